"""Attacks on certificates: what they promise, tried; what they do not promise, measured.

Inside a certified radius the class of g_delta must not change. `search` looks for a delta that
changes it: random directions, a grid for families of one parameter, the direction in which the
noise of wrongly voted copies points (for a half-space, the best there is), and a few steps of
refinement. Few votes find suspicious deltas, many fresh ones judge them, and a violation is only
called one if a test says so at a level that holds for everything tried together.

A system that receives a deformed image smooths AFTER the deformation, which a certificate in
parameter space does not cover. `deformed_first` gives the votes of that, for a measured accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.certification.certified_sets import CertifiedRegion, lengths, reach_of
from certifl.certification.counts import Request, lead_of, sign_test_against
from certifl.certification.sampling import CHUNK, VoteCounter
from certifl.errors import InputError
from certifl.rng import generator, image_key

# Images whose deltas are on the device at once; results do not depend on it.
_BLOCK = 8
# Votes that show a lead of the certified class at this level end the confirmation of a delta.
_NO_LONGER_SUSPICIOUS = 1e-4


@dataclass(frozen=True)
class AttackBudget:
    """How hard to look.

    Attributes:
        directions: deltas tried first, per image.
        steps: rounds of refinement. proposals: deltas tried in each.
        screen: votes per delta while looking.
        aim: votes for a direction of wrong votes; None takes four per parameter, 2000 to 20 000.
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
    """The worst delta that was found for each of m images.

    Attributes:
        delta: (m, *params_shape) float32, inside the certified set.
        length: (m,) its norm.
        counts: (m, classes) fresh votes of g_delta there, none of those it was found with.
        p_value: (m,) of "no other class is more likely than the certified one", for all other
            classes together.
        violated: (m,) another class is more likely: the certificate is wrong.
        tried: deltas looked at. suspicious: deltas that took all `AttackBudget.confirm` votes.
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
    effort: AttackBudget | None = None,
) -> AttackResult:
    """Look inside certified sets for a delta at which g_delta answers with another class.

    Guarantee: if all certificates hold, any violation is reported with probability at most
    `effort.level`, whatever the search did: votes of the verdict are fresh, and the level is
    shared out over all deltas judged and all other classes. Finding nothing proves nothing.

    Args:
        counter: the prepared network, the perturbation and the seed.
        images: (m, c, h, w) float32 on the network's device.
        predicted: (m,) certified classes, none abstained.
        radius: (m,) certified radii.
        interval: (m, 2) two-sided certificates of one parameter, where there are such.
        effort: how hard to look.

    Raises:
        InputError: arguments that do not fit each other.
    """
    effort = effort or AttackBudget()
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
    whole = reach_of(counter.perturbation, (channels, height, width), radius, interval, device)
    if len(whole) != len(images):
        raise InputError(f"Got {len(whole)} radii for {len(images)} images.")
    level = effort.level / (len(images) * effort.finalists)
    parts = []
    for start in range(0, len(images), _BLOCK):
        stop = min(len(images), start + _BLOCK)
        block, reach = images[start:stop], whole.rows(start, stop)
        hunt = _Hunt(counter, block, classes[start:stop], reach, effort)
        parts.append(hunt.judged(hunt.finalists(), level))
    return _together(parts)


def _together(parts: list[AttackResult]) -> AttackResult:
    return AttackResult(
        delta=torch.cat([part.delta for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        p_value=np.concatenate([part.p_value for part in parts]),
        violated=np.concatenate([part.violated for part in parts]),
        tried=sum(part.tried for part in parts),
        suspicious=sum(part.suspicious for part in parts),
        votes=sum(part.votes for part in parts),
    )


class _Hunt:
    """The search for a block of images; every stage casts votes no other stage has seen."""

    def __init__(
        self,
        counter: VoteCounter,
        images: Tensor,
        predicted: np.ndarray,
        reach: CertifiedRegion,
        effort: AttackBudget,
    ) -> None:
        self._counter, self._images, self._reach, self._effort = counter, images, reach, effort
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
        effort, reach = self._effort, self._reach
        nowhere = torch.zeros((len(reach), 1, *reach.shape), device=self._images.device)
        lean = nowhere[:, 0] if reach.dim == 1 else self._lean(nowhere)
        deltas = reach.first(effort.directions, self._aim(lean), self._generators)
        leads = self._leads(deltas)
        for step in range(effort.steps):
            deltas, leads = _worst(deltas, leads, effort.finalists)
            if reach.dim == 1:
                spacing = (2.0 / effort.proposals) ** step / (effort.directions - 1)
                proposed = reach.around(deltas[:, :1], effort.proposals, spacing)
            else:
                latest = self._lean(deltas[:, :1])
                lean = lean + latest
                aims = torch.stack([self._aim(latest), self._aim(lean)], dim=1)
                width = 0.5 ** (step + 1)
                proposed = reach.beyond(
                    deltas[:, :1], aims, effort.proposals, width, self._generators
                )
            deltas = torch.cat([deltas, proposed], dim=1)
            leads = np.concatenate([leads, self._leads(proposed)], axis=1)
        return _worst(deltas, leads, effort.finalists)[0]

    def judged(self, deltas: Tensor, level: float) -> AttackResult:
        """Fresh votes at the finalists: four times as many at each look, while in doubt."""
        effort, count = self._effort, deltas.shape[1]
        first = self._next_vote
        slots = np.arange(len(deltas) * count)
        rows = slots // count
        counts = np.zeros((len(slots), self._counter.network.classes), np.int64)
        doubtful, have, wanted = slots, 0, min(10 * effort.screen, effort.confirm)
        while len(doubtful) and have < effort.confirm:
            counts += self._counts(deltas, doubtful, first + have, first + wanted)
            lead = sign_test_against(counts[doubtful], self._predicted[rows[doubtful]], True)
            if wanted < effort.confirm:
                doubtful = doubtful[lead > _NO_LONGER_SUSPICIOUS]
            have, wanted = wanted, min(4 * wanted, effort.confirm)
        p_values = np.ones(len(slots))
        # Only deltas that took all votes are judged: stopping early cannot make a violation.
        p_values[doubtful] = sign_test_against(counts[doubtful], self._predicted[rows[doubtful]])
        leads = lead_of(counts, self._predicted[rows]).reshape(-1, count)
        best = np.where(p_values.reshape(-1, count) <= level, -2.0, leads).argmin(axis=1)
        chosen = np.arange(len(deltas)) * count + best
        worst = deltas.flatten(0, 1)[torch.as_tensor(chosen, device=deltas.device)]
        return AttackResult(
            worst,
            lengths(worst, self._reach.norm, len(self._reach.shape)).cpu().numpy(),
            counts[chosen],
            p_values[chosen],
            p_values[chosen] <= level,
            self.tried,
            len(doubtful),
            self.votes,
        )

    def _aim(self, lean: Tensor) -> Tensor:
        """The direction of wrong votes, or a random one where there was none, (m, *shape)."""
        random = self._reach.directions(1, self._generators)[:, 0]
        found = (lean.flatten(1) != 0).any(dim=1).reshape(-1, *(1 for _ in self._reach.shape))
        return torch.where(found, lean, random)

    def _lean(self, centre: Tensor) -> Tensor:
        """Sums of the noise of wrong votes at one delta per image, (m, *shape)."""
        wanted = self._effort.aim or min(20_000, max(2000, 4 * self._reach.dim))
        stop = self._next_vote + wanted
        requests = [
            Request(row, row, key, "attack", self._next_vote, stop)
            for row, key in enumerate(self._keys)
        ]
        found = self._counter.lean(self._images, requests, self._expected, centre[:, 0])
        self._next_vote = stop
        self.votes += wanted * len(requests)
        return found

    def _leads(self, deltas: Tensor) -> np.ndarray:
        """By how much of the votes the certified class leads at each delta, (m, k)."""
        slots = np.arange(deltas.shape[0] * deltas.shape[1])
        first = self._next_vote
        counts = self._counts(deltas, slots, first, first + self._effort.screen)
        self.tried += len(slots)
        self._next_vote += self._effort.screen
        rows = slots // deltas.shape[1]
        return lead_of(counts, self._predicted[rows]).reshape(deltas.shape[:2])

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


def _worst(deltas: Tensor, leads: np.ndarray, count: int) -> tuple[Tensor, np.ndarray]:
    order = np.argsort(leads, axis=1, kind="stable")[:, :count]
    rows = torch.arange(len(deltas), device=deltas.device)[:, None]
    kept = deltas[rows, torch.as_tensor(order, device=deltas.device)]
    return kept, np.take_along_axis(leads, order, axis=1)


def deformed_first(counter: VoteCounter, images: Tensor, deltas: Tensor, votes: int) -> np.ndarray:
    """Votes of the smoothed classifier on images that arrive deformed: two interpolations.

    Args:
        counter: the prepared network, the perturbation and the seed.
        images: (m, c, h, w) float32 on the network's device.
        deltas: (m, k, *params_shape) on the same device; zeros give the pristine image.
        votes: per deformed image.

    Returns:
        (m, k, classes) int64.
    """
    counts = []
    for image, own in zip(images, deltas, strict=True):
        arrived = counter.perturbation.apply(image[None], own)
        requests = [
            Request(row, row, image_key(one), "attack", 0, votes)
            for row, one in enumerate(arrived)
        ]
        counts.append(counter.count(arrived, requests, len(arrived)))
    return np.stack(counts)
