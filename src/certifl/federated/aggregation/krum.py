"""Krum: the update that lies closest to its nearest neighbours, or the mean of several such."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from certifl.federated.aggregation import RULES, share_of
from certifl.federated.aggregation.base import (
    blocks,
    combined,
    is_statistic,
)
from certifl.federated.averaging import average_models, policy_of
from certifl.federated.states import ModelState, ServerState, Update

Floats = NDArray[np.float64]


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

    In a round that faults made too small, f is as large as n >= 2 f + 3 allows.

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

    numpy's sums are made by one thread in a fixed order: the choice is the same on any machine.
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
