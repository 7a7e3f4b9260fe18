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
        sigma: scale of the distribution in the family's unit.

    Raises:
        InputError: sigma is not a positive amount in the family's unit, or above `most`.
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
        """Blurred images.

        Raises:
            InputError: a variance below 0.
        """
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

    centres = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    rows = (_frequencies(size, like)[:, None] * centres).cos() * math.sqrt(2.0 / size)
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
