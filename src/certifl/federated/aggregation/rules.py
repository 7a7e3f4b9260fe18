"""What an aggregation rule is; clipping, Krum, coordinate-wise median and trimmed mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
import torch

from certifl.errors import InputError
from certifl.federated.aggregation import RULES, share_of
from certifl.federated.averaging import average_models, check_alike, is_statistic, policy_of
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
        """Refuse hyper-parameters that need more participants in a round (SpecError)."""
        ...


def with_parts(update: Update, parts: Parts) -> Update:
    """The update with other parts."""
    extra = {part: tensors for part, tensors in parts.items() if part != "model"}
    return replace(update, model=parts.get("model"), extra=extra)


def combined(
    updates: Iterable[Update], combine: Callable[[Sequence[ModelState]], ModelState]
) -> Iterator[Update]:
    """Replace the parts of every update by their combination over all clients.

    Clients are combined in the order of their numbers, whatever the order of arrival; all updates
    stay in memory until the last one has arrived. InputError where keys or shapes differ.
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


def blocks(values: Sequence[torch.Tensor]) -> Iterator[Floats]:
    """Tensors of one shape as rows of (n, coordinates) in float64, a block of columns at a time.

    A complex number is two coordinates.
    """
    flat = [(torch.view_as_real(v) if v.is_complex() else v).reshape(-1) for v in values]
    for start in range(0, flat[0].numel(), _COORDINATES):
        rows = [row[start : start + _COORDINATES].to(torch.float64) for row in flat]
        yield torch.stack(rows).numpy()


class _Listed:
    """A rule with a row in `RULES`."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        RULES.check_component(self)

    def check(self, participants: int) -> None:
        """Refuse too few clients, as the row of the rule says."""
        RULES.rows[self.name].check(RULES.describe(self), participants)


@dataclass(frozen=True)
class Mean(_Listed):
    """No defense: the algorithm aggregates the updates as they are."""

    name: ClassVar[str] = "mean"

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates, unchanged."""
        yield from updates


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


@dataclass(frozen=True)
class Krum(_Listed):
    """Krum: of n updates, the one with the smallest score s(i).

      s(i) = sum over the n - f - 2 updates j nearest to i of ||theta_i - theta_j||^2,

    where f = ceil(malicious n) of them may be malicious; it needs n >= 2 f + 3. With `keep` above
    1 it is Multi-Krum: the uniform mean of the `keep` updates with the smallest scores. Ties go to
    the smaller client number. Counters take the maximum over those that are kept.

    BatchNorm's running statistics live on another scale than weights: alone in the sum, one large
    variance would decide everything; left out, they could be poisoned freely. Where a model has
    both, the squared distances of each kind are divided by their median over pairs that differ,
    and added. Without statistics it is Krum as published.

    Where faults leave too few clients in a round, f is as large as n >= 2 f + 3 allows.

    Memory: n models; time: n^2 / 2 passes over a model.

    Attributes:
        malicious: share of the clients of a round that may be malicious, in [0, 1/2).
        keep: how many updates are averaged.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer, Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent, 2017, section 4 (Multi-Krum: section 5).
    """

    malicious: float
    keep: int = 1

    name: ClassVar[str] = "krum"

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Every update with the chosen one, or the mean of the chosen ones, in it."""
        return combined(updates, self._chosen)

    def _chosen(self, tables: Sequence[ModelState]) -> ModelState:
        count = len(tables)
        wrong = min(share_of(self.malicious, count), max(0, (count - 3) // 2))
        nearest = max(1, count - wrong - 2)
        others = np.sort(_distances(tables), axis=1)[:, 1 : nearest + 1]  # the first is its own, 0
        best = np.argsort(others.sum(axis=1), kind="stable")
        chosen = sorted(best[: min(self.keep, count - wrong)])
        mean = average_models([Update(int(i), 1.0, tables[i], {}) for i in chosen])
        return {} if mean is None else mean


def _distances(tables: Sequence[ModelState]) -> Floats:
    """(n, n) squared distances, weights and running statistics each in their own unit."""
    weights = _squares(tables, lambda name: not is_statistic(name))
    statistics = _squares(tables, is_statistic)
    if not (weights.any() and statistics.any()):
        return weights + statistics
    units = [float(np.median(kind[kind > 0])) for kind in (weights, statistics)]
    return weights / units[0] + statistics / units[1]


def _squares(tables: Sequence[ModelState], counts: Callable[[str], bool]) -> Floats:
    """(n, n) squared distances over the floating tensors that count.

    numpy sums in a fixed order on one thread: the choice is the same on any machine.
    """
    squares = np.zeros((len(tables), len(tables)))
    for name, first in tables[0].items():
        if policy_of(first) != "average" or not counts(name):
            continue
        for block in blocks([table[name] for table in tables]):
            for row in range(len(tables) - 1):
                apart = ((block[row + 1 :] - block[row]) ** 2).sum(axis=1)
                squares[row, row + 1 :] += apart
                squares[row + 1 :, row] += apart
    return squares


@dataclass(frozen=True)
class Median(_Listed):
    """Coordinate-wise median, the mean of the two middle values where their number is even.

    While fewer than half of the n updates are malicious, every coordinate of the result lies
    between the smallest and the largest honest value. All clients count the same. BatchNorm's
    running statistics are coordinates like others (a median of variances is a variance); counters
    take the maximum.

    Memory: n models, and n values of 65 536 coordinates in float64.

    Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates, 2018, Definition 1.
    """

    name: ClassVar[str] = "median"

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Every update with the median of all in it."""
        return combined(updates, lambda tables: _by_coordinate(tables, self._median))

    def _median(self, values: Floats) -> Floats:
        """Medians of the columns of (n, coordinates), which are sorted."""
        low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
        return np.where(low == high, low, low + (high - low) / 2)


