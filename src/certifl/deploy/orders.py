"""Whether tensors that the server sent can belong to a study."""

from __future__ import annotations

import math

import torch

from certifl.deploy.refusing import Refusal
from certifl.federated.states import ModelState, Parts


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
