"""Scan certificates: how far one parameter may move, from votes along its whole axis.

For a family of one parameter under the uniform law on [-sigma, sigma], with h_c(t) = 1 where
f(T_t x) = c and 0 elsewhere,

    p_c(delta) = 1 / (2 sigma) * integral of h_c over the window [delta - sigma, delta + sigma].

All windows look at ONE function of t. So h is voted on once along the axis, and every delta is
judged by the votes inside its own window, instead of by the worst case that Corollary 1 assumes.

Votes come in pairs. A pass cuts the axis into strata of width s and casts two votes, X and Y, at
independent uniform places of each. For a rival c of the chosen class c_A let z = 1 for a vote for
c_A, -1 for c, 0 for others. A pair is given the weight, for a bet lam in [0, 1],

    w = exp(lam * max(zX, zY)) * (1 - lam * |zX - zY| / 2).

Lemma: E w <= exp(lam * m), m = the mean of z in the stratum. Hence, with B a run of strata close
to the window of delta and d the length by which run and window differ, in strata,

    E(delta) = mean over lam of  product over passes of  exp(-lam d) * product of w over B

has an expectation of at most 1 wherever p_A(delta) <= p_c(delta), and ever reaches 2 / alpha with
probability at most alpha / 2, after whatever number of passes (Ville's inequality). Cells of delta
are tested outwards from 0, all at that threshold, and a side ends at its first failure: a false
certificate must pass the test at the FIRST delta where c_A does not lead, one fixed test a side.
So neither the number of cells, nor of rivals, nor of passes costs anything (proof: docs/scan.md).

Pairs that agree tell h almost exactly, pairs that differ mark where it is uncertain: where h
changes only now and then, the ends are off by about log(1 / alpha) / n, not by 1 / sqrt(n).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certifl.errors import InputError
from certifl.smoothing.bounds import Bools, Floats, Ints

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
        """The t of some votes: a uniform position in the stratum each of them belongs to.

        Args:
            votes: numbers of votes, from 0; votes 2 i and 2 i + 1 of a pass share its stratum i.
            uniforms: one independent draw from [0, 1) each.
        """
        number = np.asarray(votes, dtype=np.int64)
        current = np.searchsorted(self.totals, number, side="right")
        starts = np.concatenate([[0], self.totals[:-1]])
        strata = np.asarray(self.passes)[current]
        position = (number - starts[current]) // 2 + np.asarray(uniforms, dtype=np.float64)
        return self.low + position * (self.width / strata)


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

    The run of a delta is the one whose center lies nearest; where the scan ends, it stays inside.
    Run and window differ at the left edge by |offset - misfit| and at the right by |offset +
    misfit|, together 2 max(|offset|, |misfit|), where misfit is half the difference in length.
    """

    def __init__(self, scan: Scan, strata: int) -> None:
        self.scan, self.strata, self.width = scan, strata, scan.width / strata
        self.length = self._length()

    def _length(self) -> int:
        """Strata in a run: about a window's, of the parity that centers a run on 0."""
        window, zero = 2.0 * self.scan.sigma / self.width, -self.scan.low / self.width

        def difference(length: int) -> float:
            away = zero - length / 2
            return max(abs(away - np.rint(away)) + 0.5, abs(window - length) / 2)

        near = int(np.rint(window))
        return min(
            (k for k in (near, near - 1, near + 1) if 0 <= k <= self.strata), key=difference
        )

    def center(self, start: ArrayLike) -> Floats:
        """The delta in the middle of the run that begins with stratum `start`."""
        return self.scan.low + (np.asarray(start) + self.length / 2) * self.width

    def turns(self) -> Floats:
        """The deltas at which the nearest run changes."""
        first, last = 0, self.strata - self.length
        if self.scan.periodic:
            first, last = -self.length, self.strata
        return self.center(np.arange(first, last) + 0.5)

    def nearest(self, delta: Floats) -> Ints:
        """First strata of the nearest runs."""
        start = np.rint((delta - self.scan.low) / self.width - self.length / 2).astype(np.int64)
        return start if self.scan.periodic else np.clip(start, 0, self.strata - self.length)

    def discrepancy(self, start: Ints, lows: Floats, highs: Floats) -> Floats:
        """In strata, the most that a run and the window of a delta in [low, high] differ by."""
        center = self.center(start)
        offset = np.maximum(np.abs(lows - center), np.abs(highs - center))
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


# Bets from nearly 1 (votes all agree) down to where 1e6 votes that all differ are best betted on,
# and the share of each: large ones first, for h seldom changes within a stratum.
BETS: Floats = np.asarray(0.95 * 2.0 ** (-0.5 * np.arange(14)), dtype=np.float64)
SHARES: Floats = (1.0 - 2.0**-40) / np.arange(1, 15) / np.sum(1.0 / np.arange(1, 15))


def log_weight(bet: float, tops: ArrayLike, ones: ArrayLike, twos: ArrayLike) -> Floats:
    """Logarithm of the product of the weights w of some pairs (see the head of this file).

    Args:
        bet: lam, in [0, 1).
        tops: sum over the pairs of max(zX, zY).
        ones, twos: how many pairs have z that differ by 1, and by 2.
    """
    return (
        bet * np.asarray(tops)
        + np.log1p(-bet / 2) * np.asarray(ones)
        + np.log1p(-bet) * np.asarray(twos)
    )


