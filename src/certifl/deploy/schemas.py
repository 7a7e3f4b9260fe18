"""What each message of a federation may contain: one schema per message, for both directions.

The receiver of a message checks it here before using it. A schema bounds every type, size and
range; keys that it does not name are ignored. Numbers that the receiver knows (which client, which
round) are compared with its own records afterwards.

| message | schema |
|---|---|
| any | `Envelope` |
| request to join, to train a round, to certify | `JoinRequest`, `RoundRequest`, `CertifyRequest` |
| any answer | `Reply` |
| answer to join | `Joined` |
| answer to a round | `Trained` |
| answer to certify | `Certified` |
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from certifl.errors import CertiflError, WorkError, one_line


class MalformedMessage(WorkError):
    """A message that is not one of certifl's, is damaged, or claims the impossible."""

    def __init__(self, why: object) -> None:
        super().__init__(one_line(why, 500))


class Rejected(CertiflError):
    """A request that a client refuses; the server gets its text, which holds nothing private."""


class _Message(BaseModel):
    """Strict types, nothing infinite, frozen; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


def _plain_text(value: str) -> str:
    """Refuse characters that no name has: controls, surrogates, line separators."""
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError("it has a character that cannot be printed")
    return value


def _distinct(value: list[str]) -> list[str]:
    if len(set(value)) < len(value):
        raise ValueError("a name appears twice")
    return value


_MOST_IMAGES = 10**8
_Number = Annotated[int, Field(ge=0, lt=10**6)]
_Count = Annotated[int, Field(ge=0, le=_MOST_IMAGES)]
_Votes = Annotated[int, Field(ge=0, le=10**17)]
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{1,128}$")]
_Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain_text)]
_Side = Annotated[int, Field(ge=1, le=2**14)]
_Share = Literal["none", "curve", "rows"]
_Seconds = Annotated[float, Field(ge=0, le=1e9)]
_Metric = Annotated[float, Field(ge=-1e30, le=1e30)]
_Share01 = Annotated[float, Field(ge=0, le=1)]
_Any = Annotated[float, Field(allow_inf_nan=True)]


class Envelope(_Message):
    """What every message is: its format, the names of its parts, its fields."""

    format: int
    parts: Annotated[
        list[Annotated[str, Field(max_length=200)]],
        Field(max_length=32),
        AfterValidator(_distinct),
    ]
    facts: dict[str, Any]


class StudyReference(_Message):
    """What a request says of the study.

    Attributes:
        id: of the run on the server. spec: its text. hash: of the spec.
        own_perturbation: whether clients may certify their own perturbation.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    spec: Annotated[str, Field(max_length=1 << 18)]
    hash: _Hex
    own_perturbation: bool


class JoinRequest(_Message):
    """Report the client's properties."""

    order: Literal["join"]
    study: StudyReference


class _WorkRequest(_Message):
    """Work on the parts of the message.

    Attributes:
        round: from 0. counted: the round after which the client was counted last; -1 = never.
        broadcast: fingerprint of the parts.
    """

    study: StudyReference
    client: _Number
    round: _Number
    counted: Annotated[int, Field(ge=-1, lt=10**6)]
    broadcast: _Hex


class RoundRequest(_WorkRequest):
    """Train one round."""

    order: Literal["round"]


class CertifyRequest(_WorkRequest):
    """Certify for some seconds (`piece`), and share at most so much."""

    order: Literal["certify"]
    piece: Annotated[float, Field(gt=0, le=1e6)]
    share: _Share


class Joined(_Message):
    """A client's properties.

    Attributes:
        client: its number, as reported.
        in_channels, image_size, class_names: of its images.
        train_images: how many it trains on. test_images: how many it certifies, if reported.
        initial_model: fingerprint of the study's initial network.
        name, fingerprint: of a data set that all clients have, whose images the study allocates.
        versions: of certifl and torch.
    """

    client: _Number
    in_channels: Annotated[int, Field(ge=1, le=1024)]
    image_size: Annotated[list[_Side], Field(min_length=2, max_length=2)]
    class_names: Annotated[
        list[_Name], Field(min_length=1, max_length=1 << 15), AfterValidator(_distinct)
    ]
    train_images: _Count
    test_images: _Count | None = None
    initial_model: _Hex
    name: _Name | None = None
    fingerprint: _Name | None = None
    versions: Annotated[dict[_Name, _Name], Field(max_length=16)] = Field(default_factory=dict)


class Metrics(_Message):
    """What a client measured in a round: the metrics of all algorithms, and no others."""

    model_config = ConfigDict(extra="forbid")

    loss: _Metric | None = None
    accuracy: _Share01 | None = None
    global_loss: _Metric | None = None
    global_accuracy: _Share01 | None = None
    alpha: _Share01 | None = None
    private_steps: Annotated[int, Field(ge=0, le=10**9)] | None = None


class _Update(_Message):
    client: _Number
    weight: Annotated[float, Field(ge=0, le=_MOST_IMAGES)]
    model: bool
    metrics: Metrics


class Trained(_Message):
    """The answer to a round; its tensors are in the message's parts."""

    update: _Update


class Curve(_Message):
    """Certified images at each radius; whether the numbers are possible is checked elsewhere."""

    radii: Annotated[list[_Any], Field(min_length=1, max_length=10_000)]
    correct: Annotated[
        list[Annotated[int, Field(ge=-_MOST_IMAGES, le=_MOST_IMAGES)]],
        Field(min_length=1, max_length=10_000),
    ]
    images: Annotated[int, Field(ge=0, le=_MOST_IMAGES)]
    acr: _Any
    conditions: Annotated[dict[_Name, Any], Field(max_length=64)]


class Plain(_Message):
    """Accuracy of a client that certifies nothing."""

    images: Annotated[int, Field(ge=1, le=_MOST_IMAGES)]
    correct: _Count


class Certified(_Message):
    """Progress of a client's certification, and at the end what it shares.

    Attributes:
        share: disclosure level.
        model: fingerprint of what it certified; absent where the model is the client's own and
            the server gets no rows, since it would only name a model that stays on the client.
        done: whether this is the end.
        cast, at_most: votes so far, in tenths, and at most; absent where it shares nothing.
    """

    share: _Share
    model: _Hex | None = None
    done: bool
    cast: _Votes | None = None
    at_most: _Votes | None = None
    plain: Plain | None = None
    curve: Curve | None = None


class _Fault(_Message):
    kind: Annotated[str, Field(max_length=40)]
    reason: Annotated[str, Field(max_length=10_000)]


class Reply(_Message):
    """Fields of every answer: which client, how long it took, what failed.

    Attributes:
        round, started_from: of an answer to a round.
    """

    client: _Number
    seconds: _Seconds = 0.0
    fault: _Fault | None = None
    round: _Number | None = None
    started_from: _Hex | None = None


_Schema = TypeVar("_Schema", bound=BaseModel)


def checked(schema: type[_Schema], fields: object, what: str) -> _Schema:
    """A message's fields, checked by its schema; MalformedMessage names the first error.

    `what` describes the message in the error, to follow "it is".
    """
    if not isinstance(fields, Mapping):
        raise MalformedMessage(f"it is {what}")
    try:
        return schema.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = one_line(".".join(map(str, first["loc"])), 80)
        raise MalformedMessage(f"it is {what}: {where}: {one_line(first['msg'], 160)}") from error
