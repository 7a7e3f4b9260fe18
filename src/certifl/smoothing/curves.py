"""Curves of certificates: accuracy and average radius, grids and bands, and radii as text.

Everything is counted over ALL certified test images: an abstention counts as not correct.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certifl.errors import InputError
from certifl.smoothing.bounds import Floats

_ROUNDING = 1e-9


def certified_accuracy(correct: ArrayLike, radius: ArrayLike, radii: ArrayLike) -> Floats:
    """Certified accuracy at R: the share of all images that are correct with radius >= R.

    Args:
        correct: (m,) whether the prediction equals the label; False where abstained.
        radius: (m,) certified radii.
        radii: R, a scalar or an array, in the unit of `radius`; the result has its shape.

    Raises:
        InputError: no images, unequal lengths, or a radius or R that is negative or not a number.
    """
    right, reach = _images(correct, radius)
    requested = np.asarray(radii, dtype=np.float64)
    if not np.all(requested >= 0):
        raise InputError("The radii of a curve must be numbers of at least 0.")
    certified = np.sort(reach[right])
    short = np.searchsorted(certified, requested, side="left")  # correct images with radius < R
    return ((certified.size - short) / reach.size)[()]


def average_certified_radius(correct: ArrayLike, radius: ArrayLike) -> float:
    """ACR: the mean over ALL images of radius * correct, in the unit of the radii.

    Arguments and errors are those of `certified_accuracy`.

    Source: Zhai et al. 2020 (MACER).
    """
    right, reach = _images(correct, radius)
    return float(np.mean(np.where(right, reach, 0.0)))


def even_grid(largest: float, count: int = 50) -> Floats:
    """An even grid of `count` radii from 0 up to `largest`, both included.

    Args:
        largest: usually `law.largest_radius(sigma, n, alpha)`, or sigma of a uniform law.
        count: number of radii, at least 2.

    Raises:
        InputError: `largest` not positive and finite, or fewer than 2 radii.
    """
    if not (np.isfinite(largest) and largest > 0):
        raise InputError(
            f"The largest radius of a grid must be positive and finite, not {largest}."
        )
    if count < 2:
        raise InputError(f"A grid needs at least 2 radii, not {count}.")
    return np.linspace(0.0, largest, count)


def mean_and_band(curves: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Mean, lowest and highest client at every radius, (radii,) each.

    Every client counts the same, however many images it holds (the paper's average over clients).

    Args:
        curves: (clients, radii), one certified-accuracy curve a row; else InputError.
    """
    try:
        table = np.asarray(curves, dtype=np.float64)
    except ValueError as error:
        raise InputError("The clients' curves must be computed on the same radii.") from error
    if table.ndim != 2 or table.shape[0] == 0 or not np.all(np.isfinite(table)):
        raise InputError(
            "Give one finite curve a client, shape (clients, radii), of at least one client."
        )
    return table.mean(axis=0), table.min(axis=0), table.max(axis=0)


def _images(correct: ArrayLike, radius: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Both columns as arrays of one length, or an error that says what to do."""
    right = np.asarray(correct).astype(bool)
    reach = np.asarray(radius, dtype=np.float64)
    if right.ndim != 1 or right.shape != reach.shape or right.size == 0:
        raise InputError(
            "Give `correct` and `radius` for the same images, at least one, shape (m,)."
        )
    if not np.all(reach >= 0):
        raise InputError("A certified radius must be at least 0; abstentions have radius 0.")
    return right, reach


# A float needs up to 309 digits before the point; with the digits after it this always fits.
_EXACT = Context(prec=1400, rounding=ROUND_FLOOR)


def floor_text(value: float, digits: int = 3) -> str:
    """A number with `digits` decimals, rounded down: read back, it is never above the value.

    The text is the largest decimal d with float(d) <= value. So 0.3, whose float is a hair below
    three tenths, is written "0.300", and writing what was read changes nothing. Radii lie below
    their exact formula by more than that hair (see `laws`), so the promise printed is sound too.

    Args:
        value: usually a radius, in any unit; InputError for NaN. Infinity is "inf".
        digits: decimals, 0 to 1000.
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


# Whether a curve is possible at all: falling counts, and an average that they allow. Whether it is
# true can only be checked with the votes.


def impossible_curve(
    radii: Sequence[float],
    counts: Sequence[int],
    images: int,
    acr: float,
    largest: float = math.inf,
) -> str | None:
    """Why no certificates can have these numbers, in words; None where some can.

    Args:
        radii: ascending. counts: images that are certified correct at each of them.
        images: total. acr: the average certified radius.
        largest: the largest radius that one certificate can have.
    """
    if len(radii) != len(counts) or not radii:
        return f"its curve has {len(counts)} counts for {len(radii)} radii"
    if images < 1 or counts[-1] < 0:
        return "it counts no images, or fewer than none"
    if any(after > before for before, after in itertools.pairwise([images, *counts])):
        return f"its counts must fall from at most all {images} images"
    low, high = possible_averages(np.array(radii), np.array(counts), images, largest)
    off = _ROUNDING * max(1.0, abs(low))
    if not (math.isfinite(acr) and low - off <= acr <= high + off):
        return (
            f"an average certified radius of {acr:.6g} does not fit its curve, which allows "
            f"{low:.6g} to {high:.6g}"
        )
    return None


def possible_averages(
    radii: np.ndarray, counts: np.ndarray, images: int, largest: float = math.inf
) -> tuple[float, float]:
    """The smallest and largest average radius that these counts allow.

    Every image is somewhere in its step; those of the last step between the last radius and the
    largest possible one. Images that are not counted at the first radius may be certified correct
    below it.
    """
    in_step = counts - np.append(counts[1:], 0)
    ends = np.append(radii[1:], max(largest, radii[-1]) if in_step[-1] else radii[-1])
    low, high = (in_step * radii).sum(), (in_step[in_step != 0] * ends[in_step != 0]).sum()
    below = (images - counts[0]) * radii[0]
    return float(low / images), float((high + below) / images)
