"""Decimal text of radii that never promises more than was certified."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np

from certifl.errors import InputError

# A float needs up to 309 digits before the point; with the digits after it this always fits.
_EXACT = Context(prec=1400, rounding=ROUND_FLOOR)


def floor_text(value: float, digits: int = 3) -> str:
    """A number with `digits` decimals, rounded down: read back, it is never above the value.

    The text is the largest decimal d with float(d) <= value. So 0.3, whose float is a hair below
    three tenths, is written "0.300", and writing what was read changes nothing. Radii lie below
    their exact formula by more than that hair (see `laws`), so the promise printed is sound too.

    Args:
        value: usually a radius, in any unit.
        digits: decimals, 0 to 1000.

    Returns:
        The decimal as text; "inf" and "-inf" stay what they are.

    Raises:
        InputError: a value that is not a number, or digits out of range.
    """
    if not 0 <= digits <= 1000:
        raise InputError(f"digits must lie between 0 and 1000, not {digits}.")
    if np.isnan(value):
        raise InputError(
            "A radius that is not a number cannot be printed; look for NaN in the record."
        )
    if np.isinf(value):
        return "inf" if value > 0 else "-inf"
    step = Decimal(1).scaleb(-digits)
    text = Decimal(float(value)).quantize(step, context=_EXACT)
    above = _EXACT.add(text, step)
    text = above if float(above) <= value else text
    return f"{text if text else abs(text):f}"
