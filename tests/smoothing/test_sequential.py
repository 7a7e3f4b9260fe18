from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from certifl.errors import InputError
from certifl.smoothing import BOUNDS, GAUSSIAN, LAWS, grid_steps, levels, looks, reachable_radius

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
