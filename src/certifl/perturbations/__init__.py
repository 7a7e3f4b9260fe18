"""Perturbations: what may happen to an image, and the noise that smooths a classifier against it.

| family | parameters | distribution | unit |
|---|---|---|---|
| pixel | one per pixel and channel | Gaussian | intensity |
| translation | (t_u, t_v) | Gaussian | half-widths |
| rotation | angle | uniform | radians |
| scaling | factor - 1 | uniform | relative |
| affine | 6, added to the identity's | Gaussian | coefficients |
| smooth_flow | 2 k^2 cosine coefficients | Gaussian | coefficients |
| dense_flow | one (u, v) per pixel | Gaussian | half-widths |
| brightness | one, added to all intensities | Gaussian | intensity |
| contrast | logarithm of the factor | Gaussian | log factor |
| gaussian_blur | added variance, from 0 | exponential | px^2 |

One row each: a new family is one file and one row. Nothing here imports torch: a spec builds its
perturbations without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from certifl.errors import InputError
from certifl.lazy import lazy_names
from certifl.perturbations.base import Geometry, Padding, Perturbation
from certifl.perturbations.units import format_amount, from_records, parse_sigma
from certifl.registry import Flag, Parameters, PositiveInt, Registry, Row, parameters

if TYPE_CHECKING:
    from certifl.perturbations.deformations import (
        Affine,
        DenseFlow,
        Rotation,
        Scaling,
        SmoothFlow,
        Translation,
    )
    from certifl.perturbations.photometric import Brightness, Contrast, GaussianBlur, PixelNoise

__all__ = [
    "DEFAULT",
    "PERTURBATIONS",
    "Affine",
    "Brightness",
    "Contrast",
    "DenseFlow",
    "GaussianBlur",
    "Perturbation",
    "PixelNoise",
    "Rotation",
    "Scaling",
    "SmoothFlow",
    "Translation",
    "covers_received",
    "describe",
    "family_label",
    "format_amount",
    "from_description",
    "from_record",
    "parse_sigma",
    "received_words",
    "trait",
]

# The class itself reads a sigma: it knows the unit.
_Sigma = Annotated[
    Any, Field(description='the scale of the noise, such as 0.25 or, of an angle, "18deg"')
]


def _moving(**options: Any) -> type[Parameters]:
    """Parameters of a family that moves pixels."""
    return parameters(
        sigma=_Sigma, padding=(Padding, "zeros"), geometry=(Geometry, "centre"), **options
    )


_PHOTOMETRIC = "certifl.perturbations.photometric"
_DEFORMATIONS = "certifl.perturbations.deformations"

PERTURBATIONS: Registry[Row] = Registry(
    "perturbation",
    {
        "pixel": Row(
            f"{_PHOTOMETRIC}:PixelNoise",
            parameters(sigma=_Sigma, exact=(Flag, False)),
            "pixel noise",
        ),
        "translation": Row(f"{_DEFORMATIONS}:Translation", _moving(), "translation"),
        "rotation": Row(f"{_DEFORMATIONS}:Rotation", _moving(), "rotation"),
        "scaling": Row(f"{_DEFORMATIONS}:Scaling", _moving(), "scaling"),
        "affine": Row(f"{_DEFORMATIONS}:Affine", _moving(), "affine deformation"),
        "smooth_flow": Row(
            f"{_DEFORMATIONS}:SmoothFlow", _moving(bases=(PositiveInt, 2)), "smooth flow"
        ),
        "dense_flow": Row(f"{_DEFORMATIONS}:DenseFlow", _moving(), "dense flow"),
        "brightness": Row(f"{_PHOTOMETRIC}:Brightness", parameters(sigma=_Sigma), "brightness"),
        "contrast": Row(f"{_PHOTOMETRIC}:Contrast", parameters(sigma=_Sigma), "contrast"),
        "gaussian_blur": Row(
            f"{_PHOTOMETRIC}:GaussianBlur", parameters(sigma=_Sigma), "Gaussian blur"
        ),
    },
    key="family",
)

DEFAULT: Mapping[str, Any] = {"family": "pixel", "sigma": 0.25}
"""What a model is certified against where nothing else is said."""

__getattr__ = lazy_names(
    __name__, {row.attribute: row.module for row in PERTURBATIONS.rows.values()}
)


def describe(perturbation: Perturbation) -> dict[str, Any]:
    """A perturbation as data that JSON and TOML can hold: its family and every field.

    Guarantee: `from_description(describe(p)) == p`. InputError for what is not a dataclass.
    """
    if isinstance(perturbation, type) or not dataclasses.is_dataclass(perturbation):
        raise InputError(
            f"{type(perturbation).__name__} is not a dataclass, so its settings cannot be "
            "recorded. Make it a frozen dataclass."
        )
    return PERTURBATIONS.describe(perturbation)


def from_description(description: Mapping[str, Any]) -> Perturbation:
    """The perturbation that `describe` wrote down, or that a person did.

    >>> from_description({"family": "rotation", "sigma": "18deg"}).sigma
    0.3141592653589793

    Raises:
        SpecError: an unknown family or option, a missing sigma, or an option out of range.
        InputError: a sigma that is not a positive amount in the family's unit.
    """
    return PERTURBATIONS.build(description)


def from_record(description: Mapping[str, Any]) -> Perturbation:
    """As `from_description`; an unusual sigma is not warned of again."""
    with from_records():
        return from_description(description)


def trait(family: object, name: str, default: Any) -> Any:
    """An optional attribute of a family (see `Perturbation`), or the default where it has none."""
    known = str(family) in PERTURBATIONS
    return getattr(PERTURBATIONS[str(family)], name, default) if known else default


def covers_received(family: object) -> bool:
    """Whether certificates of a family also hold for images that arrive changed.

    They do where T_a(T_b(x)) = T_{a + b}(x): up to rounding and clipping by the sender. Elsewhere
    a certificate is about parameters of one change of the original image.
    """
    return bool(trait(family, "received", False) or trait(family, "additive", False))


def received_words(family: object) -> str:
    """Whether certificates of a family also hold for images that arrive changed, in a sentence."""
    if covers_received(family):
        return "Covered, up to rounding and clipping by the sender of the image."
    return "Not covered: certificates are in parameter space only, about the original image."


def family_label(family: object) -> str:
    """A family's name for people; the name in the record where it has no row."""
    row = PERTURBATIONS.rows.get(str(family))
    return str(family) if row is None else row.label
