"""Arithmetic on lists of tensors: one kernel launch on a GPU, as in torch.optim.SGD.

The results are the same bits as tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# torch has no public name for operations on lists. They refuse empty ones.
_lists: Any = torch


def scale(values: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply every value by factor, in place."""
    if values:
        _lists._foreach_mul_(values, factor)


def add(values: Sequence[torch.Tensor], others: Sequence[torch.Tensor], factor: float = 1) -> None:
    """Add factor times other to every value, in place."""
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


def copy(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy every value into its target."""
    if targets:
        _lists._foreach_copy_(targets, values)
