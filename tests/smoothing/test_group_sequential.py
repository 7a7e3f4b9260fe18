"""Exact sequential bounds under every stopping rule, and the rule that stops by a price."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from certifl.errors import InputError
from certifl.smoothing import GAUSSIAN, LAWS, UNIFORM, even_grid, looks
from certifl.smoothing.group_sequential import GroupSequential, increments, reported_misses

ALPHA, RUNS = 0.05, 20_000
GRID = np.array([0.25, 0.5, 0.75, 1.0])
LOOKS = looks(1600, first=50, per_doubling=4)
exact = settings(max_examples=50, deadline=None, derandomize=True)


def sequence(runner_up: bool = True, radii: np.ndarray = GRID, law=GAUSSIAN, sigma: float = 1.0):
    misses = reported_misses(radii, law, sigma)
    return GroupSequential(LOOKS, increments(ALPHA, LOOKS), runner_up, misses)


@exact
@given(st.floats(1e-9, 0.4), st.integers(1, 10**6), st.integers(1, 12))
def test_increments_never_sum_to_more_than_alpha(alpha, n, per_doubling):
    schedule = looks(n, per_doubling=per_doubling)
    made = increments(alpha, schedule)
    assert len(made) == len(schedule)
    assert min(made) > 0
    total = sum(map(Fraction, made), start=Fraction(0))
    assert Fraction(alpha) * (1 - Fraction(1, 10**14)) <= total <= Fraction(alpha)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize("sigma", [0.1, 0.25, 1.0])
def test_reported_radii_are_reached_at_their_own_probability_and_at_none_above(law, sigma):
    radii = sigma * np.array([0.0, 0.3, 0.5, 0.9])
    for q in (made := reported_misses(radii, law, sigma)):
        assert q * 2.0**40 == round(q * 2.0**40)
    reached, beyond = (
        law.radius(sigma, 1 - np.array(made) - step, np.array(made) + step)
        for step in (0.0, 2.0**-40)
    )
    wanted = radii[::-1]
    assert np.all(np.sort(reached) >= np.sort(wanted))
    assert np.all(np.sort(beyond)[1:] < np.sort(wanted)[1:])
    assert beyond.min() == 0.0


# Multinomial votes. The worst stopping rule knows the truth and stops where it is exceeded.

CELLS = {
    "at a step": (UNIFORM, [0.75, 0.25]),
    "at a step, gaussian": (GAUSSIAN, [0.6914624612740131, 0.3085375387259869]),
    "at zero": (UNIFORM, [0.5, 0.5]),
    "tie below half": (UNIFORM, [0.4, 0.4, 0.2]),
    "below half, at a step": (UNIFORM, [0.45, 0.2, 0.2, 0.15]),
}


def paths(shares: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(looks, runs) counts of the class selected by 20 votes, whose truth is tested, and rival."""
    chosen = rng.multinomial(20, shares, size=RUNS).argmax(1)
    steps = np.diff((0, *LOOKS))
    counts = np.cumsum([rng.multinomial(step, shares, size=RUNS) for step in steps], axis=0)
    mine = np.arange(len(shares)) == chosen[:, None]
    return np.where(mine, counts, 0).sum(-1), np.where(mine, -1, counts).max(-1), chosen


def radii_at(made: GroupSequential, law, top, rival, j) -> np.ndarray:
    pairs, back = np.unique(np.stack([top, rival]), axis=1, return_inverse=True)
    look = np.full(pairs.shape[1], j)
    return np.asarray(law.radius(1.0, *made.bounds(*pairs, look)))[back.reshape(-1)]


@pytest.mark.parametrize("cell", CELLS)
def test_no_stopping_rule_can_break_the_level(cell: str) -> None:
    law, shares = CELLS[cell][0], np.array(CELLS[cell][1])
    top, rival, chosen = paths(shares, np.random.default_rng(6))
    others = np.array([np.delete(shares, c).max() for c in range(len(shares))])
    truth = law.radius(1.0, shares[chosen], others[chosen])
    for runner_up in (False, True):
        made, wrong = sequence(runner_up, law=law), np.zeros(RUNS, bool)
        for j in range(len(LOOKS)):
            wrong |= radii_at(made, law, top[j], rival[j], j) > truth
        assert binomtest(int(wrong.sum()), RUNS, ALPHA, alternative="greater").pvalue > 1e-3


def test_looks_chosen_from_the_votes_break_the_level() -> None:
    """Planted: only the look that these votes favor, with all of alpha as its increment."""
    shares = np.array([0.5, 0.5])
    top = paths(shares, np.random.default_rng(7))[0]
    p_values = binom.sf(top - 1, np.array(LOOKS)[:, None], 0.5)
    assert np.mean(p_values.min(axis=0) <= ALPHA) > 2 * ALPHA


# When to stop.


@pytest.mark.parametrize("runner_up", [False, True])
def test_images_in_the_middle_of_a_cell_stop_early_and_those_at_a_step_do_not(runner_up):
    schedule = looks(100_000, per_doubling=8)
    made = GroupSequential(schedule, increments(1e-3, schedule), runner_up)
    j = schedule.index(1600)

    def stops(k: int, rest: int) -> bool:
        counts = np.array([k]), np.array([rest]), np.array([j])
        return bool(made.finished(*counts, GAUSSIAN, 0.25, GRID, 0.01)[0])

    assert stops(1472, 128)  # p = .92: between 0.25 (.841) and 0.5 (.977)
    assert not stops(1346, 254)
    assert stops(200, 1400)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_a_higher_price_stops_earlier_and_never_later(law) -> None:
    made, rng, j = sequence(), np.random.default_rng(1), len(LOOKS) // 2
    top = rng.binomial(LOOKS[j], rng.uniform(0.4, 1.0, 500))
    counts = top, LOOKS[j] - top, np.full(500, j)
    grid = even_grid(law.largest_radius(1.0, LOOKS[-1], ALPHA), 21)
    by_step = [made.finished(*counts, law, 1.0, grid, price) for price in (0.003, 0.3, 30.0)]
    by_radius = [~made.gains(*counts, law, 1.0, price) for price in (0.001, 0.03, 30.0)]
    for patient, hasty, last in (by_step, by_radius):
        assert patient.sum() < hasty.sum() < last.sum()
        assert np.all(patient <= hasty)
        assert np.all(hasty <= last)


def test_images_are_answered_as_if_alone_and_the_last_look_ends() -> None:
    made, rng = sequence(), np.random.default_rng(2)
    look = rng.integers(0, len(LOOKS), 60)
    top = rng.binomial(np.array(LOOKS)[look], rng.uniform(0.3, 1.0, 60))
    rival = rng.binomial(np.array(LOOKS)[look] - top, 0.7)
    together = made.finished(top, rival, look, GAUSSIAN, 1.0, GRID, 0.01)
    bounds = np.stack(made.bounds(top, rival, look))
    for row in range(60):
        one = top[[row]], rival[[row]], look[[row]]
        assert made.finished(*one, GAUSSIAN, 1.0, GRID, 0.01) == together[[row]]
        assert np.array_equal(np.stack(made.bounds(*one))[:, 0], bounds[:, row])
    assert together[look == len(LOOKS) - 1].all()
    assert np.all(bounds.sum(axis=0) <= 1)


@pytest.mark.parametrize("change", [{"look": [-1]}, {"look": [99]}, {"top": [51]}])
def test_counts_that_do_not_fit_a_look_are_refused(change) -> None:
    with pytest.raises(InputError):
        sequence().bounds(**{"top": [40], "runner_up": [9], "look": [0], **change})
