"""Estimators: which votes an image needs next, and what finished votes certify.

An estimator is a frozen value of settings and noise, fixed before the first vote. Everything else
asks it: `counts` for the next votes, whether they suffice and what they certify, `metadata` and
`recompute` for what a record must say.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from certifl.certification.certificates import UNLABELED
from certifl.certification.counts import Request, Votes, top_and_runner_up
from certifl.certification.settings import ESTIMATORS, GRID_POINTS, Settings
from certifl.errors import InputError
from certifl.perturbations.base import Perturbation
from certifl.smoothing import curves, group_sequential, sequential
from certifl.smoothing.bounds import BOUNDS, Bools, Floats, Ints
from certifl.smoothing.group_sequential import GroupSequential
from certifl.smoothing.laws import LAWS, Law

if TYPE_CHECKING:
    from torch import Tensor

    from certifl.certification.certificates import Certificates
    from certifl.certification.sampling import VoteCounter

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedNoise:
    """The recorded noise of a perturbation, whose family certifl may not know."""

    family: str
    sigma: float
    law: Law
    unit: str


Noise = Perturbation | RecordedNoise
"""What an estimator knows of a perturbation: how its parameters are distributed."""

PRICES = {"certificates": 0.003, "curve": 0.22}
"""What n votes must bring, in steps of the radii that are asked for, for each value of `keep`."""
RADIUS_PRICES = {"certificates": 0.01, "curve": 0.03}
"""The same where no radii are asked for, as a share of the largest radius that n votes certify."""
# Another scipy rounds forecasts otherwise.
_PRICE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Saving:
    """How often sequential certification looked until 0.1, and what n votes were worth.

    Attributes:
        per_doubling, early_share: as `sequential.looks` and `sequential.levels` take them.
        price: of n votes, in grid steps (`futility` of `reachable_radius`); or where `of_curve`,
            as a share of the curve: a lost step is 1 / steps of what an image adds to it.
    """

    per_doubling: int
    early_share: float
    price: float
    of_curve: bool


UNION_BOUND_KEEPS = {
    "certificates": Saving(per_doubling=1, early_share=0.02, price=0.01, of_curve=False),
    "curve": Saving(per_doubling=4, early_share=0.005, price=0.2, of_curve=True),
}
"""What stopping early kept with the union bound; `verify` reads records of 0.1 by it."""


@dataclass(frozen=True)
class Estimator:
    """Votes counted per class, and bounds at looks fixed in advance; a subclass says what differs.

    The bounds of all looks must hold at once with probability 1 - alpha: then each certificate is
    wrong with probability at most alpha, whatever made the votes stop.

    Attributes:
        settings: what was asked for. noise: distribution of the parameters.
        bounds: which confidence bounds, as the metadata names them.
        stops_early: whether it may take fewer than n votes of an image.
    """

    settings: Settings
    noise: Noise

    bounds: ClassVar[str] = "runner-up"
    stops_early: ClassVar[bool] = False

    # What is fixed before the first vote.

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """Numbers of estimation votes at which votes may stop, rising."""
        return (self.settings.n,)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Confidence level of each look, in all at most alpha; one alone holds for all looks."""
        return (self.settings.alpha,)

    def level(self, look: Ints) -> Floats:
        """Confidence level of images after some looks, numbered from 0."""
        levels = np.array(self.levels)
        return np.full(len(look), levels[0]) if len(levels) == 1 else levels[look]

    def limits(
        self, top: Ints | int, runner_up: Ints | int, look: Ints | int
    ) -> tuple[Floats, Floats]:
        """(p_lower, p_upper) from counts after some looks, numbered from 0."""
        votes, levels = np.array(self.looks)[look], np.array(self.levels)[look]
        return BOUNDS[self.bounds](top, runner_up, votes, levels)

    def largest_radius(self) -> float:
        """The largest radius that n votes can certify, in the unit of the noise."""
        noise, settings = self.noise, self.settings
        return float(noise.law.largest_radius(noise.sigma, settings.n, settings.alpha))

    def grid(self) -> Floats:
        """The radii that are reported: as asked, or evenly up to the largest; see `check`."""
        self.check()
        if self.settings.radii is not None:
            return np.array(self.settings.radii, dtype=np.float64)
        return curves.even_grid(self.largest_radius(), GRID_POINTS)

    def check(self) -> None:
        """Refuse settings with which votes that agree certify none of the radii (InputError)."""
        settings = self.settings
        if not self.decides():
            raise too_few_votes(settings.n, settings.alpha, self.least_votes())
        if settings.radii is None:
            return
        smallest = min((radius for radius in settings.radii if radius > 0.0), default=0.0)
        largest, unit = self.largest_radius(), self.noise.unit
        if largest < smallest:
            degrees = " (5 degrees are 0.0873)" if unit == "radians" else ""
            ways = ' An angle in degrees is written "5deg".' if unit == "radians" else ""
            raise InputError(
                f"radii are in {unit}{degrees}, and n = {settings.n} votes certify {largest:.4g} "
                f"at most, so none of yours, from {smallest:g} up, can be reached.{ways}"
            )

    def decides(self) -> bool:
        """Whether n votes that all agree certify anything.

        The last look has the most votes and the highest level, so it decides.
        """
        low, high = self.limits(self.settings.n, 0, len(self.looks) - 1)
        return bool(low > high)

    def least_votes(self) -> int:
        """The least n at which votes that all agree certify anything, at this alpha."""
        return least_that(
            lambda n: replace(self, settings=replace(self.settings, n=n, radii=None)).decides()
        )

    # While votes are cast.

    def next_requests(
        self, votes: Votes, keys: Sequence[int], size: int, quota: int
    ) -> list[Request]:
        """The next votes of as many unfinished images, in order, as make a batch.

        Selection votes may be cast together with the first estimation votes: the class is chosen
        from the former alone, so the latter stay fresh.

        Args:
            votes: cast so far. keys: `rng.image_key` of each image.
            size: votes of the batch, about. quota: the most of one image and purpose.
        """
        n0, looks = self.settings.n0, self.looks
        requests: list[Request] = []
        requested = 0
        for row in map(int, np.flatnonzero(~votes.done)):
            if requested >= size:
                break
            stages = {
                "selection": (votes.selection, n0),
                "estimation": (votes.estimation, looks[votes.looks[row]]),
            }
            for purpose in self.purposes(votes):
                counts, end = stages[purpose]
                start = int(counts[row].sum())
                stop = min(int(end), start + quota)
                if stop > start:
                    requests.append(Request(row, row, keys[row], purpose, start, stop))
                    requested += stop - start
        return requests

    def purposes(self, votes: Votes) -> tuple[str, ...]:
        """What votes may be cast for next: selection, estimation, or both."""
        return ("selection", "estimation")

    def cast(
        self, counter: VoteCounter, images: Tensor, requests: Sequence[Request], votes: Votes
    ) -> None:
        """Cast the requested votes and add them, in place."""
        m = len(votes.done)
        slotted = [
            replace(request, slot=request.image + m * (request.purpose == "estimation"))
            for request in requests
        ]
        counts = counter.count(images, slotted, slots=2 * m)
        votes.selection += counts[:m]
        votes.estimation += counts[m:]

    def close(self, votes: Votes, labels: np.ndarray | None) -> None:
        """Take the looks that are due, in place, and close images that more votes cannot help."""
        chosen = votes.selection.sum(axis=1) >= self.settings.n0
        pending = np.minimum(votes.looks, len(self.looks) - 1)
        complete = votes.estimation.sum(axis=1) >= np.array(self.looks)[pending]
        rows = np.flatnonzero(~votes.done & chosen & complete)
        top, runner_up = top_and_runner_up(votes.estimation, votes.selected)
        votes.done[rows] = self.finished(top[rows], runner_up[rows], votes.looks[rows])
        votes.done[rows] |= self.misclassified(votes, labels)[rows]
        votes.looks[rows] += 1

    def finished(self, top: Ints, runner_up: Ints, look: Ints) -> Bools:
        """Which images may stop at these looks; any answer is valid."""
        return look >= len(self.looks) - 1

    def misclassified(self, votes: Votes, labels: np.ndarray | None) -> Bools:
        """Images that stop at the first look, because their selected class is not their label."""
        if labels is None or not self.settings.label_aware:
            return np.zeros(len(votes.done), np.bool_)
        return (labels != UNLABELED) & (votes.selected != labels)

    # Once votes are finished.

    def finalize(self, votes: Votes) -> dict[str, np.ndarray]:
        """Columns of `Certificates` that finished votes give, and which rows are `certified`."""
        last = votes.looks - 1
        top, runner_up = top_and_runner_up(votes.estimation, votes.selected)
        p_lower, p_upper = self.limits(top, runner_up, last)
        radius = self.noise.law.radius(self.noise.sigma, p_lower, p_upper)
        certified = np.asarray(p_lower > p_upper)
        return {
            "certified": certified,
            "radius": np.where(certified, radius, 0.0),
            "p_lower": np.asarray(p_lower, np.float64),
            "p_upper": np.asarray(p_upper, np.float64),
            "level": self.level(last),
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """What its certificates say besides the settings: the names in its registry row."""
        return {}

    # What a record says, read again.

    @classmethod
    def recorded(cls, settings: Settings, noise: Noise, metadata: Metadata) -> Estimator:
        """The estimator of a record; KeyError or InputError where its metadata do not say it."""
        return cls(settings, noise)

    @staticmethod
    def largest_recorded(metadata: Metadata) -> float:
        """The largest radius with this metadata; infinity if unknown, InputError if unreadable."""
        law = LAWS.get(str(metadata.get("law")))
        if law is None or not {"sigma", "n", "alpha"} <= metadata.keys():
            return math.inf
        return law.largest_radius(metadata["sigma"], metadata["n"], metadata["alpha"])

    def record_problem(self, metadata: Metadata) -> str | None:
        """Why its own metadata are not those that the settings give; None where they are."""
        return None

    def recorded_votes(
        self, certificates: Certificates, report: Callable[[Bools, str], None]
    ) -> tuple[Votes, Bools]:
        """Votes that can be read, and whose; others are reported. InputError if there are none."""
        return Votes.of(certificates), np.ones(len(certificates), np.bool_)

    def stopped_early(self, votes: Votes, radius: Floats, tolerance: float) -> Bools:
        """Whose recorded votes stopped although more could have helped, were the class right.

        Args:
            votes, radius: of the record.
            tolerance: a grid step that is missed by this share of a radius counts as reached.
        """
        try:
            self.check()
        except InputError:
            return np.zeros(len(votes.done), np.bool_)  # nothing to gain: all votes were cast
        top, runner_up = top_and_runner_up(votes.estimation, votes.selected)
        rows = np.flatnonzero(votes.looks < len(self.looks))
        early = np.zeros(len(votes.done), np.bool_)
        if len(rows):
            look = votes.looks[rows] - 1
            early[rows] = self.gains(top[rows], runner_up[rows], look, radius[rows], tolerance)
        return early

    def gains(
        self, top: Ints, runner_up: Ints, look: Ints, radius: Floats, tolerance: float
    ) -> Bools:
        """Whose votes go on after these looks, at which they certify these radii.

        Args:
            top, runner_up, look, radius: one an image.
            tolerance: a gain that hangs on this share of a radius is none.
        """
        return look < len(self.looks) - 1


class TopClass(Estimator):
    """The lower bound of the top class alone (Cohen et al. 2019)."""

    bounds = "top-class"


class RunnerUp(Estimator):
    """Bounds of the top class and of the runner-up."""


class Sequential(Estimator):
    """Exact group-sequential bounds of the top class and of the runner-up (`group_sequential`).

    A record names its boundaries; one that does not is of version 0.1, which used a union bound.
    """

    stops_early = True

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """Numbers of estimation votes at which votes may stop, rising."""
        return sequential.looks(self.settings.n, per_doubling=group_sequential.PER_DOUBLING)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """What each look adds to the level; at most alpha in all."""
        return group_sequential.increments(self.settings.alpha, self.looks)

    @cached_property
    def _boundaries(self) -> GroupSequential:
        radii = np.array(self.settings.radii or (), dtype=np.float64)
        misses = group_sequential.reported_misses(radii, self.noise.law, self.noise.sigma)
        return GroupSequential(self.looks, self.levels, self.bounds == "runner-up", misses)

    def limits(
        self, top: Ints | int, runner_up: Ints | int, look: Ints | int
    ) -> tuple[Floats, Floats]:
        """(p_lower, p_upper) from counts after some looks; those of all looks hold at once."""
        if len(self.looks) == 1:
            return super().limits(top, runner_up, look)
        return self._boundaries.bounds(np.array(top), np.array(runner_up), np.array(look))

    def decides(self) -> bool:
        """Whether n votes that all agree certify anything, at the last look's own level."""
        low, high = super().limits(self.settings.n, 0, len(self.looks) - 1)
        return bool(low > high)

    def finished(self, top: Ints, runner_up: Ints, look: Ints) -> Bools:
        """Which images may stop at these looks; any answer is valid."""
        grid = self.grid()
        if len(self.looks) == 1:
            return super().finished(top, runner_up, look)
        law, sigma, price = self.noise.law, self.noise.sigma, self.price
        if self.settings.radii is None:
            last = look >= len(self.looks) - 1
            return last | ~self._boundaries.gains(top, runner_up, look, law, sigma, price)
        return self._boundaries.finished(top, runner_up, look, law, sigma, grid, price)

    def gains(
        self, top: Ints, runner_up: Ints, look: Ints, radius: Floats, tolerance: float
    ) -> Bools:
        """Whose votes go on after these looks, at which they certify these radii."""
        law, sigma = self.noise.law, self.noise.sigma
        if self.settings.radii is None:
            price = self.price * (1 + _PRICE_TOLERANCE)
            return self._boundaries.gains(top, runner_up, look, law, sigma, price)
        best = self._boundaries.reach(top, runner_up, look, law, sigma, self.price)
        return _more_steps(best, radius, self.grid(), tolerance)

    @cached_property
    def price(self) -> float:
        """What n votes must bring: grid steps, or where no radii are asked for a radius."""
        if self.settings.radii is not None:
            return PRICES[self.settings.keep]
        return RADIUS_PRICES[self.settings.keep] * self.largest_radius()

    @property
    def metadata(self) -> dict[str, Any]:
        """How its bounds hold at all looks."""
        return {"boundaries": "exact"}

    @classmethod
    def recorded(cls, settings: Settings, noise: Noise, metadata: Metadata) -> Estimator:
        """The estimator of a record; that of 0.1 where no boundaries are named."""
        if "boundaries" in metadata:
            return cls(settings, noise)
        earlier = UnionBoundTopClass if cls.bounds == "top-class" else UnionBound
        return earlier(settings, noise)

    def record_problem(self, metadata: Metadata) -> str | None:
        """Why its boundaries cannot be computed again; None where they can."""
        if metadata["boundaries"] == "exact":
            return None
        return f"its boundaries {metadata['boundaries']!r} are not the exact ones"


class SequentialTopClass(Sequential):
    """Exact group-sequential bounds of the top class."""

    bounds = "top-class"


class UnionBound(Estimator):
    """`sequential` of records of version 0.1: bounds at looks whose levels sum to alpha."""

    stops_early = True

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """Numbers of estimation votes at which votes might stop, rising."""
        return sequential.looks(self.settings.n, per_doubling=self._saving.per_doubling)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Confidence level of each look, in all at most alpha."""
        alpha, looks = self.settings.alpha, self.looks
        if len(looks) == 1:
            return (alpha,)
        return sequential.levels(alpha, looks, self._saving.early_share)

    @property
    def _saving(self) -> Saving:
        return UNION_BOUND_KEEPS[self.settings.keep]

    def gains(
        self, top: Ints, runner_up: Ints, look: Ints, radius: Floats, tolerance: float
    ) -> Bools:
        """Whose votes went on after these looks, at which they certify these radii."""
        grid, saving = self.grid(), self._saving
        steps = max(1, np.unique(grid[grid > 0]).size if saving.of_curve else 1)
        best = sequential.reachable_radius(
            top,
            runner_up,
            look,
            self.looks,
            self.levels,
            self.noise.law,
            self.noise.sigma,
            BOUNDS[self.bounds],
            futility=saving.price * steps,
        )
        return _more_steps(best, radius, grid, tolerance)


def _more_steps(best: Floats, radius: Floats, grid: Floats, tolerance: float) -> Bools:
    """Where the best radius reaches more steps; one missed by a rounding counts as reached."""
    reachable = sequential.grid_steps(best * (1 - tolerance), grid)
    return np.asarray(reachable > sequential.grid_steps(radius * (1 + tolerance), grid))


class UnionBoundTopClass(UnionBound):
    """`sequential-top-class` of records of version 0.1."""

    bounds = "top-class"


def largest_radius(metadata: Metadata) -> float:
    """The largest radius with this metadata; infinity if unknown, InputError if unreadable."""
    kind = ESTIMATORS.get(str(metadata.get("estimator")), Estimator)
    return kind.largest_recorded(metadata)


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
