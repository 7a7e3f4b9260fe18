"""Pixel noise: the original randomized smoothing.

Source: Cohen, Rosenfeld and Kolter 2019; the paper, Eq. (1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from certifl.perturbations.base import Sweep, check_image_shape, draw, image_shape_of, matched
from certifl.perturbations.units import parse_sigma, warn_beyond
from certifl.smoothing.laws import GAUSSIAN

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEVELS = 255.0
_LARGEST_USUAL = 2.0


@dataclass(frozen=True)
class PixelNoise:
    """Gaussian noise added to every intensity, before the network normalizes: T_phi(x) = x + phi.

    One parameter per pixel and channel; results are not clipped to [0, 1].

    With `exact`, noise lies on the grid of 8-bit intensities (multiples of 1/255) and the sum is
    formed there: (round(255 x) + k) / 255. For an 8-bit image x the voted image is then a function
    of the integers 255 x + k alone, and round(255 x + noise) = 255 x + round(noise), so the
    certificate holds for every 8-bit image with no floating-point gap. Other images are rounded to
    8 bits first. The noise is drawn in float64 before it is rounded to the grid: a float32 normal
    number ends at 5.77 sigma, which an image of 150 000 numbers would notice.

    Attributes:
        sigma: standard deviation, intensity in [0, 1].
        exact: noise on the 8-bit grid.

    Raises:
        InputError: sigma is not a positive number.
    """

    sigma: float
    exact: bool = False

    family = "pixel"
    law = GAUSSIAN
    unit = "intensity"
    dim = None
    additive = True
    received = True
    promise = "for every change of the pixel intensities whose {norm} norm is at most the radius"
    sweep_note = (
        "A certificate covers every change of at most its length, the worst included. The two "
        "changes shown here are not attacks, so the class often stays the same far beyond the "
        "radius. Pictures are clipped to black and white; the network sees unclipped intensities."
    )

    def __post_init__(self) -> None:
        given = self.sigma
        object.__setattr__(self, "sigma", parse_sigma(given, self.unit))
        meaning = (
            "intensities lie between 0 and 1, so the image is lost in such noise. A sigma on the "
            f"scale of 0 to 255 is divided by 255: {self.sigma / _LEVELS:.3g}."
        )
        warn_beyond(given, self.sigma, _LARGEST_USUAL, self.unit, meaning)
        object.__setattr__(self, "exact", bool(self.exact))

    @property
    def norm(self) -> str:
        """The norm of the law."""
        return self.law.norm

    @property
    def threat(self) -> str:
        """What a certificate covers."""
        reach = "Every 8-bit image" if self.exact else "Every image"
        gap = (
            "Voted images are functions of integers, so rounding opens no gap."
            if self.exact
            else "The noise is meant in real numbers; float32 rounding of the sum is not covered."
        )
        return (
            f"{reach} whose intensities differ from this one's by at most the radius in l2, over "
            "all pixels and channels together. The smoothed classifier votes around the image as "
            f"received, so a system that is handed the changed image is covered. {gap}"
        )

    def params_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """One parameter per pixel and channel: (c, h, w)."""
        return check_image_shape(image_shape)

    def sample(
        self, n: int, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw n noise images, (n, c, h, w) float32, as intensities; see `Perturbation.sample`."""
        shape = (n, *self.params_shape(image_shape))
        if not self.exact:
            return draw(self.law, self.sigma, shape, generator)
        noise = draw(self.law, self.sigma, shape, generator, double=True)
        return _from_levels(_to_levels(noise).float())

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        """Add the noise; see `Perturbation.apply`."""
        images, params = matched(images, params, image_shape_of(images))
        if self.exact:
            return _from_levels(_to_levels(images) + _to_levels(params))
        return images + params

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """One noise image, and the way to another picture."""
        noise = "with one drawn noise image added or taken away"
        return (
            Sweep("noise", noise, "added", "taken away", None, reach),
            Sweep("towards", "blended into another picture", "of the way there", "", None, None),
        )


def _to_levels(intensities: Tensor) -> Tensor:
    return (intensities * _LEVELS).round_()


def _from_levels(levels: Tensor) -> Tensor:
    import torch

    # A divisor on the device: GPUs turn division by a host number into a product with its rounded
    # reciprocal, which is not k / 255.
    return levels / torch.full((), _LEVELS, dtype=levels.dtype, device=levels.device)
