"""Sequential certification by exact boundaries: bounds at every look, and when to stop.

Bounds. `Limits` (see `boundaries`) are upper confidence limits of the probability of an event that
hold at all looks at once. The votes that are not for c_A give p_A >= 1 - limit; the runner-up's
votes give p_B <= limit. The largest count among the other classes is never below that of the true
runner-up, one fixed class, and limits increase with the count; so the two families at 0.9 and 0.1
of the level need no factor for the number of classes, as at a single look.

A certificate is a function of the counts at the look at which its votes stopped, and of nothing
else: all limits of all looks hold at once with probability 1 - alpha, so those of that look do,
whatever made the votes stop. What an earlier look had certified is not needed to read it.

Stopping. Reported radii are floored to a grid, whose first step is "certified at all". The PRICE
of n votes is a number of grid steps: an image goes on as long as some later look, at n' votes,
gains its next step with a chance of at least

    price * (n' - votes so far) / n ,

that is, while further votes are expected to bring at least `price` steps per n votes. Where no
radii are named, what is reported is a curve and the average radius, so the price is a radius: an
image goes on while the chance of a gain times the gain is worth the votes. Chances are estimated
from the votes so far; they decide about the number of votes, never about validity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certifl.errors import InputError
from certifl.smoothing.bounds import RUNNER_UP_SHARE, Bools, Floats, Ints, clopper_pearson_upper
from certifl.smoothing.laws import Law
from certifl.smoothing.sequential import LARGEST_CHANCE, count_at_most, grid_steps

_MARGIN = 2.0**-20
# The share of its own increment that a look keeps for rounding; half of it where a boundary is
# computed, so that what `Limits` takes for crossed is.
_SPARE = 16 * _MARGIN
# Windows in standard deviations; their size costs time and level, never validity.
_ABOVE, _STEP_ABOVE = 4.5, 5.0
_FINEST, _PER_DEVIATION = 2**11, 3
_BLOCK = 16


class Limits:
    """Upper confidence limits of q; all looks' hold at once with probability 1 - sum(levels).

    Attributes:
        looks: vote counts at which M is looked at; two at least.
        levels: their increments of level.
        grid: the values that limits take, but at the last look.
    """

    def __init__(
        self, looks: tuple[int, ...], levels: tuple[float, ...], more: Sequence[float] = ()
    ) -> None:
        self.looks, self.levels = looks, levels
        # About three points a standard deviation of sqrt(M / n), 1 / (2 sqrt(n)).
        points = 2.0 * _PER_DEVIATION * np.sqrt(looks[-1])
        size = int(min(_FINEST, 2 ** np.ceil(np.log2(points))))
        even = (np.arange(1, size) / size) ** 2
        self.grid = np.unique(np.concatenate([even, np.asarray(more, dtype=np.float64)]))
        self._sums = np.cumsum(levels)
        self._boundaries = np.full((len(self.grid), len(looks)), -1, dtype=np.int64)
        self._computed = np.zeros(len(self.grid), dtype=np.int64)

    def upper(self, count: Ints, look: Ints) -> Floats:
        """The limits of counts of events, each at its look (an index from 0)."""
        result = np.ones(len(count))
        for j in np.unique(look):
            rows = look == j
            distinct, back = np.unique(count[rows], return_inverse=True)
            result[rows] = self._at_look(distinct, int(j))[back]
        return result

    def _at_look(self, counts: Ints, j: int) -> Floats:
        votes, level = self.looks[j], self.levels[j]
        safe = clopper_pearson_upper(counts, votes, level * (1.0 - _SPARE))
        end = np.searchsorted(self.grid, safe)  # from here on all points are crossed for certain
        start = np.searchsorted(self.grid, clopper_pearson_upper(counts, votes, self._sums[j]))
        self._compute(np.unique(np.concatenate([*map(np.arange, start, end)])), j)
        boundary = self._boundaries[:, j]
        for row, count in enumerate(counts):
            crossed = boundary[start[row] : end[row]] >= count
            end[row] -= int(np.argmin(np.append(crossed[::-1], False)))
        result = np.append(self.grid, 1.0)[end]
        last = j == len(self.looks) - 1
        return np.minimum(result, clopper_pearson_upper(counts, votes, level)) if last else result

    def _compute(self, points: Ints, j: int) -> None:
        missing = points[self._computed[points] <= j]
        until = min(len(self.looks), j + 1 + len(self.looks) // 8)
        for start in range(0, len(missing), _BLOCK):
            block = missing[start : start + _BLOCK]
            self._boundaries[block, :until] = boundaries(
                self.grid[block], self.looks[:until], self.levels[:until]
            )
            self._computed[block] = until


@lru_cache(maxsize=32)
def limits(
    looks: tuple[int, ...], levels: tuple[float, ...], more: tuple[float, ...] = ()
) -> Limits:
    """`Limits`, computed once per setting."""
    return Limits(looks, levels, more)


def boundaries(q: Floats, looks: Sequence[int], levels: Sequence[float]) -> Ints:
    """b_j(q), the largest counts of events that reject q, (points, looks); -1 where none does.

    Args:
        q: probabilities in (0, 1), near each other if they are many: they share a window.
        looks: increasing vote counts.
        levels: their increments of level.
    """
    result = np.empty((len(q), len(looks)), dtype=np.int64)
    state: Floats = np.ones((len(q), 1))
    low = np.zeros(len(q), dtype=np.int64)
    spent, allowed, before = np.zeros(len(q)), 0.0, 0
    for j, (votes, level) in enumerate(zip(looks, levels, strict=True)):
        step, first, lost = _step_distribution(q, votes - before, level)
        joined = [np.convolve(a, b) for a, b in zip(state, step, strict=True)]
        state = np.array(joined, dtype=np.float64)
        low, before, allowed = low + first, votes, allowed + level
        spent = spent + lost
        total = np.cumsum(state, axis=1) * (1.0 + _MARGIN)
        crossed = np.sum(total <= (allowed - spent)[:, None], axis=1)
        cost = np.take_along_axis(total, np.maximum(crossed - 1, 0)[:, None], axis=1)[:, 0]
        spent = spent + np.where(crossed > 0, cost, 0.0)
        while np.any(more := _own_level_allows(low + crossed, votes, q, level)):
            crossed, spent = crossed + more, np.where(more, allowed, spent)
        result[:, j] = low + crossed - 1
        state, low = _window(state, crossed, q, votes, low), low + crossed
    return result


def _own_level_allows(count: Ints, votes: int, q: Floats, level: float) -> NDArray[np.bool_]:
    """Whether so few events have at most the probability that a look alone may spend."""
    some = np.minimum(count, votes - 1)
    tail = special.betaincc(some + 1.0, votes - some, q)
    return (count < votes) & (tail <= level * (1.0 - _SPARE / 2.0))


def _step_distribution(q: Floats, votes: int, level: float) -> tuple[Floats, Ints, Floats]:
    """Distributions of the events of a step, where they start, and what is cut off below."""
    mean, deviation = votes * q, np.sqrt(votes * q * (1.0 - q))
    first, lost = _start_of_step(q, votes, level)
    last = np.minimum(votes, np.ceil(mean + _STEP_ABOVE * deviation + 4.0))
    k = first[:, None] + np.arange(int(np.max(last - first)))
    ratio = np.maximum(0.0, (votes - k) / (k + 1.0)) * (q / (1.0 - q))[:, None]
    pmf = np.cumprod(np.concatenate([np.ones((len(q), 1)), ratio], axis=1), axis=1)
    last = np.minimum(first + k.shape[1], votes)
    above = np.where(last < votes, special.bdtrc(last, votes, q), 0.0)
    pmf *= ((1.0 - lost - above) / pmf.sum(axis=1))[:, None]
    pmf[:, -1] += above
    return pmf, first.astype(np.int64), lost


def _start_of_step(q: Floats, votes: int, level: float) -> tuple[Floats, Floats]:
    """Where the laws of a step are cut off below, and the probability of less, rounded up."""
    mean, deviation = votes * q, np.sqrt(votes * q * (1.0 - q))
    deep = 1.0 - special.ndtri(level * _MARGIN / 2.0)
    while True:
        first = np.maximum(0.0, np.floor(mean - deep * deviation))
        lost = special.bdtr(np.maximum(first - 1.0, 0.0), votes, q) * (1.0 + _MARGIN)
        lost = np.where(first > 0.0, lost, 0.0)
        if np.all(lost <= level * _MARGIN):
            return first, lost
        deep *= 1.25


def _window(state: Floats, crossed: Ints, q: Floats, votes: int, low: Ints) -> Floats:
    """The distribution of what did not cross; what lies above the window goes to its end."""
    top = np.ceil(votes * q + _ABOVE * np.sqrt(votes * q * (1.0 - q)) + 4.0).astype(np.int64)
    width = max(1, int(np.max(top - low - crossed)) + 1)
    at = crossed[:, None] + np.arange(state.shape[1])
    inside = np.take_along_axis(state, np.minimum(at, state.shape[1] - 1), axis=1)
    remaining = np.where(at < state.shape[1], inside, 0.0)
    remaining[:, width - 1 : width] += remaining[:, width:].sum(axis=1, keepdims=True)
    return remaining[:, :width]


PER_DOUBLING = 8
_EARLY_SHARE = 0.25
# By how much overlap lets a boundary exceed the Clopper-Pearson limit of the look's own level,
# about; only forecasts use it.
_OVERLAP = 2.5
_FRACTION_BITS = 40
# Chances at which a gain of radius is looked at.
_CHANCES = (0.5, 0.1, 0.02)


def increments(alpha: float, looks: Sequence[int]) -> tuple[float, ...]:
    """The level of each look: a quarter of alpha over the early looks, the rest at the last.

    Of the early quarter, the share sqrt(n_j / n_(m-1)) is spent until look j. The exact sum of all
    levels does not exceed alpha, also after rounding.

    Args:
        alpha: the probability of a false certificate allowed for one image, in (0, 1).
        looks: increasing vote counts.
    """
    if len(looks) == 1:
        return (alpha,)
    until = [0.0, *(math.sqrt(votes / looks[-2]) for votes in looks[:-1])]
    early = [_EARLY_SHARE * alpha * (b - a) for a, b in itertools.pairwise(until)]
    return (*early, (alpha - math.fsum(early)) * (1.0 - 2.0**-49))


def reported_misses(radii: Floats, law: Law, sigma: float) -> tuple[float, ...]:
    """The probabilities of a miss below which radii are certified by the top class alone.

    With these among the values of the limits, no reported radius is missed by a rounding.

    Returns:
        For "certified at all" and each positive radius the largest multiple q of 2**-40, so that 1
        - q is exact, with law.radius(sigma, 1 - q, q) >= radius; those of at least 2**-40.
    """
    thresholds = np.unique(np.append(radii[radii > 0], np.nextafter(0.0, 1.0)))
    unit = 2.0**-_FRACTION_BITS
    low, high = np.zeros(len(thresholds)), np.full(len(thresholds), 2.0 ** (_FRACTION_BITS - 1))
    for _ in range(_FRACTION_BITS):
        middle = np.floor((low + high) / 2.0)
        enough = law.radius(sigma, 1.0 - middle * unit, middle * unit) >= thresholds
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return tuple((low[low > 0] * unit).tolist())


@dataclass(frozen=True)
class GroupSequential:
    """Bounds of the top class, or of it and the runner-up, at looks fixed in advance.

    Attributes:
        looks, levels: vote counts and increments of level; two or more.
        runner_up: whether the runner-up is bounded by its own votes, at a tenth of the level.
        misses: values that limits of misses shall take besides those of their own grid.
    """

    looks: tuple[int, ...]
    levels: tuple[float, ...]
    runner_up: bool = True
    misses: tuple[float, ...] = ()

    @cached_property
    def _of_misses(self) -> Limits:
        share = 1.0 - RUNNER_UP_SHARE if self.runner_up else 1.0
        return limits(self.looks, tuple(share * level for level in self.levels), self.misses)

    @cached_property
    def _of_runner_up(self) -> Limits:
        return limits(self.looks, tuple(RUNNER_UP_SHARE * level for level in self.levels))

    def bounds(self, top: Ints, runner_up: Ints, look: Ints) -> tuple[Floats, Floats]:
        """(p_lower, p_upper) of counts, each at its look; with probability 1 - alpha all hold.

        Args:
            top: votes for the selected class.
            runner_up: largest count among the other classes.
            look: which look, from 0.

        Raises:
            InputError: more votes than the look has, or no such look.
        """
        top, runner_up, look = self._checked(top, runner_up, look)
        miss = self._of_misses.upper(np.array(self.looks)[look] - top, look)
        p_lower = 1.0 - miss
        p_lower = np.where(1.0 - p_lower < miss, np.nextafter(p_lower, 0.0), p_lower)
        if not self.runner_up:
            return p_lower, miss
        return p_lower, np.minimum(self._of_runner_up.upper(runner_up, look), miss)

    def reach(
        self, top: Ints, runner_up: Ints, look: Ints, law: Law, sigma: float, price: float
    ) -> Floats:
        """The largest radius that is worth further votes at this price of n votes, in steps."""
        top, runner_up, look = self._checked(top, runner_up, look)
        later, share = self._ahead(look)
        chance = np.minimum(LARGEST_CHANCE, price * share)
        return self._forecast(top, runner_up, look, later, chance, law, sigma).max(axis=0)

    def gains(
        self, top: Ints, runner_up: Ints, look: Ints, law: Law, sigma: float, price: float
    ) -> Bools:
        """Whether some later look is worth its votes at this price of n votes, a radius."""
        top, runner_up, look = self._checked(top, runner_up, look)
        later, share = self._ahead(look)
        now = self._forecast(top, runner_up, look, look[None], np.array(0.5), law, sigma)
        worth = np.zeros(len(look), np.bool_)
        for chance in _CHANCES:
            then = self._forecast(top, runner_up, look, later, np.array(chance), law, sigma)
            worth |= np.any((share > 0) & (chance * (then - now) >= price * share), axis=0)
        return worth

    def finished(
        self,
        top: Ints,
        runner_up: Ints,
        look: Ints,
        law: Law,
        sigma: float,
        grid: Floats,
        price: float,
    ) -> Bools:
        """Which images may stop: no next grid step is worth further votes. Any answer is valid."""
        done = np.asarray(look) >= len(self.looks) - 1
        reachable = grid_steps(self.reach(top, runner_up, look, law, sigma, price), grid)
        sums = np.cumsum(self.levels)[look]
        at_most = self._at_level(top, runner_up, np.array(self.looks)[look], sums)
        uncertain = ~done & (reachable <= grid_steps(law.radius(sigma, *at_most), grid))
        rows = np.flatnonzero(uncertain)  # elsewhere the exact bounds cannot have that step yet
        exact = law.radius(sigma, *self.bounds(top[rows], runner_up[rows], look[rows]))
        done[rows] = reachable[rows] <= grid_steps(exact, grid)
        return cast(Bools, done)

    def _ahead(self, look: Ints) -> tuple[Ints, Floats]:
        """Later looks (1, 2, 4, ... on, and the last; by images) and the votes until then / n."""
        last, votes = len(self.looks) - 1, np.array(self.looks, dtype=np.float64)
        on = np.array([*(2**i for i in range(last.bit_length())), last])
        later = np.minimum(look + on[:, None], last)
        return later, (votes[later] - votes[look]) / votes[-1]

    def _forecast(
        self,
        top: Ints,
        runner_up: Ints,
        look: Ints,
        later: Ints,
        chance: Floats,
        law: Law,
        sigma: float,
    ) -> Floats:
        """Radii that later looks exceed with such a chance, about."""
        votes = np.array(self.looks, dtype=np.float64)
        now, then = votes[look], votes[later]
        most = count_at_most(top, now, then, chance)
        least = then - count_at_most(now - runner_up, now, then, chance)
        level = np.minimum(_OVERLAP * np.array(self.levels), np.cumsum(self.levels))
        level[-1] = self.levels[-1]
        p_lower, p_upper = self._at_level(most, np.minimum(least, then - most), then, level[later])
        return np.asarray(law.radius(sigma, p_lower, p_upper))

    def _at_level(
        self, top: Floats | Ints, runner_up: Floats | Ints, votes: Floats | Ints, level: Floats
    ) -> tuple[Floats, Floats]:
        """Clopper-Pearson limits without rounding outward: for forecasts, not for certificates."""
        share = RUNNER_UP_SHARE if self.runner_up else 0.0
        some = np.maximum(top, 1)
        p_lower = special.betaincinv(some, votes - some + 1.0, level * (1.0 - share))
        p_lower = np.where(top > 0, p_lower, 0.0)
        if not self.runner_up:
            return p_lower, 1.0 - p_lower
        some = np.minimum(runner_up, votes - 1)
        p_upper = special.betainccinv(some + 1.0, votes - some, level * share)
        return p_lower, np.minimum(np.where(runner_up < votes, p_upper, 1.0), 1.0 - p_lower)

    def _checked(self, top: Ints, runner_up: Ints, look: Ints) -> tuple[Ints, Ints, Ints]:
        top, runner_up, look = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(value)) for value in (top, runner_up, look))
        )
        if np.any(look < 0) or np.any(look >= len(self.looks)):
            raise InputError(f"A look is an index from 0 to {len(self.looks) - 1} into the looks.")
        if np.any(top + runner_up > np.array(self.looks)[look]):
            raise InputError(
                "More votes than this look has; give the counts of exactly looks[look] votes."
            )
        return top, runner_up, look
