"""How far a mean difference over a few trainings may be off: paired intervals, and Holm's marks.

A training seed draws everything anew here: the training and test images, who holds them, the
first weights, the order of batches, the noise. One seed's mean difference on the images that two
algorithms share is therefore one independent observation. The intervals are those of report pages
and claims (`certifl.report.intervals`), over images instead of clients, since a client of a skewed
split may hold a single image.

Source: Student's paired t; Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from certifl.report.intervals import (
    FEWEST_UNLIKE,
    Sample,
    Scatter,
    rule_of_three_margin,
    scatter_of,
    unlike_images,
)

__all__ = ["ERROR", "Observed", "Paired", "holm", "paired"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ERROR = 0.05
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Observed:
    """One seed's differences.

    Attributes:
        values: (images,) one algorithm minus the other on the same image.
        clients: (images,) who holds them. images: (images,) which they are.
    """

    values: Floats
    clients: Ints
    images: Ints

    def by_client(self) -> list[Floats]:
        """The values of each client."""
        return [self.values[self.clients == client] for client in np.unique(self.clients)]


@dataclass(frozen=True)
class Paired:
    """A mean difference over seeds.

    Attributes:
        estimate: each seed counts once.
        low, high: its 95 % interval.
        p: the largest error at which the interval contains 0.
    """

    estimate: float
    low: float
    high: float
    p: float

    def within(self, scale: float) -> Paired:
        """The same with ends that are possible: no difference exceeds the scale."""
        return replace(self, low=max(-scale, self.low), high=min(scale, self.high))

    @property
    def apart(self) -> bool:
        """Whether the interval, by itself, excludes 0."""
        return self.low > 0.0 or self.high < 0.0


def paired(
    differences: Sequence[Observed | Floats], error: float = ERROR, scale: float = 1.0
) -> Paired:
    """Interval of the mean over seeds, no narrower than the images would make it.

    Args:
        differences: what was observed with each seed; values alone are of one client and of
            images that no two seeds share.
        error: probability of missing the true value.
        scale: how far one image can lie from another.

    Raises:
        ValueError: fewer than two seeds, or than two images of a seed.
    """
    seeds = [_observed(one, at) for at, one in enumerate(differences)]
    if len(seeds) < 2 or min(len(one.values) for one in seeds) < 2:
        raise ValueError("An interval needs two seeds and two images of each.")
    samples = [Sample.of([one.values], [one.images]) for one in seeds]
    found, floors = scatter_of(samples, scale), [_floor(one, scale) for one in seeds]
    estimate = float(found.mean[0])

    half = max(
        float(found.half_width(error)[0]), float(rule_of_three_margin(floors, error)[0]) * scale
    )
    p = _largest_error(found, floors, abs(estimate))
    return Paired(estimate, estimate - half, estimate + half, p)


def _observed(one: Observed | Floats, seed: int) -> Observed:
    if isinstance(one, Observed):
        return one
    own = np.arange(len(one)) + seed * len(one)
    return Observed(one, np.zeros(len(one), np.int64), own)


def _floor(one: Observed, scale: float) -> Floats:
    """How many images limit an interval, judged by the median of every client's own images."""
    shown = unlike_images(one.by_client(), scale) >= FEWEST_UNLIKE
    return np.array([[math.inf if shown else len(one.values)]])


def _largest_error(found: Scatter, floors: Sequence[Floats], size: float) -> float:
    """At which error an interval just reaches 0; it is narrower the larger the error."""

    def beyond(log: float) -> float:
        error = math.exp(log)
        hidden = float(rule_of_three_margin(floors, error)[0]) * found.scale
        return max(float(found.half_width(error)[0]), hidden) - size

    if beyond(0.0) >= 0.0:
        return 1.0
    least = math.log(_LEAST)
    return _LEAST if beyond(least) <= 0.0 else math.exp(cast(float, brentq(beyond, least, 0.0)))


def holm(p: Sequence[float], error: float = ERROR) -> list[bool]:
    """Which of several differences are shown, none of them wrongly with 95 % for all together.

    The smallest p is held against error / m, the next against error / (m - 1), and so on until
    one is too large; the differences may depend on each other in any way.
    """
    shown = [False] * len(p)
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[place] > error / (len(p) - rank):
            break
        shown[place] = True
    return shown
