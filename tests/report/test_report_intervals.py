"""Intervals of means of few images have their nominal coverage; planted mistakes are noticed."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from certifl.report import compare as comparing
from certifl.report import intervals
from certifl.report.compare import compare
from certifl.report.intervals import (
    Sample,
    even_images,
    hidden_share,
    interval_over_seeds,
    mean_interval,
)
from report_factory import make_certificates, make_run

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]

ERROR = 0.05
TRIALS = 1500
SIZES = [(10,), (30,), (2,) * 10, (10,) * 4, (3, 40, 7)]


def two_radii(stream: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Differences of two algorithms that are correct on nearly the same images."""
    right = stream.random(shape) < 0.75
    one = right * stream.uniform(0.3, 1.0, shape)
    two = (right ^ (stream.random(shape) < 0.1)) * stream.uniform(0.3, 1.0, shape)
    return one - two


def saturated(stream: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Every correct image has the largest radius, and nearly all are correct."""
    return (stream.random(shape) < 0.96).astype(float)


def a_rare_loss(stream: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """A little better on nearly all images, far worse on one in a hundred."""
    return np.where(stream.random(shape) < 0.01, -0.9, 0.005)


MEANS = {two_radii: 0.65 * (0.75 - 0.70), saturated: 0.96, a_rare_loss: 0.99 * 0.005 - 0.01 * 0.9}


def misses(draw: Draw, sizes: tuple[int, ...], trials: int = TRIALS) -> int:
    stream = np.random.default_rng(7)
    sample = Sample.of([draw(stream, (size, trials)) for size in sizes])
    low, high = interval_over_seeds([sample], ERROR, 1.0)
    return int(((low > MEANS[draw]) | (high < MEANS[draw])).sum())


def too_often(count: int, trials: int = TRIALS, error: float = ERROR) -> bool:
    return stats.binomtest(count, trials, error, alternative="greater").pvalue < 1e-3


@pytest.mark.statistical
@pytest.mark.parametrize("draw", list(MEANS))
@pytest.mark.parametrize("sizes", [*SIZES, (3, 400), (10, *(400,) * 4)])
def test_intervals_miss_at_their_nominal_rate(draw, sizes):
    assert not too_often(misses(draw, sizes))


@pytest.mark.statistical
def test_variance_alone_ignores_unsampled_images(monkeypatch):
    monkeypatch.setattr(intervals, "FEWEST_UNLIKE", 0)
    assert too_often(misses(saturated, (30,)))


@pytest.mark.statistical
def test_last_digits_make_no_image_unlike_another(monkeypatch):
    def with_digits(stream: np.random.Generator, shape: tuple[int, int]) -> Floats:
        return a_rare_loss(stream, shape) + stream.uniform(-1e-6, 1e-6, shape)

    monkeypatch.setitem(MEANS, with_digits, MEANS[a_rare_loss])
    assert not too_often(misses(with_digits, (40,) * 4))
    monkeypatch.setattr(intervals, "ALIKE", 0.0)
    assert too_often(misses(with_digits, (40,) * 4))


def differences_shown(studies: int) -> int:
    """Studies of ten equally good clients in which some client has a shown difference."""
    count = 0
    for number in range(studies):
        seeds = (5000 + 2 * number, 5001 + 2 * number)
        made = [make_certificates(0.6, 10, 50, seed=seed, spread=0.0) for seed in seeds]
        pair = [make_run(one, label=str(row)) for row, one in enumerate(made)]
        count += any(one.pairs[0, 1].shown for one in compare(pair).clients)
    return count


@pytest.mark.statistical
def test_no_client_has_a_shown_difference_where_there_is_none(monkeypatch):
    monkeypatch.setattr(intervals, "FEWEST_UNLIKE", 0)  # the floor alone would hide the mistake
    assert not too_often(differences_shown(40), 40)
    whole = comparing._difference

    def careless(at, couple, _, scale, client=None):
        return whole(at, couple, ERROR, scale, client)

    monkeypatch.setattr(comparing, "_difference", careless)
    assert too_often(differences_shown(40), 40)


def test_the_rule_of_three_bounds_what_was_not_sampled():
    assert (1 - hidden_share(30, 0.05)) ** 30 == pytest.approx(0.025)
    assert even_images((20, 20, 20)) == 60
    assert even_images((2, 40)) == 4


def test_many_images_of_one_client_say_nothing_about_another():
    many = np.r_[np.zeros(380), np.full(20, 0.9)]
    low, high = mean_interval([many, np.full(5, 0.1)], ERROR, 1.0)
    assert (high - low) / 2 >= hidden_share(10, ERROR) - 1e-12
    assert np.isinf(Sample.of([many, many]).floors(1.0)).all()


def test_no_variance_is_no_certainty():
    low, high = mean_interval([np.full(20, 0.4), np.full(20, 0.4)], 0.05, scale=2.0)
    assert high - 0.4 == pytest.approx(2.0 * hidden_share(40, 0.05))
    assert low == pytest.approx(0.8 - high)
    low, high = mean_interval([np.full(20, 0.12), np.full(20, -0.10)], ERROR, 1.0)
    assert (high - low) / 2 >= hidden_share(40, ERROR) - 1e-12  # clients that differ


def test_one_image_of_a_client_gives_no_interval():
    pair = [make_run(make_certificates(q, 12, 1), label=str(q)) for q in (0.2, 0.99)]
    found = compare(pair).pairs[0, 1]
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert comparing.own_interval(pair[0]) is None
