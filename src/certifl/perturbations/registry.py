"""The families by name, and perturbations as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from certifl.errors import InputError
from certifl.perturbations.base import Perturbation
from certifl.perturbations.deformations import Affine, Rotation, Scaling, Translation
from certifl.perturbations.flows import DenseFlow, SmoothFlow
from certifl.perturbations.pixel import PixelNoise
from certifl.perturbations.units import from_records

PERTURBATIONS: dict[str, type[Perturbation]] = {
    "pixel": PixelNoise,
    "translation": Translation,
    "rotation": Rotation,
    "scaling": Scaling,
    "affine": Affine,
    "smooth_flow": SmoothFlow,
    "dense_flow": DenseFlow,
}


def describe(perturbation: Perturbation) -> dict[str, Any]:
    """A perturbation as data that JSON and TOML can hold: its family and every field.

    Guarantee: `from_description(describe(p)) == p`.

    Raises:
        InputError: a perturbation that is not a dataclass, which has no fields to write down.
    """
    if isinstance(perturbation, type) or not dataclasses.is_dataclass(perturbation):
        raise InputError(
            f"{type(perturbation).__name__} is not a dataclass, so its settings cannot be "
            "recorded. Make it a frozen dataclass."
        )
    fields = {name: getattr(perturbation, name) for name in _settings(perturbation)}
    return {"family": perturbation.family, **fields}


def from_description(description: Mapping[str, Any]) -> Perturbation:
    """The perturbation that `describe` wrote down, or that a person did.

    >>> from_description({"family": "rotation", "sigma": "18deg"}).sigma
    0.3141592653589793

    Args:
        description: "family", "sigma" and the family's options; the rest by default.

    Returns:
        A perturbation that equals the one described.

    Raises:
        InputError: an unknown family or option, a missing sigma, or a value that is out of range.
    """
    family = description.get("family")
    if not isinstance(family, str) or family not in PERTURBATIONS:
        raise InputError(
            f"There is no perturbation family {family!r}. "
            f"Choose one of {', '.join(PERTURBATIONS)}."
        )
    made: Any = PERTURBATIONS[family]
    known = _settings(made)
    unknown = sorted(set(description) - {"family", *known})
    if unknown:
        raise InputError(
            f"{family} has no option {', '.join(map(repr, unknown))}. "
            f"Its options are {', '.join(known)}."
        )
    if "sigma" not in description:
        raise InputError(f"{family} needs a sigma, the scale of its noise, in {made.unit}.")
    return made(**{name: description[name] for name in known if name in description})


def from_record(description: Mapping[str, Any]) -> Perturbation:
    """The perturbation that `describe` wrote down; an unusual sigma is not warned of again.

    Raises:
        InputError: as `from_description`.
    """
    with from_records():
        return from_description(description)


def _settings(perturbation: Any) -> list[str]:
    """Names of the fields a person sets; constants of the family are no settings."""
    return [field.name for field in dataclasses.fields(perturbation) if field.init]
