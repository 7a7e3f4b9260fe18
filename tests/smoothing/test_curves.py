from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certifl.errors import InputError
from certifl.smoothing import (
    average_certified_radius,
    certified_accuracy,
    even_grid,
    mean_and_band,
)

exact = settings(max_examples=50, deadline=None, derandomize=True)
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
