"""Exact sequential bounds under every stopping rule, their looks and levels, and curves."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, hypergeom

from certifl.errors import InputError
from certifl.smoothing import (
    BOUNDS,
    GAUSSIAN,
    LAWS,
    UNIFORM,
    average_certified_radius,
    certified_accuracy,
    even_grid,
    grid_steps,
    levels,
    looks,
    mean_and_band,
    reachable_radius,
)
from certifl.smoothing.group_sequential import GroupSequential, increments, reported_misses

ALPHA, RUNS = 0.05, 20_000
GRID = np.array([0.25, 0.5, 0.75, 1.0])
LOOKS = looks(1600, first=50, per_doubling=4)
exact = settings(max_examples=50, derandomize=True)


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
def test_no_stopping_rule_can_break_the_level(cell):
    law, shares = CELLS[cell][0], np.array(CELLS[cell][1])
    top, rival, chosen = paths(shares, np.random.default_rng(6))
    others = np.array([np.delete(shares, c).max() for c in range(len(shares))])
    truth = law.radius(1.0, shares[chosen], others[chosen])
    for runner_up in (False, True):
        made, wrong = sequence(runner_up, law=law), np.zeros(RUNS, bool)
        for j in range(len(LOOKS)):
            wrong |= radii_at(made, law, top[j], rival[j], j) > truth
        assert binomtest(int(wrong.sum()), RUNS, ALPHA, alternative="greater").pvalue > 1e-3


def test_looks_chosen_from_the_votes_break_the_level():
    """Planted: only the look that these votes favor, with all of alpha as its increment."""
    shares = np.array([0.5, 0.5])
    top = paths(shares, np.random.default_rng(7))[0]
    p_values = binom.sf(top - 1, np.array(LOOKS)[:, None], 0.5)
    assert np.mean(p_values.min(axis=0) <= ALPHA) > 2 * ALPHA


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
def test_a_higher_price_stops_earlier_and_never_later(law):
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


def test_images_are_answered_as_if_alone_and_the_last_look_ends():
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
def test_counts_that_do_not_fit_a_look_are_refused(change):
    with pytest.raises(InputError):
        sequence().bounds(**{"top": [40], "runner_up": [9], "look": [0], **change})


def test_looks_double_up_to_n():
    assert looks(100_000) == (
        100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 51_200, 100_000,
    )  # fmt: skip
    assert looks(100) == looks(100, first=500) == (100,)
    assert looks(250) == (100, 200, 250)
    assert looks(1000, per_doubling=2) == (100, 200, 300, 400, 600, 800, 1000)


@exact
@given(st.integers(1, 10**7), st.integers(1, 5000), st.integers(1, 6))
def test_looks_increase_in_whole_chunks_and_end_with_n(n, first, per_doubling):
    made = looks(n, first, per_doubling)
    assert made[-1] == n
    assert all(a < b for a, b in pairwise(made))
    assert all(count % first == 0 for count in made[:-1])


@exact
@given(st.floats(1e-9, 0.999), st.integers(1, 40), st.floats(0.001, 0.0255))
def test_levels_never_sum_to_more_than_alpha(alpha, count, share):
    made = levels(alpha, range(count), share)
    assert len(made) == count
    assert all(level > 0 for level in made)
    total = sum((Fraction(level) for level in made), start=Fraction(0))
    assert Fraction(alpha) * (1 - Fraction(1, 10**14)) <= total <= Fraction(alpha)
    assert made[:-1] == (share * alpha,) * (count - 1)


def test_levels_of_the_paper_sized_run():
    made = levels(1e-3, looks(100_000))
    assert made[0] == pytest.approx(2e-5)
    assert made[-1] == pytest.approx(8e-4)


def test_grid_steps_start_with_being_certified_at_all():
    steps = grid_steps([0.0, 1e-9, 0.25, 0.49, 5.0], [0.5, 0.0, 0.25, 0.25])
    assert list(steps) == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize("rule", BOUNDS)
@exact
@given(data=st.data())
def test_reachable_radius_is_between_the_likely_and_the_best_case(law, rule, data):
    schedule = looks(20_000)
    level = levels(0.01, schedule)
    look = data.draw(st.integers(0, len(schedule) - 1))
    spent, n = schedule[look], schedule[-1]
    top = data.draw(st.integers(0, spent))
    runner = data.draw(st.integers(0, spent - top))
    bound = BOUNDS[rule]
    reach = reachable_radius([top], [runner], look, schedule, level, law, 1.0, bound)[0]
    best = law.radius(1.0, *bound(top + n - spent, runner, n, level[-1]))
    assert reach <= best
    on = np.floor(top * n / spent), np.floor(runner * n / spent)
    if spent == n:
        assert reach == law.radius(1.0, *bound(top, runner, n, level[-1]))
    else:
        assert reach >= law.radius(1.0, *bound(min(on[0], top + n - spent), on[1], n, level[-1]))


def test_an_image_that_would_reach_the_step_is_rarely_given_up():
    # Given the counts after n votes, those at a look are hypergeometric. For images whose LAST
    # look just reaches a step, the exact chance of being stopped short of it must be near
    # futility * n_j / n; 1.6 covers the Beta limit that stands in for the exact one.
    schedule, price = looks(100_000), 0.05
    level, n = levels(1e-3, schedule), schedule[-1]
    every = np.arange(n // 2, n + 1)
    radius = GAUSSIAN.radius(0.25, *BOUNDS["top-class"](every, 0, n, level[-1]))
    for step in (0.0, 0.25, 0.5, 0.75):
        needed = int(every[np.argmax(radius > step if step == 0 else radius >= step)])
        for j, spent in enumerate(schedule[:-1]):
            k = np.arange(spent + 1)
            reach = reachable_radius(
                k, 0 * k, j, schedule, level, GAUSSIAN, 0.25, BOUNDS["top-class"], futility=price
            )
            short = grid_steps(reach, GRID) < grid_steps(radius[needed - n // 2], GRID)
            missed = hypergeom.cdf(k[short].max(initial=-1), n, needed, spent)
            assert missed <= 1.6 * price * spent / n


def reach(k=(90,), runner=(5,), look=0, schedule=None, level=None, **options):
    schedule = looks(100_000) if schedule is None else schedule
    level = levels(1e-3, schedule) if level is None else level
    bound = BOUNDS["top-class"]
    return reachable_radius(k, runner, look, schedule, level, GAUSSIAN, 0.25, bound, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"look": 11},
        {"look": -1},
        {"k": [101]},
        {"k": [1.5], "look": 10},
        {"futility": 0.0},
        {"futility": float("nan")},
        {"schedule": (100, 100), "level": (0.1, 0.1)},
        {"schedule": (100, 200), "level": (0.1,)},
    ],
)
def test_what_does_not_fit_a_look_is_refused(change):
    assert reach() > 0
    with pytest.raises(InputError):
        reach(**change)


def test_bad_schedules_are_refused():
    for arguments in ((0,), (10, 0), (10, 1, 0)):
        with pytest.raises(InputError):
            looks(*arguments)
    for alpha, made, share in ((0.0, (1,), 0.02), (1.0, (1,), 0.02), (0.1, (), 0.02)):
        with pytest.raises(InputError):
            levels(alpha, made, share)
    for share in (0.0, 0.1, float("nan")):
        with pytest.raises(InputError):
            levels(0.1, looks(100_000), share)
    for grid in ([-1.0], [np.nan]):
        with pytest.raises(InputError):
            grid_steps([0.1], grid)


rows = st.lists(st.tuples(st.booleans(), st.floats(0, 3)), min_size=1, max_size=30)


@exact
@given(rows, st.lists(st.floats(0, 4), min_size=1, max_size=8))
def test_certified_accuracy_counts_correct_images_with_enough_radius(images, radii):
    correct, radius = (np.array(column) for column in zip(*images, strict=True))
    radii = [*radii, float(radius[0])]  # exactly at a radius counts as reached
    want = [sum(c and r >= at for c, r in images) / len(images) for at in radii]
    assert list(certified_accuracy(correct, radius, radii)) == want
    assert certified_accuracy(correct, radius, radii[0]) == want[0]


@exact
@given(rows)
def test_average_certified_radius_is_the_area_under_the_curve(images):
    correct, radius = (np.array(column) for column in zip(*images, strict=True))
    edges = np.unique(np.concatenate([[0.0], radius]))
    heights = certified_accuracy(correct, radius, edges[1:])
    assert average_certified_radius(correct, radius) == pytest.approx(
        float(np.sum(heights * np.diff(edges))), abs=1e-9
    )


def test_abstentions_count_in_the_denominator():
    correct, radius = [1, 0, 0, 1], [0.5, 0.0, 0.9, 0.25]
    assert list(certified_accuracy(correct, radius, [0.0, 0.25, 0.3, 0.6])) == [0.5, 0.5, 0.25, 0]
    assert average_certified_radius(correct, radius) == 0.75 / 4


def test_even_grid_starts_at_zero_and_ends_at_the_largest():
    grid = even_grid(0.953)
    assert grid.size == 50
    assert (grid[0], grid[-1]) == (0.0, 0.953)
    assert np.ptp(np.diff(grid)) < 1e-12
    assert even_grid(1.0, 21)[1] == pytest.approx(0.05)


def test_mean_and_band_treats_clients_alike():
    mean, low, high = mean_and_band([[1.0, 0.5], [0.5, 0.0], [0.75, 0.25]])
    assert list(mean) == [0.75, 0.25]
    assert list(low) == [0.5, 0.0]
    assert list(high) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("correct", "radius"),
    [([], []), ([1, 0], [0.1]), ([1], [-0.1]), ([1], [np.nan]), ([[1]], [[0.1]])],
)
def test_bad_columns_are_refused(correct, radius):
    with pytest.raises(InputError):
        certified_accuracy(correct, radius, [0.0])
    with pytest.raises(InputError):
        average_certified_radius(correct, radius)


def test_bad_grids_and_curves_are_refused():
    for radii in ([-0.1], [np.nan]):
        with pytest.raises(InputError):
            certified_accuracy([1], [0.5], radii)
    for largest, count in ((0.0, 50), (np.inf, 50), (np.nan, 50), (1.0, 1)):
        with pytest.raises(InputError):
            even_grid(largest, count)
    for curves in ([], [0.1, 0.2], [[0.1], [0.1, 0.2]], [[np.nan]]):
        with pytest.raises(InputError):
            mean_and_band(curves)
