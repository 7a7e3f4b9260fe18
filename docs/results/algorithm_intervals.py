"""How far a mean difference over a few trainings may be off: paired intervals, and Holm's marks.

A training seed draws everything anew here: the training and test images, who holds them, the
first weights, the order of batches, the noise. One seed's mean difference on the images that two
algorithms share is therefore one independent observation, and the seeds are all the repetition
there is; images within a seed share its trained networks and are none.

Source: Student's paired t; Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["ERROR", "Paired", "holm", "paired"]

Floats = NDArray[np.float64]

ERROR = 0.05


@dataclass(frozen=True)
class Paired:
    """A mean difference over seeds.

    Attributes:
        estimate: each seed counts once.
        low, high: its 95 % interval. p: two-sided, of no difference.
    """

    estimate: float
    low: float
    high: float
    p: float

    @property
    def apart(self) -> bool:
        """Whether the interval, by itself, excludes 0."""
        return self.low > 0.0 or self.high < 0.0


def paired(differences: Sequence[Floats], error: float = ERROR) -> Paired:
    """Student's t interval of the mean over seeds, no narrower than the images would make it.

    The standard error is that of the seeds' means. Each of these carries the scatter of its own
    images, so a standard error below what the images alone would give is luck, and is replaced by
    the latter: with three seeds such luck is common, and equal shares of few images would
    otherwise give an interval of no width.

    Args:
        differences: for every seed (images,) one algorithm minus the other on the same image.
        error: probability of missing the true value.

    Raises:
        ValueError: fewer than two seeds, or than two images of a seed.
    """
    seeds = len(differences)
    if seeds < 2 or min(len(values) for values in differences) < 2:
        raise ValueError("An interval needs two seeds and two images of each.")
    means = np.array([values.mean() for values in differences])
    of_images = np.mean([values.var(ddof=1) / len(values) for values in differences])
    deviation = math.sqrt(max(float(means.var(ddof=1)), float(of_images)) / seeds)
    estimate = float(means.mean())
    if deviation == 0.0:  # no image differs
        return Paired(estimate, estimate, estimate, 1.0 if estimate == 0.0 else 0.0)
    reach = float(special.stdtrit(seeds - 1, 1.0 - error / 2.0)) * deviation
    p = 2.0 * float(special.stdtr(seeds - 1, -abs(estimate) / deviation))
    return Paired(estimate, estimate - reach, estimate + reach, p)


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
