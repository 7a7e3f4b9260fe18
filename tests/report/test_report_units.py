"""Radii as people read them: in their unit, rounded down, intervals rounded outward."""

from __future__ import annotations

import mpmath
from hypothesis import given
from hypothesis import strategies as st

from certifl.report.wording import RadiusScale, scales
from report_factory import (
    PIXEL,
    ROTATION,
)

DEGREES, RADIANS = scales(ROTATION, 0.31)


@given(st.floats(0.0, 10.0))
def test_a_shown_radius_never_exceeds_the_stored_one(radius):
    with mpmath.workdps(60):
        exact = mpmath.mpf(radius) * 180 / mpmath.pi
        shown = DEGREES.number(radius)
        assert mpmath.mpf(shown) <= exact
        assert exact - mpmath.mpf(shown) < mpmath.mpf(10) ** -DEGREES.digits * 1.001
    assert float(RADIANS.number(radius)) <= radius


@given(st.floats(-10.0, 10.0))
def test_intervals_are_rounded_outward(value):
    with mpmath.workdps(60):
        exact = mpmath.mpf(value) * 180 / mpmath.pi
        assert mpmath.mpf(DEGREES.down(value)) <= exact <= mpmath.mpf(DEGREES.up(value))
    assert float(RADIANS.down(value)) <= value <= float(RADIANS.up(value))


@given(st.integers(1, 180))
def test_a_radius_chosen_in_degrees_is_asked_for_in_full(degrees):
    with mpmath.workdps(60):
        assert mpmath.mpf(DEGREES.stored(float(degrees))) * 180 / mpmath.pi >= degrees


def test_other_families_have_their_own_unit_only():
    (only,) = scales(PIXEL, 0.9)
    assert only == RadiusScale("intensity", " intensity", 1.0, 4)
    assert only.text(0.25) == "0.2500 intensity"


def test_zero_and_negative_ends_read_well():
    assert RADIANS.up(0.0) == "0.0000"
    assert RADIANS.up(-0.00001) == "0.0000"
    assert RADIANS.up(-0.5) == "-0.5000"
    assert RADIANS.down(-0.00001) == "-0.0001"
    assert RADIANS.up(0.00001) == "0.0001"
