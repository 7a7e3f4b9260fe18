"""Intervals of means of few images, from several clients with images of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = [
    "FEWEST_UNLIKE",
    "even_images",
    "hidden_share",
    "mean_interval",
    "unlike_images",
]

Floats = NDArray[np.float64]

# As a share of the scale. Differences of a few points, however many, make a narrow interval, while
# an image that is not at hand may lose its whole radius, twenty times as much: only larger ones
# show that such images would have been met.
ALIKE = 0.05
FEWEST_UNLIKE = 10  # with so many, the scatter itself tells how far a mean may be off


def hidden_share(images: float, error: float) -> float:
    """Largest share of all images that may be unlike every one of those at hand.

    With probability error / 2 or more, none of `images` drawn is of a kind whose share is at most
    1 - (error / 2) ** (1 / images).

    Source: Hanley and Lippman-Hand, If nothing goes wrong, is everything all right?, 1983.
    """
    return 1.0 - (error / 2.0) ** (1.0 / images)


def unlike_images(values: Floats, scale: float) -> int:
    """How many values lie farther from that of most images than last digits and small gains do.

    What nearly all images share, however large, says nothing of the few that may lose.
    """
    return int((np.abs(values - np.median(values)) > ALIKE * scale).sum())


def even_images(sizes: Sequence[int]) -> float:
    """As many images, spread evenly over the clients, would bound their mean as well."""
    return len(sizes) ** 2 / sum(1.0 / size for size in sizes)


def mean_interval(values: Sequence[Floats], error: float, scale: float) -> tuple[float, float]:
    """Interval of the mean over clients of each client's mean over all its images.

    Student's t with the variances within clients and Welch and Satterthwaite's degrees of freedom.
    Where hardly any image is unlike the others, their scatter says nothing about kinds that were
    not met; then the interval is no narrower than what those could have moved.

    Args:
        values: of each client, of its own images (m,), m >= 2.
        error: probability, about, of missing the true mean.
        scale: how far one image can lie from another.

    Returns:
        The two ends.

    Source: Welch 1947; Satterthwaite 1946.
    """
    parts = [np.asarray(part, np.float64) for part in values]
    sizes = np.array([len(part) for part in parts])
    within = np.array([part.var(ddof=1) for part in parts]) / sizes
    half = 0.0
    if within.sum() > 0.0:
        freedom = within.sum() ** 2 / float((within**2 / (sizes - 1)).sum())
        scatter = math.sqrt(within.sum()) / len(parts)
        half = scatter * -float(special.stdtrit(freedom, error / 2.0))
    together = np.concatenate(parts)
    if unlike_images(together, scale) < FEWEST_UNLIKE:
        half = max(half, hidden_share(even_images(sizes.tolist()), error) * scale)
    mean = float(np.mean([part.mean() for part in parts]))
    return mean - half, mean + half
