"""Sigma as a person writes it, amounts as a person reads them."""

import math
import re
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certifl.errors import InputError, RequestError
from certifl.perturbations import (
    PERTURBATIONS,
    PixelNoise,
    Rotation,
    Translation,
    format_amount,
    parse_sigma,
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0.3, 0.3),
        (1, 1.0),
        (np.float32(0.5), 0.5),
        ("0.3", 0.3),
        (" 0.3 ", 0.3),
        (".5", 0.5),
        ("2.", 2.0),
        ("+1e-3", 1e-3),
        ("0.1pi", 0.1 * math.pi),
        ("0.1*pi", 0.1 * math.pi),
        (" 0.1 * pi ", 0.1 * math.pi),
        ("0.1 pi", 0.1 * math.pi),
        ("18deg", math.radians(18)),
        ("18 deg", math.radians(18)),
        ("1e1deg", math.radians(10)),
    ],
)
def test_sigma_is_read(written, meant):
    found = parse_sigma(written)
    assert type(found) is float
    assert found == meant


@pytest.mark.parametrize(
    "written",
    [
        *("", "pi", "abc", "0.1 rad", "0.1pi2", "18 degrees", "1,5", "0x10"),
        *("nan", "inf", "1e999", "--1"),
    ],
)
def test_text_that_means_nothing_is_refused(written):
    with pytest.raises(InputError, match="sigma"):
        parse_sigma(written)


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, "-0.1", "0", "0deg", math.nan, math.inf, -math.inf]
)
def test_sigma_must_be_finite_and_positive(value):
    with pytest.raises(InputError, match="finite and above 0"):
        parse_sigma(value)


@pytest.mark.parametrize("value", [None, True, [0.1], 1j, b"0.1"])
def test_other_types_are_refused(value):
    with pytest.raises(InputError, match="sigma cannot be"):
        parse_sigma(value)


def test_the_error_is_also_a_value_error():
    with pytest.raises(ValueError):
        parse_sigma("nonsense")
    assert issubclass(InputError, RequestError)


def test_angles_belong_to_families_with_an_angle():
    assert Rotation("0.1pi") == Rotation(0.1 * math.pi) == Rotation("18deg")
    for family in (Translation, PixelNoise):
        for written in ("0.1pi", "18deg"):
            with pytest.raises(InputError, match="angle"):
                family(written)
    assert Translation("0.1").sigma == 0.1


def test_degrees_and_multiples_of_pi_agree_on_the_studys_values():
    assert parse_sigma("0.1pi") == parse_sigma("18deg")
    assert parse_sigma("0.5pi") == parse_sigma("90deg")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1 * math.pi, "radians", "0.314 rad (18.0 deg)"),
        (math.pi / 2, "radians", "1.570 rad (90.0 deg)"),
        (1.9057, "intensity", "1.905 intensity"),
        (0.0, "half-widths", "0.000 half-widths"),
        (0.2999, "relative", "0.299 relative"),
    ],
)
def test_amounts_are_written_with_their_unit(value, unit, text):
    assert format_amount(value, unit) == text


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_a_written_radius_never_exceeds_the_real_one(value, digits):
    for unit in {family(1.0).unit for family in PERTURBATIONS.values()}:
        text = format_amount(value, unit, digits)
        number = re.match(r"[\d.]+", text.removeprefix("added variance 0 to "))
        assert float(number[0]) <= value
        assert value - float(Decimal(number[0])) <= 10.0**-digits * (1 + 1e-9) + value * 2**-52
        degrees = re.search(r"\(([\d.]+) deg\)", text)
        assert (degrees is not None) == (unit == "radians")
        assert degrees is None or float(degrees[1]) <= math.degrees(value)
