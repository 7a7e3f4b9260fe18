"""What was spent: epsilon of so many noisy steps, and the noise that keeps to a budget.

Both kinds of privacy are the same mechanism told twice: a Poisson sample (every record with
probability q, independently) is summed with each record's share clipped to norm C, and Gaussian
noise of standard deviation z C is added. Its Renyi divergences compose by addition, and

    epsilon(delta) = min_a [ T rho_a(q, z) - (ln delta + ln a) / (a - 1) + ln((a - 1) / a) ]

after T steps is an upper bound for data sets of which one has nothing in the place of a record of
the other. Their size is public and sets q, so it is the same in both.

Source: Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019
(rho_a); Balle et al., Hypothesis Testing Interpretations and Renyi Differential Privacy, 2020,
Theorem 21 (the conversion). Both are computed by opacus.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Mapping
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from certifl.errors import SpecError
from certifl.federated.training.batches import batch_bounds

ACCOUNTANT = "rdp"
# Where the minimum over orders is looked for: every order gives a bound that holds.
_ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 10)),
    *(2 + quarter / 4 for quarter in range(24)),
    *range(8, 65),
    *(80, 96, 128, 192, 256, 512),
)
_MOST_NOISE = 1e4
_PRECISION = 1e-3


def grad_sample() -> ModuleType:
    """Gradients per sample of opacus, or an error that says how to get them.

    Raises:
        SpecError: opacus is not installed.
    """
    return _opacus("opacus.grad_sample")


def _opacus(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(
            f"[privacy] needs opacus, which cannot be imported here ({error}). Install it with "
            "pip install 'certifl[dp]', or remove [privacy]."
        ) from error


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of a pass over so many images; every image is drawn with probability 1 / steps."""
    return len(batch_bounds(images, batch_size))


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The loss of privacy after so many steps, as epsilon at this delta.

    Args:
        noise_multiplier: z, noise in units of the clipping norm; 0 gives infinity.
        rate: q, probability of each record to be in a step.
        steps: T, how many steps.
        delta: probability of the guarantee to fail.

    Returns:
        An upper bound, exact to about the distance between the orders it is minimised over.
    """
    return composed({(noise_multiplier, rate): steps}, delta)


def composed(steps: Mapping[tuple[float, float], int], delta: float) -> float:
    """The loss of privacy after steps of several kinds, whose divergences add up.

    Args:
        steps: how many, by (noise multiplier z, sampling rate q); every step has a sample and
            noise of its own.
        delta: probability of the guarantee to fail.

    Returns:
        An upper bound on epsilon; infinity where a step had no noise.
    """
    taken = {kind: count for kind, count in steps.items() if count}
    if not taken:
        return 0.0
    if any(noise_multiplier == 0 for noise_multiplier, _ in taken):
        return math.inf
    analysis = _opacus("opacus.accountants.analysis.rdp")
    kinds = [count * _divergences(*kind) for kind, count in taken.items()]
    with warnings.catch_warnings():
        # At either end of the orders the bound could be smaller, and holds as it is.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        spent, _ = analysis.get_privacy_spent(
            orders=_ORDERS, rdp=functools.reduce(np.add, kinds), delta=delta
        )
    return max(0.0, float(spent))


@functools.lru_cache(maxsize=4096)
def _divergences(noise_multiplier: float, rate: float) -> NDArray[np.float64]:
    """rho_a(q, z) of one step, for all orders."""
    analysis = _opacus("opacus.accountants.analysis.rdp")
    return analysis.compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS)


@functools.lru_cache(maxsize=4096)
def noise_for(target_epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The noise multiplier that spends no more than the target in so many steps.

    Returns:
        At most a thousandth above the smallest one.

    Raises:
        SpecError: even a noise multiplier of 10 000 spends more.
    """
    high = 1.0
    while epsilon(high, rate, steps, delta) > target_epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise SpecError(
                f"privacy.target_epsilon = {target_epsilon} cannot be kept over {steps} steps at "
                f"a sampling rate of {rate:.3g}: raise it, train fewer rounds, or raise delta."
            )
    low = 0.0
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if epsilon(middle, rate, steps, delta) > target_epsilon:
            low = middle
        else:
            high = middle
    return high
