"""Trackers that follow a run through its folder: only what is stored is logged.

A round is logged once it is committed, the certificates once they are stored. A run that was
interrupted, continued from another's training, or computed without a tracker is therefore logged
in full, and nothing twice.

```
<run>/tracking/<tracker>/certifl.json    the tracker's name of the run, rounds logged, certified
<run>/tracking/<tracker>/...             the tracker's files, unless the user named a server
```

Names are the same in every tracker, so that a chart made in one is found in another:

```
loss/mean  loss/client-3  accuracy/mean  accuracy/client-3  seconds/round  seconds/client-3
acr/mean  acr/client-3  certified_accuracy/0.5-sigma/mean  certified_accuracy/0.5-sigma/client-3
```
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from certifl.errors import StoreError
from certifl.federated.privacy.accounting import EPSILON
from certifl.runs.atomic import read_json, write_json
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from certifl.safe_io import parse_toml
from certifl.smoothing.laws import LAWS
from certifl.spec import Spec
from certifl.study.opened_run import OpenRun
from certifl.study.setup import by_client
from certifl.tracking.backends import TRACKERS, Tracker

RADII_IN_SIGMA = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Radii for certified accuracies, as multiples of sigma; logged where so many votes reach them."""

_FOLDER, _RECORD = "tracking", "certifl.json"
_LOGGED = ("name", "label", "regime", "deploys", "spec_hash", "seed", "created", "command")
_log = logging.getLogger(__name__)

Update = Callable[[], None]  # when the folder may hold something not logged yet


@contextlib.contextmanager
def tracked(names: Sequence[str], run: OpenRun) -> Iterator[Update]:
    """Open trackers for a run whose folder was begun; close them whatever happens.

    Args:
        names: names of trackers that passed `check_trackers`; none: nothing is done.
        run: locked by this process.

    Yields:
        What to call when the folder holds something new. It never raises: a tracker that fails is
        reported in a warning and stopped, and the run continues.
    """
    followers = [
        _Follower(name, TRACKERS[name], run.path / _FOLDER / name) for name in dict.fromkeys(names)
    ]
    if followers:
        spec, metadata = parse_toml(run.spec.to_toml()), _metadata(run.folder)
        for follower in followers:
            follower.begin(spec, metadata)
    try:
        yield lambda: _report(followers, run)
    finally:
        for follower in followers:
            follower.finish()


def track_finished(names: Sequence[str], run: OpenRun) -> None:
    """Log what trackers do not have yet of a run that is finished.

    Raises:
        StoreMismatch: another process is using the folder.
    """
    if names:
        with run.folder.locked(), tracked(names, run) as update:
            update()


def _report(followers: Sequence[_Follower], run: OpenRun) -> None:
    behind = [follower for follower in followers if not follower.complete]
    if not behind:
        return
    try:
        if run.folder.history.is_file():
            history = list(run.history)
        else:
            history = [by_client(e) for e in Checkpoints(run.folder.training).history()]
        certified = certified_numbers(run) if run.folder.certificates.is_file() else None
    except Exception as error:  # the run reports its own errors
        _log.warning("%s is not logged: %s", run.path, error)
        return
    for follower in behind:
        follower.log(history, certified, participants_are_secret(run.spec))


@dataclass(frozen=True)
class _Logged:
    """What was logged to a tracker so far.

    Attributes:
        run: the tracker's name of the run; None before its first start.
        rounds: number of rounds logged.
        certified: whether the certificates were logged.
    """

    run: str | None = None
    rounds: int = 0
    certified: bool = False


