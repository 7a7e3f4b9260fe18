"""Amounts of perturbation as a person writes and reads them.

Inside the program sigma and radii are plain floats in the family's own unit. Angles alone are also
written in other ways: the study's sigma 0.1 for rotation means 0.1 pi radians, 18 degrees.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import re
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from decimal import ROUND_CEILING, Decimal
from typing import Any

from certifl.errors import InputError, UnusualValue
from certifl.smoothing.curves import floor_text

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SMALLEST, _LARGEST = 1e-12, 1e9  # float32 holds their squares, and sums of those
_TEXT = re.compile(rf"\s*(?P<number>{_NUMBER})\s*(?P<unit>\*?\s*(?:pi|π)|deg|°)?\s*")
_WAYS = 'Write a positive number such as 0.25; for angles also "0.1pi", "0.1*pi" or "18deg".'
ANGLE, LOG_FACTOR, VARIANCE = "radians", "log factor", "px^2"
_LARGEST_EXPONENT = 709.0
_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


def parse_sigma(value: float | str, unit: str | None = None) -> float:
    """Sigma as a float in the family's unit, from a number or from text.

    >>> parse_sigma(" 0.3 ")
    0.3
    >>> parse_sigma("18deg") == parse_sigma("18°") == parse_sigma("0.1pi") == parse_sigma("0.1*pi")
    True

    Args:
        value: a finite real number above 0, or text: a number, a multiple of pi, or degrees; else
            InputError.
        unit: of the family; ways of writing an angle are for "radians" or None.
    """
    if isinstance(value, str):
        sigma = _parse_text(value, unit, "sigma")
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


def parse_amount(value: float | str, unit: str | None, name: str) -> float:
    """A radius or reach as a float in a family's unit: a number, or an angle with its unit.

    >>> parse_amount("45deg", "radians", "reach") == math.pi / 4
    True

    InputError, which names what the amount is, for anything else.
    """
    if isinstance(value, str) and _unit_of(value) is not None:
        return _parse_text(value, unit, name)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    angle = ', or an angle with its unit such as "5deg"' if unit == ANGLE else f" in {unit}"
    raise InputError(f"{name} must be a positive number{angle}; got {value!r}.")


def parse_amounts(values: Any, unit: str | None, name: str = "radii") -> tuple[float, ...]:
    """Several amounts, as `parse_amount` reads each; InputError if one cannot be read."""
    example = '["5deg", "10deg"]' if unit == ANGLE else "[0.0, 0.1]"
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InputError(f"{name} must be a list such as {example}; got {values!r}.")
    try:
        return tuple(parse_amount(value, unit, name) for value in values)
    except InputError as error:
        raise InputError(f"{name} must be a list such as {example}: {error}") from error


def warn_beyond(given: float | str, sigma: float, limit: float, unit: str, meaning: str) -> None:
    """Warn that a sigma given as a plain number is larger than anyone is likely to mean.

    An angle with its unit written out was meant, and a sigma from a record was warned of before.

    Args:
        given, sigma: as it was written, and read. limit: the largest that passes.
        meaning: what such a sigma does to an image, and what was perhaps meant.
    """
    written_out = isinstance(given, str) and _unit_of(given) is not None
    if sigma > limit and not written_out and not _recorded.get():
        # The level of the constructor's caller: this, __post_init__, __init__, the call.
        warnings.warn(f"sigma = {sigma:g} {unit}: {meaning}", UnusualValue, stacklevel=4)


@contextlib.contextmanager
def from_records() -> Iterator[None]:
    """While perturbations are made from records, no sigma is warned of a second time."""
    before = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(before)


def _unit_of(text: str) -> str | None:
    match = _TEXT.fullmatch(text)
    return None if match is None else match["unit"]


def _parse_text(text: str, unit: str | None, name: str) -> float:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise InputError(f"{name} cannot be read from {text!r}. {_WAYS}")
    number, suffix = float(match["number"]), match["unit"]
    if suffix is None:
        return number
    if unit not in (None, ANGLE):
        raise InputError(
            f"{text!r} is an angle, but {name} of this family is measured in {unit}. "
            "Write a plain number in that unit."
        )
    return math.radians(number) if suffix in ("deg", "°") else number * math.pi


def format_amount(value: float, unit: str, digits: int = 3) -> str:
    """A sigma or radius with its unit, rounded down so that a radius is never overstated.

    >>> format_amount(0.1 * math.pi, "radians")
    '0.314 rad (18.0 deg)'
    >>> format_amount(1.9057, "intensity")
    '1.905 intensity'
    >>> format_amount(0.2236, "log factor")
    '0.223 log factor (factor 0.801 to 1.249)'
    >>> format_amount(3.2, "px^2")
    'added variance 0 to 3.200 px^2'

    Args:
        value: amount in `unit`.
        unit: of a family, such as "intensity", "half-widths" or "radians".
        digits: decimals; angles carry degrees with one decimal beside them, logarithms of a factor
            the factors, rounded towards 1.

    Raises:
        InputError: a value that is not a number.
    """
    if unit == ANGLE:
        return f"{floor_text(value, digits)} rad ({floor_text(math.degrees(value), 1)} deg)"
    amount = floor_text(value, digits)
    if unit == LOG_FACTOR:
        low, high = factor_texts(float(amount), digits)
        return f"{amount} {unit} (factor {low} to {high})"
    return f"added variance 0 to {amount} {unit}" if unit == VARIANCE else f"{amount} {unit}"


def factor_texts(radius: float, digits: int = 3) -> tuple[str, str]:
    """The factors e^-R and e^R as text, rounded towards 1."""
    inward = 2.0**-50  # exp is off by less than that
    low = math.exp(-radius) * (1.0 + inward)
    up = Decimal(low).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING)
    high = math.exp(radius) * (1.0 - inward) if radius < _LARGEST_EXPONENT else math.inf
    return f"{min(up, Decimal(1)):f}", floor_text(max(1.0, high), digits)
