"""Photometric perturbations: brightness, contrast and Gaussian blur.

Lamps, scanners and focus differ in these. In each family T_a(T_b(x)) = T_{a + b}(x) in real
numbers, so noise that is added to the parameter is noise added to the image as received: a
certificate also holds for images that ARRIVE changed. What the sender does besides, rounding to 8
bits and clipping to [0, 1], is not covered; `certifl attack` measures it.

Source: Li et al. 2021, TSS (resolvable transformations).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from certifl.errors import InputError
from certifl.perturbations.base import Sweep, check_image_shape, draw, image_shape_of, matched
from certifl.perturbations.units import LOG_FACTOR, VARIANCE, parse_sigma, warn_beyond
from certifl.smoothing.laws import EXPONENTIAL, GAUSSIAN, Law

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEVELS = 255.0
_LEAST_EXACT = 0.25 / _LEVELS
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
        sigma: standard deviation, intensity in [0, 1] (InputError where not positive).
        exact: noise on the 8-bit grid.
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
        if self.exact and self.sigma < _LEAST_EXACT:
            raise InputError(
                f"sigma = {given!r} is below a quarter of one of the 255 steps of 8 bits, so "
                f"almost all noise would be rounded to 0: give {_LEAST_EXACT:.1g} or more, or "
                "exact = false."
            )

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


_RECEIVED = (
    "Changes of this kind add up, so a system that receives the changed image is covered, up to "
    "what the sender does besides: rounding to 8 bits and clipping to [0, 1] are not covered."
)
_GRAY = 0.5


@dataclass(frozen=True)
class Photometric(ABC):
    """A change of intensities by one number. Families fill in their constants and `changed`.

    Results are not clipped to [0, 1].

    Attributes:
        sigma: scale of the distribution in the family's unit, up to `most` (else InputError).
    """

    sigma: float

    # Constants of a family, filled in by each class; no settings, so not part of the record.
    family: str = field(init=False, repr=False, compare=False)
    law: Law = field(init=False, repr=False, compare=False)
    unit: str = field(init=False, repr=False, compare=False)
    certified: str = field(init=False, repr=False, compare=False)  # begins `threat`
    # The largest sigma that passes without a warning, what a larger one does, and the largest.
    usual: float = field(init=False, repr=False, compare=False)
    beyond: str = field(init=False, repr=False, compare=False)
    most: float = field(init=False, repr=False, compare=False, default=math.inf)

    received = True
    dim = 1

    def __post_init__(self) -> None:
        given = self.sigma
        object.__setattr__(self, "sigma", parse_sigma(given, self.unit))
        if self.sigma > self.most:
            raise InputError(
                f"sigma = {self.sigma:g} {self.unit} is more than {self.most:g}: {self.beyond}"
            )
        warn_beyond(given, self.sigma, self.usual, self.unit, self.beyond)

    @property
    def norm(self) -> str:
        """The norm of the law."""
        return self.law.norm

    @property
    def threat(self) -> str:
        """What a certificate covers and what it does not."""
        return f"{self.certified} {_RECEIVED}"

    def params_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """One parameter for an image of shape (c, h, w)."""
        check_image_shape(image_shape)
        return (1,)

    def sample(
        self, n: int, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw n parameters, float32 (n, 1); see `Perturbation.sample`."""
        return draw(self.law, self.sigma, (n, *self.params_shape(image_shape)), generator)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        """Change the images (m, c, h, w); see `Perturbation.apply`."""
        image_shape_of(images)
        images, params = matched(images, params, (1,))
        return self.changed(images, params[:, :, None, None])

    @abstractmethod
    def changed(self, images: Tensor, amount: Tensor) -> Tensor:
        """The images (m, c, h, w) changed by amounts (m, 1, 1, 1), either broadcast."""


@dataclass(frozen=True)
class Brightness(Photometric):
    """All intensities shifted alike: T_b(x) = x + b, Gaussian.

    Attributes:
        sigma: standard deviation of b, intensity in [0, 1].
    """

    family = "brightness"
    law = GAUSSIAN
    unit = "intensity"
    certified = "The image with one number of at most the radius added to all its intensities."
    promise = "for every change of brightness by at most the radius, brighter or darker"
    usual = 1.0
    beyond = (
        "intensities lie between 0 and 1, so this is from black to white. A sigma on the scale of "
        "0 to 255 is divided by 255."
    )

    def changed(self, images: Tensor, amount: Tensor) -> Tensor:
        """Shifted intensities."""
        return images + amount

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """From black to white at most."""
        words = "made brighter or darker"
        return (Sweep("brightness", words, "brighter", "darker", 0, min(reach, 1.0)),)


