"""How votes become a certificate: estimator, votes and levels, fixed before the first vote."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from certifl.errors import InputError
from certifl.perturbations.base import Perturbation
from certifl.smoothing import curves, sequential
from certifl.smoothing.bounds import BOUNDS

GRID_POINTS = 50
_MOST_VOTES = 10**9

# name -> (which bounds, whether votes are looked at on the way)
ESTIMATORS: dict[str, tuple[str, bool]] = {
    "top-class": ("top-class", False),
    "runner-up": ("runner-up", False),
    "sequential": ("runner-up", True),
    "sequential-top-class": ("top-class", True),
    "scan": ("scan", False),
}


@dataclass(frozen=True)
class _Thrift:
    """How often sequential certification looks, and what n votes are worth (see `sequential`).

    Attributes:
        per_doubling, early_share: as `sequential.looks` and `sequential.levels` take them.
        price: of n votes, in grid steps (`sequential.finished`'s give_up); or where `of_curve`,
            as a share of the curve: a lost step is 1 / steps of what an image adds to it.
    """

    per_doubling: int
    early_share: float
    price: float
    of_curve: bool


KEEPS = {
    "certificates": _Thrift(per_doubling=1, early_share=0.02, price=0.01, of_curve=False),
    "curve": _Thrift(per_doubling=4, early_share=0.005, price=0.2, of_curve=True),
}
"""What stopping early must keep.

`verify` makes the looks and levels of a record anew from these numbers. Whoever changes them gives
the changed ones a name of their own, for certificates made before must still verify.
"""


@dataclass(frozen=True)
class Settings:
    """What `certify` was asked for; equal settings and equal votes give equal certificates.

    Attributes:
        estimator: a name in `ESTIMATORS`.
        n0: votes that choose the class (selection).
        n: fresh votes that bound its probability (estimation); for `sequential` the most it draws.
        alpha: probability, per image, that a certificate claims too much.
        radii: the radii that will be reported; `sequential` stops when none of them can be gained.
            None stands for an even grid of 50 up to the largest radius that n votes can give.
        label_aware: stop early on images whose label is known and whose chosen class is wrong.
        reach: `scan` only, how far from 0 it looks, in the family's unit; None stands for all the
            way round for rotation, and three times sigma for scaling.
        keep: `sequential` only, what stopping early keeps. "certificates": every grid step that n
            votes would reach, but for about one image in a thousand. "curve": the certified
            accuracies to about half a point on average over the radii, at a third (rotation) to
            two thirds (pixel noise) of these votes.

    Raises:
        InputError: a value that is not allowed, or two that do not go together; it says which.
    """

    estimator: str = "sequential"
    n0: int = 100
    n: int = 100_000
    alpha: float = 1e-3
    radii: Sequence[float] | None = None
    label_aware: bool = True
    reach: float | None = None
    keep: str = "certificates"

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            known = ", ".join(ESTIMATORS)
            raise InputError(f"estimator must be one of {known}; got {self.estimator!r}.")
        for name in ("n0", "n"):
            object.__setattr__(self, name, _checked_votes(name, getattr(self, name)))
        if not (isinstance(self.alpha, float) and 0.0 < self.alpha < 0.5):
            raise InputError(
                f"alpha is the probability of a wrong certificate and must lie between 0 and 0.5; "
                f"got {self.alpha!r}."
            )
        if self.radii is not None:
            object.__setattr__(self, "radii", _checked_radii(self.radii))
        if self.reach is not None:
            object.__setattr__(self, "reach", _checked_reach(self.reach, self.estimator))
        if self.keep not in KEEPS:
            raise InputError(f"keep must be one of {', '.join(KEEPS)}; got {self.keep!r}.")
        if self.keep != "certificates" and not ESTIMATORS[self.estimator][1]:
            raise InputError(
                f"keep = {self.keep!r} is for sequential certification alone: {self.estimator!r} "
                'does not stop early by it. Choose estimator = "sequential".'
            )

    @property
    def bounds(self) -> str:
        """Which confidence bounds: "top-class" or "runner-up"; "scan" has its own."""
        return ESTIMATORS[self.estimator][0]

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of votes at which the counts are looked at; the last is n."""
        if not ESTIMATORS[self.estimator][1]:
            return (self.n,)
        return sequential.looks(self.n, per_doubling=KEEPS[self.keep].per_doubling)

    @property
    def levels(self) -> tuple[float, ...]:
        """Confidence level of each look; they sum to at most alpha."""
        looks = self.looks
        if len(looks) == 1:
            return (self.alpha,)
        return sequential.levels(self.alpha, looks, KEEPS[self.keep].early_share)

    def give_up(self, grid: NDArray[np.float64]) -> float:
        """The price of n votes in steps of this grid, as `sequential.finished` takes it."""
        thrift = KEEPS[self.keep]
        return thrift.price * max(1, np.unique(grid[grid > 0]).size if thrift.of_curve else 1)

    def grid(self, perturbation: Perturbation) -> NDArray[np.float64]:
        """The radii that will be reported, in the perturbation's unit.

        Raises:
            InputError: so few votes that none of them could certify anything, all agreeing; or
                radii of which n votes can certify none.
        """
        if self.bounds in BOUNDS and not self.decides():
            raise too_few_votes(self.n, self.alpha, self.least_votes())
        largest = perturbation.law.largest_radius(perturbation.sigma, self.n, self.alpha)
        if self.radii is not None:
            check_reachable(self.radii, float(largest), perturbation.unit, self.n)
            return np.array(self.radii, dtype=np.float64)
        return curves.even_grid(float(largest), GRID_POINTS)

    def decides(self) -> bool:
        """Whether n votes that all agree certify anything; not for "scan", see `scan`.

        The last look has the most votes and the highest level, so it decides.
        """
        low, high = BOUNDS[self.bounds](self.n, 0, self.n, self.levels[-1])
        return bool(low > high)

    def least_votes(self) -> int:
        """The least n at which votes that all agree certify anything, at this alpha."""
        return least_that(lambda n: replace(self, n=n, radii=None).decides())


def least_that(decides: Callable[[int], bool]) -> int:
    """The least n that decides, where every larger one does too."""
    high = 1
    while not decides(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=1, key=decides)


def too_few_votes(n: int, alpha: float, least: int) -> InputError:
    """The refusal of votes that could decide nothing, even where they all agree."""
    return InputError(
        f"n = {n} votes can decide nothing at alpha = {alpha:g}, even where they all agree: take "
        f"n = {least} or more; 1000 and more are usual."
    )


def _checked_votes(name: str, value: object) -> int:
    """A number of votes; 1e4 is one, though a float."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name} must be a whole number of votes; got {value!r}.")
    if not 1 <= value <= _MOST_VOTES:
        raise InputError(f"{name} must lie between 1 and {_MOST_VOTES}; got {value}.")
    return int(value)


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(r) for r in radii}))
    except (TypeError, ValueError) as error:
        raise InputError(f"radii must be a list such as [0.0, 0.1]; got {radii!r}.") from error
    if not values or not all(math.isfinite(r) and r >= 0.0 for r in values):
        raise InputError("radii must be finite numbers of at least 0, and at least one of them.")
    return values


def check_reachable(radii: Sequence[float], largest: float, unit: str, n: int) -> None:
    """Refuse radii of which n votes can certify none.

    Raises:
        InputError: all positive ones lie beyond the largest that n votes certify.
    """
    smallest = min((radius for radius in radii if radius > 0.0), default=0.0)
    if largest < smallest:
        degrees = " (5 degrees are 0.0873)" if unit == "radians" else ""
        ways = ' An angle in degrees is written "5deg".' if unit == "radians" else ""
        raise InputError(
            f"radii are in {unit}{degrees}, and n = {n} votes certify {largest:.4g} at most, so "
            f"none of yours, from {smallest:g} up, can be reached.{ways}"
        )


def _checked_reach(reach: float, estimator: str) -> float:
    if estimator != "scan":
        raise InputError(f"reach is for the scan certificate alone, not for {estimator!r}.")
    if not (isinstance(reach, (int, float)) and math.isfinite(reach) and reach > 0.0):
        raise InputError(f"reach must be a positive finite amount; got {reach!r}.")
    return float(reach)
