"""Attacks on certificates: their promise is tested, what they do not promise is measured.

Inside a certified radius the class of g_delta must not change. `search` looks for a delta that
changes it: random directions, a grid for families of one parameter, the direction in which the
noise of wrongly voted copies points (for a half-space, the best there is), and a few steps of
refinement. Few votes find suspicious deltas, many fresh ones judge them, and a violation is only
reported if a test says so at a level that holds for all deltas together.

A system that receives a changed image smooths AFTER the change, which a certificate in parameter
space does not cover. `deformed_first` gives the votes of that, for a measured accuracy. Families
whose certificates cover received images do so up to what the sender does besides: there the image
arrives clipped to [0, 1] and rounded to 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.certification.counts import CHUNK, Request, sign_test_against, vote_margins
from certifl.certification.sampling import VoteCounter, lengths
from certifl.errors import InputError
from certifl.perturbations import covers_received
from certifl.perturbations.base import Perturbation
from certifl.rng import generator, image_key

# Deltas are drawn a millionth inside, so that float32 rounding cannot carry one over the edge.
_INSIDE = 1.0 - 1e-6
# Images whose deltas are on the device at once; results do not depend on it.
_BLOCK = 8
# A delta is no longer confirmed once votes favor the certified class at this level.
_NO_LONGER_SUSPICIOUS = 1e-4
_LEVELS = 255.0


@dataclass(frozen=True)
class AttackBudget:
    """Budget of an attack.

    Attributes:
        directions: deltas tried first, per image.
        steps: rounds of refinement. proposals: deltas tried in each.
        screen: votes per delta during the search.
        aim: votes for a direction of disagreement; None takes four per parameter, 2000 to 20 000.
        finalists: worst deltas per image that are judged with fresh votes.
        confirm: votes per suspicious delta; ten times those of the certificate.
        level: probability of calling any violation where there is none.
    """

    directions: int = 32
    steps: int = 3
    proposals: int = 8
    screen: int = 400
    aim: int | None = None
    finalists: int = 2
    confirm: int = 1_000_000
    level: float = 1e-6

    def __post_init__(self) -> None:
        least = {"directions": 2, "steps": 0, "proposals": 5, "finalists": 1, "confirm": 1}
        for name, low in {**least, "screen": CHUNK, "aim": CHUNK}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} must be at least {low}; got {value}.")
        if not 0.0 < self.level < 1.0:
            raise InputError(f"level is a probability in (0, 1); got {self.level}.")


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The worst delta of each of m images.

    Attributes:
        delta: (m, *params_shape) float32, inside the certified set.
        length: (m,) its norm.
        counts: (m, classes) fresh votes of g_delta there, not used in the search.
        p_value: (m,) of "no other class is more likely than the certified one", for all other
            classes together.
        violated: (m,) another class is more likely: the certificate is wrong.
        tried: deltas searched. suspicious: deltas that took all `AttackBudget.confirm` votes.
        votes: votes spent.
    """

    delta: Tensor
    length: np.ndarray
    counts: np.ndarray
    p_value: np.ndarray
    violated: np.ndarray
    tried: int
    suspicious: int
    votes: int


def search(
    counter: VoteCounter,
    images: Tensor,
    predicted: np.ndarray,
    radius: np.ndarray,
    interval: np.ndarray | None = None,
    budget: AttackBudget | None = None,
) -> AttackResult:
    """Look inside certified sets for a delta at which g_delta answers with another class.

    Guarantee: if all certificates hold, any violation is reported with probability at most
    `budget.level`, whatever the search did: votes of the verdict are fresh, and the level is
    shared out over all deltas judged and all other classes. Finding nothing proves nothing.

    Args:
        counter: the prepared network, the perturbation and the seed.
        images: (m, c, h, w) float32 on the network's device.
        predicted: (m,) certified classes, none abstained.
        radius: (m,) certified radii.
        interval: (m, 2) two-sided certificates of one parameter, if any.
        budget: of the search.

    Raises:
        InputError: arguments that do not fit each other.
    """
    budget = budget or AttackBudget()
    classes = np.asarray(predicted, np.int64)
    if len(images) == 0 or classes.shape != (len(images),):
        raise InputError(
            f"There must be at least one image and a class for each; got {len(images)} images "
            f"and {classes.shape} classes."
        )
    if classes.min() < 0 or classes.max() >= counter.network.classes:
        raise InputError("predicted must hold certified classes; leave out abstained images.")
    device = counter.network.device
    channels, height, width = images.shape[1:]
    whole = region_of(counter.perturbation, (channels, height, width), radius, interval, device)
    if len(whole) != len(images):
        raise InputError(f"Got {len(whole)} radii for {len(images)} images.")
    level = budget.level / (len(images) * budget.finalists)
    parts = []
    for start in range(0, len(images), _BLOCK):
        stop = min(len(images), start + _BLOCK)
        block, region = images[start:stop], whole.rows(start, stop)
        stage = _Search(counter, block, classes[start:stop], region, budget)
        parts.append(stage.judge(stage.finalists(), level))
    columns = ("length", "counts", "p_value", "violated")
    return AttackResult(
        delta=torch.cat([part.delta for part in parts]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns},
        tried=sum(part.tried for part in parts),
        suspicious=sum(part.suspicious for part in parts),
        votes=sum(part.votes for part in parts),
    )


