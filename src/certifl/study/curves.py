"""Whether a curve is possible at all: falling counts, and an average that they allow.

Whether it is true can only be checked with the votes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

_ROUNDING = 1e-9


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
