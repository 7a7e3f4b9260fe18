"""Convolutions on a GPU held to algorithms that give the same bits every time.

cuDNN offers several algorithms for a convolution. Some add in an order that differs from call to
call, and its benchmark chooses between them by time, so that two runs may take different ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["exact_convolutions"]


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
