"""Do scan certificates claim too much? Known functions of the axis, 5000 runs a cell.

A run over-claims when its interval reaches the first delta, on either side, at which c_A does not
lead. The tolerance: of a procedure that errs with probability at most alpha = 0.05, over-claims in
5000 runs are bounded by Binomial(5000, 0.05), with mean 250 and standard deviation 15.4, so 300
and more (a share of 0.06), whose probability is below 1e-3, are evidence against it; a procedure
that errs in a share of 0.07 gives such evidence with probability 0.998. The planted defects at the
end must give it, or this harness would not notice them.

Rough functions change sides a hundred times within a stratum, so that every vote of a stratum is a
coin of the given bias: the least favorable case for votes in pairs. Smooth ones change once or
twice, where the method gains most and where an error of geometry would show.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom

from certifl.smoothing.scan import BETS, SHARES, Scan, log_weight, read_scan

pytestmark = pytest.mark.statistical
ALPHA, RUNS, BLOCK = 0.05, 5000, 500
A, B, C = 0, 1, 2


def rejected(overclaims: np.ndarray) -> bool:
    assert overclaims.shape == (RUNS,)
    return bool(binom.sf(int(overclaims.sum()) - 1, RUNS, ALPHA) < 1e-3)


def coin(t: np.ndarray, *shares: float) -> np.ndarray:
    """A comb of classes 0, 1, ... in these shares, with a thousand teeth per unit of t."""
    place = (t * 1000.0) % 1.0
    return np.searchsorted(np.cumsum(shares)[:-1], place, side="right").astype(np.int8)


@dataclass(frozen=True)
class Known:
    """A function of t and the first delta to either side where A does not lead (sigma = 1)."""

    h: Callable[[np.ndarray], np.ndarray]
    low: float
    high: float


def within(inside: Callable, outside: Callable, low: float, high: float) -> Callable:
    return lambda t: np.where((t >= low) & (t <= high), inside(t), outside(t))


def all_a(t: np.ndarray) -> np.ndarray:
    return np.zeros(t.shape, np.int8)


def all_b(t: np.ndarray) -> np.ndarray:
    return np.ones(t.shape, np.int8)


# Of three classes the lead over B is 0.22 up to |delta| = 0.5; a share x of the window outside
# takes 0.28 x from A and gives 0.34 x to B.
THREE = 0.5 + 2 * 0.22 / 0.62

KNOWN = {
    # The window around 0.7 covers [-0.3, 0.7] of A, one half.
    "interval": Known(within(all_a, all_b, -0.7, 0.7), -0.7, 0.7),
    "long interval": Known(within(all_a, all_b, -1.6, 1.6), -1.6, 1.6),
    "asymmetric": Known(within(all_a, all_b, -0.4, 1.4), -0.4, 1.4),
    # p_A is 0.8 up to |delta| = 0.5, from where it falls by 0.3 per unit.
    "comb": Known(
        within(lambda t: coin(t, 0.8, 0.2), lambda t: coin(t, 0.2, 0.8), -1.5, 1.5), -1.5, 1.5
    ),
    "three classes below one half": Known(
        within(lambda t: coin(t, 0.48, 0.26, 0.26), lambda t: coin(t, 0.2, 0.6, 0.2), -1.5, 1.5),
        -THREE,
        THREE,
    ),
    "tie": Known(lambda t: coin(t, 0.5, 0.5), 0.0, 0.0),
    "tie of three": Known(lambda t: coin(t, 1 / 3, 1 / 3, 1 / 3), 0.0, 0.0),
    # Votes for A hardly ever fail inside, never come outside, and p_A(0) is exactly one half.
    "nearly unanimous": Known(
        within(lambda t: coin(t, 0.97, 0.03), all_b, -50 / 97, 50 / 97), 0.0, 0.0
    ),
}
LINE = Scan(1.0, -3.0, 3.0, False, (80, 80, 160))
CIRCLE = Scan(1.0, -np.pi, np.pi, True, (101, 80, 160))


def cast(scan: Scan, known: Known, seed: int, runs: int = RUNS) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([20261, seed])
    spent = int(scan.totals[-1])
    for _ in range(runs // BLOCK):
        yield known.h(scan.parameters(np.arange(spent), rng.random((BLOCK, spent))))


def overclaims(scan: Scan, known: Known, votes: np.ndarray) -> np.ndarray:
    made = read_scan(scan, votes, np.full(len(votes), A), ALPHA)
    low, high = made.interval.T
    return made.certified & ((low <= known.low) | (high >= known.high))


@pytest.mark.parametrize("name", KNOWN)
def test_no_stopping_rule_makes_a_scan_claim_too_much(name):
    """The worst rule: it knows the truth and stops after the first pass that over-claims."""
    wrong = []
    for votes in cast(LINE, KNOWN[name], 1):
        after = [overclaims(LINE, KNOWN[name], votes[:, :total]) for total in LINE.totals]
        wrong.append(np.any(after, axis=0))
    assert not rejected(np.concatenate(wrong))


@pytest.mark.parametrize("name", ["asymmetric", "comb", "tie"])
def test_a_scan_of_a_circle_whose_strata_fit_nothing_claims_no_more(name):
    wrong = [overclaims(CIRCLE, KNOWN[name], votes) for votes in cast(CIRCLE, KNOWN[name], 2)]
    assert not rejected(np.concatenate(wrong))


def test_a_scan_comes_close_to_the_truth():
    """Without this, a scan that certifies nothing would pass all of the above."""
    known = KNOWN["asymmetric"]
    votes = np.concatenate(list(cast(LINE, known, 3, 2000)))
    low, high = read_scan(LINE, votes, np.full(len(votes), A), ALPHA).interval.mean(axis=0)
    assert known.low < low < known.low + 0.15
    assert known.high - 0.15 < high < known.high


def e_values(tops: np.ndarray, twos: np.ndarray, discrepancy: float | np.ndarray) -> np.ndarray:
    total = np.zeros(tops.shape)
    for bet, share in zip(BETS, SHARES, strict=True):
        log = log_weight(bet, tops - discrepancy, 0, twos)
        total += share * np.exp(np.minimum(log, 100.0))
    return total


@cache
def windows_of_a_long_axis() -> np.ndarray:
    """Which windows pass, (RUNS, 1993), on an axis right near 0 and undecided beyond.

    2000 blocks of 25 strata and windows of 8 blocks; the first 8 blocks are all A, the others
    coins, so no window from number 8 on holds more of A than of B.
    """
    rng, good = np.random.default_rng(20262), []
    for _ in range(RUNS // 500):
        pairs = rng.multinomial(25, [0.25, 0.25, 0.5], (500, 2000)).astype(np.int16)
        pairs[:, :8] = [25, 0, 0]
        before = np.pad(pairs.cumsum(axis=1), ((0, 0), (1, 0), (0, 0)))
        both_a, both_b, differ = np.moveaxis(before[:, 8:] - before[:, :-8], 2, 0)
        good.append(e_values(both_a - both_b + differ, differ, 1.0) >= 2 / ALPHA)
    return np.concatenate(good)


def extended_over_failed_cells() -> np.ndarray:
    """The interval ends at the last window that passes, not before the first that fails."""
    good = windows_of_a_long_axis()
    return (good * np.arange(good.shape[1])).max(axis=1) >= 8


def best_window_of_all() -> np.ndarray:
    """Every window is tested at full level and the best is reported: no order and no union."""
    return windows_of_a_long_axis()[:, 8:].any(axis=1)


def ended_at_the_first_failure() -> np.ndarray:
    return np.cumprod(windows_of_a_long_axis()[:, :50], axis=1).sum(axis=1) > 8


def no_charge_for_pairs_that_differ() -> np.ndarray:
    """Pairs that differ count as one vote for either side and cost nothing beyond."""
    differ = np.random.default_rng(20263).binomial(100, 0.5, RUNS)
    both_a = np.random.default_rng(20264).binomial(100 - differ, 0.5)
    lead = both_a - (100 - differ - both_a)
    total = sum(s * np.exp(bet * lead) for bet, s in zip(BETS, SHARES, strict=True))
    return np.asarray(total) >= 2 / ALPHA


def best_of_many_seeds() -> np.ndarray:
    """The scan is repeated, a thousand times, until one certifies; nothing can be certified."""
    rng, claimed = np.random.default_rng(20265), np.zeros(RUNS, bool)
    for _ in range(1000):
        both_a, both_b, differ = rng.multinomial(400, [0.25, 0.25, 0.5], RUNS).T
        claimed |= e_values(both_a - both_b + differ, differ, 1.0) >= 2 / ALPHA
    return claimed


# A and B in turn such that the lead is 1/4 at 0 and at 1/2, and 0 at 1/4.
SPIKE_EDGES = np.array([-1.0, -0.75, -0.5, 0.5, 1.0, 1.25, 1.5])
SPIKE_CLASS = np.array([B, A, B, A, B, B, A, B], np.int8)
SPIKE = Known(lambda t: SPIKE_CLASS[np.searchsorted(SPIKE_EDGES, t)], -9.0, 0.25)


FINE = Scan(1.0, -3.0, 3.0, False, (240,))


def coarse_grid_without_loss() -> np.ndarray:
    """Windows at 0, 1/2, 1, ... alone, each standing for a quarter to either side as it is."""
    wrong, per_unit = [], 40
    for votes in cast(FINE, SPIKE, 4):
        z = 1 - 2 * votes.reshape(BLOCK, -1, 2)
        tops, twos = z.max(axis=2), np.ptp(z, axis=2) == 2
        good = np.ones(BLOCK, bool)
        for delta in (0.0, 0.5):
            first = round((delta - FINE.sigma - FINE.low) * per_unit)
            window = slice(first, first + 2 * per_unit)
            good &= e_values(tops[:, window].sum(1), twos[:, window].sum(1), 0.0) >= 2 / ALPHA
        wrong.append(good)  # then [0, 3/4] is claimed, with the spike at 1/4 in it
    return np.concatenate(wrong)


def spike_with_loss() -> np.ndarray:
    return np.concatenate([overclaims(FINE, SPIKE, votes) for votes in cast(FINE, SPIKE, 4)])


DEFECTS = [extended_over_failed_cells, best_window_of_all, no_charge_for_pairs_that_differ]
DEFECTS += [best_of_many_seeds, coarse_grid_without_loss]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_planted_defects_are_caught(defect):
    wrong = defect()
    assert rejected(wrong)


@pytest.mark.parametrize("twin", [ended_at_the_first_failure, spike_with_loss])
def test_the_sound_twins_of_the_defects_pass(twin):
    assert not rejected(twin())
