"""Convolutions on a GPU held to algorithms that give the same bits every time.

cuDNN offers several algorithms for a convolution. Some add in an order that differs from call to
call, and its benchmark chooses between them by time, so that two runs may take different ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from multiprocessing.connection import wait

import torch
from torch import nn


@contextlib.contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """Within this context, cuDNN takes deterministic algorithms, chosen without timing them.

    Only these two settings are touched, and afterwards they are what they were. `cudnn.flags`
    reads and sets TF32 along with them, which torch refuses once a program has chosen it by
    `fp32_precision`. On other devices than CUDA nothing is done.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Within this context, `torch.autocast` of a calling program rounds nothing."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


# How many threads torch computes with: one for small networks, unless more are asked for.
#
# A call of a small network takes a millisecond or less. On a machine with other work, threads that
# wait for each other at every call cost many times what they gain.
#
# More are requested by `OMP_NUM_THREADS` (or `MKL_NUM_THREADS`) above 1, or `requested_threads`.


# How torch and its libraries say that memory ran out, where they raise no type of their own.
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "unable to find an engine",  # cuDNN, where no engine fits into the free memory
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


_SMALL_NETWORK = 1_000_000
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_requested: ContextVar[bool] = ContextVar("requested", default=False)


def is_small(model: nn.Module) -> bool:
    """Whether a network has so few weights that several threads do not pay."""
    return sum(p.numel() for p in model.parameters()) < _SMALL_NETWORK


def threads_in_use(small: bool) -> int:
    """The threads that votes of a network are cast with."""
    return 1 if small and not several_threads_requested() else torch.get_num_threads()


def several_threads_requested() -> bool:
    """Whether several threads were asked for, so that no network may choose fewer."""
    return _requested.get() or any(
        count.isdigit() and int(count) > 1 for count in map(os.environ.get, _VARIABLES) if count
    )


@contextlib.contextmanager
def one_thread(enabled: bool) -> Iterator[None]:
    """Compute on one thread if enabled; afterwards on as many as before."""
    before = torch.get_num_threads()
    if enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def requested_threads(count: int) -> Iterator[None]:
    """Compute on so many threads, small networks too; 0 leaves the choice to each network."""
    before, token = torch.get_num_threads(), _requested.set(count > 0)
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _requested.reset(token)


# Memory of the C library's allocator.

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _LARGEST_KEPT = 128 << 20, 32 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep up to 128 MB that it freed; on Linux with glibc, else nothing.

    A batch of votes allocates and frees a few megabytes many times. By default they go back to the
    system, and every page is fetched anew: 14 page faults a vote, up to a third of the time of a
    small network. Settings of the user (variables `MALLOC_...`) are left as they are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


# Processes beside the one that was asked.


def follow_parent() -> None:
    """In a process started by multiprocessing: Ctrl-C is left to the parent, and so is life.

    Ctrl-C reaches all processes of a terminal; the one that asked decides what follows. Should the
    parent be killed, this process ends at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
