"""Bounding how far one client can move anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from certifl.errors import InputError
from certifl.federated.aggregation.base import Rule, blocks, is_statistic, parts_of, with_parts
from certifl.federated.averaging import policy_of
from certifl.federated.states import ModelState, ServerState, Update
from certifl.registry import check_number


@dataclass(frozen=True)
class Mean:
    """No defence: what the clients send is what the algorithm aggregates."""

    name: ClassVar[str] = "mean"

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates as they are, one at a time."""
        del broadcast
        yield from updates

    def check(self, participants: int) -> None:
        """A mean is one of any number of clients."""


@dataclass(frozen=True)
class Clip:
    """Norm clipping of updates around what was broadcast, then another rule.

      theta_i <- theta_bar + (theta_i - theta_bar) min(1, norm / ||theta_i - theta_bar||).

    With the mean after it, m malicious clients of n move the result by at most norm m / n, which
    bounds what they can do in a round and does not undo it. Weights and BatchNorm's running
    statistics are clipped apart, each to `norm`, for they live on different scales: statistics can
    move by no more than `norm` in a round either. Counters are left alone. Further parts that an
    algorithm sends are clipped to the same norm around the broadcast's part of that name, or
    around 0 where there is none. An update within the norm is handed on untouched.

    Memory: one update at a time; norms are sums in float64.

    Attributes:
        norm: the largest Euclidean length.
        then: the rule that follows.

    Source: Sun, Kairouz, Suresh, McMahan, Can You Really Backdoor Federated Learning?, 2019,
    section 4; the centre as in Karimireddy, He, Jaggi, Learning from History for Byzantine Robust
    Optimization, 2021 (one step of centered clipping from the broadcast model).
    """

    norm: float
    then: Rule = field(default_factory=Mean)

    name: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_number("clip", self.norm, "a number above 0", low=0, open_low=True)

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Clipped updates through the rule that follows."""
        return self.then(broadcast, (self._clipped(broadcast, update) for update in updates))

    def check(self, participants: int) -> None:
        """What the rule that follows needs."""
        self.then.check(participants)

    def _clipped(self, broadcast: ServerState, update: Update) -> Update:
        made = {}
        for part, held in parts_of(update).items():
            centre = broadcast.parts.get(part)
            if centre is None and part == "model":
                raise InputError(
                    "clip bounds how far a model moves from the one that was broadcast, but this "
                    "algorithm broadcasts no part 'model': choose another rule."
                )
            made[part] = self._around(centre or {}, held)
        return with_parts(update, made)

    def _around(self, centre: ModelState, held: ModelState) -> ModelState:
        """A table of tensors, weights and statistics each within the norm of the centre."""
        floating = [name for name, value in held.items() if policy_of(value) == "average"]
        made = dict(held)
        for kind in (False, True):
            names = [name for name in floating if is_statistic(name) == kind]
            length = math.sqrt(math.fsum(_square(held[n], centre.get(n)) for n in names))
            if length > self.norm:
                for name in names:
                    made[name] = _moved(held[name], centre.get(name), self.norm / length)
        return made


def _square(value: torch.Tensor, centre: torch.Tensor | None) -> float:
    """Squared length of value - centre; by one thread in a fixed order, the same anywhere."""
    pair = [value, torch.zeros_like(value) if centre is None else centre]
    return math.fsum(float(((block[0] - block[1]) ** 2).sum()) for block in blocks(pair))


def _moved(value: torch.Tensor, centre: torch.Tensor | None, share: float) -> torch.Tensor:
    """The point at a share of the way from centre to value, in float64, in the value's dtype."""
    wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
    if centre is None:
        return (wide * share).to(value.dtype)
    middle = centre.to(wide.dtype)
    return (middle + (wide - middle) * share).to(value.dtype)
