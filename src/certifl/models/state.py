"""A model's state: what is averaged, stored and named in a record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

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
        if not isinstance(
            state[name], Tensor
        ):  # extra state of a layer, weights of a quantized one
            digest.update(f"{name}\x1f{_in_words(state[name])}\x1e".encode())
            continue
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _in_words(value: Any) -> str:
    """A text that is equal for equal values; addresses in memory are left out."""
    if isinstance(value, Tensor):
        plain = value.dequantize() if value.is_quantized else value
        return fingerprint({"": plain})
    if isinstance(value, (tuple, list)):
        return ",".join(_in_words(part) for part in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_in_words(part)}" for key, part in value.items())
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
