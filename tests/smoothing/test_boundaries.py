"""Exact boundaries: the level of every limit, computed and not simulated, and mistakes in it."""

from fractions import Fraction
from functools import cache
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from certifl.smoothing.bounds import clopper_pearson_upper
from certifl.smoothing.group_sequential import Limits, boundaries, increments, limits
from certifl.smoothing.sequential import looks

ALPHA = 0.05
LOOKS = looks(1000, first=50, per_doubling=4)
LEVELS = increments(ALPHA, LOOKS)
EXTRA = (0.158655, 0.3, 0.45)
VALUES = (1e-3, 0.01, 0.0624, 0.158655, 0.16, 0.3, 0.449, 0.45, 0.4999, 0.7)


@cache
def table() -> tuple[np.ndarray, ...]:
    made = Limits(LOOKS, LEVELS, EXTRA)
    return tuple(
        made.upper(np.arange(votes + 1), np.full(votes + 1, j)) for j, votes in enumerate(LOOKS)
    )


def crossing(bound: np.ndarray, q: float, schedule: tuple[int, ...] = LOOKS) -> float:
    """P(M_j <= bound_j at some look), by summing over all counts."""
    state, before, crossed = np.ones(1), 0, 0.0
    for votes, end in zip(schedule, bound, strict=True):
        step = votes - before
        state, before = np.convolve(state, binom.pmf(np.arange(step + 1), step, q)), votes
        crossed += state[: end + 1].sum()
        state[: end + 1] = 0.0
    return crossed


def wrong_counts(q: float, made: tuple[np.ndarray, ...] | None = None) -> np.ndarray:
    """For each look the largest count whose limit lies below the truth q; -1 where none does."""
    return np.array([np.sum(limit < q) - 1 for limit in made or table()])


@pytest.mark.parametrize("q", VALUES)
@pytest.mark.parametrize("shift", [0.0, 1e-12, 1e-3, -1e-3])
def test_all_limits_hold_at_once_at_the_level_for_any_truth(q, shift):
    """At a grid point, just beyond one and between two; whatever look an image stops at."""
    truth = q + shift
    for value in {truth, np.nextafter(np.ceil(np.sqrt(truth) * 256) ** 2 / 256**2, 1.0)}:
        assert crossing(wrong_counts(value), value) <= ALPHA


def test_the_level_is_used():
    """Just beyond a grid point nearly all of it, where the union bound uses two thirds."""
    points = np.array([q for q in Limits(LOOKS, LEVELS, EXTRA).grid if 0.1 < q < 0.5])[::8]
    used = [crossing(wrong_counts(q := np.nextafter(p, 1.0)), q) for p in points]
    separate = [crossing(binom.ppf(np.array(LEVELS), LOOKS, p).astype(int) - 1, p) for p in points]
    assert np.mean(used) > 0.9 * ALPHA
    assert np.mean(separate) < 0.8 * ALPHA


def test_limits_increase_with_the_count_and_lie_between_those_of_their_levels():
    for j, limit in enumerate(table()):
        counts = np.arange(LOOKS[j] + 1)
        assert np.all(np.diff(limit) >= 0)
        assert limit[-1] == 1.0
        least = clopper_pearson_upper(counts, LOOKS[j], min(sum(LEVELS[: j + 1]), ALPHA))
        assert np.all(limit >= least)
    assert np.all(limit <= clopper_pearson_upper(counts, LOOKS[-1], LEVELS[-1]))


def test_limits_do_not_depend_on_what_was_asked_before():
    fresh = Limits(LOOKS, LEVELS, EXTRA)
    rng = np.random.default_rng(0)
    for j in rng.permutation(len(LOOKS)):
        counts = rng.integers(0, LOOKS[j] + 1, 5)
        assert np.array_equal(fresh.upper(counts, np.full(5, j)), table()[j][counts])
    assert limits(LOOKS, LEVELS) is limits(LOOKS, LEVELS)