@dataclass(frozen=True)
class TrimmedMean(_Listed):
    """Mean of every coordinate without the largest and the smallest ceil(trim n) of n values.

    While no more than ceil(trim n) updates are malicious, every coordinate of the result lies
    between the smallest and the largest honest value. All clients count the same. BatchNorm's
    running statistics are coordinates like others; counters take the maximum. Where faults
    leave too few clients in a round, (n - 1) // 2 values are dropped at each end at most.

    Memory: n models, and n values of 65 536 coordinates in float64.

    Attributes:
        trim: share of the values dropped at EACH end, in [0, 1/2): the share of the clients that
            may be malicious.

    Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates, 2018, Definition 2.
    """

    trim: float

    name: ClassVar[str] = "trimmed-mean"

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Every update with the trimmed mean of all in it."""
        return combined(updates, lambda tables: _by_coordinate(tables, self._mean))

    def _mean(self, values: Floats) -> Floats:
        """Means of the columns of (n, coordinates), which are sorted."""
        count = len(values)
        dropped = min(share_of(self.trim, count), (count - 1) // 2)
        rest = values[dropped : count - dropped]
        middle = rest[len(rest) // 2]  # near the mean, so that little is rounded away
        mean = middle + (rest - middle).mean(0)
        # -0.0 + 0.0 is 0.0: without this, equal models would lose the sign of their zeros.
        return np.where(rest[-1] == rest[0], rest[0], mean)


def _by_coordinate(
    tables: Sequence[ModelState], combine: Callable[[Floats], Floats]
) -> ModelState:
    """A combination of sorted values, coordinate by coordinate, in float64."""
    counters = largest_counters(tables)
    result: ModelState = {}
    for name, first in tables[0].items():
        if name in counters:
            result[name] = counters[name]
            continue
        pieces = [combine(np.sort(block, 0)) for block in blocks([t[name] for t in tables])]
        flat = torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0))
        shaped = (
            torch.view_as_complex(flat.reshape(*first.shape, 2))
            if first.is_complex()
            else flat.reshape(first.shape)
        )
        result[name] = shaped.to(first.dtype)
    return result
