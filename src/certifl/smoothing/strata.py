"""Where a scan casts its votes, and which of them stand for the window of a delta.

A scan covers a stretch of the axis of one parameter in passes. Each pass cuts the stretch into
strata of equal width and casts two votes in each. A window [delta - sigma, delta + sigma] need not
begin and end with a stratum: the run of strata nearest to it stands for it, and the length by
which the two differ is carried along, for h may be anything there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from certifl.errors import InputError
from certifl.smoothing.arrays import Bools, Floats, Ints

_STRATA_PER_WINDOW = 20
_FIRST_PASS = 1000
# In strata: far above the rounding of a dozen float64 terms, far below anything that matters.
_SLACK = 1e-9


@dataclass(frozen=True)
class Scan:
    """Where votes are cast, fixed before the first of them.

    Attributes:
        sigma: half the width of the law, and of a window.
        low, high: the stretch of the axis that is voted on.
        periodic: whether the axis closes, with period high - low (rotation: one full turn).
        passes: strata of each pass over the stretch; a pass casts two votes in each.
    """

    sigma: float
    low: float
    high: float
    periodic: bool
    passes: tuple[int, ...]

    def __post_init__(self) -> None:
        width = self.high - self.low
        if not (self.sigma > 0 and np.isfinite(width) and width >= 2 * self.sigma):
            raise InputError("A scan must span at least one window of 2 sigma, sigma positive.")
        if not self.periodic and not (self.low <= -self.sigma and self.high >= self.sigma):
            raise InputError("A scan must contain the window around 0, [-sigma, sigma].")
        if not self.passes or min(self.passes) < 1:
            raise InputError("A scan needs at least one pass of at least one stratum.")

    @property
    def width(self) -> float:
        """Length of the stretch."""
        return self.high - self.low

    @property
    def ends(self) -> tuple[float, float]:
        """The farthest delta to either side: a half turn, or the last full window."""
        if self.periodic:
            return -self.width / 2, self.width / 2
        return self.low + self.sigma, self.high - self.sigma

    @property
    def totals(self) -> Ints:
        """Votes cast after each pass."""
        return 2 * np.cumsum(np.asarray(self.passes, dtype=np.int64))

    def parameters(self, votes: ArrayLike, uniforms: ArrayLike) -> Floats:
        """The t of some votes: a uniform place in the stratum each of them belongs to.

        Args:
            votes: numbers of votes, from 0; votes 2 i and 2 i + 1 of a pass share its stratum i.
            uniforms: one independent draw from [0, 1) each.
        """
        number = np.asarray(votes, dtype=np.int64)
        current = np.searchsorted(self.totals, number, side="right")
        starts = np.concatenate([[0], self.totals[:-1]])
        strata = np.asarray(self.passes)[current]
        place = (number - starts[current]) // 2 + np.asarray(uniforms, dtype=np.float64)
        return self.low + place * (self.width / strata)


def passes_of(n: int, sigma: float, width: float) -> tuple[int, ...]:
    """Strata of the passes that n votes are spent in; each pass doubles the votes so far.

    The first pass has 1000 votes, or as many as give a window 20 strata; a last pass that would
    add less than half to the votes before it is joined to the one before.

    Args:
        n: votes at most; an odd one is left out.
        sigma: half the width of a window. width: of the stretch that is scanned.
    """
    if n < 2:
        raise InputError(f"A scan casts its votes in pairs and needs at least 2; got n = {n}.")
    least, first = 2 * _STRATA_PER_WINDOW * width / (2.0 * sigma), _FIRST_PASS
    while first < least:
        first *= 2
    totals = []
    while 1.5 * first <= n:
        totals.append(first)
        first *= 2
    if len(totals) == 0 or totals[-1] < n - 1:
        totals.append(n)
    votes = np.diff(np.asarray([0, *totals]))
    return tuple(int(v) // 2 for v in votes)


class Runs:
    """The runs of strata of one pass that stand for windows, and which of them for which delta.

    The run of a delta is the one whose centre lies nearest; where the scan ends, it stays inside.
    Run and window differ at the left edge by |offset - misfit| and at the right by |offset +
    misfit|, together 2 max(|offset|, |misfit|), where misfit is half the difference in length.
    """

    def __init__(self, scan: Scan, strata: int) -> None:
        self.scan, self.strata, self.width = scan, strata, scan.width / strata
        self.length = self._length()

    def _length(self) -> int:
        """Strata in a run: about a window's, of the parity that centres a run on 0."""
        window, zero = 2.0 * self.scan.sigma / self.width, -self.scan.low / self.width

        def difference(length: int) -> float:
            away = zero - length / 2
            return max(abs(away - np.rint(away)) + 0.5, abs(window - length) / 2)

        near = int(np.rint(window))
        return min(
            (k for k in (near, near - 1, near + 1) if 0 <= k <= self.strata), key=difference
        )

    def centre(self, start: ArrayLike) -> Floats:
        """The delta in the middle of the run that begins with stratum `start`."""
        return self.scan.low + (np.asarray(start) + self.length / 2) * self.width

    def turns(self) -> Floats:
        """The deltas at which the nearest run changes."""
        first, last = 0, self.strata - self.length
        if self.scan.periodic:
            first, last = -self.length, self.strata
        return self.centre(np.arange(first, last) + 0.5)

    def nearest(self, delta: Floats) -> Ints:
        """First strata of the nearest runs."""
        start = np.rint((delta - self.scan.low) / self.width - self.length / 2).astype(np.int64)
        return start if self.scan.periodic else np.clip(start, 0, self.strata - self.length)

    def discrepancy(self, start: Ints, lows: Floats, highs: Floats) -> Floats:
        """In strata, the most that a run and the window of a delta in [low, high] differ by."""
        centre = self.centre(start)
        offset = np.maximum(np.abs(lows - centre), np.abs(highs - centre))
        misfit = abs(self.scan.sigma - self.length * self.width / 2)
        return 2.0 * np.maximum(offset, misfit) / self.width + _SLACK

    def sums(self, start: Ints, per_stratum: Ints) -> Ints:
        """Sums over runs, (images, runs), of values (images, strata); a circle repeats."""
        before = np.zeros((len(per_stratum), self.strata + 1), np.int64)
        np.cumsum(per_stratum, axis=1, out=before[:, 1:])

        def up_to(index: Ints) -> Ints:
            rounds, rest = np.divmod(index, self.strata)
            return before[:, rest] + rounds * before[:, -1:]

        return up_to(start + self.length) - up_to(start)


