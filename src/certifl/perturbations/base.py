"""What every perturbation family promises, and the checks and draws they share.

A perturbation T_phi changes an image by parameters phi. The same object draws phi from its
distribution and applies it: training augments with one draw, certification votes over many, plots
take its unit.

A spec builds perturbations, so the files of families import torch only where they compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from certifl.errors import InputError
from certifl.smoothing.laws import LAWS, Law, drawn_width

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Padding = Literal["zeros", "border", "reflection"]
Geometry = Literal["centre", "deformrs"]


@dataclass(frozen=True)
class Sweep:
    """A line of parameters through 0, along which `certifl explore` shows deformed images.

    Attributes:
        name: of the sweep. words: what happens to the image on the way.
        forward, backward: which way positive and negative steps go; `backward` is empty where
            there are none.
        axis: number of the parameter that changes; None for a direction drawn for the image.
        reach: length of the longest parameter, in the family's unit; None = up to another image.
    """

    name: str
    words: str
    forward: str
    backward: str
    axis: int | None
    reach: float | None


class Perturbation(Protocol):
    """A perturbation family with its smoothing distribution: frozen, hashable, printable.

    Adding a family: a frozen dataclass with these members in its own file, and a row in
    `PERTURBATIONS`; the conformance tests then run on it. A family may also have

    - `promise`: completes "the smoothed classifier gives the certified class ..." in reports;
      {family}, {norm} and {unit} are filled in;
    - `received = True`: T_a(T_b(x)) = T_{a + b}(x), so that a system that receives the changed
      image is covered, up to rounding and clipping by the sender;
    - `additive = True`: parameters are added to the intensities, one each, which implies it;
    - `radius_note`: follows "radius" on axes;
    - `exact`: images and parameters lie on the grid of 8-bit intensities;
    - `sweeps(reach)`: lines of parameters to explore, and `sweep_note`, what they do not show;
    - `scan_range(reach)`: (low, high, whether the two ends are one), where the "scan" estimator
      votes for a certificate up to `reach`; None = the family's own. Families of one uniform
      parameter only.
    """

    @property
    def family(self) -> str:
        """Name in specs and records, e.g. "rotation"."""
        ...

    @property
    def sigma(self) -> float:
        """Scale in `unit`: standard deviation (Gaussian), half width (uniform), mean (exp.)."""
        ...

    @property
    def law(self) -> Law:
        """Distribution of the parameters; gives the radius."""
        ...

    @property
    def unit(self) -> str:
        """Unit of sigma, parameters and radii."""
        ...

    @property
    def norm(self) -> str:
        """Norm of the parameters in which radii are measured: "l2" or "l1"."""
        ...

    @property
    def dim(self) -> int | None:
        """Number of parameters; None where it depends on the image."""
        ...

    @property
    def threat(self) -> str:
        """What a certificate covers and what it does not, in words."""
        ...

    def params_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one parameter set for an image of shape (c, h, w)."""
        ...

    def sample(
        self, n: int, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw n parameter sets from the law.

        Args:
            n: number of sets.
            image_shape: (c, h, w).
            generator: where the randomness comes from; it also decides the device.

        Returns:
            float32, shape (n, *params_shape(image_shape)), in `unit`, on the generator's device.
        """
        ...

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        """T_phi of every image. Zero parameters give the images back exactly.

        Args:
            images: (m, c, h, w), floating point, intensities in [0, 1].
            params: (m, *params_shape), on the device of the images. One image with many parameter
                sets, or one set with many images, is broadcast.

        Returns:
            (m, c, h, w), in float32 or better. Results of pixel noise are not clipped.

        Raises:
            InputError: shapes, types or devices that do not go together.
        """
        ...


def family_sweeps(perturbation: Perturbation, reach: float) -> tuple[Sweep, ...]:
    """The sweeps of a family; by default one line in a direction drawn for each image.

    Args:
        perturbation: of any family.
        reach: how far to go, in the family's unit; a family may stop earlier.
    """
    sweeps = getattr(perturbation, "sweeps", None)
    if sweeps is not None:
        return sweeps(reach)
    words = "deformed along one drawn direction"
    return (Sweep("drawn", words, "along it", "against it", None, reach),)


def check_image_shape(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape as (c, h, w), or an error."""
    shape = tuple(image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"image_shape must be (channels, height, width), all at least 1, got {shape}. "
            "Leave the batch dimension out: images.shape[1:]."
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def draw(
    law: Law,
    sigma: float,
    shape: tuple[int, ...],
    generator: torch.Generator,
    double: bool = False,
) -> Tensor:
    """Independent draws from a distribution, on the generator's device.

    Uniform draws lie in [-w, w] with w = `drawn_width(sigma)`, the width that radii use. Normal
    draws in float32 end at 5.77 sigma on a CPU (24-bit uniforms, Box and Muller 1958), which
    leaves out a probability of 8e-9 per number; in float64 they end at 8.57 sigma. Exponential
    draws invert the distribution at 53-bit uniforms and end at 36.7 sigma.

    Args:
        law: Gaussian, uniform or exponential.
        sigma: its scale.
        shape: of the result.
        generator: where the randomness comes from.
        double: whether normal numbers are drawn in float64.
    """
    import torch

    if min(shape) < 1:
        raise InputError(f"At least one parameter set must be drawn, got n = {shape[0]}.")
    if law.name == "gaussian":
        dtype = torch.float64 if double else torch.float32
        normal = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
        return normal.mul_(sigma)
    if law.name == "uniform":
        unit = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
        return unit.mul_(2.0).sub_(1.0).mul_(float(drawn_width(sigma)))
    if law.name == "exponential":
        unit = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return unit.neg_().log1p_().mul_(-sigma).to(torch.float32)
    raise InputError(
        f"Cannot draw from the distribution {law.name!r}: choose one of {', '.join(LAWS)}."
    )


def matched(images: Tensor, params: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images (m, c, h, w) and parameters (m, *shape), checked, in one type of at least float32.

    Parameters may also be (m,) in families of one; InputError says what does not fit.
    """
    _check_tensor("params", params)
    if shape == (1,) and params.ndim == 1:
        params = params[:, None]
    if tuple(params.shape[1:]) != shape or params.ndim != len(shape) + 1:
        expected = ", ".join(["m", *map(str, shape)])
        raise InputError(
            f"params must have shape ({expected}) for images of shape {tuple(images.shape)}, "
            f"got {tuple(params.shape)}. Draw them with sample(m, images.shape[1:], generator)."
        )
    counts = (images.shape[0], params.shape[0])
    if 0 in counts or (counts[0] != counts[1] and 1 not in counts):
        raise InputError(
            f"Got {counts[0]} images and {counts[1]} parameter sets. Give as many sets as images, "
            "or exactly one of either."
        )
    if images.device != params.device:
        raise InputError(
            f"Images are on {images.device} and params on {params.device}. Move one of them; the "
            "generator's device decides where sample() draws."
        )
    import torch

    kind = torch.promote_types(images.dtype, torch.float32)
    return images.to(kind), params.to(kind)


def image_shape_of(images: Tensor) -> tuple[int, int, int]:
    """(c, h, w) of a batch of images, or an error that says what a batch is."""
    _check_tensor("images", images)
    if images.ndim != 4:
        raise InputError(
            f"images must have shape (m, channels, height, width), got {tuple(images.shape)}. "
            "One image goes in as image[None]."
        )
    return check_image_shape(tuple(images.shape[1:]))


def _check_tensor(name: str, value: Any) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise InputError(
            f"{name} must be floating point, got {value.dtype}. "
            "8-bit images go in as images.float() / 255, between 0 and 1."
        )
