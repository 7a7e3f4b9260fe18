"""A study run on the server's machine, and how a party's folder stands."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from certifl.deploy.client.privacy_budget import spending_lines
from certifl.deploy.client.settings import load_settings
from certifl.deploy.processes import KeyFolder, admitted, here
from certifl.deploy.provision.keys import check_certificate, reach
from certifl.deploy.provision.kit import load_connection
from certifl.deploy.server.coordinator import Options, conduct
from certifl.deploy.server.start import survey
from certifl.deploy.transport.flower_processes import give_memory_back, private_files, quiet
from certifl.deploy.transport.flower_runs import opened_run
from certifl.deploy.transport.transport import GridTransport
from certifl.errors import CertiflError
from certifl.runs.folder import RunFolder
from certifl.spec import Spec


def run_study(spec: Spec, kit: Path, options: Options) -> RunFolder:
    """Conduct a study with the clients of a running server.

    Args:
        spec: the study.
        kit: the server's folder.
        options: of the conduct; the keys of clients come from the folder.

    Raises:
        RequestError: the study, the run folder or the kit are not what they should be.
        WorkError: the server is not there, or the study failed; the same call goes on.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite, spec.to_toml())
    if not options.overwrite and folder.complete():
        return folder
    name = hashlib.sha256(str(options.out.resolve()).encode()).hexdigest()[:16]
    with _line(kit, f"run-{name}.txt") as line:
        return conduct(spec, line, dataclasses.replace(options, keys=KeyFolder(kit)))


def check_study(spec: Spec, kit: Path, options: Options) -> str | None:
    """Ask the clients of a running server who would take part in a study, and train nothing.

    Args:
        spec, kit, options: as for `run_study`; `options.told` gets the list of clients.

    Returns:
        Why the study would not start; None where it would.

    Raises:
        RequestError: the study or the kit are not what they should be.
        WorkError: the server is not there.
    """
    with _line(kit, "check.txt") as line:
        return survey(spec, line, dataclasses.replace(options, keys=KeyFolder(kit)))


@contextlib.contextmanager
def _line(kit: Path, notes: str) -> Iterator[GridTransport]:
    """The way to the clients of a running server."""
    place = here(kit)
    quiet(kit / "flower")
    give_memory_back()
    with private_files(), opened_run(place, kit / "flower" / notes) as grid:
        yield GridTransport(grid)


def status_lines(folder: Path) -> tuple[list[str], bool]:
    """How a party's folder stands, in lines, and whether all is well.

    Raises:
        SpecError: the folder is none of a party's.
    """
    connection = load_connection(folder)
    is_server = (folder / "superexec.secret").is_file()
    lines, fine = [f"Server: {connection.address}"], True
    try:
        if not connection.insecure:
            check_certificate(folder / ("server.crt" if is_server else "ca.crt"))
        if is_server:
            lines += _clients(folder)
        else:
            authority = None if connection.insecure else folder / "ca.crt"
            problem = reach(connection.host, connection.port, authority)
            lines.append("It answers." if problem is None else f"It does not answer: {problem}.")
            fine = problem is None
    except CertiflError as error:
        lines.append(str(error))
        fine = False
    if is_server:
        return lines, fine
    kept = sorted((folder / "studies").glob("*"))
    lines += [f"Kept of study {place.name}: {_kept(place)}" for place in kept]
    try:
        settings = load_settings(folder / "client.toml")
        lines += spending_lines(folder, settings.max_epsilon, settings.delta)
    except CertiflError as error:
        lines.append(str(error))
        fine = False
    return lines, fine


def _clients(folder: Path) -> list[str]:
    lines = []
    for node in admitted(folder):
        client = node["client"]
        who = node["name"] or f"node {node['key'].hex()[:8]}"
        who = who if client is None else f"client {client}"
        since = f" since {node['since']}" if node["since"] and node["status"] == "online" else ""
        lines.append(f"{who}: {node['status']}{since}")
    return lines or ["No client has been admitted yet."]


def _kept(place: Path) -> str:
    names = {
        "state-*.safetensors": "its state",
        "deployed.safetensors": "the deployed model",
        "certificates.parquet": "certificates",
    }
    held = [text for pattern, text in names.items() if any(place.glob(pattern))]
    return ", ".join(held) or "nothing"
