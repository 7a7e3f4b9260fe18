"""In which arithmetic a network is trained: float32, or bfloat16 with weights in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from certifl.federated.batches import Batch
from certifl.federated.objectives import Objective

__all__ = ["TRAINING_PRECISIONS", "InBfloat16"]

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
