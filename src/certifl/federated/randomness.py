"""What surrounds one client's passes: a generator of its own, and exact convolutions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from certifl.convolutions import exact_convolutions

__all__ = ["own_randomness"]


@contextlib.contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Lets modules that draw from the global generator (dropout) draw from a derived one.

    On CUDA, convolutions are held to their deterministic algorithms meanwhile, so that a resumed
    run repeats the interrupted one.
    """
    cuda = device.type == "cuda"
    index = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    with torch.random.fork_rng(devices=index), exact_convolutions(device):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(index[0]):
                torch.cuda.manual_seed(seed)
        yield
