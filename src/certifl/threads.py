"""How many threads torch computes with: one for small networks, unless more are asked for.

A call of a small network takes a millisecond or less. On a machine with other work, threads that
wait for each other at every call cost many times what they gain.

More are asked for by `OMP_NUM_THREADS` (or `MKL_NUM_THREADS`) above 1, or by `threads_asked`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

__all__ = ["is_small", "one_thread", "threads_asked", "threads_in_use"]

_SMALL_NETWORK = 1_000_000
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_asked: ContextVar[bool] = ContextVar("asked", default=False)


def is_small(model: nn.Module) -> bool:
    """Whether a network has so few weights that several threads do not pay."""
    return sum(p.numel() for p in model.parameters()) < _SMALL_NETWORK


def threads_in_use(small: bool) -> int:
    """The threads that votes of a network are cast with."""
    several_asked = _asked.get() or any(
        count.isdigit() and int(count) > 1 for count in map(os.environ.get, _VARIABLES) if count
    )
    return 1 if small and not several_asked else torch.get_num_threads()


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Compute on one thread where that is wanted; afterwards on as many as before."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def threads_asked(count: int) -> Iterator[None]:
    """Compute on so many threads, small networks too; 0 leaves the choice to each network."""
    before, token = torch.get_num_threads(), _asked.set(count > 0)
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _asked.reset(token)
