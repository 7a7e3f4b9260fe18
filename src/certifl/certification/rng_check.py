"""A self-test of the random source, in milliseconds, before the first vote of a process.

Certificates assume independent draws from the distribution. Votes of a broken generator, a driver
that replays its numbers or a perturbation that forgets to draw look like any others. So streams
are tested once: they repeat, they differ, and moments are those of the distribution. The streams
are fixed, so the result is the same at every start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certifl.certification.sampling import CHUNK
from certifl.errors import RandomSourceBroken
from certifl.perturbations.base import Perturbation
from certifl.rng import vote_generator

Source = Callable[[int, str, int, int, torch.device], torch.Generator]
"""Called with (seed, purpose, image key, chunk, device), as `rng.vote_generator`."""

_SEED, _IMAGE = 20_230_206, 1_618_033_988
# A correct source is further off than this in one of 5e8 statistics.
_STANDARD_ERRORS = 6.0
# law -> (mean, variance, fourth central moment), in units of sigma, sigma^2 and sigma^4
_MOMENTS = {
    "gaussian": (0.0, 1.0, 3.0),
    "uniform": (0.0, 1.0 / 3.0, 1.0 / 5.0),
    "exponential": (1.0, 1.0, 9.0),
}
# Noise on the grid of 8-bit intensities differs from the law by at most half a level a draw.
_LEVEL = 1.0 / 255.0

_passed: set[tuple[Any, ...]] = set()


def check_random_source_once(
    perturbation: Perturbation, image_shape: tuple[int, ...], device: torch.device
) -> None:
    """`check_random_source`, once per process for each device, perturbation and image shape."""
    case = (str(device), repr(perturbation), tuple(image_shape))
    if case not in _passed:
        check_random_source(perturbation, image_shape, device)
        _passed.add(case)


def check_random_source(
    perturbation: Perturbation,
    image_shape: tuple[int, ...],
    device: torch.device,
    source: Source = vote_generator,
) -> None:
    """Refuse to vote where draws do not repeat, do not differ, or do not follow the distribution.

    Args:
        perturbation: whose draws are tested.
        image_shape: (c, h, w).
        device: where votes will be drawn.
        source: gives the generator of a chunk of votes.

    Raises:
        RandomSourceBroken: a stream is not repeated by the same seed; two chunks, the two stages
            or two images share a stream; mean, variance or the correlation of two chunks is more
            than six standard errors from those of the distribution.
    """
    channels, height, width = image_shape
    # A chunk draws as many numbers as the images have pixels; some hundred thousand are enough.
    sets = min(CHUNK, max(2, 100_000 // (2 * channels * height * width)))

    def drawn(purpose: str, image: int, chunk: int) -> Tensor:
        draws = perturbation.sample(
            sets,
            (channels, height, width),
            source(_SEED, purpose, image, chunk, device),
        )
        return draws.flatten()

    first, second = drawn("estimation", _IMAGE, 0), drawn("estimation", _IMAGE, 1)
    if not torch.equal(first, drawn("estimation", _IMAGE, 0)):
        raise _broken("the same seed gives other numbers when it is used again", device)
    others = {
        "two chunks of one image": second,
        "selection and estimation": drawn("selection", _IMAGE, 0),
        "two images": drawn("estimation", _IMAGE + 1, 0),
    }
    for pair, other in others.items():
        if torch.equal(first, other):
            raise _broken(f"{pair} draw the same numbers", device)
    _check_moments(perturbation, first.double(), second.double(), device)


def _check_moments(
    perturbation: Perturbation, first: Tensor, second: Tensor, device: torch.device
) -> None:
    """Mean, variance and correlation of two chunks against the distribution."""
    if perturbation.law.name not in _MOMENTS:
        return  # a custom distribution, whose moments are unknown here
    mean, variance, fourth = (
        unit * perturbation.sigma**power
        for unit, power in zip(_MOMENTS[perturbation.law.name], (1, 2, 4), strict=True)
    )
    first, second = first - mean, second - mean
    both, pairs = torch.cat([first, second]), len(first)
    slack = _LEVEL if getattr(perturbation, "exact", False) else 0.0
    statistics = {
        "mean": (float(both.mean()), 0.0, math.sqrt(variance / (2 * pairs)), 0.0),
        "variance": (
            float(both.square().mean()),
            variance,
            math.sqrt((fourth - variance**2) / (2 * pairs)),
            slack * (math.sqrt(variance) + slack),
        ),
        "covariance of two chunks": (
            float((first * second).mean()),
            0.0,
            variance / math.sqrt(pairs),
            slack**2,
        ),
    }
    for name, (value, expected, error, rounding) in statistics.items():
        # float32 draws are off by 6e-8 of themselves, which is far below any standard error here.
        if not abs(value - expected) <= _STANDARD_ERRORS * error + rounding:
            raise _broken(
                f"the {name} of {2 * pairs} draws of {perturbation.family} is {value:.4g}, "
                f"{abs(value - expected) / error:.1f} standard errors from {expected:.4g}",
                device,
            )


def _broken(what: str, device: torch.device) -> RandomSourceBroken:
    return RandomSourceBroken(
        f"The random source on {device} cannot be trusted: {what}. Certificates would not hold, "
        "so nothing was certified. Try device='cpu'; check the installation of torch and, if the "
        "perturbation is your own, its sample()."
    )
