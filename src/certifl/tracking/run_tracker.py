"""Trackers that follow a run through its folder: only what is stored is logged.

A round is logged once it is committed, the certificates once they are stored. A run that was
interrupted, continued from another's training, or computed without a tracker is therefore logged
in full, and nothing twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from certifl.certification import Certificates
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from certifl.safe_io import parse_toml
from certifl.smoothing.laws import LAWS
from certifl.study.opened_run import OpenRun
from certifl.study.setup import by_client
from certifl.tracking import TRACKERS, Follower

RADII_IN_SIGMA = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Radii for certified accuracies, as multiples of sigma; logged where so many votes reach them."""

_FOLDER = "tracking"
_LOGGED = ("name", "label", "regime", "deploys", "spec_hash", "seed", "created", "command")
_log = logging.getLogger(__name__)

Update = Callable[[], None]
"""Called when the folder may hold something that is not logged yet."""


@contextlib.contextmanager
def tracked(names: Sequence[str], run: OpenRun) -> Iterator[Update]:
    """Open trackers for a run whose folder was begun; close them whatever happens.

    Args:
        names: names of trackers that passed `check_trackers`; none: nothing is done.
        run: locked by this process.

    Yields:
        What to call when the folder holds something new. It never raises: a tracker that fails is
        reported in a warning and stopped, and the run goes on.
    """
    followers = [
        Follower(name, TRACKERS[name], run.path / _FOLDER / name) for name in dict.fromkeys(names)
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
        StoreMismatch: another process is at work in the folder.
    """
    if names:
        with run.folder.locked(), tracked(names, run) as update:
            update()


def _report(followers: Sequence[Follower], run: OpenRun) -> None:
    behind = [follower for follower in followers if not follower.complete]
    if not behind:
        return
    try:
        history = _history(run)
        summary = _summary(run) if run.folder.certificates.is_file() else None
    except Exception as error:  # the run reports its own errors
        _log.warning("Nothing of %s is logged: %s", run.path, error)
        return
    for follower in behind:
        follower.rounds(history)
        if summary is not None:
            follower.certified(summary)


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


def _history(run: OpenRun) -> list[dict[str, Any]]:
    """All committed rounds, with their clients under their numbers."""
    if run.folder.history.is_file():
        return [_numbers(entry) for entry in run.history]
    return [_numbers(by_client(e)) for e in Checkpoints(run.folder.training).history()]


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A round with nothing but the numbers of its clients."""
    rows = {
        client: {name: value for name, value in row.items() if isinstance(value, int | float)}
        for client, row in entry["clients"].items()
    }
    return {**entry, "clients": rows}


def _summary(run: OpenRun) -> dict[str, Any]:
    """Average certified radius and certified accuracies of every client on its own images."""
    certificates = run.certificates
    clients = sorted({int(client) for client in certificates.client})
    return {
        "seconds": run.folder.manifest().get("certification_seconds", 0.0),
        "unit": "" if len(certificates.by_kind()) > 1 else certificates.conditions["unit"],
        "clients": {str(c): _of_client(certificates.of_client(c)) for c in clients},
    }


def _of_client(own: Certificates) -> dict[str, Any]:
    metadata = own.conditions
    sigma, n, alpha = float(metadata["sigma"]), int(metadata["n"]), float(metadata["alpha"])
    end = LAWS[metadata["law"]].largest_radius(sigma, n, alpha)
    radii = [radius for radius in RADII_IN_SIGMA if radius * sigma <= end]
    shares = own.certified_accuracy([sigma * radius for radius in radii])
    return {
        "acr": own.average_certified_radius(),
        "accuracy": {f"{r:g}": float(share) for r, share in zip(radii, shares, strict=True)},
    }
