"""Walks through the parameters of a perturbation: deformations in a row, votes at each of them.

A certificate speaks of all parameters up to its radius, a walk of one line through them. What is
seen on the way is the smoothed classifier g_delta: votes of the network on ONE interpolation of
the original image with the summed parameter delta + noise, which is what certificates are about.
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
from certifl.perturbations.base import Sweep, sweeps_of
from certifl.rng import generator, image_key

STEPS = {1: 31, 2: 21}
"""Parameters on each walk, by the number of walks; odd, so that 0 is one of them."""

_LEVELS = 255.0
# How far to go, in multiples of sigma: certificates of uniform laws end at sigma, those of
# Gaussian ones seldom reach three.
_SIGMAS = {"uniform": 2.0, "gaussian": 3.0}
_SIGMAS_OF_INTERVALS = 4.0


@dataclass(frozen=True, eq=False)
class Walked:
    """What was seen on a walk of v steps.

    Attributes:
        values: (v,) signed lengths along the walk, 0 for the image as it is.
        lengths: (v,) norms of the parameters, to hold against a radius.
        counts: (v, classes) votes of g_delta, on the same noise at every step.
        frames: (v, c, h, w) float32 the image deformed by delta alone, clipped to [0, 1].
    """

    values: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    frames: Tensor


def walks_of(perturbation: Perturbation, intervals: bool = False) -> tuple[Sweep, ...]:
    """The sweeps of a family, as far out as its certificates reach.

    Args:
        intervals: whether certificates are intervals of a scan, which do not end at sigma.
    """
    sigmas = _SIGMAS_OF_INTERVALS if intervals else _SIGMAS[perturbation.law.name]
    return sweeps_of(perturbation, sigmas * perturbation.sigma)


def walk_along(
    counter: VoteCounter, walk: Sweep, image: Tensor, other: Tensor, steps: int, votes: int
) -> Walked:
    """Go along a walk and let the network vote at every step.

    Args:
        counter: the prepared network, the perturbation and the seed.
        image: (c, h, w) float32 on the network's device.
        other: another picture of the same shape, for the walk that leads to it.
        steps: parameters on the walk, odd. votes: at each of them.
    """
    perturbation = counter.perturbation
    values, deltas = _deltas(walk, perturbation, image, other, steps, counter.seed)
    batch, key = image[None], image_key(image)
    requests: Sequence[Request] = [
        Request(step, 0, key, "explore", 0, votes) for step in range(len(deltas))
    ]
    counts = counter.count(batch, requests, len(deltas), deltas)
    axes = deltas.ndim - 1
    return Walked(
        values=values,
        lengths=lengths(deltas, perturbation.norm, axes).cpu().numpy(),
        counts=counts,
        frames=perturbation.apply(batch, deltas).clamp(0.0, 1.0).cpu(),
    )


def _deltas(
    walk: Sweep, perturbation: Perturbation, image: Tensor, other: Tensor, steps: int, seed: int
) -> tuple[np.ndarray, Tensor]:
    """Signed lengths (v,) and parameters (v, *params_shape) on the image's device."""
    channels, height, width = image.shape
    shape = perturbation.params_shape((channels, height, width))
    if walk.reach is None:
        line = (other - image).cpu().double()
        ends = float(line.norm())
    elif walk.axis is not None:
        line = torch.zeros(math.prod(shape), dtype=torch.float64)
        line[walk.axis], ends = 1.0, walk.reach
    else:
        stream = generator(seed, "explore", image_key(image), walk.name)
        line, ends = torch.randn(shape, generator=stream, dtype=torch.float64), walk.reach
    line = line.reshape(shape) / line.norm().clamp(min=1e-12)
    half = steps // 2
    numbers = np.arange(steps) / (steps - 1) if not walk.backward else np.arange(-half, half + 1)
    values = numbers * (ends if not walk.backward else ends / half)
    deltas = (torch.as_tensor(values).reshape(-1, *(1 for _ in shape)) * line).float()
    if getattr(perturbation, "exact", False):
        deltas = (deltas * _LEVELS).trunc() / _LEVELS  # noise on the grid of 8-bit intensities
    return values, deltas.to(image.device)
