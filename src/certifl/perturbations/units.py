"""Amounts of perturbation as a person writes and reads them.

Inside the program sigma and radii are plain floats in the family's own unit. Angles alone are also
written in other ways: the study's sigma 0.1 for rotation means 0.1 pi radians, 18 degrees.
"""

from __future__ import annotations

import math
import numbers
import re

from certifl.errors import InputError
from certifl.smoothing.rounding import floor_text

__all__ = ["format_amount", "parse_sigma"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TEXT = re.compile(rf"\s*(?P<number>{_NUMBER})\s*(?P<unit>\*?\s*pi|deg)?\s*")
_SMALLEST, _LARGEST = 1e-12, 1e9  # float32 holds their squares, and sums of those
_WAYS = 'Write a positive number such as 0.25; for angles also "0.1pi", "0.1*pi" or "18deg".'


def parse_sigma(value: float | str, unit: str | None = None) -> float:
    """Sigma as a float in the family's unit, from a number or from text.

    >>> parse_sigma(" 0.3 ")
    0.3
    >>> parse_sigma("18deg") == parse_sigma("0.1pi") == parse_sigma("0.1*pi")
    True

    Args:
        value: a real number, or text: a number, a multiple of pi, or degrees.
        unit: unit of the family; the two ways of writing an angle are refused unless it is
            "radians" or None.

    Returns:
        A finite number above 0; angles in radians.

    Raises:
        InputError: text that is none of these, an angle for a family without one, or a sigma that
            is not finite and positive.
    """
    if isinstance(value, str):
        sigma = _parse_text(value, unit)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        sigma = _as_float(value)
    else:
        raise InputError(f"sigma cannot be {value!r} of type {type(value).__name__}. {_WAYS}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(
            f"sigma is the scale of the noise and must be finite and above 0, got "
            f"{value!r}. {_WAYS}"
        )
    if not _SMALLEST <= sigma <= _LARGEST:
        raise InputError(
            f"sigma = {value!r} is beyond what numbers in images can follow: give one from "
            f"{_SMALLEST:g} to {_LARGEST:g}. {_WAYS}"
        )
    return sigma


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _parse_text(text: str, unit: str | None) -> float:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise InputError(f"sigma cannot be read from {text!r}. {_WAYS}")
    number, suffix = float(found["number"]), found["unit"]
    if suffix is None:
        return number
    if unit not in (None, "radians"):
        raise InputError(
            f"{text!r} is an angle, but sigma of this family is measured in {unit}. "
            "Write a plain number in that unit."
        )
    return math.radians(number) if suffix == "deg" else number * math.pi


def format_amount(value: float, unit: str, digits: int = 3) -> str:
    """A sigma or radius with its unit, rounded down so that a radius is never overstated.

    >>> format_amount(0.1 * math.pi, "radians")
    '0.314 rad (18.0 deg)'
    >>> format_amount(1.9057, "intensity")
    '1.905 intensity'

    Args:
        value: amount in `unit`.
        unit: "intensity", "half-widths", "radians", "relative" or "coefficients".
        digits: decimals; angles carry degrees with one decimal beside them.

    Raises:
        InputError: a value that is not a number.
    """
    if unit == "radians":
        return f"{floor_text(value, digits)} rad ({floor_text(math.degrees(value), 1)} deg)"
    return f"{floor_text(value, digits)} {unit}"
