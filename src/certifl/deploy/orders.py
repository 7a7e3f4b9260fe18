"""Orders of the server as a client accepts them: every value of the right type and in its range.

Nothing that comes in is believed. An order is refused as a whole where one value is wrong, before
anything is read, built or computed for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from certifl.deploy.keeping import NEVER
from certifl.deploy.refusing import Refusal
from certifl.federated.states import ModelState, Parts

__all__ = ["CertifyOrder", "RoundOrder", "StudyNamed", "check_parts", "read_order", "study_named"]

_LONGEST_SPEC = 1 << 20
_ROUNDS = 1 << 40

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]


class _Order(BaseModel):
    """Values are not converted; keys that a later version adds are left unread."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class StudyNamed(_Order):
    """The study of an order.

    Attributes:
        id: its name among all studies, which is also the name of a folder. spec: as TOML.
        hash: of the spec. own_perturbation: whether clients may certify one of their own.
    """

    id: Hex
    spec: Annotated[str, Field(max_length=_LONGEST_SPEC)]
    hash: Hex
    own_perturbation: bool


class RoundOrder(_Order):
    """A round of training.

    Attributes:
        round: counted from 0. counted: the last round that the client was counted in, or `NEVER`.
        broadcast: fingerprint of the model that was sent.
    """

    round: Annotated[int, Field(ge=0, le=_ROUNDS)]
    counted: Annotated[int, Field(ge=NEVER, le=_ROUNDS)]
    broadcast: Annotated[str, Field(max_length=128)]


class CertifyOrder(RoundOrder):
    """A piece of certification.

    Attributes:
        piece: seconds after which votes are saved and an answer is sent.
        share: the most that is asked for.
    """

    piece: Annotated[float, Field(gt=0)]
    share: Literal["none", "curve", "rows"]


Read = TypeVar("Read", bound=_Order)


def read_order(kind: type[Read], facts: Mapping[str, Any]) -> Read:
    """An order with all its values checked.

    Raises:
        Refusal: a value is missing, of another type, or out of its range.
    """
    try:
        return kind.model_validate(dict(facts))
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise Refusal(f"the order is not one of this version's: {wrong} is wrong") from error


def study_named(facts: Mapping[str, Any]) -> StudyNamed:
    """The study that an order names.

    Raises:
        Refusal: it names none.
    """
    asked = facts.get("study")
    if not isinstance(asked, dict):
        raise Refusal("the order names no study")
    return read_order(StudyNamed, asked)


def check_parts(parts: Parts, network: ModelState, clients: int) -> None:
    """Refuse tensors that cannot belong to the study.

    Args:
        parts: as they were sent. network: entries of the study's network.
        clients: how many the study has.

    Raises:
        Refusal: the model has other entries, shapes or types than the network, or something that
            comes with it has another shape.
    """
    model = parts.get("model")
    if model is None or {n: _kind(v) for n, v in model.items()} != {
        n: _kind(v) for n, v in network.items()
    }:
        raise Refusal("the model that was sent does not fit the study's network")
    for part, tensors in parts.items():
        if part != "model" and not all(_fits(n, v, network, clients) for n, v in tensors.items()):
            raise Refusal("what was sent with the model does not fit the study's network")


def _kind(value: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def _fits(name: str, value: torch.Tensor, network: ModelState, clients: int) -> bool:
    """Whether a tensor has the shape of the entry it is named after, or lists clients."""
    if name in network:
        return value.shape == network[name].shape
    return value.ndim == 1 and math.prod(value.shape) <= clients
