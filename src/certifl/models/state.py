"""A model's state: what is averaged, stored and named in a record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "state_of"]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as detached copies on the CPU, by name."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of a state, in the order of names.

    Equal for a model and for its stored state; independent of device and memory layout.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