class Cells:
    """The cells of delta: on each of them every pass so far has one nearest run.

    Later passes only split cells, so the runs of a delta never change. Were they chosen anew after
    each pass, E(delta) would be no product of fixed factors and stopping would not be free.
    """

    def __init__(self, scan: Scan, passes: int) -> None:
        self.runs = [Runs(scan, strata) for strata in scan.passes[:passes]]
        low, high = scan.ends
        edges = np.unique(np.concatenate([[0.0], *[runs.turns() for runs in self.runs]]))
        apart = _SLACK * min(runs.width for runs in self.runs)
        edges = edges[(edges > low + apart) & (edges < high - apart)]
        edges = np.concatenate([[low], edges[np.diff(edges, prepend=-np.inf) > apart], [high]])
        self.lows, self.highs = edges[:-1], edges[1:]
        self.zero = min(int(np.searchsorted(self.highs, 0.0, side="right")), len(self.highs) - 1)
        middles = (self.lows + self.highs) / 2
        self.starts = [runs.nearest(middles) for runs in self.runs]
        self.discrepancy = np.zeros(len(middles))
        for runs, start in zip(self.runs, self.starts, strict=True):
            self.discrepancy += runs.discrepancy(start, self.lows, self.highs)

    def around_zero(self, good: Bools) -> slice:
        """The cells that any image may still be connected with, given (images, cells)."""
        some: Bools = np.logical_or.reduce(good, axis=0)
        right = int(np.cumprod(some[self.zero :], dtype=np.int64).sum())
        left = int(np.cumprod(some[self.zero :: -1], dtype=np.int64).sum())
        return slice(max(0, self.zero - left), self.zero + right + 1)

    def connected(self, good: Bools) -> Floats:
        """Ends of the stretch of good cells around 0, rounded towards 0; zeros where 0 is bad."""
        right = np.cumprod(good[:, self.zero :], axis=1, dtype=np.int64).sum(axis=1)
        left = np.cumprod(good[:, self.zero :: -1], axis=1, dtype=np.int64).sum(axis=1)
        some = right > 0
        highs = self.highs[np.where(some, self.zero + right - 1, 0)]
        lows = self.lows[np.where(some, self.zero - left + 1, 0)]
        # Strictly inside: an end may be shared with a cell that failed.
        ends = np.stack([lows, highs], axis=1) * (1.0 - 2.0**-48)
        return np.where(some[:, None], ends, 0.0) + 0.0
