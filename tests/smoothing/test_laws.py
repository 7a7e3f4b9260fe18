from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certifl.errors import InputError
from certifl.smoothing import EXPONENTIAL, GAUSSIAN, LAWS, UNIFORM, floor_text, top_class_bounds
from certifl.smoothing.laws import drawn_width

exact = settings(max_examples=50, deadline=None, derandomize=True)
probability = st.one_of(
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.floats(1e-15, 1e-3).map(lambda small: 1 - small),
    st.floats(1e-300, 1e-3),
    st.floats(-1e-9, 1e-9).map(lambda small: 0.5 + small),
)
sigmas = st.floats(1e-3, 1e3)


def quantile(p: float) -> mpmath.mpf:
    """PhiInv of the very float p: Newton steps in 50 digits from a start good to eight."""
    target = mpmath.mpf(p)
    x = mpmath.mpf(float(np.clip(special_start(p), -40, 40)))
    for _ in range(6):
        x -= (mpmath.ncdf(x) - target) / mpmath.npdf(x)
    return x


def special_start(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


@exact
@given(sigmas, probability, probability)
def test_gaussian_radius_is_never_above_the_formula_and_close_to_it(sigma, first, second):
    low, high = max(first, second), min(first, second)
    radius = float(GAUSSIAN.radius(sigma, low, high))
    with mpmath.workdps(50):
        a, b = quantile(low), quantile(high)
        formula = mpmath.mpf(sigma) / 2 * (a - b)
        assert radius <= formula
        assert formula - radius <= mpmath.mpf(sigma) * 1e-14 * (1 + abs(a) + abs(b))


@exact
@given(sigmas, st.floats(0, 1), st.floats(0, 1))
def test_uniform_radius_is_never_above_the_formula_and_close_to_it(sigma, first, second):
    low, high = max(first, second), min(first, second)
    radius = float(UNIFORM.radius(sigma, low, high))
    with mpmath.workdps(400):
        width = mpmath.mpf(float(drawn_width(sigma)))
        formula = width * (mpmath.mpf(low) - mpmath.mpf(high))
        assert radius <= formula
        assert formula - radius <= formula * 1e-14 + 3 * mpmath.mpf(5e-324)


@exact
@given(sigmas, probability, probability)
def test_exponential_radius_is_never_above_the_formula_and_close_to_it(sigma, first, second):
    low, high = max(first, second), min(first, second)
    radius = float(EXPONENTIAL.radius(sigma, low, high))
    with mpmath.workdps(400):
        formula = -mpmath.mpf(sigma) * mpmath.log(1 - mpmath.mpf(low) + mpmath.mpf(high))
        assert radius <= formula
        assert formula - radius <= formula * 1e-14 + mpmath.mpf(sigma) * 1e-14


@exact
@given(st.floats(1e-30, 1e300))
def test_the_drawn_width_is_the_largest_float32_not_above_sigma(sigma):
    width = np.float32(drawn_width(sigma))
    assert float(width) == drawn_width(sigma) <= sigma
    assert (
        width == np.finfo(np.float32).max or float(np.nextafter(width, np.float32(np.inf))) > sigma
    )


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@exact
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_nothing_is_certified_unless_the_top_class_is_ahead(law, first, second):
    low, high = min(first, second), max(first, second)
    assert law.radius(0.5, low, high) == 0.0
    assert law.radius(0.5, low, low) == 0.0


def test_unanimous_votes():
    assert GAUSSIAN.largest_radius(1.0, 100_000, 1e-3) == pytest.approx(3.8115, abs=5e-5)
    assert GAUSSIAN.largest_radius(0.25, 100_000, 1e-3) == pytest.approx(0.25 * 3.81146, abs=1e-5)
    assert UNIFORM.largest_radius(1.0, 10_000, 1e-3) == pytest.approx(0.9986, abs=5e-5)
    assert UNIFORM.largest_radius(1.0, 100_000, 1e-3) == pytest.approx(0.9999, abs=5e-5)
    for law in LAWS.values():
        best = law.radius(0.3, *top_class_bounds(np.arange(101), 100, 0.01))
        assert np.all(best <= law.largest_radius(0.3, 100, 0.01))
        assert best[-1] == law.largest_radius(0.3, 100, 0.01)


def test_certain_classes():
    assert GAUSSIAN.radius(1.0, 1.0, 0.2) == np.inf
    assert GAUSSIAN.radius(1.0, 0.3, 0.0) == np.inf
    assert EXPONENTIAL.radius(1.0, 1.0, 0.0) == np.inf
    assert EXPONENTIAL.radius(2.0, 1.0, 0.25) == pytest.approx(2 * np.log(4), rel=1e-12)
    assert UNIFORM.radius(0.5, 1.0, 0.0) == pytest.approx(0.5, rel=1e-12)
    assert UNIFORM.radius(0.5, 1.0, 0.0) <= 0.5


def test_arrays_equal_scalars():
    low, high = np.array([0.9, 0.4, 0.2]), np.array([0.1, 0.3, 0.3])
    for law in LAWS.values():
        rows = law.radius(0.25, low, high)
        assert rows.shape == (3,)
        assert [float(law.radius(0.25, a, b)) for a, b in zip(low, high, strict=True)] == list(
            rows
        )


def test_names_and_norms():
    assert {name: (law.name, law.norm) for name, law in LAWS.items()} == {
        "gaussian": ("gaussian", "l2"),
        "uniform": ("uniform", "l1"),
        "exponential": ("exponential", "l1"),
    }


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize(
    ("sigma", "low", "high"),
    [
        (0.0, 0.9, 0.1),
        (-1.0, 0.9, 0.1),
        (np.inf, 0.9, 0.1),
        (np.nan, 0.9, 0.1),
        (1.0, 1.1, 0.1),
        (1.0, 0.9, -0.1),
        (1.0, np.nan, 0.1),
    ],
)
def test_bad_numbers_are_refused(law, sigma, low, high):
    with pytest.raises(InputError):
        law.radius(sigma, low, high)


@exact
@given(st.floats(0, 1e12), st.integers(0, 17))
def test_text_is_rounded_down_and_stable(value, digits):
    text = floor_text(value, digits)
    assert float(text) <= value
    assert floor_text(float(text), digits) == text
    assert len(text.partition(".")[2]) == digits
    with mpmath.workdps(60):
        assert mpmath.mpf(text) + mpmath.mpf(10) ** -digits > mpmath.mpf(value) * (1 - 1e-16)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.9057, 2, "1.90"),
        (1.9057, 3, "1.905"),
        (0.3, 3, "0.300"),
        (0.1 + 0.2, 1, "0.3"),
        (np.nextafter(0.3, 0), 3, "0.299"),
        (0.0, 4, "0.0000"),
        (-0.0, 1, "0.0"),
        (2.0, 0, "2"),
        (float("inf"), 3, "inf"),
    ],
)
def test_text_examples(value, digits, text):
    assert floor_text(value, digits) == text


def test_text_of_nonsense_is_refused():
    with pytest.raises(InputError):
        floor_text(float("nan"), 3)
    with pytest.raises(InputError):
        floor_text(1.0, -1)
