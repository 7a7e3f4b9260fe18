"""Training history as curves: what was recorded each round, mean over clients with its band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.report.results import Row, RunResults, flat

__all__ = ["MeasureCurve", "left_out_words", "measure_curves", "measures_of"]

Floats = NDArray[np.float64]

_FIRST = ("loss", "accuracy")
_NO_MEASURES = ("client", "seconds", "private_steps")
_CLIENTS_SHOWN = 5


@dataclass(frozen=True, eq=False)
class MeasureCurve:
    """One measure over the rounds.

    Attributes:
        rounds: (r,) the rounds, counted from 1.
        mean, low, high: (r,) over the clients that recorded the measure in that round.
    """

    rounds: Floats
    mean: Floats
    low: Floats
    high: Floats

    def columns(self) -> tuple[list[float], ...]:
        """The four columns as plain lists."""
        return tuple(c.tolist() for c in (self.rounds, self.mean, self.low, self.high))


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Names of all recorded measures: loss and accuracy first, the others by name."""
    found = {
        str(name)
        for run in flat(rows)
        for entry in run.history
        for measures in _clients(entry)
        for name, value in measures.items()
        if _number(value) is not None
    }
    return [n for n in _FIRST if n in found] + sorted(found.difference(_FIRST))


def measure_curves(row: Row, measure: str) -> MeasureCurve | None:
    """One measure, over the clients of all seeds; None where it was never recorded."""
    known: dict[float, list[float]] = {}
    for run in row.runs:
        for position, entry in enumerate(run.history):
            numbers = [_number(measures.get(measure)) for measures in _clients(entry)]
            number = float(entry.get("round", position)) + 1.0
            known.setdefault(number, []).extend(n for n in numbers if n is not None)
    rows = [(n, float(np.mean(v)), min(v), max(v)) for n, v in sorted(known.items()) if v]
    if not rows:
        return None
    rounds, mean, low, high = np.array(rows, np.float64).T
    return MeasureCurve(rounds, mean, low, high)


def left_out_words(run: RunResults) -> str | None:
    """Which clients failed and were left out of rounds, in a sentence; None where none was."""
    faults = [
        (int(fault["client"]), entry.get("round", position), str(fault["reason"]))
        for position, entry in enumerate(run.history)
        for fault in entry.get("left_out", ())
    ]
    if not faults:
        return None
    worked = sum(len(_clients(entry)) for entry in run.history) + len(faults)
    rounds = len({number for _, number, _ in faults})
    first = {client: reason for client, _, reason in reversed(faults)}
    times = {client: sum(c == client for c, _, _ in faults) for client in sorted(first)}
    named = [
        f"client {client} ({count} times; first: {first[client]})"
        if count > 1
        else f"client {client} (once: {first[client]})"
        for client, count in list(times.items())[:_CLIENTS_SHOWN]
    ]
    more = len(times) - len(named)
    also = f"; and {more} more" if more else ""
    return (
        f"{len(faults)} of {worked} rounds of clients failed and were left out, in "
        f"{rounds} of {len(run.history)} rounds: {'; '.join(named)}{also}."
    )


def _clients(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The clients' measures of one round, from a list of rows or from a mapping by client."""
    rows = entry.get("clients")
    if isinstance(rows, Mapping):
        rows = list(rows.values())
    if not isinstance(rows, list):
        return []
    return [
        {name: value for name, value in row.items() if name not in _NO_MEASURES}
        for row in rows
        if isinstance(row, Mapping)
    ]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond every float
        return None
