"""Deformations that move every pixel by one formula: translation, rotation, scaling, affine.

Convention (see `warp`): x to the right, y downwards, relative to the image center; the output at p
takes the input at p + nu_phi(p). One half-width is w / 2 pixels for x and h / 2 pixels for y.

Source: the paper, Eq. (3) and section 3.2; Alfarra et al. 2022 (DeformRS).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from certifl.errors import InputError
from certifl.perturbations.base import (
    Geometry,
    Padding,
    Sweep,
    check_image_shape,
    draw,
    image_shape_of,
    matched,
)
from certifl.perturbations.units import parse_sigma, warn_beyond
from certifl.registry import check_choice, check_number
from certifl.smoothing.laws import GAUSSIAN, UNIFORM, Law

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from certifl.perturbations.warp import Grid

_ONE_INTERPOLATION = (
    "The certificate is in parameter space: it promises the smoothed classifier of ONE "
    "interpolation of the pristine image with the summed parameters. A system that receives an "
    "already deformed image interpolates twice, which this does not cover{}."
)
_LEAVES = (
    "the image leaves the frame in many draws. 1 is a shift by half the image; a shift by k "
    "pixels of w is 2 k / w."
)


@dataclass(frozen=True)
class Deformation(ABC):
    """A perturbation that moves pixels. Families fill in their constants and `sources`.

    Attributes:
        sigma: scale of the law in the family's unit.
        padding: what lies outside the image: "zeros" (the paper), "border" or "reflection".
        geometry: "centre", or "deformrs" to reproduce published curves; see `warp`.

    Raises:
        InputError: sigma is not a positive amount in the family's unit.
        SpecError: an unknown padding or geometry.
    """

    sigma: float
    padding: str = "zeros"
    geometry: str = "centre"

    # Constants of a family, filled in by each class; no settings, so not part of the record.
    family: str = field(init=False, repr=False, compare=False)
    law: Law = field(init=False, repr=False, compare=False)
    unit: str = field(init=False, repr=False, compare=False)
    count: int | None = field(
        init=False, repr=False, compare=False
    )  # of parameters; None = varies
    certified: str = field(init=False, repr=False, compare=False)  # begins `threat`
    exception: str = field(init=False, repr=False, compare=False, default="")
    # The largest sigma that passes without a warning, and what a larger one does.
    usual: float = field(init=False, repr=False, compare=False, default=1.0)
    beyond: str = field(init=False, repr=False, compare=False, default=_LEAVES)

    def __post_init__(self) -> None:
        given = self.sigma
        object.__setattr__(self, "sigma", parse_sigma(given, self.unit))
        check_choice("padding", self.padding, get_args(Padding))
        check_choice("geometry", self.geometry, get_args(Geometry))
        self.check()
        warn_beyond(given, self.sigma, self.usual, self.unit, self.beyond)

    def check(self) -> None:  # noqa: B027 - most families have nothing to add
        """Refuse settings that the family has no meaning for (InputError)."""

    @property
    def norm(self) -> str:
        """The norm of the law."""
        return self.law.norm

    @property
    def threat(self) -> str:
        """What a certificate covers and what it does not."""
        return f"{self.certified} {_ONE_INTERPOLATION.format(self.exception)}"

    @property
    def dim(self) -> int | None:
        """Number of parameters; None where it depends on the image."""
        return self.count

    def params_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one parameter set for an image of shape (c, h, w)."""
        check_image_shape(image_shape)
        assert self.count is not None
        return (self.count,)

    @abstractmethod
    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Where each output pixel is read, by parameters (m, *params_shape).

        Returns:
            Columns and rows in pixels, each broadcastable to (m, h, w).
        """

    def sample(
        self, n: int, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw n parameter sets, float32 (n, *params_shape); see `Perturbation.sample`."""
        return draw(self.law, self.sigma, (n, *self.params_shape(image_shape)), generator)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        """Deform the images (m, c, h, w); see `Perturbation.apply`."""
        from certifl.perturbations.warp import grid_of, warp

        shape = self.params_shape(image_shape_of(images))
        images, params = matched(images, params, shape)
        x, y = self.sources(params, grid_of(images, self.geometry))
        return warp(images, x, y, self.padding)


