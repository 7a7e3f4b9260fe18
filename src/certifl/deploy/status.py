"""The state of a folder: a server's or client's bundle, or the run folder of a study.

Of a study only what clients sent in the rounds is shown: who answered, and the loss of their
training, as a mean. What `share` keeps with a client is not in the folder. Nothing is locked, and
Flower is not needed for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certifl.errors import CertiflError, StoreError, one_line
from certifl.progress import clock
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import FINISHED
from certifl.safe_io import MALFORMED
from certifl.study.opened_run import OpenRun

_SHOWN = 10
_PACE = 5  # rounds whose median is the pace
_LONGEST = 120


def status_lines(folder: Path) -> tuple[list[str], bool]:
    """The state of a bundle as text, and whether it has no problem; else SpecError."""
    from certifl.deploy.bundle import load_connection
    from certifl.deploy.client.privacy_budget import ledger_lines
    from certifl.deploy.client.settings import load_settings
    from certifl.deploy.keys import check_certificate, connection_problem

    connection = load_connection(folder)
    is_server = (folder / "superexec.secret").is_file()
    lines, ok = [f"Server: {connection.address}"], True
    try:
        if not connection.insecure:
            check_certificate(folder / ("server.crt" if is_server else "ca.crt"))
        if is_server:
            lines += _clients(folder)
        else:
            authority = None if connection.insecure else folder / "ca.crt"
            problem = connection_problem(connection.host, connection.port, authority)
            lines.append("It answers." if problem is None else f"It does not answer: {problem}.")
            ok = problem is None
    except CertiflError as error:
        lines.append(str(error))
        ok = False
    if is_server:
        return lines, ok
    studies = sorted((folder / "studies").glob("*"))
    lines += [f"Stored for study {study.name}: {_contents(study)}" for study in studies]
    try:
        settings = load_settings(folder / "client.toml")
        lines += ledger_lines(folder, settings.max_epsilon, settings.delta)
    except CertiflError as error:
        lines.append(str(error))
        ok = False
    return lines, ok


def _clients(folder: Path) -> list[str]:
    from certifl.deploy.flower import nodes
    from certifl.deploy.server.process import client_keys, local_endpoint

    lines, numbers = [], {key: client for client, key in client_keys(folder).items()}
    for node in nodes(local_endpoint(folder)):
        client, active = numbers.get(node.public_key), node.last_activated_at
        who = node.name or f"node {node.public_key.hex()[:8]}"
        who = who if client is None else f"client {client}"
        since = f" since {active}" if active and node.status == "online" else ""
        lines.append(f"{who}: {node.status}{since}")
    return lines or ["No client has been admitted yet."]


def _contents(folder: Path) -> str:
    names = {
        "state-*.safetensors": "its state",
        "deployed.safetensors": "the deployed model",
        "certificates.parquet": "certificates",
    }
    present = [text for pattern, text in names.items() if any(folder.glob(pattern))]
    return ", ".join(present) or "nothing"


def study_lines(path: Path) -> list[str]:
    """The state of a run folder in sentences: rounds, who answered, loss, time left."""
    run = OpenRun(path)
    spec, last = run.spec, Checkpoints(run.folder.training).latest()
    lines = [f"Study {spec.name!r} (spec {spec.hash()[:8]}), {spec.clients.count} clients"]
    if last is None:
        return [*lines, "No round has begun: it waits for its clients."]
    try:
        return [*lines, *_rounds(run, last)]
    except MALFORMED as error:
        why = f"{last.path / 'round.json'} is damaged ({type(error).__name__})."
        raise StoreError(why) from error


def _rounds(run: OpenRun, last: StoredRound) -> list[str]:
    history, clients = last.history, run.spec.clients.count
    total = run.spec.training.rounds + run.algorithm.extra_rounds
    age = time.time() - (last.path / "round.json").stat().st_mtime
    since = clock(max(0.0, age))
    lines = [f"Rounds: {len(history)} of {total}, the last stored {since} ago"]
    lines += [_round(entry) for entry in history[-_SHOWN:]]
    if run.manifest.get("status") == FINISHED:
        return [*lines, "Finished."]
    left = total - len(history)
    if left:
        pace = [float(entry.get("seconds", 0.0)) for entry in history[-_PACE:]]
        known = f"about {clock(left * statistics.median(pace))}" if pace else "not known yet"
        return [*lines, f"Time left for the rounds: {known}; certification comes after them."]
    done = [client for client in range(clients) if run.folder.shared(client).is_file()]
    who = f" ({_named(done)})" if done else ""
    finished = f"{len(done)} of {clients} clients have finished{who}."
    return [*lines, f"Certification: {finished}"]


def _round(entry: Mapping[str, Any]) -> str:
    rows = [row for row in entry.get("clients", ()) if isinstance(row, Mapping)]
    answered = sorted(int(row["client"]) for row in rows)
    losses = [float(row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    loss = f"loss {statistics.fmean(losses):.4g}" if losses else "no loss"
    words = [
        f"  round {int(entry['round']) + 1}: {loss}",
        f"{_named(answered)} answered" if answered else "nobody answered",
        f"{clock(float(entry.get('seconds', 0.0)))}",
    ]
    failed = [
        f"client {fault['client']} was left out ({one_line(fault['reason'], _LONGEST)})"
        for fault in entry.get("left_out", ())
    ]
    return ", ".join([*words, *failed])


def _named(clients: Sequence[int]) -> str:
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"
