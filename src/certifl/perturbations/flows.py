"""Deformations with a separate displacement for every pixel: smooth and dense flows.

Source: Alfarra et al. 2022 (DeformRS); conventions as in `deformations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certifl.perturbations.base import check_image_shape
from certifl.perturbations.deformations import Deformation
from certifl.registry import check_number
from certifl.smoothing.laws import GAUSSIAN

if TYPE_CHECKING:
    from torch import Tensor

    from certifl.perturbations.warp import Grid


@dataclass(frozen=True)
class SmoothFlow(Deformation):
    """A smooth displacement field: a sum of k x k cosines (DCT-II, not normalized), Gaussian.

    At row i and column j, for either component, in half-widths:
    nu(i, j) = sum over a, b < k of phi[a, b] cos(pi a (2i + 1) / (2h)) cos(pi b (2j + 1) / (2w)).
    With k = 1 this is translation.

    Attributes:
        sigma: standard deviation of each coefficient.
        bases: k, cosines per axis.
        padding, geometry: as in `Deformation`.

    Raises:
        InputError: as `Deformation`. SpecError: `bases` is not a whole number from 1.
    """

    bases: int = 2

    family = "smooth_flow"
    law = GAUSSIAN
    unit = "coefficients"
    certified = (
        "Displacement fields made of the lowest cosines, whose coefficients have an l2 length of "
        "at most the radius."
    )

    def check(self) -> None:
        """At least one cosine an axis."""
        check_number("bases", self.bases, "a whole number from 1", low=1, whole=True)

    @property
    def dim(self) -> int | None:
        """2 k^2 coefficients."""
        return 2 * self.bases**2

    def params_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(2, k, k): component (across, down), vertical frequency a, horizontal frequency b."""
        check_image_shape(image_shape)
        return (2, self.bases, self.bases)

    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Coordinates displaced by the field.

        Summed term by term, not as a matrix product: the result for one parameter set must not
        depend on how many others stand in the batch.
        """
        across = _cosines(self.bases, grid.columns.numel(), params)
        down = _cosines(self.bases, grid.rows.numel(), params)
        coefficients = params[..., None]
        waves = coefficients[:, :, :, 0] * across[0]
        for b in range(1, self.bases):
            waves = waves + coefficients[:, :, :, b] * across[b]
        field = waves[:, :, 0, None, :] * down[0][:, None]
        for a in range(1, self.bases):
            field = field + waves[:, :, a, None, :] * down[a][:, None]
        return grid.columns + field[:, 0] * grid.half_width, grid.rows + field[
            :, 1
        ] * grid.half_height


@dataclass(frozen=True)
class DenseFlow(Deformation):
    """An independent displacement (u, v) for every pixel: nu(i, j) = phi[:, i, j], Gaussian.

    Attributes:
        sigma: standard deviation of each component of each pixel, half-widths.
        padding, geometry: as in `Deformation`.
    """

    family = "dense_flow"
    law = GAUSSIAN
    unit = "half-widths"
    count = None
    certified = (
        "Displacement fields with any (u, v) at any pixel, whose l2 length over all pixels "
        "together is at most the radius, in half-widths."
    )

    def params_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(2, h, w): component (across, down), row, column."""
        return (2, *check_image_shape(image_shape)[1:])

    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Coordinates displaced pixel by pixel."""
        u, v = params.unbind(1)
        return grid.columns + u * grid.half_width, grid.rows + v * grid.half_height


def _cosines(count: int, size: int, like: Tensor) -> Tensor:
    """cos(pi a (2i + 1) / (2 size)) for a < count, i < size; shape (count, size)."""
    import torch

    centres = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    order = torch.arange(count, dtype=like.dtype, device=like.device)
    return torch.cos(order[:, None] * centres * (math.pi / size))
