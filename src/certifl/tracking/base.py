"""What a tracker is, and how rounds and certificates become named numbers.

Names are the same in every tracker, so that a chart made in one is found in another:

```
loss/mean  loss/client-3  accuracy/mean  accuracy/client-3  seconds/round  seconds/client-3
acr/mean  acr/client-3  certified_accuracy/0.5-sigma/mean  certified_accuracy/0.5-sigma/client-3
```
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

PROJECT = "certifl"
"""The project, or experiment, that runs belong to unless the user names another."""

_SECONDS = "seconds"


class Tracker(Protocol):
    """One experiment tracker following one run.

    Calls come in this order: `begin`, then `round` for every round not logged before, in order,
    then `certified` once, then `finish`. What was logged must survive a kill of the process as
    soon as the call returns, as far as the library allows.
    """

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open the tracker's run.

        Args:
            spec: the study, every default spelled out: the run's parameters.
            metadata: name, label, spec hash, data, machine, versions, links.
            run_id: the tracker's name of this run; None at its first start.
            rounds: how many rounds were logged before.

        Returns:
            The name with which to resume after an interruption.
        """
        ...

    def round(self, entry: Mapping[str, Any]) -> None:
        """Log one committed round: `round` (from 0), `seconds`, `clients` {number: metrics}."""
        ...

    def certified(self, summary: Mapping[str, Any]) -> None:
        """Log a summary of the certificates; see `certified_numbers`."""
        ...

    def finish(self, complete: bool) -> None:
        """Close the run: complete, or to be resumed."""
        ...


class TrackerFactory(Protocol):
    """A class of trackers, as a row of the table."""

    def __call__(self, folder: Path) -> Tracker:
        """A tracker that writes its files to a folder of the run."""
        ...

    def installed(self) -> bool:
        """Whether its library is installed; it is not imported."""
        ...


def importable(*packages: str) -> bool:
    """Whether packages can be imported, without importing them.

    A folder without code does not count: trackers leave folders of their own name behind.
    """
    specs = [importlib.util.find_spec(package) for package in packages]
    return all(spec is not None and spec.origin is not None for spec in specs)


def round_numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """A round's numbers by name; means count every client that took part once."""
    clients: Mapping[str, Mapping[str, Any]] = entry["clients"]
    numbers = {f"{_SECONDS}/round": float(entry[_SECONDS])}
    columns: dict[str, dict[str, float]] = {}
    for client, metrics in clients.items():
        for metric, value in metrics.items():
            columns.setdefault(metric, {})[client] = float(value)
    for metric, column in columns.items():
        if metric != _SECONDS:
            numbers[f"{metric}/mean"] = math.fsum(column.values()) / len(column)
        numbers |= {f"{metric}/client-{client}": value for client, value in column.items()}
    return numbers


def certified_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """What the certificates came to, by name.

    Args:
        summary: `clients` {number: {"acr": ..., "accuracy": {radius in sigma: share}}}, in the
            unit of the radius, and `seconds` of certification; means count every client once, and
            there are none where clients certify perturbations of their own (`unit` is "").
    """
    clients: Mapping[str, Mapping[str, Any]] = summary["clients"]
    columns: dict[str, dict[str, float]] = {}
    for client, row in clients.items():
        columns.setdefault("acr", {})[client] = float(row["acr"])
        for radius, value in row["accuracy"].items():
            columns.setdefault(f"certified_accuracy/{radius}-sigma", {})[client] = float(value)
    numbers = {f"{_SECONDS}/certification": float(summary[_SECONDS])}
    for name, column in columns.items():
        if summary.get("unit") != "":
            numbers[f"{name}/mean"] = math.fsum(column.values()) / len(column)
        numbers |= {f"{name}/client-{client}": value for client, value in column.items()}
    return numbers


def links_text(metadata: Mapping[str, Any]) -> str:
    """Links to the report page, the figures and the run folder, as Markdown."""
    links: Mapping[str, str] = metadata["links"]
    return "\n".join(f"- {name}: `{path}`" for name, path in links.items())