class _Search:
    """The search for a block of images; every stage casts votes no other stage has seen."""

    def __init__(
        self,
        counter: VoteCounter,
        images: Tensor,
        predicted: np.ndarray,
        region: CertifiedRegion,
        budget: AttackBudget,
    ) -> None:
        self._counter, self._images, self._region, self._budget = counter, images, region, budget
        self._predicted = predicted
        self._expected = torch.as_tensor(predicted, device=images.device)
        self._keys = [image_key(image) for image in images]
        device = counter.network.device
        self._generators = [
            generator(counter.seed, "attack", k, device=device) for k in self._keys
        ]
        self._next_vote = self.tried = self.votes = 0

    def finalists(self) -> Tensor:
        """The worst deltas after all rounds, (m, finalists, *shape)."""
        budget, region = self._budget, self._region
        nowhere = torch.zeros((len(region), 1, *region.shape), device=self._images.device)
        disagreement = nowhere[:, 0] if region.dim == 1 else self._disagreement(nowhere)
        deltas = region.first(budget.directions, self._aim(disagreement), self._generators)
        margins = self._margins(deltas)
        for step in range(budget.steps):
            deltas, margins = _worst(deltas, margins, budget.finalists)
            if region.dim == 1:
                spacing = (2.0 / budget.proposals) ** step / (budget.directions - 1)
                proposed = region.around(deltas[:, :1], budget.proposals, spacing)
            else:
                latest = self._disagreement(deltas[:, :1])
                disagreement = disagreement + latest
                aims = torch.stack([self._aim(latest), self._aim(disagreement)], dim=1)
                width = 0.5 ** (step + 1)
                proposed = region.beyond(
                    deltas[:, :1], aims, budget.proposals, width, self._generators
                )
            deltas = torch.cat([deltas, proposed], dim=1)
            margins = np.concatenate([margins, self._margins(proposed)], axis=1)
        return _worst(deltas, margins, budget.finalists)[0]

    def judge(self, deltas: Tensor, level: float) -> AttackResult:
        """Judge the finalists by fresh votes: four times as many at each look, while in doubt."""
        budget, count = self._budget, deltas.shape[1]
        first = self._next_vote
        slots = np.arange(len(deltas) * count)
        rows = slots // count
        counts = np.zeros((len(slots), self._counter.network.classes), np.int64)
        doubtful, have, until = slots, 0, min(10 * budget.screen, budget.confirm)
        while len(doubtful) and have < budget.confirm:
            counts += self._counts(deltas, doubtful, first + have, first + until)
            p_ahead = sign_test_against(counts[doubtful], self._predicted[rows[doubtful]], True)
            if until < budget.confirm:
                doubtful = doubtful[p_ahead > _NO_LONGER_SUSPICIOUS]
            have, until = until, min(4 * until, budget.confirm)
        p_values = np.ones(len(slots))
        # Only deltas that took all votes are judged: stopping early cannot make a violation.
        p_values[doubtful] = sign_test_against(counts[doubtful], self._predicted[rows[doubtful]])
        margins = vote_margins(counts, self._predicted[rows]).reshape(-1, count)
        best = np.where(p_values.reshape(-1, count) <= level, -2.0, margins).argmin(axis=1)
        chosen = np.arange(len(deltas)) * count + best
        worst = deltas.flatten(0, 1)[torch.as_tensor(chosen, device=deltas.device)]
        return AttackResult(
            worst,
            lengths(worst, self._region.norm, len(self._region.shape)).cpu().numpy(),
            counts[chosen],
            p_values[chosen],
            p_values[chosen] <= level,
            self.tried,
            len(doubtful),
            self.votes,
        )

    def _aim(self, disagreement: Tensor) -> Tensor:
        """The direction of disagreement, or a random one where there is none, (m, *shape)."""
        random = self._region.directions(1, self._generators)[:, 0]
        known = (
            (disagreement.flatten(1) != 0).any(dim=1).reshape(-1, *(1 for _ in self._region.shape))
        )
        return torch.where(known, disagreement, random)

    def _disagreement(self, center: Tensor) -> Tensor:
        """Directions of disagreement at one delta per image, (m, *shape); see `VoteCounter`."""
        count = self._budget.aim or min(20_000, max(2000, 4 * self._region.dim))
        stop = self._next_vote + count
        requests = [
            Request(row, row, key, "attack", self._next_vote, stop)
            for row, key in enumerate(self._keys)
        ]
        direction = self._counter.disagreement(
            self._images, requests, self._expected, center[:, 0]
        )
        self._next_vote = stop
        self.votes += count * len(requests)
        return direction

    def _margins(self, deltas: Tensor) -> np.ndarray:
        """Margins of the certified class at each delta, as shares of the votes, (m, k)."""
        slots = np.arange(deltas.shape[0] * deltas.shape[1])
        first = self._next_vote
        counts = self._counts(deltas, slots, first, first + self._budget.screen)
        self.tried += len(slots)
        self._next_vote += self._budget.screen
        rows = slots // deltas.shape[1]
        return vote_margins(counts, self._predicted[rows]).reshape(deltas.shape[:2])

    def _counts(self, deltas: Tensor, slots: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Votes `start` to `stop` of g_delta at some of the deltas; other slots stay empty."""
        per_image = deltas.shape[1]
        requests = [
            Request(int(s), int(s) // per_image, self._keys[s // per_image], "attack", start, stop)
            for s in slots
        ]
        every = deltas.flatten(0, 1)
        self.votes += (stop - start) * len(requests)
        return self._counter.count(self._images, requests, len(every), every)


def _worst(deltas: Tensor, margins: np.ndarray, count: int) -> tuple[Tensor, np.ndarray]:
    order = np.argsort(margins, axis=1, kind="stable")[:, :count]
    rows = torch.arange(len(deltas), device=deltas.device)[:, None]
    worst = deltas[rows, torch.as_tensor(order, device=deltas.device)]
    return worst, np.take_along_axis(margins, order, axis=1)


def deformed_first(counter: VoteCounter, images: Tensor, deltas: Tensor, votes: int) -> np.ndarray:
    """Votes (m, k, classes) of the smoothed classifier on images that arrive changed.

    Deformations are then interpolated twice; where that makes no difference (`covers_received`),
    the image is sent as a camera would: clipped to [0, 1] and rounded to 8 bits.

    Args:
        counter: the prepared network, the perturbation and the seed. votes: per image.
        images: (m, c, h, w) float32 on the network's device.
        deltas: (m, k, *params_shape) on the same device; zeros give the pristine image.
    """
    counts = []
    for image, own in zip(images, deltas, strict=True):
        arrived = counter.perturbation.apply(image[None], own)
        if covers_received(counter.perturbation.family):
            arrived = (arrived.clamp(0.0, 1.0) * _LEVELS).round() / _LEVELS
        counts.append(counter.count_each(arrived, "attack", votes))
    return np.stack(counts)


# The parameters that certificates cover, as sets to search in: balls, or intervals.


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
        """Of one parameter, deltas (m, k, 1) float32 at shares (k,) or (m, k) from low to high."""
        low, high = (self.low * _INSIDE)[:, None], (self.high * _INSIDE)[:, None]
        return (low + (high - low) * share.double()).to(torch.float32)[..., None]

    def share_of(self, deltas: Tensor) -> Tensor:
        """The inverse of `points`: (m, k, 1) to (m, k) in [0, 1]; one half where low is high."""
        low, high = (self.low * _INSIDE)[:, None], (self.high * _INSIDE)[:, None]
        width = high - low
        share = (deltas[..., 0].double() - low) / torch.where(width > 0, width, 1.0)
        return torch.where(width > 0, share, 0.5).clamp(0.0, 1.0)

    def towards(self, directions: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Deltas in directions (m, k, *shape), float32, never longer than the radius.

        `share` of the radius is broadcast to (m, k): 1 is on the boundary.
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

        Each image has a generator, so that its deltas do not depend on the other images.
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
    """What certificates of radii (m,), or intervals (m, 2) around 0, cover; else InputError."""
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
