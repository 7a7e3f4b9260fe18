"""In which arithmetic a network is trained: float32, or bfloat16 with weights in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from certifl.federated.objectives import Objective
from certifl.federated.training.batches import Batch
from certifl.torch_env import exact_convolutions

TRAINING_PRECISIONS = {
    "float32": "weights, activations and gradients in float32",
    "bfloat16": "convolutions and matrix products in bfloat16; weights, their gradients, momentum "
    "and the loss stay in float32",
}


@dataclass(frozen=True)
class InBfloat16:
    """An objective whose network computes in bfloat16 (autocast) and answers in float32.

    bfloat16 has the range of float32, so losses need no scaling.

    Attributes:
        objective: what is minimised.

    Source: Micikevicius et al., Mixed Precision Training, 2018; Kalamkar et al., A Study of
    BFLOAT16 for Deep Learning Training, 2019.
    """

    objective: Objective

    name: ClassVar[str] = "bfloat16"

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's loss and logits."""
        return self.objective(_Rounding(model), batch)


class _Rounding(nn.Module):
    """A network under autocast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images).float()


# What surrounds one client's passes: a generator of its own, and exact convolutions.


@contextlib.contextmanager
def isolated_rng(device: torch.device, seed: int) -> Iterator[None]:
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
