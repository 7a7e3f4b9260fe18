"""Arithmetic on many tensors at once: on a GPU one launch for all, as in torch.optim.SGD there.

Every tensor gets the operations that it would get alone, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# torch has no public name for operations on lists. They refuse empty ones.
_lists: Any = torch


def scale(values: Sequence[torch.Tensor], factor: float) -> None:
    """Every value becomes factor times itself, in place."""
    if values:
        _lists._foreach_mul_(values, factor)


def add(values: Sequence[torch.Tensor], others: Sequence[torch.Tensor], factor: float = 1) -> None:
    """Every value becomes value + factor times other, in place."""
    if values:
        _lists._foreach_add_(values, others, alpha=factor)


def sums(
    values: Sequence[torch.Tensor], others: Sequence[torch.Tensor], factor: float = 1
) -> list[torch.Tensor]:
    """Of each pair: value + factor times other."""
    return list(_lists._foreach_add(values, others, alpha=factor)) if values else []


def differences(
    values: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Of each pair: value - other."""
    return list(_lists._foreach_sub(values, others)) if values else []


def copy(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Every value is put where its place is."""
    if places:
        _lists._foreach_copy_(places, values)
