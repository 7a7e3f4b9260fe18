"""How the claims' numbers are written: in points, intervals rounded outward."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["TOO_FEW", "change_words", "interval_words", "point_words", "range_words"]


TOO_FEW = "too few images for an interval"


def change_words(share: float) -> str:
    """A signed difference."""
    return f"{100 * share:+.1f} points"


def point_words(share: float, upward: bool) -> str:
    """A size, rounded to a tenth of a point to the side on which the sentence stays true."""
    tenths = _tenths(share, upward)
    return "1 point" if tenths == 10 else f"{tenths / 10:g} points"


def interval_words(ends: tuple[float, float]) -> str:
    """An interval in points, rounded outward; why there is none where it has no end."""
    if not math.isfinite(ends[1] - ends[0]):
        return TOO_FEW
    return f"{_end(ends[0], upward=False)} to {_end(ends[1], upward=True)}"


def range_words(values: Sequence[int]) -> str:
    """Smallest to largest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _end(share: float, upward: bool) -> str:
    return f"{_tenths(share, upward) / 10 + 0.0:+.1f}"


def _tenths(share: float, upward: bool) -> int:
    step = 1000 * share
    return math.ceil(step - 1e-9) if upward else math.floor(step + 1e-9)
