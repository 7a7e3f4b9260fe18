"""Classifiers whose smoothed probabilities and true radii are known in closed form."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE = 16


class HalfSpace(nn.Module):
    """Class 1 where w.x + b > 0: the true l2 radius of g at x is |w.x + b| / ||w||."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.reshape(-1)), bias

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight + self.bias
        return torch.stack([-score, score], dim=1)

    def true_radius(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            score = images.flatten(1).double() @ self.weight.double() + self.bias
            return score.abs() / self.weight.double().norm()


def ramps() -> Tensor:
    """One image (1, 3, 16, 16): ramps along x and along y, between which a warp can be read off.

    Bilinear interpolation keeps a ramp exact inside, so central differences at the middle give the
    matrix of an affine warp and the middle value gives its shift.
    """
    line = (torch.arange(SIDE) + 0.5) / SIDE
    x = line.expand(SIDE, SIDE)
    return torch.stack([x, x.T, torch.zeros_like(x)])[None]


def read_angle(images: Tensor) -> Tensor:
    """Angle in radians by which `ramps()` was rotated (paper 3.2: u = x(cos b - 1) - y sin b)."""
    middle = SIDE // 2
    along_x = images[:, 0, middle, middle] - images[:, 0, middle, middle - 1]
    along_y = images[:, 1, middle, middle] - images[:, 1, middle, middle - 1]
    return torch.atan2(along_y, along_x)


def read_factor(images: Tensor) -> Tensor:
    """Scaling parameter (factor - 1) by which the sampling grid of `ramps()` was stretched."""
    middle = SIDE // 2
    return (images[:, 0, middle, middle] - images[:, 0, middle, middle - 1]) * SIDE - 1


def read_shift(images: Tensor) -> Tensor:
    """(m, 2) translation in half-widths by which `ramps()` was shifted."""
    middle = images[:, :2, SIDE // 2 - 1 : SIDE // 2 + 1, SIDE // 2 - 1 : SIDE // 2 + 1]
    return (middle.mean(dim=(2, 3)) - 0.5) * 2


def votes_for(inside: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A classifier of three classes that answers 1 where `inside` holds and 0 elsewhere."""

    def logits(images: Tensor) -> Tensor:
        hit = inside(images).float()
        return torch.stack([1 - hit, hit, torch.full_like(hit, -1.0)], dim=1)

    return logits


def normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))
