"""Trackers kept level with a run, from what its folder holds: nothing is told that is not kept.

A round is told once it is committed, the certificates once they are stored. A run that was
interrupted, continued from another's training, or computed before anybody asked for a tracker is
therefore told in full, and nothing twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from certifl.certification import Certificates
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from certifl.safe_io import parse_json, read_text, read_toml
from certifl.smoothing.laws import LAWS
from certifl.tracking import TRACKERS, Follower

RADII_IN_SIGMA = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Radii for certified accuracies, as multiples of sigma; told where so many votes reach them."""

_PLACE = "tracking"
_FACTS = ("name", "label", "regime", "deploys", "spec_hash", "seed", "created", "command")
_log = logging.getLogger(__name__)

News = Callable[[], None]
"""Called when the folder may hold something that the trackers do not know."""


@contextlib.contextmanager
def tracked(names: Sequence[str], folder: RunFolder) -> Iterator[News]:
    """Open trackers for a run whose folder was begun; close them whatever happens.

    Args:
        names: of trackers that `check_trackers` let pass; none = nothing is done.
        folder: of the run; held by this process.

    Yields:
        What to call when the folder holds something new. It never raises: a tracker that fails is
        warned about and left, and the run goes on.
    """
    followers = [
        Follower(name, TRACKERS[name], folder.path / _PLACE / name)
        for name in dict.fromkeys(names)
    ]
    if followers:
        spec, facts = read_toml(folder.spec), _facts(folder)
        for follower in followers:
            follower.begin(spec, facts)
    try:
        yield lambda: _tell(followers, folder)
    finally:
        for follower in followers:
            follower.finish()


def track_finished(names: Sequence[str], folder: RunFolder) -> None:
    """Tell trackers of a run that is finished what they do not know of it.

    Raises:
        StoreMismatch: another process is at work in the folder.
    """
    if names:
        with folder.locked(), tracked(names, folder) as news:
            news()


def _tell(followers: Sequence[Follower], folder: RunFolder) -> None:
    behind = [follower for follower in followers if not follower.complete]
    if not behind:
        return
    try:
        history = _history(folder)
        summary = _summary(folder) if folder.certificates.is_file() else None
    except Exception as error:  # the run meets and names its own trouble
        _log.warning("Trackers are not told what %s holds: %s", folder.path, error)
        return
    for follower in behind:
        follower.rounds(history)
        if summary is not None:
            follower.certified(summary)


def _facts(folder: RunFolder) -> dict[str, Any]:
    held = folder.manifest()
    kept = {key: held[key] for key in _FACTS if held.get(key) not in (None, "")}
    data: Mapping[str, Any] = held["data"]
    place = folder.path.resolve()
    return {
        **kept,
        "data": {"name": data["name"], "fingerprint": data["fingerprint"]},
        "machine": held["machine"],
        "versions": held["versions"],
        "links": {
            "report": str(place / folder.report.name),
            "figures": str(place / folder.figures.name),
            "run": str(place),
        },
    }


def _history(folder: RunFolder) -> list[dict[str, Any]]:
    """All committed rounds, with their clients under their numbers."""
    if folder.history.is_file():
        lines = read_text(folder.history).splitlines()
        return [_numbers(entry, entry["clients"]) for entry in map(parse_json, lines)]
    rounds = Checkpoints(folder.training).history()
    return [_numbers(e, {str(row["client"]): row for row in e["clients"]}) for e in rounds]


def _numbers(entry: Mapping[str, Any], clients: Mapping[str, Any]) -> dict[str, Any]:
    """A round with nothing but numbers said of its clients."""
    rows = {
        client: {
            name: value
            for name, value in row.items()
            if name != "client" and isinstance(value, int | float)
        }
        for client, row in clients.items()
    }
    return {**entry, "clients": rows}


def _summary(folder: RunFolder) -> dict[str, Any]:
    """Average certified radius and certified accuracies of every client on its own images."""
    certificates = folder.load_certificates()
    clients = sorted({int(client) for client in certificates.client})
    return {
        "seconds": folder.manifest().get("certification_seconds", 0.0),
        "unit": "" if len(certificates.by_kind()) > 1 else certificates.conditions["unit"],
        "clients": {str(c): _of_client(certificates.of_client(c)) for c in clients},
    }


def _of_client(own: Certificates) -> dict[str, Any]:
    facts = own.conditions
    sigma = float(facts["sigma"])
    end = LAWS[facts["law"]].largest_radius(sigma, int(facts["n"]), float(facts["alpha"]))
    radii = [radius for radius in RADII_IN_SIGMA if radius * sigma <= end]
    shares = own.certified_accuracy([sigma * radius for radius in radii])
    return {
        "acr": own.average_certified_radius(),
        "accuracy": {f"{r:g}": float(share) for r, share in zip(radii, shares, strict=True)},
    }
