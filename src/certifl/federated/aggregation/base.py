"""What an aggregation rule is, what all rules share, the mean and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch

from certifl.errors import InputError
from certifl.federated.averaging import check_alike, policy_of
from certifl.federated.states import ModelState, Parts, ServerState, Update
from certifl.registry import check_number
from certifl.smoothing.bounds import Floats

_COORDINATES = 1 << 16


class Rule(Protocol):
    """What the server does with the updates of a round before the algorithm aggregates them.

    A frozen record of hyper-parameters. A rule combines every part that clients send separately:
    the model and the further parts of some algorithms. It returns every client's update with the
    robust combination in it. Averages of equal models are exact, so this works with every
    algorithm. Updates without parts are returned unchanged.

    Attributes:
        name: its key in `RULES`.
    """

    name: ClassVar[str]

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates that the algorithm aggregates; as many as arrived, in client order."""
        ...

    def check(self, participants: int) -> None:
        """Refuse hyper-parameters that need more participants.

        Raises:
            SpecError: the number of participants in a round is too small.
        """
        ...


def with_parts(update: Update, parts: Parts) -> Update:
    """The update with other parts."""
    extra = {part: tensors for part, tensors in parts.items() if part != "model"}
    return replace(update, model=parts.get("model"), extra=extra)


def combined(
    updates: Iterable[Update], combine: Callable[[Sequence[ModelState]], ModelState]
) -> Iterator[Update]:
    """Replace the parts of every update by their combination over all clients.

    Clients are combined in the order of their numbers, whatever the order of arrival.

    Args:
        updates: all stay in memory until the last one has arrived.
        combine: one state from several with the same keys and shapes.

    Raises:
        InputError: a client sent other keys or shapes than the first one.
    """
    arrived = list(updates)
    sent: dict[str, list[ModelState]] = {}
    for update in sorted(arrived, key=lambda update: update.client):
        for part, tensors in update.parts.items():
            same = sent.setdefault(part, [])
            same.append(tensors)
            check_alike(same[0], update.client, tensors)
    result = {part: combine(tables) for part, tables in sent.items()}
    del sent
    for update in arrived:
        yield with_parts(update, {part: result[part] for part in update.parts})


def largest_counters(tables: Sequence[ModelState]) -> ModelState:
    """Maxima of integer tensors: BatchNorm's counters of steps."""
    counters = [k for k, value in tables[0].items() if policy_of(value) == "maximum"]
    largest = {name: tables[0][name].clone() for name in counters}
    for table in tables[1:]:
        for name in counters:
            largest[name] = torch.maximum(largest[name], table[name])
    return largest


def is_statistic(name: str) -> bool:
    """Whether a key names a running mean or variance of BatchNorm, by torch's names for them."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def blocks(values: Sequence[torch.Tensor]) -> Iterator[Floats]:
    """Tensors of one shape as rows of (n, coordinates) in float64, a block of columns at a time.

    A complex number is two coordinates.
    """
    flat = [(torch.view_as_real(v) if v.is_complex() else v).reshape(-1) for v in values]
    for start in range(0, flat[0].numel(), _COORDINATES):
        rows = [row[start : start + _COORDINATES].to(torch.float64) for row in flat]
        yield torch.stack(rows).numpy()


@dataclass(frozen=True)
class Mean:
    """No defense: the algorithm aggregates the updates as they are."""

    name: ClassVar[str] = "mean"

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates, unchanged."""
        del broadcast
        yield from updates

    def check(self, participants: int) -> None:
        """Any number of clients."""


@dataclass(frozen=True)
class Clip:
    """Norm clipping of updates around what was broadcast, then another rule.

      theta_i <- theta_bar + (theta_i - theta_bar) min(1, norm / ||theta_i - theta_bar||).

    With the mean after it, m malicious clients of n move the result by at most norm m / n, which
    bounds what they can do in a round and does not undo it. Weights and BatchNorm's running
    statistics are clipped apart, each to `norm`, for they live on different scales: statistics can
    move by no more than `norm` in a round either. Counters are unchanged. Further parts that an
    algorithm sends are clipped to the same norm around the broadcast's part of that name, or
    around 0 where there is none. An update within the norm is returned unchanged.

    Memory: one update at a time; norms are sums in float64.

    Attributes:
        norm: the largest Euclidean length.
        then: the rule that follows.

    Source: Sun, Kairouz, Suresh, McMahan, Can You Really Backdoor Federated Learning?, 2019,
    section 4; the center as in Karimireddy, He, Jaggi, Learning from History for Byzantine Robust
    Optimization, 2021 (one step of centered clipping from the broadcast model).
    """

    norm: float
    then: Rule = field(default_factory=Mean)

    name: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_number("clip", self.norm, "a number above 0", low=0, open_low=True)

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Clip the updates, then apply the rule that follows."""
        return self.then(broadcast, (self._clipped(broadcast, update) for update in updates))

    def check(self, participants: int) -> None:
        """As the rule that follows."""
        self.then.check(participants)

    def _clipped(self, broadcast: ServerState, update: Update) -> Update:
        clipped = {}
        for part, tensors in update.parts.items():
            center = broadcast.parts.get(part)
            if center is None and part == "model":
                raise InputError(
                    "clip bounds how far a model moves from the one that was broadcast, but this "
                    "algorithm broadcasts no part 'model': choose another rule."
                )
            clipped[part] = self._around(center or {}, tensors)
        return with_parts(update, clipped)

    def _around(self, center: ModelState, state: ModelState) -> ModelState:
        """A state whose weights, and whose statistics, are within the norm of the center."""
        floating = [name for name, value in state.items() if policy_of(value) == "average"]
        clipped = dict(state)
        for kind in (False, True):
            names = [name for name in floating if is_statistic(name) == kind]
            length = math.sqrt(math.fsum(_square(state[n], center.get(n)) for n in names))
            if length > self.norm:
                for name in names:
                    clipped[name] = _moved(state[name], center.get(name), self.norm / length)
        return clipped


def _square(value: torch.Tensor, center: torch.Tensor | None) -> float:
    """Squared length of value - center, summed in a fixed order on any machine."""
    pair = [value, torch.zeros_like(value) if center is None else center]
    return math.fsum(float(((block[0] - block[1]) ** 2).sum()) for block in blocks(pair))


def _moved(value: torch.Tensor, center: torch.Tensor | None, share: float) -> torch.Tensor:
    """Center + share (value - center), computed in float64, in the value's dtype."""
    wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
    if center is None:
        return (wide * share).to(value.dtype)
    middle = center.to(wide.dtype)
    return (middle + (wide - middle) * share).to(value.dtype)
