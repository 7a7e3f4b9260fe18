"""The parameters that certificates cover, as sets to search in: balls, or intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.certification.counts import Request
from certifl.certification.sampling import VoteCounter
from certifl.errors import InputError
from certifl.perturbations.base import Perturbation, Sweep, family_sweeps
from certifl.rng import generator, image_key

# Deltas are drawn a millionth inside, so that float32 rounding cannot carry one over the edge.
_INSIDE = 1.0 - 1e-6
_LEVELS = 255.0


@dataclass(frozen=True, eq=False)
class CertifiedRegion:
    """Where m certificates promise that g_delta does not change its class.

    Attributes:
        radius: (m,) float64: ||delta|| <= radius in `norm`.
        low, high: (m,) float64, families of one parameter: low <= delta <= high, which reaches
            beyond the radius on one side where a certificate is an interval, and begins at 0 where
            the distribution is one-sided.
        norm: "l2" or "l1".
        shape: of one parameter set.
        exact: parameters are multiples of 1/255 (`exact=True`).
    """

    radius: Tensor
    low: Tensor
    high: Tensor
    norm: str
    shape: tuple[int, ...]
    exact: bool = False

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.radius)

    def rows(self, start: int, stop: int) -> CertifiedRegion:
        """The certificates of some images."""
        part = slice(start, stop)
        ends = self.radius[part], self.low[part], self.high[part]
        return CertifiedRegion(*ends, norm=self.norm, shape=self.shape, exact=self.exact)

    def points(self, share: Tensor) -> Tensor:
        """Families of one parameter: deltas at shares of the way from `low` (0) to `high` (1).

        Args:
            share: (k,) or (m, k), in [0, 1].

        Returns:
            (m, k, 1) float32.
        """
        low, high = (self.low * _INSIDE)[:, None], (self.high * _INSIDE)[:, None]
        return (low + (high - low) * share.double()).to(torch.float32)[..., None]

    def share_of(self, deltas: Tensor) -> Tensor:
        """The inverse of `points`: (m, k, 1) to (m, k) in [0, 1]; one half where low is high."""
        low, high = (self.low * _INSIDE)[:, None], (self.high * _INSIDE)[:, None]
        width = high - low
        share = (deltas[..., 0].double() - low) / torch.where(width > 0, width, 1.0)
        return torch.where(width > 0, share, 0.5).clamp(0.0, 1.0)

    def towards(self, directions: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Deltas in given directions, at a share of the radius (1: on the boundary).

        Args:
            directions: (m, k, *shape) of any length but 0.
            share: of the radius, broadcast to (m, k).

        Returns:
            (m, k, *shape) float32, never longer than the radius.
        """
        size = lengths(directions, self.norm, len(self.shape))
        length = self.radius[:, None] * share * _INSIDE
        factor = (length / torch.where(size > 0, size, 1.0)).reshape(
            *size.shape, *(1 for _ in self.shape)
        )
        deltas = (directions.double() * factor).to(torch.float32)
        # On the grid of 8-bit intensities towards zero, which makes no delta longer.
        return (deltas * _LEVELS).trunc() / _LEVELS if self.exact else deltas

    def random(self, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Deltas uniform over the ball (l2) or the interval, (m, count, *shape) float32.

        Args:
            count: per image.
            generators: one per image, so that no image's deltas depend on the others.
        """
        drawn = shares(count, generators)
        if self.dim == 1:
            return self.points(drawn)
        return self.towards(self.directions(count, generators), drawn ** (1.0 / self.dim))

    def directions(self, count: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Random directions, (m, count, *shape) float32; see `random`."""
        size = (count, *self.shape)
        return torch.stack([torch.randn(size, generator=g, device=g.device) for g in generators])

    def first(self, count: int, aim: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Deltas to begin a search with, (m, count, *shape).

        A grid in one dimension; otherwise `aim` (m, *shape), the axes where they are few, random
        directions on the boundary, and some inside.
        """
        if self.dim == 1:
            return self.points(torch.linspace(0, 1, count, device=aim.device))
        axes = (
            torch.eye(self.dim, device=aim.device) if 4 * self.dim <= count else aim.new_empty(0)
        )
        axes = torch.cat([axes, -axes]).reshape(-1, *self.shape)
        boundary = max(1, (count - 1 - len(axes)) * 3 // 4)
        outer = [
            aim[:, None],
            axes.expand(len(self), *axes.shape),
            self.directions(boundary, generators),
        ]
        inside = count - 1 - len(axes) - boundary
        deltas = [self.towards(torch.cat(outer, dim=1))]
        if inside > 0:
            drawn = shares(inside, generators)
            deltas.append(self.towards(self.directions(inside, generators), drawn))
        return torch.cat(deltas, dim=1)

    def around(self, best: Tensor, count: int, spacing: float) -> Tensor:
        """One dimension: a finer grid about `best` (m, 1, 1), `spacing` of the interval wide."""
        offsets = torch.linspace(-1, 1, count, device=best.device) * spacing
        return self.points((self.share_of(best) + offsets).clamp(0.0, 1.0))

    def beyond(
        self,
        best: Tensor,
        aims: Tensor,
        count: int,
        width: float,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """More dimensions: deltas along `aims`, between them and `best`, near `best`, inside.

        Args:
            best: (m, 1, *shape). aims: (m, k, *shape).
            count: of deltas in all, at least k + 3.
            width: how far near is, as a tangent.
            generators: one per image.
        """
        unit = self._unit(best)
        between = unit + self._unit(aims[:, :1])
        others = self.directions(count - aims.shape[1] - 2, generators)
        outer = torch.cat([aims, between, unit + width * self._unit(others)], dim=1)
        return torch.cat([self.towards(outer), self.towards(best, 0.8)], dim=1)

    def _unit(self, directions: Tensor) -> Tensor:
        size = lengths(directions, "l2", len(self.shape))
        scale = torch.where(size > 0, size, 1.0).to(directions.dtype)
        return directions / scale.reshape(*size.shape, *(1 for _ in self.shape))


def shares(count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform numbers in [0, 1), (m, count) float64, one generator per image."""
    drawn = [torch.rand(count, generator=g, device=g.device) for g in generators]
    return torch.stack(drawn).double()


def region_of(
    perturbation: Perturbation,
    image_shape: tuple[int, int, int],
    radius: np.ndarray,
    interval: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> CertifiedRegion:
    """What certificates of radius `radius` (m,), or of an interval (m, 2) around 0, cover.

    Raises:
        InputError: radii that are negative or not finite, or intervals without 0.
    """
    size = torch.as_tensor(np.asarray(radius, np.float64), device=device)
    if size.ndim != 1 or not bool((torch.isfinite(size) & (size >= 0)).all()):
        raise InputError("radius must hold one finite number of at least 0 for each image.")
    shape = perturbation.params_shape(image_shape)
    one_sided = getattr(perturbation.law, "one_sided", False)
    low, high = torch.zeros_like(size) if one_sided else -size, size
    if interval is not None and math.prod(shape) == 1:
        ends = torch.as_tensor(np.asarray(interval, np.float64), device=device)
        if ends.shape != (len(size), 2) or not bool(((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).all()):
            raise InputError("interval must hold two ends around 0 for each image.")
        low, high = torch.minimum(low, ends[:, 0]), torch.maximum(high, ends[:, 1])
    exact = bool(getattr(perturbation, "exact", False))
    return CertifiedRegion(size, low, high, perturbation.norm, shape, exact)


def lengths(deltas: Tensor, norm: str, axes: int) -> Tensor:
    """Norms over the last `axes` axes, float64."""
    flat = deltas.double().flatten(-axes)
    return flat.abs().sum(-1) if norm == "l1" else flat.square().sum(-1).sqrt()


STEPS = {1: 31, 2: 21}
"""Parameters of each sweep, by the number of sweeps; odd, so that 0 is one of them."""

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
