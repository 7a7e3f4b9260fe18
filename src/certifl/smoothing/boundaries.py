"""Exact group-sequential boundaries: confidence limits that hold at every look at once.

A vote is an event (a miss: not for c_A) or it is not. After n_1 < ... < n_m = n votes the count of
events is M_1, ..., M_m, with M_j ~ Binomial(n_j, q). Increments of level a_1, ..., a_m are fixed
before the first vote. For one q, the boundary b_j(q) is the largest b with

    P_q(no crossing before look j, M_j <= b)  <=  a_1 + ... + a_j - what earlier looks spent;

a crossing is M_j <= b_j(q). So P_q(any crossing) <= a_1 + ... + a_m = a, although the same votes
are looked at again and again; the union bound pays for every look as if it had fresh votes.

From tests to limits. The grid G holds the squares (i / N)^2, N a power of two, and the values that
reported radii ask for. The limit of a count M at look j is the smallest g in G such that M <=
b_j(g') for ALL g' >= g in G. If the true q exceeds it, then M_j <= b_j(g*), with g* the largest
point of G below q. The larger q, the less likely are so few events (draw the votes of both from
the same uniform numbers), so that happens at ANY look with probability at most P_g*(any crossing)
<= a: for every q, on the grid or not, and for any rule of stopping. Asking it of all g' >= g makes
limits increase with M even where b_j(q) should decrease with q.

At the last look the Clopper-Pearson limit U(M_m, n, a_m) is taken where it is smaller. Then the
event is M_j <= b_j(g*) at an early look (probability at most a_1 + ... + a_(m-1)) or M_m <= c, the
larger of b_m(g*) and the Clopper-Pearson boundary of q: in the first case it is a crossing of
b(g*), in the second the last look adds at most a_m. At two looks or more the same could cost more
than a; so it is done at that one alone.

Points g >= U(M, n_j, a_j) need no computation: P_g(M_j <= M) <= a_j, and the boundary never lies
below the Clopper-Pearson boundary of its own increment. Nor do points below U(M, n_j, a_1 + ... +
a_j), which no boundary rejects. The points between are computed when they are first needed, once
per setting.

Rounding is outward. The distribution of M_j is kept on a window; what lies above it is moved down
to its upper end, and so is the upper tail of a step: fewer events, more crossings. The lower tail
of a step is cut off and counted as a crossing. All other operations add or multiply positive
numbers: a convolution of w terms errs by at most (w + 1) 2^-53 of each result, a step's
distribution by 4 w 2^-53. With 10^5 terms and 100 looks that is below 10^-8 in all; what a look
spends is taken to be larger by `_MARGIN` = 2^-20, 10^-6 of itself.

Source: Armitage, McPherson and Rowe 1969 (the recursion); Jennison and Turnbull 2000, chapters 7
(increments of level fixed in advance), 9 (repeated confidence intervals) and 12 (binomial counts).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certifl.smoothing.arrays import Floats, Ints
from certifl.smoothing.bounds import clopper_pearson_upper

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
        size = _grid_size(looks[-1])
        even = (np.arange(1, size) / size) ** 2
        self.grid = np.unique(np.concatenate([even, np.asarray(more, dtype=np.float64)]))
        self._sums = np.cumsum(levels)
        self._boundaries = np.full((len(self.grid), len(looks)), -1, dtype=np.int64)
        self._computed = np.zeros(len(self.grid), dtype=np.int64)

    def upper(self, count: Ints, look: Ints) -> Floats:
        """The limits of counts of events, each at its look (an index from 0)."""
        found = np.ones(len(count))
        for j in np.unique(look):
            rows = look == j
            distinct, back = np.unique(count[rows], return_inverse=True)
            found[rows] = self._at_look(distinct, int(j))[back]
        return found

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
        found = np.append(self.grid, 1.0)[end]
        last = j == len(self.looks) - 1
        return np.minimum(found, clopper_pearson_upper(counts, votes, level)) if last else found

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


def _grid_size(n: int) -> int:
    """About three points a standard deviation of sqrt(M / n), 1 / (2 sqrt(n)); a power of two."""
    wanted = 2.0 * _PER_DEVIATION * np.sqrt(n)
    return int(min(_FINEST, 2 ** np.ceil(np.log2(wanted))))


def boundaries(q: Floats, looks: Sequence[int], levels: Sequence[float]) -> Ints:
    """b_j(q), the largest counts of events that reject q, (points, looks); -1 where none does.

    Args:
        q: probabilities in (0, 1), near each other if they are many: they share a window.
        looks: increasing vote counts.
        levels: their increments of level.
    """
    found = np.empty((len(q), len(looks)), dtype=np.int64)
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
        found[:, j] = low + crossed - 1
        state, low = _window(state, crossed, q, votes, low), low + crossed
    return found


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
    kept = np.where(at < state.shape[1], inside, 0.0)
    kept[:, width - 1 : width] += kept[:, width:].sum(axis=1, keepdims=True)
    return kept[:, :width]
