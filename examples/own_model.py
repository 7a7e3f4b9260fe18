"""Your own network in a study: `examples/own_model.toml` names it as `own_model:network`.

certifl calls the function with the channels of the images and the number of classes; further
arguments come from `[model] options` in the spec. Images arrive in [0, 1], so the
network normalizes them itself, and returns logits. In evaluation mode the logits of an image must
not depend on the other images of its batch, nor on chance.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["network"]


class Normalized(nn.Module):
    """Centers and scales intensities of [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5) / 0.25


def network(in_channels: int, num_classes: int, width: int = 24) -> nn.Module:
    """Two convolutions and one linear layer, for images of any size from 8 x 8."""
    return nn.Sequential(
        Normalized(),
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * width * 16, num_classes),
    )
