from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from certifl.errors import InputError
from certifl.smoothing import (
    BOUNDS,
    GAUSSIAN,
    LAWS,
    UNIFORM,
    even_grid,
    finished,
    grid_steps,
    levels,
    looks,
    reachable_radius,
)

exact = settings(max_examples=50, deadline=None, derandomize=True)
GRID = np.arange(1, 5) * 0.25


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
    assert list(grid_steps([0.0, 1e-9, 0.25, 0.49, 5.0], [0.5, 0.0, 0.25, 0.25])) == [
        0,
        1,
        2,
        2,
        3,
    ]


def run(k, runner, look, rule="top-class", grid=GRID, law=GAUSSIAN, sigma=0.25, **options):
    schedule = looks(100_000)
    return finished(
        k,
        runner,
        look,
        schedule,
        levels(1e-3, schedule),
        grid,
        law,
        sigma,
        BOUNDS[rule],
        **options,
    )


def test_unanimous_images_stop_once_the_last_reachable_step_is_certified():
    # 0.75 = 3 sigma needs p >= Phi(3); 2e-5 ** (1 / n) passes it from n = 8010 on; 1.0 needs
    # 4 sigma, which 100 000 unanimous votes do not give.
    unanimous = [bool(run([c], [0], j)[0]) for j, c in enumerate(looks(100_000))]
    assert unanimous == [False] * 7 + [True] * 4


@pytest.mark.parametrize("rule", BOUNDS)
def test_images_in_the_middle_of_a_cell_stop_early_and_those_at_a_step_do_not(rule):
    # Between 0.25 (p = .841) and 0.5 (p = .977): 1600 votes tell p = .92 apart from both.
    assert run([1472], [128], 4, rule)[0]
    assert not run([1346], [254], 4, rule)[0]
    # Hopeless: far below one half and behind the runner-up
    assert run([100], [700], 3, rule)[0]


def test_a_wrong_label_stops_at_the_first_look_and_no_label_changes_nothing():
    assert list(run([95, 95], [5, 5], 0, wrong=[True, False])) == [True, False]
    assert list(run([95, 95], [5, 5], 0)) == [False, False]


@pytest.mark.parametrize("rule", BOUNDS)
def test_images_at_different_looks_are_answered_as_if_alone(rule):
    rng = np.random.default_rng(0)
    schedule = looks(100_000)
    look = rng.integers(0, len(schedule), 300)
    spent = np.asarray(schedule)[look]
    top = rng.binomial(spent, rng.uniform(0.3, 1.0, 300))
    runner = rng.binomial(spent - top, 0.7)
    together = run(top, runner, look, rule)
    alone = [
        bool(run([a], [b], int(j), rule)[0]) for a, b, j in zip(top, runner, look, strict=True)
    ]
    assert list(together) == alone
    assert 0 < together.sum() < 300
    assert together[spent == 100_000].all()


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
                k,
                0 * k,
                j,
                schedule,
                level,
                GAUSSIAN,
                0.25,
                BOUNDS["top-class"],
                futility=price,
            )
            short = grid_steps(reach, GRID) < grid_steps(radius[needed - n // 2], GRID)
            missed = hypergeom.cdf(k[short].max(initial=-1), n, needed, spent)
            assert missed <= 1.6 * price * spent / n


def test_a_higher_price_stops_earlier_and_never_later():
    rng = np.random.default_rng(1)
    top = rng.binomial(6400, rng.uniform(0.4, 1.0, 2000))
    patient, hasty = (
        run(top, 6400 - top, 6, law=UNIFORM, grid=even_grid(0.25, 21), futility=price)
        for price in (0.01, 3.0)
    )
    assert np.all(hasty >= patient)
    assert hasty.sum() > patient.sum() > 0


@pytest.mark.parametrize(
    "change",
    [
        {"look": 11},
        {"look": -1},
        {"k": [101]},
        {"k": [1.5]},
        {"grid": [-1.0]},
        {"grid": [np.nan]},
        {"futility": 0.0},
        {"futility": float("nan")},
    ],
)
def test_counts_that_do_not_fit_are_refused(change):
    with pytest.raises(InputError):
        run(**{"k": [90], "runner": [5], "look": 0, **change})


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
    for schedule, level in (((100, 100), (0.1, 0.1)), ((100, 200), (0.1,))):
        with pytest.raises(InputError):
            finished([9], [1], 0, schedule, level, GRID, GAUSSIAN, 0.25, BOUNDS["top-class"])
