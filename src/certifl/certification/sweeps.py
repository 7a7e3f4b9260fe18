"""Parameter sweeps: a line of deformations of one image, with votes at each of them.

A certificate covers all parameters up to its radius, a sweep one line through them. It shows the
smoothed classifier g_delta: votes of the network on ONE interpolation of the original image with
the summed parameter delta + noise, which is what certificates are about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.certification.certified_sets import lengths
from certifl.certification.counts import Request
from certifl.certification.sampling import VoteCounter
from certifl.perturbations import Perturbation
from certifl.perturbations.base import Sweep, family_sweeps
from certifl.rng import generator, image_key

STEPS = {1: 31, 2: 21}
"""Parameters of each sweep, by the number of sweeps; odd, so that 0 is one of them."""

_LEVELS = 255.0
# Ends in multiples of sigma: radii of uniform distributions end at sigma, Gaussian ones seldom
# reach three; an exponential one with 99 % of the votes reaches four.
_SIGMAS = {"uniform": 2.0, "gaussian": 3.0, "exponential": 5.0}
_SIGMAS_OF_INTERVALS = 4.0


@dataclass(frozen=True, eq=False)
class SweepVotes:
    """Votes and images along a sweep of v steps.

    Attributes:
        values: (v,) signed lengths along the sweep, 0 for the unchanged image.
        lengths: (v,) norms of the parameters, to compare with a radius.
        counts: (v, classes) votes of g_delta, on the same noise at every step.
        frames: (v, c, h, w) float32 the image deformed by delta alone, clipped to [0, 1].
    """

    values: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    frames: Tensor


def sweeps_of(perturbation: Perturbation, intervals: bool = False) -> tuple[Sweep, ...]:
    """The sweeps of a family, as far out as its certificates reach.

    Args:
        intervals: whether certificates are intervals of a scan, which do not end at sigma.
    """
    sigmas = _SIGMAS_OF_INTERVALS if intervals else _SIGMAS[perturbation.law.name]
    return family_sweeps(perturbation, sigmas * perturbation.sigma)


def sweep_along(
    counter: VoteCounter, sweep: Sweep, image: Tensor, other: Tensor, steps: int, votes: int
) -> SweepVotes:
    """Cast votes of the network at every step of a sweep.

    Args:
        counter: the prepared network, the perturbation and the seed.
        image: (c, h, w) float32 on the network's device.
        other: another image of the same shape, for the sweep that ends there.
        steps: parameters of the sweep, odd. votes: at each of them.
    """
    perturbation = counter.perturbation
    values, deltas = _deltas(sweep, perturbation, image, other, steps, counter.seed)
    batch, key = image[None], image_key(image)
    requests: Sequence[Request] = [
        Request(step, 0, key, "explore", 0, votes) for step in range(len(deltas))
    ]
    counts = counter.count(batch, requests, len(deltas), deltas)
    axes = deltas.ndim - 1
    return SweepVotes(
        values=values,
        lengths=lengths(deltas, perturbation.norm, axes).cpu().numpy(),
        counts=counts,
        frames=perturbation.apply(batch, deltas).clamp(0.0, 1.0).cpu(),
    )


def _deltas(
    sweep: Sweep, perturbation: Perturbation, image: Tensor, other: Tensor, steps: int, seed: int
) -> tuple[np.ndarray, Tensor]:
    """Signed lengths (v,) and parameters (v, *params_shape) on the image's device."""
    channels, height, width = image.shape
    shape = perturbation.params_shape((channels, height, width))
    if sweep.reach is None:
        line = (other - image).cpu().double()
        ends = float(line.norm())
    elif sweep.axis is not None:
        line = torch.zeros(math.prod(shape), dtype=torch.float64)
        line[sweep.axis], ends = 1.0, sweep.reach
    else:
        stream = generator(seed, "explore", image_key(image), sweep.name)
        line, ends = torch.randn(shape, generator=stream, dtype=torch.float64), sweep.reach
    line = line.reshape(shape) / line.norm().clamp(min=1e-12)
    half = steps // 2
    numbers = np.arange(steps) / (steps - 1) if not sweep.backward else np.arange(-half, half + 1)
    values = numbers * (ends if not sweep.backward else ends / half)
    deltas = (torch.as_tensor(values).reshape(-1, *(1 for _ in shape)) * line).float()
    if getattr(perturbation, "exact", False):
        deltas = (deltas * _LEVELS).trunc() / _LEVELS  # noise on the grid of 8-bit intensities
    return values, deltas.to(image.device)