@dataclass(frozen=True)
class Contrast(Photometric):
    """Intensities scaled about middle gray: T_k(x) = e^k (x - 1/2) + 1/2, Gaussian in k.

    The parameter k is the logarithm of the factor, so that factors multiply where parameters add;
    a radius R covers the factors e^-R to e^R. Brightness and contrast together do not commute:
    neither certificate covers both.

    Attributes:
        sigma: standard deviation of k; 0.1 is about 10 % of contrast.
    """

    family = "contrast"
    law = GAUSSIAN
    unit = LOG_FACTOR
    certified = (
        "The image with its contrast about middle gray (0.5) multiplied by one factor between "
        "e^-R and e^R, R the radius."
    )
    promise = "for every contrast factor from e^-R to e^R, R the radius"
    usual = 2.0
    beyond = "it is the logarithm of a factor, and 2 stands for 7 times the contrast or a seventh."
    most = 10.0  # beyond it, factors of draws overflow float32

    def changed(self, images: Tensor, amount: Tensor) -> Tensor:
        """Moved by (e^k - 1) (x - 1/2), which is 0 at k = 0."""
        return images + amount.expm1() * (images - _GRAY)

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """Up to 20 times the contrast."""
        words = "given more or less contrast"
        return (Sweep("contrast", words, "more", "less", 0, min(reach, 3.0)),)


@dataclass(frozen=True)
class GaussianBlur(Photometric):
    """Blur by a Gaussian of variance v: T_v(x) = x + IDCT((exp(-v w^2 / 2) - 1) DCT(x)), v >= 0.

    w is the frequency in radians a pixel, and w^2 the sum of both axes'; the image is
    continued by reflection at its border (DCT-II). At v = 0 the image comes back exactly, and
    variances add: T_a(T_b(x)) = T_{a + b}(x).

    The distribution is exponential and one-sided: certificates cover ADDED variances from 0 to the
    radius. An image is never certified against being sharpened.

    Attributes:
        sigma: mean added variance, px^2; 4 is a blur with a standard deviation of about 2 pixels.
    """

    family = "gaussian_blur"
    law = EXPONENTIAL
    unit = VARIANCE
    certified = (
        "The image blurred by a Gaussian whose variance is between 0 and the radius, in px^2 "
        "(the square of its standard deviation in pixels), mirrored at the border."
    )
    promise = "for every Gaussian blur that adds a variance from 0 to the radius"
    radius_note = ", added variance from 0,"
    usual = 100.0
    beyond = (
        "this is a variance in square pixels, the square of a standard deviation of 10 pixels and "
        "more; most images lose everything in such a blur."
    )

    def changed(self, images: Tensor, amount: Tensor) -> Tensor:
        """Blurred images; InputError for a variance below 0."""
        if bool((amount < 0).any()):
            raise InputError(
                "A Gaussian blur has a variance of at least 0; certificates of this family are "
                "one-sided, so give parameters from 0."
            )
        m, channels, height, width = images.shape
        # In float64, because products of float32 may be formed in TF32 or bfloat16.
        wide = images if images.device.type == "mps" else images.double()
        down, across = _cosines(height, wide), _cosines(width, wide)
        squared = _frequencies(height, wide).square()[:, None] + _frequencies(width, wide).square()
        lost = (amount.to(wide) * (-0.5 * squared)).expm1()
        spectrum = _product(down, wide.flatten(0, 1), across.T).unflatten(0, (m, channels)) * lost
        change = _product(down.T, spectrum.flatten(0, 1), across)
        return images + change.unflatten(0, (-1, channels)).to(images)

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """More blur only."""
        words = "blurred, with added variance from 0"
        return (Sweep("blur", words, "more blur", "", 0, reach),)


def _cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II as a matrix (frequency, position)."""
    import torch

    centers = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    rows = (_frequencies(size, like)[:, None] * centers).cos() * math.sqrt(2.0 / size)
    rows[0] *= math.sqrt(0.5)
    return rows


def _frequencies(size: int, like: Tensor) -> Tensor:
    """Frequencies of the cosines in radians a pixel."""
    import torch

    return torch.arange(size, dtype=like.dtype, device=like.device) * (math.pi / size)


def _product(left: Tensor, images: Tensor, right: Tensor) -> Tensor:
    """The products left @ image @ right of images (k, h, w), each by itself."""
    k = len(images)
    return left.expand(k, *left.shape).bmm(images).bmm(right.expand(k, *right.shape))
