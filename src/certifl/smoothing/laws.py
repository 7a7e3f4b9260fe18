"""Smoothing laws: how far a prediction is safe, given bounds on its vote probabilities.

For a classifier smoothed by noise around the parameters delta of a perturbation, p_A(delta) cannot
fall, and p_B(delta) cannot rise, faster than the law allows. While p_A stays above p_B the
prediction stays. With p_lower <= p_A(0) and p_upper >= p_B(0), the largest safe radius is

    Gaussian, l2:  R = sigma / 2 (PhiInv(p_lower) - PhiInv(p_upper))
    uniform on [-sigma, sigma], l1:  R = sigma (p_lower - p_upper)
    exponential of mean sigma on [0, inf), parameters added upwards only:
                     R = sigma ln(1 / (1 - p_lower + p_upper))

Uniform noise is drawn in float32 on [-w, w], w the largest float32 that is not above sigma
(`drawn_width`), so the radius of the uniform law is w (p_lower - p_upper).

Radii are rounded DOWN: the float returned is at most the exact value of the formula for the floats
given. How far is said at each law.

Source: the paper, Theorem 1 and Corollary 1; Cohen, Rosenfeld and Kolter 2019; Yang et al. 2020;
Alfarra et al. 2022 (deformations); Li et al. 2021, TSS (exponential).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from certifl.errors import InputError
from certifl.smoothing.bounds import Floats, top_class_bounds

# scipy's PhiInv (Cephes ndtri) is off by at most 7.2e-16 of its value by its authors' tables;
# 4.1e-16 is the most seen against 40 digits. 2**-48 = 3.6e-15 is five times the tabulated error.
_QUANTILE_ERROR = 2.0**-48
# Each of the few float operations after that is off by at most 2**-53 of its result, five of them
# by less than 2**-50; 2**-49 covers them twice.
_ARITHMETIC_ERROR = 2.0**-49
# numpy's log and log1p are off by at most 4 units in the last place; 2**-48 covers them twice.
_LOGARITHM_ERROR = 2.0**-48
_SMALLEST = 2.0**-1074


@dataclass(frozen=True)
class Law(ABC):
    """A noise distribution with scale sigma and the radius that its smoothing certifies.

    Attributes:
        name: as in specs and records.
        norm: of parameters, in which radii are measured.
        one_sided: certificates cover [0, R] instead of [-R, R].
    """

    name: str
    norm: str

    one_sided: ClassVar[bool] = False

    def radius(self, sigma: ArrayLike, p_lower: ArrayLike, p_upper: ArrayLike) -> Floats:
        """The certified radius, rounded down; 0.0 where nothing is certified (p_lower <= p_upper).

        If the bounds hold with probability 1 - alpha, so does the certificate.

        Args:
            sigma: scale of the noise in the family's unit, positive.
            p_lower: lower bound(s) on the probability of c_A, in [0, 1].
            p_upper: upper bound(s) on the probability of any other class, in [0, 1].

        Returns:
            float64 in the unit of sigma, in the norm `norm`.

        Raises:
            InputError: sigma not positive and finite, or a probability outside [0, 1].
        """
        scale, low, high = np.broadcast_arrays(
            *(np.asarray(value, dtype=np.float64) for value in (sigma, p_lower, p_upper))
        )
        if not np.all((scale > 0) & np.isfinite(scale)):
            raise InputError(
                "sigma must be positive and finite; it is the noise scale in the family's unit."
            )
        if not np.all((low >= 0) & (low <= 1) & (high >= 0) & (high <= 1)):
            raise InputError("p_lower and p_upper are probabilities and must lie in [0, 1].")
        return self._radius(scale, low, high)[()]

    @abstractmethod
    def _radius(self, scale: Floats, low: Floats, high: Floats) -> Floats:
        """`radius` of checked arrays of one shape."""

    def largest_radius(self, sigma: float, n: int, alpha: float) -> float:
        """The radius of n unanimous votes at level alpha: no certificate of n votes exceeds it.

        Errors are those of `radius` and `clopper_pearson_lower`.
        """
        return float(self.radius(sigma, *top_class_bounds(n, n, alpha)))


class Gaussian(Law):
    """Independent normal noise of standard deviation sigma on every parameter; radii in l2."""

    def _radius(self, scale: Floats, low: Floats, high: Floats) -> Floats:
        """R = sigma / 2 (PhiInv(p_lower) - PhiInv(p_upper)), rounded down.

        The two quantiles a and b carry relative errors below 2**-48 (five times what their authors
        tabulate), so a - b is too large by at most 2**-48 (|a| + |b|), which is taken off; then
        2**-49 of the result for the subtraction, the product and the correction themselves.
        The radius lost is below 5e-14 sigma for p in [1e-9, 1 - 1e-9].

        Source: Cohen, Rosenfeld and Kolter 2019, Theorem 1; the paper, Theorem 1.
        """
        from scipy import special

        some = low > high
        a = np.asarray(special.ndtri(np.where(some, low, 0.5)))
        b = np.asarray(special.ndtri(np.where(some, high, 0.5)))
        endless = np.isinf(a) | np.isinf(b)  # p_lower = 1 or p_upper = 0: safe everywhere
        a, b = np.where(endless, 0.0, a), np.where(endless, 0.0, b)
        gap = (a - b) - _QUANTILE_ERROR * (np.abs(a) + np.abs(b))
        certified = np.maximum(0.0, 0.5 * scale * (gap * (1.0 - _ARITHMETIC_ERROR)))
        return np.where(endless, np.inf, np.where(some, certified, 0.0))


def drawn_width(sigma: ArrayLike) -> Floats:
    """Half the width on which uniform noise is drawn: sigma rounded down to float32.

    At most 1.2e-7 of sigma is lost. Radii that used sigma itself would be too large by as much.
    """
    scale = np.minimum(np.asarray(sigma, np.float64), np.finfo(np.float32).max)
    width = scale.astype(np.float32)
    below = np.nextafter(width, np.float32(0.0))
    return np.where(width > scale, below, width).astype(np.float64)[()]


class Uniform(Law):
    """Independent noise, uniform on [-sigma, sigma], on every parameter; radii in l1, below sigma.

    The noise is drawn on [-w, w] with w = `drawn_width(sigma)`, and radii are those of w.
    """

    def _radius(self, scale: Floats, low: Floats, high: Floats) -> Floats:
        """R = w (p_lower - p_upper) with w the drawn width, rounded down.

        Difference and product are off by at most 2**-53 of the result each; 2**-49 of it is taken
        off, and the smallest positive float, which is the error of results below 1e-307.

        Source: the paper, Corollary 1; Yang et al. 2020.
        """
        certified = drawn_width(scale) * ((low - high) * (1.0 - _ARITHMETIC_ERROR))
        return np.where(low > high, np.maximum(0.0, certified - _SMALLEST), 0.0)


class Exponential(Law):
    """Noise of one parameter v >= 0 with density exp(-v / sigma) / sigma; one-sided radii.

    A radius covers what is ADDED to the parameter, delta in [0, R], and nothing below 0.
    """

    one_sided: ClassVar[bool] = True

    def _radius(self, scale: Floats, low: Floats, high: Floats) -> Floats:
        """R = sigma ln(1 / (1 - p_lower + p_upper)) for delta in [0, R], rounded down.

        With g = p_lower - p_upper, R = -sigma ln(1 - g). Below one half it is computed as log1p of
        g, above from 1 - p_lower, which is exact there. Sums are off by at most 2**-53 of
        themselves: 2**-49 is taken off g, or added to 1 - g. Then 2**-48 of the result is taken
        off for the logarithm and the product, and the smallest positive float, the error of
        results below 1e-307.

        Source: Li et al. 2021, TSS, Gaussian blur with exponential smoothing; docs/mathematics.md.
        """
        gap = (low - high) * (1.0 - _ARITHMETIC_ERROR)
        rest = ((1.0 - low) + high) * (1.0 + _ARITHMETIC_ERROR)
        near = gap < 0.5
        some, endless = low > high, rest == 0.0
        logarithm = np.where(
            near,
            -np.log1p(-np.where(near, np.maximum(gap, 0.0), 0.0)),
            -np.log(np.where(near | endless, 1.0, rest)),
        )
        certified = scale * (logarithm * (1.0 - _LOGARITHM_ERROR)) - _SMALLEST
        return np.where(endless, np.inf, np.where(some, np.maximum(0.0, certified), 0.0))


GAUSSIAN = Gaussian("gaussian", "l2")
UNIFORM = Uniform("uniform", "l1")
EXPONENTIAL = Exponential("exponential", "l1")
LAWS: dict[str, Law] = {law.name: law for law in (GAUSSIAN, UNIFORM, EXPONENTIAL)}
