"""Median and trimmed mean of every coordinate by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from certifl.federated.aggregation import RULES, share_of
from certifl.federated.aggregation.base import (
    blocks,
    combined,
    largest_counters,
)
from certifl.federated.states import ModelState, ServerState, Update

Floats = NDArray[np.float64]


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
        """A median is one of any number of clients."""


@dataclass(frozen=True)
class TrimmedMean:
    """Mean of every coordinate without the largest and the smallest ceil(trim n) of n values.

    While no more than ceil(trim n) updates are malicious, every coordinate of the result lies
    between the smallest and the largest honest value. All clients count the same. BatchNorm's
    running statistics are coordinates like others; counters take the maximum. In a round that
    faults made too small, (n - 1) // 2 values are dropped at each end at most.

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
        """Something must be left between what is dropped at both ends."""
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
    made: ModelState = {}
    for name, first in tables[0].items():
        if name in counters:
            made[name] = counters[name]
            continue
        pieces = [combine(np.sort(block, 0)) for block in blocks([t[name] for t in tables])]
        made[name] = _like(np.concatenate(pieces) if pieces else np.empty(0), first)
    return made


def _like(coordinates: Floats, first: torch.Tensor) -> torch.Tensor:
    """Coordinates as a tensor of the shape and dtype of `first`."""
    made = torch.from_numpy(coordinates)
    if first.is_complex():
        return torch.view_as_complex(made.reshape(*first.shape, 2)).to(first.dtype)
    return made.reshape(first.shape).to(first.dtype)