@dataclass(frozen=True)
class _Evidence:
    """What the pairs in the windows say for c_A against one rival; (images, cells) each.

    Attributes:
        tops: sum over pairs of max(zX, zY).
        ones, twos: pairs whose z differ by 1, by 2.
    """

    tops: Ints
    ones: Ints
    twos: Ints

    def exceeds(self, discrepancy: Floats, alpha: float) -> Bools:
        """Where E(delta) >= 2 / alpha: the test of one side, at level alpha / 2."""
        total = np.zeros(self.tops.shape)
        for bet, share in zip(BETS, SHARES, strict=True):
            log = log_weight(bet, self.tops - discrepancy, self.ones, self.twos)
            total += share * np.exp(np.minimum(log, 100.0))
        return total >= 2.0 / alpha * (1.0 + _SLACK)

    def hopeful(self) -> Bools:
        """Where more votes may still certify: margin plus two standard errors is positive."""
        margin = self.tops - 0.5 * self.ones - self.twos
        return margin + 2.0 * np.sqrt(0.25 * self.ones + self.twos + 1.0) > 0


@dataclass(frozen=True)
class Reading:
    """What some passes of a scan certify; one row per image.

    Attributes:
        certified: (m,) whether c_A is certified at 0 at all.
        interval: (m, 2) ends of the certified interval, low <= 0 <= high; zeros where not.
        hope: (m, 2) ends that more votes may reach at best, judged by the votes so far.
    """

    certified: Bools
    interval: Floats
    hope: Floats


def read_scan(scan: Scan, votes: ArrayLike, chosen: ArrayLike, alpha: float) -> Reading:
    """The certified interval around 0 of each image, from the votes of whole passes.

    Guarantee: for each image, with probability at least 1 - alpha over its votes, c_A is the one
    most likely class of the smoothed classifier at every delta of the interval; at whichever pass
    the reading is taken, and whatever made the votes stop there.

    Args:
        scan: where the votes were cast.
        votes: (m, v) classes, in the order of `Scan.parameters`; v is one of `scan.totals`.
        chosen: (m,) c_A of each image, from OTHER votes.
        alpha: probability of claiming too much, per image.

    Raises:
        InputError: a number of votes that ends within a pass, or alpha out of range.
    """
    classes, c_a = np.asarray(votes), np.asarray(chosen)
    if not 0.0 < alpha < 1.0:
        raise InputError(f"alpha must lie strictly between 0 and 1, not {alpha}; 0.001 is usual.")
    cells = Cells(scan, _whole_passes(scan, classes))
    shape = (len(classes), len(cells.lows))
    passed, hopeful = np.ones(shape, np.bool_), np.ones(shape, np.bool_)
    near = slice(0, shape[1])
    for rival in _rivals(classes):
        against = np.flatnonzero(np.ones(len(c_a), np.bool_) if rival is None else c_a != rival)
        if len(against) == 0:
            continue
        evidence = _evidence(cells, classes[against], c_a[against], rival, near)
        passed[against, near] &= evidence.exceeds(cells.discrepancy[near], alpha)
        hopeful[against, near] &= evidence.hopeful()
        near = cells.around_zero(passed | hopeful)  # beyond, nothing can be connected with 0
    return Reading(
        certified=passed[:, cells.zero],
        interval=cells.connected(passed),
        hope=cells.connected(hopeful),
    )


def _whole_passes(scan: Scan, classes: NDArray[np.integer]) -> int:
    after = np.flatnonzero(scan.totals == classes.shape[-1])
    if classes.ndim != 2 or len(after) != 1:
        raise InputError(
            f"A scan is read after whole passes: votes (images, v) with v one of "
            f"{scan.totals.tolist()}, not of shape {classes.shape}."
        )
    return int(after[0]) + 1


def _rivals(classes: NDArray[np.integer]) -> list[int | None]:
    """The classes that got votes, most first; last a class that got none."""
    voted, counts = np.unique(classes, return_counts=True)
    return [*voted[np.argsort(-counts, kind="stable")].tolist(), None]


def _evidence(
    cells: Cells,
    votes: NDArray[np.integer],
    chosen: NDArray[np.integer],
    rival: int | None,
    near: slice,
) -> _Evidence:
    """The pairs in the windows of the cells `near`, as they speak for c_A against a rival."""
    sums = [np.zeros((len(votes), len(cells.lows[near])), np.int64) for _ in range(3)]
    for runs, start, pairs in zip(cells.runs, cells.starts, _pairs(cells, votes), strict=True):
        z = (pairs == chosen[:, None, None]).astype(np.int8)
        if rival is not None:
            z -= pairs == rival
        gap = np.abs(z[..., 0] - z[..., 1])
        for total, kind in zip(sums, (z.max(axis=2), gap == 1, gap == 2), strict=True):
            total += runs.sums(start[near], kind)
    return _Evidence(*sums)


def _pairs(cells: Cells, votes: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    """The votes of each pass as (images, strata, 2)."""
    start = 0
    for runs in cells.runs:
        stop = start + 2 * runs.strata
        yield votes[:, start:stop].reshape(len(votes), runs.strata, 2)
        start = stop
