"""Robust rules: Krum, coordinate-wise median and trimmed mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch

from certifl.federated.aggregation import RULES, share_of
from certifl.federated.aggregation.base import blocks, combined, is_statistic, largest_counters
from certifl.federated.averaging import average_models, policy_of
from certifl.federated.states import ModelState, ServerState, Update
from certifl.smoothing.bounds import Floats


@dataclass(frozen=True)
class Krum:
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

    def __post_init__(self) -> None:
        RULES.check_component(self)

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Every update with the chosen one, or the mean of the chosen ones, in it."""
        del broadcast
        return combined(updates, self._chosen)

    def check(self, participants: int) -> None:
        """Enough clients for f malicious ones, n >= 2 f + 3, and no more than n - f kept."""
        RULES.rows[self.name].check(asdict(self), participants)

    def _chosen(self, tables: Sequence[ModelState]) -> ModelState:
        count = len(tables)
        wrong = min(share_of(self.malicious, count), max(0, (count - 3) // 2))
        best = np.argsort(_scores(_distances(tables), wrong), kind="stable")
        chosen = sorted(best[: min(self.keep, count - wrong)])
        mean = average_models([Update(int(i), 1.0, tables[i], {}) for i in chosen])
        return {} if mean is None else mean


def _scores(distances: Floats, wrong: int) -> Floats:
    """Sum of the squared distances to the nearest n - f - 2 others, for each of n."""
    count = len(distances)
    nearest = max(1, count - wrong - 2)
    others = np.sort(distances, axis=1)[:, 1 : nearest + 1]  # the first is its own, 0
    return others.sum(axis=1)


def _distances(tables: Sequence[ModelState]) -> Floats:
    """(n, n) squared distances, weights and running statistics each in their own unit."""
    weights = _squares(tables, lambda name: not is_statistic(name))
    statistics = _squares(tables, is_statistic)
    if not (weights.any() and statistics.any()):
        return weights + statistics
    return weights / _unit(weights) + statistics / _unit(statistics)


def _unit(squares: Floats) -> float:
    """The median over all pairs that differ."""
    return float(np.median(squares[squares > 0]))


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
class Median:
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
        del broadcast
        return combined(updates, lambda tables: _by_coordinate(tables, _median))

    def check(self, participants: int) -> None:
        """Any number of clients."""


@dataclass(frozen=True)
class TrimmedMean:
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

    def __post_init__(self) -> None:
        RULES.check_component(self)

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """Every update with the trimmed mean of all in it."""
        del broadcast
        return combined(updates, lambda tables: _by_coordinate(tables, self._mean))

    def check(self, participants: int) -> None:
        """At least one value must remain."""
        RULES.rows[self.name].check(asdict(self), participants)

    def _mean(self, values: Floats) -> Floats:
        """Means of the columns of (n, coordinates), which are sorted."""
        count = len(values)
        dropped = min(share_of(self.trim, count), (count - 1) // 2)
        kept = values[dropped : count - dropped]
        middle = kept[len(kept) // 2]  # near the mean, so that little is rounded away
        mean = middle + (kept - middle).mean(0)
        # -0.0 + 0.0 is 0.0: without this, equal models would lose the sign of their zeros.
        return np.where(kept[-1] == kept[0], kept[0], mean)


def _median(values: Floats) -> Floats:
    """Medians of the columns of (n, coordinates), which are sorted."""
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return np.where(low == high, low, low + (high - low) / 2)


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
        result[name] = _like(np.concatenate(pieces) if pieces else np.empty(0), first)
    return result


def _like(coordinates: Floats, first: torch.Tensor) -> torch.Tensor:
    """Coordinates as a tensor of the shape and dtype of `first`."""
    result = torch.from_numpy(coordinates)
    if first.is_complex():
        return torch.view_as_complex(result.reshape(*first.shape, 2)).to(first.dtype)
    return result.reshape(first.shape).to(first.dtype)