@dataclass(frozen=True)
class Translation(Deformation):
    """Shift by (t_u, t_v): nu = (t_u, t_v), Gaussian.

    Positive t_u reads to the right, so the picture moves to the left; positive t_v moves it up.
    `t_u = 2 k / w` is a shift by k whole pixels.

    Attributes:
        sigma: standard deviation of either component, half-widths.
        padding, geometry: as in `Deformation`.
    """

    family = "translation"
    law = GAUSSIAN
    unit = "half-widths"
    count = 2
    certified = (
        "Translations (t_u, t_v) whose l2 length is at most the radius, in half-widths of the "
        "image (half its width across, half its height down)."
    )
    exception = ", except that whole-pixel shifts away from the border are the same either way"
    sweep_note = (
        "A certificate covers every shift of at most its l2 length, across and down together; "
        "the slider shifts along one axis. "
    )

    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Shifted coordinates; x stays constant down a column and y along a row."""
        t_u, t_v = params[:, :, None, None].unbind(1)
        x = grid.columns + t_u * grid.half_width
        y = grid.rows + t_v * grid.half_height
        return x, y

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """Along either axis."""
        return (
            Sweep("across", "shifted across", "to the left", "to the right", 0, reach),
            Sweep("down", "shifted up and down", "up", "down", 1, reach),
        )


@dataclass(frozen=True)
class Rotation(Deformation):
    """Rotation by beta about the image center, uniform on [-sigma, sigma].

    Radii of Corollary 1 stay below sigma: to certify 18 degrees, sigma must be larger. The "scan"
    estimator has no such limit.

    u = x (cos beta - 1) - y sin beta,  v = x sin beta + y (cos beta - 1), in pixels, so images
    that are not square rotate without shear. A quarter turn is `torch.rot90(image, 1, (-2, -1))`:
    positive angles turn the picture counter-clockwise.

    Attributes:
        sigma: largest angle drawn, radians, at most pi; "18deg", "18°" and "0.1pi" are understood.
        padding, geometry: as in `Deformation`.
    """

    family = "rotation"
    law = UNIFORM
    unit = "radians"
    count = 1
    certified = "Rotations about the image centre, either way, by an angle of at most the radius."
    promise = "for every rotation by at most the radius, in either direction"
    usual = math.pi / 2
    beyond = (
        "angles are in radians, and this one turns images upside down. An angle in degrees is "
        'written "18deg"; one that is meant, such as "120deg", likewise.'
    )

    def check(self) -> None:
        """At most a half turn."""
        if self.sigma > math.pi:
            raise InputError(
                f"sigma = {self.sigma:g} radians is {math.degrees(self.sigma):.0f} degrees, more "
                'than a half turn either way. An angle in degrees is written "18deg".'
            )

    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Rotated coordinates."""
        beta = params[:, :, None]
        turn, shrink = beta.sin(), beta.cos() - 1
        x = (grid.columns + grid.x * shrink) - grid.y * turn
        y = (grid.rows + grid.y * shrink) + grid.x * turn
        return x, y

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """Up to a half turn either way."""
        turned, ends = "turned about its center", min(reach, math.pi)
        return (Sweep("turn", turned, "counter-clockwise", "clockwise", 0, ends),)

    def scan_range(self, reach: float | None) -> tuple[float, float, bool]:
        """Once round, or less where that is enough for the reach."""
        if reach is None or self.sigma + reach >= math.pi:
            return -math.pi, math.pi, True
        return -self.sigma - reach, self.sigma + reach, False


@dataclass(frozen=True)
class Scaling(Deformation):
    """Scaling of the sampling grid by 1 + s about the image center, uniform on [-sigma, sigma].

    Radii of Corollary 1 stay below sigma; the "scan" estimator has no such limit.

    nu = (s x, s y): positive s reads farther out, so the picture shrinks.

    Attributes:
        sigma: largest relative change, at most 1.
        padding, geometry: as in `Deformation`.
    """

    family = "scaling"
    law = UNIFORM
    unit = "relative"
    count = 1
    certified = (
        "Scalings of the sampling grid about the image centre by a factor between 1 - radius and "
        "1 + radius."
    )
    promise = "for every scaling whose factor differs from 1 by at most the radius"

    def check(self) -> None:
        """At most 1, where the image shrinks to a point or turns over."""
        if self.sigma > 1.0:
            raise InputError(
                f"sigma = {self.sigma:g} is a relative change, and beyond 1 the image turns over. "
                "Write 0.2 for up to a fifth larger or smaller."
            )

    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scaled coordinates."""
        s = params[:, :, None]
        return grid.columns + grid.x * s, grid.rows + grid.y * s

    def sweeps(self, reach: float) -> tuple[Sweep, ...]:
        """Short of -1, where nothing is left of the sampling grid."""
        ends = min(reach, 0.9)
        return (Sweep("scale", "scaled about its center", "smaller", "larger", 0, ends),)

    def scan_range(self, reach: float | None) -> tuple[float, float, bool]:
        """As far as the reach, by default three times sigma, but never to a factor below 0.

        Raises:
            InputError: sigma leaves nothing to scan.
        """
        if self.sigma >= 1.0:
            raise InputError(
                f"sigma = {self.sigma} scales by factors down to 0 and below, where there is no "
                "image to scan. Use a sigma below 1."
            )
        far = self.sigma + (3.0 * self.sigma if reach is None else reach)
        return max(-far, -1.0), far, False


@dataclass(frozen=True)
class Affine(Deformation):
    """An affine map whose six numbers are ADDED to the identity's, Gaussian.

    With X = x / (w / 2) and Y = y / (h / 2), both in half-widths, and phi = (a, b, c, d, e, f):
    X' = (1 + a) X + b Y + c and Y' = d X + (1 + e) Y + f; nu = (X' - X, Y' - Y). Sums of
    parameters are sums of matrices, not compositions of maps.

    Attributes:
        sigma: standard deviation of each of the six.
        padding, geometry: as in `Deformation`.
    """

    family = "affine"
    law = GAUSSIAN
    unit = "coefficients"
    count = 6
    certified = (
        "Affine maps whose six numbers, added to the identity's in half-width coordinates, have "
        "an l2 length of at most the radius."
    )

    def sources(self, params: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Mapped coordinates."""
        a, b, c, d, e, f = params[:, :, None, None].unbind(1)
        wide, high = grid.half_width, grid.half_height
        x = (grid.columns + (grid.x * a + c * wide)) + grid.y * (b * (wide / high))
        y = (grid.rows + (grid.y * e + f * high)) + grid.x * (d * (high / wide))
        return x, y


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
        check_number("bases", self.bases, "a whole number of at least 1", low=1, whole=True)

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

    centers = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    order = torch.arange(count, dtype=like.dtype, device=like.device)
    return torch.cos(order[:, None] * centers * (math.pi / size))
