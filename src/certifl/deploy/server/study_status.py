"""How far a study over a network is, from what the server has stored; nothing is locked.

Only what clients sent in the rounds is shown: who answered, and the loss of their training, as a
mean. What `share` keeps with a client is not in the folder.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certifl.errors import one_line
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import FINISHED, RunFolder
from certifl.spec import Spec, load_stored

_SHOWN = 10
_PACE = 5  # rounds whose median is the pace
_LONGEST = 120


def study_lines(path: Path) -> list[str]:
    """The state of a study in sentences: rounds, who answered, loss, time left.

    Args:
        path: the run folder of `certifl deploy run`, under way or finished.

    Raises:
        StoreError: a file of the run is damaged.
    """
    folder = RunFolder(path)
    manifest, spec = folder.manifest(), load_stored(folder.spec)
    last = Checkpoints(folder.training).latest()
    history = [] if last is None else last.history
    total = spec.training.rounds + spec.build_algorithm().extra_rounds
    lines = [f"Study {spec.name!r} (spec {spec.hash()[:8]}), {spec.clients.count} clients"]
    if last is None:
        return [*lines, "No round has begun: it waits for its clients."]
    since = _clock(time.time() - (last.path / "round.json").stat().st_mtime)
    lines.append(f"Rounds: {len(history)} of {total}, the last stored {since} ago")
    lines += [_round(entry) for entry in history[-_SHOWN:]]
    finished = manifest.get("status") == FINISHED
    return [*lines, *_phase(folder, spec, history, total, finished)]


def _round(entry: Mapping[str, Any]) -> str:
    rows = [row for row in entry.get("clients", ()) if isinstance(row, Mapping)]
    answered = sorted(int(row["client"]) for row in rows)
    words = [
        f"  round {int(entry['round']) + 1}: {_loss(rows)}",
        f"{_named(answered)} answered" if answered else "nobody answered",
        f"{_clock(float(entry.get('seconds', 0.0)))}",
    ]
    failed = [
        f"client {fault['client']} was left out ({one_line(fault['reason'], _LONGEST)})"
        for fault in entry.get("left_out", ())
    ]
    return ", ".join([*words, *failed])


def _loss(rows: Sequence[Mapping[str, Any]]) -> str:
    losses = [float(row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    return f"loss {statistics.fmean(losses):.4g}" if losses else "no loss"


def _phase(
    folder: RunFolder,
    spec: Spec,
    history: Sequence[Mapping[str, Any]],
    total: int,
    finished: bool,
) -> list[str]:
    """What is under way, and how long it may take."""
    if finished:
        return ["Finished."]
    left = total - len(history)
    if left:
        seconds = [float(entry.get("seconds", 0.0)) for entry in history[-_PACE:]]
        time_left = (
            f"about {_clock(left * statistics.median(seconds))}" if seconds else "not known yet"
        )
        return [f"Time left for the rounds: {time_left}; certification comes after them."]
    everyone = range(spec.clients.count)
    done = [client for client in everyone if folder.shared(client).is_file()]
    who = f" ({_named(done)})" if done else ""
    return [f"Certification: {len(done)} of {spec.clients.count} clients have finished{who}."]


def _named(clients: Sequence[int]) -> str:
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"


def _clock(seconds: float) -> str:
    whole = max(0, math.ceil(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