class _Follower:
    """Logs one run to one tracker; never raises because of the tracker.

    A round is recorded as logged right after the tracker accepted it. A kill between the two
    repeats that one round at the next start, with the same step and the same values. After a
    failure the tracker is not used until the next start, which logs what is missing.
    """

    def __init__(self, name: str, make: type[Tracker], folder: Path) -> None:
        self._name, self._make, self._folder = name, make, folder
        self._logged = _Logged()
        self._tracker: Tracker | None = None

    @property
    def complete(self) -> bool:
        """Whether everything was logged: all rounds and the certificates."""
        return self._logged.certified

    def begin(self, spec: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Open the tracker, or resume its run; nothing if everything was logged."""
        with self._safely():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._logged = self._stored()
            if not self.complete:
                tracker = self._make(self._folder)
                run = tracker.begin(spec, metadata, self._logged.run, self._logged.rounds)
                self._tracker = tracker
                self._store(replace(self._logged, run=run))

    def log(
        self,
        history: Sequence[Mapping[str, Any]],
        certified: Mapping[str, float] | None,
        secret: bool,
    ) -> None:
        """Log the rounds that were not logged yet, in order, then the certificates, once."""
        tracker = self._tracker
        if tracker is None:
            return
        with self._safely():
            for entry in history:
                if entry["round"] >= self._logged.rounds:
                    tracker.log(round_numbers(entry, secret), entry["round"])
                    self._store(replace(self._logged, rounds=entry["round"] + 1))
            if certified is not None and not self.complete:
                tracker.log(certified, self._logged.rounds)
                self._store(replace(self._logged, certified=True))

    def finish(self) -> None:
        """Close the tracker; what is missing is logged at the next start."""
        if self._tracker is not None:
            with self._safely():
                self._tracker.finish(self.complete)
            self._tracker = None

    def _stored(self) -> _Logged:
        path = self._folder / _RECORD
        if not path.is_file():
            return _Logged()
        try:
            return _Logged(**read_json(path))
        except TypeError as error:
            raise StoreError(
                f"{path} is damaged ({error}). Delete {self._folder} to track the run from its "
                "beginning."
            ) from error

    def _store(self, logged: _Logged) -> None:
        write_json(self._folder / _RECORD, asdict(logged))
        self._logged = logged

    @contextlib.contextmanager
    def _safely(self) -> Iterator[None]:
        """Whatever a tracker's library raises: the run matters more than its tracker."""
        try:
            yield
        except Exception as error:
            self._tracker = None
            _log.warning(
                "Tracking with %s stopped: %s: %s. The run continues and keeps everything; the "
                "same command later logs what is missing.",
                self._name,
                type(error).__name__,
                error,
            )


def _metadata(folder: RunFolder) -> dict[str, Any]:
    manifest, path = folder.manifest(), folder.path.resolve()
    data: Mapping[str, Any] = manifest["data"]
    return {
        **{key: manifest[key] for key in _LOGGED if manifest.get(key) not in (None, "")},
        "data": {"name": data["name"], "fingerprint": data["fingerprint"]},
        "machine": manifest["machine"],
        "versions": manifest["versions"],
        "links": {
            "report": str(path / folder.report.name),
            "figures": str(path / folder.figures.name),
            "run": str(path),
        },
    }


def participants_are_secret(spec: Spec) -> bool:
    """Whether the bound on privacy assumes that nobody knows who took part in which round."""
    return spec.privacy.kind == "client" and spec.clients.participation < 1


def round_numbers(entry: Mapping[str, Any], secret: bool = False) -> dict[str, float]:
    """A committed round's numbers by name.

    Args:
        entry: `round` (from 0), `seconds`, `clients` {number: metrics}. Metrics that are not
            numbers are left out.
        secret: whether nothing may tell who took part: then only epsilon remains, which is the
            same for all clients; seconds depend on how many worked.
    """
    if secret:
        return {"epsilon/mean": float(entry[EPSILON])} if EPSILON in entry else {}
    columns: dict[str, dict[str, float]] = {}
    for client, metrics in entry["clients"].items():
        for metric, value in metrics.items():
            if isinstance(value, int | float):
                columns.setdefault(metric, {})[client] = float(value)
    without_mean = {"seconds": columns.pop("seconds")} if "seconds" in columns else {}
    return {
        "seconds/round": float(entry["seconds"]),
        **_of_clients(without_mean, means=False),
        **_of_clients(columns),
    }


def certified_numbers(run: OpenRun) -> dict[str, float]:
    """Average certified radius and certified accuracies of every client's own images, by name.

    There are no means where clients certify perturbations of several units.
    """
    certificates = run.certificates
    columns: dict[str, dict[str, float]] = {}
    for client in sorted({int(client) for client in certificates.client}):
        own = certificates.of_client(client)
        columns.setdefault("acr", {})[str(client)] = own.average_certified_radius()
        metadata = own.conditions
        sigma, n, alpha = float(metadata["sigma"]), int(metadata["n"]), float(metadata["alpha"])
        end = LAWS[metadata["law"]].largest_radius(sigma, n, alpha)  # as far as the votes reach
        radii = [radius for radius in RADII_IN_SIGMA if radius * sigma <= end]
        shares = own.certified_accuracy([sigma * radius for radius in radii])
        for radius, share in zip(radii, shares, strict=True):
            name = f"certified_accuracy/{radius:g}-sigma"
            columns.setdefault(name, {})[str(client)] = float(share)
    seconds = float(run.folder.manifest().get("certification_seconds", 0.0))
    one_unit = len(certificates.by_kind()) <= 1
    return {"seconds/certification": seconds, **_of_clients(columns, means=one_unit)}


def _of_clients(
    columns: Mapping[str, Mapping[str, float]], means: bool = True
) -> dict[str, float]:
    """Numbers of clients, and their means; every client counts once."""
    numbers: dict[str, float] = {}
    for name, column in columns.items():
        if means:
            numbers[f"{name}/mean"] = math.fsum(column.values()) / len(column)
        numbers |= {f"{name}/client-{client}": value for client, value in column.items()}
    return numbers