def exact_spending(q: Fraction, schedule: tuple[int, ...], bound: np.ndarray) -> list[Fraction]:
    """P(first crossing at look j), and for the last entry of each look one count more."""
    state, before, spent = {0: Fraction(1)}, 0, Fraction(0)
    made = []
    for votes, end in zip(schedule, bound.tolist(), strict=True):
        step, after = votes - before, dict.fromkeys(range(votes + 1), Fraction(0))
        for count, chance in state.items():
            for more in range(step + 1):
                term = comb(step, more) * q**more * (1 - q) ** (step - more)
                after[count + more] += chance * term
        spent += sum((after[m] for m in range(end + 1)), start=Fraction(0))
        made.append((spent, spent + after.get(end + 1, Fraction(0))))
        state, before = {m: c for m, c in after.items() if m > end and c}, votes
    return made


@pytest.mark.parametrize("q", [Fraction(1, 64), Fraction(1, 4), Fraction(1, 2), Fraction(7, 8)])
def test_boundaries_spend_what_was_fixed_and_no_count_more(q):
    """In exact arithmetic: the next count would spend too much at every look."""
    schedule, levels = (10, 16, 24, 40), (0.01, 0.01, 0.02, 0.06)
    (bound,) = boundaries(np.array([float(q)]), schedule, levels)
    allowed = Fraction(0)
    for level, (spent, more) in zip(levels, exact_spending(q, schedule, bound), strict=True):
        allowed += Fraction(level)
        assert spent <= allowed < more * (1 + Fraction(1, 10**5))


def test_windows_lose_nothing_that_matters():
    """With the windows of a large n, against sums over all counts."""
    schedule = looks(20_000, per_doubling=2)
    levels = increments(1e-3, schedule)
    q = np.array([0.02, 0.0202])
    for value, bound in zip(q, boundaries(q, schedule, levels), strict=True):
        assert 0.9e-3 < crossing(bound, value, schedule) <= 1e-3


def test_levels_so_small_that_rounding_matters_are_still_kept():
    levels = increments(1e-13, LOOKS)
    (bound,) = boundaries(np.array([0.3]), LOOKS, levels)
    assert 0.3e-13 < crossing(bound, 0.3) <= 1e-13


# Planted mistakes: each must break the level somewhere.


def test_a_boundary_that_is_off_by_one_breaks_the_level():
    q = np.nextafter(EXTRA[1], 1.0)
    assert crossing(wrong_counts(q) + 1, q) > ALPHA


def test_levels_that_are_not_carried_between_looks_break_the_level():
    """Every look spends all that was allowed so far, as if earlier looks had spent nothing."""
    q = EXTRA[1]
    allowed = np.cumsum(LEVELS)
    anew = binom.ppf(allowed, LOOKS, q).astype(int) - 1
    assert crossing(anew, q) > 1.2 * ALPHA


def test_increments_used_twice_break_the_level():
    """Clopper-Pearson limits at alpha, in place of the last increment, beside the early looks."""
    q = np.nextafter(EXTRA[1], 1.0)
    bound = wrong_counts(q)
    bound[-1] = binom.ppf(ALPHA, LOOKS[-1], q) - 1
    assert crossing(bound, q) > ALPHA


class Careless(Limits):
    """One grid point is crossed by any count, as no boundary that increases with q would be."""

    def _compute(self, points: np.ndarray, j: int) -> None:
        super()._compute(points, j)
        self._boundaries[np.searchsorted(self.grid, EXTRA[2])] = np.array(LOOKS)


def test_a_boundary_that_is_not_monotone_gives_no_smaller_limit():
    """All points above have to be crossed, too; a limit that jumps over them breaks the level."""
    made, j, q = Careless(LOOKS, LEVELS, EXTRA), len(LOOKS) - 3, 0.46
    counts = np.arange(LOOKS[j] + 1)
    found = made.upper(counts, np.full(len(counts), j))
    following = made.grid[np.searchsorted(made.grid, EXTRA[2]) + 1]
    assert np.all(table()[j][found != table()[j]] == following)
    jumping = wrong_counts(q)
    jumping[j] = LOOKS[j]  # the point below q is crossed by any count
    assert crossing(jumping, q) > ALPHA
