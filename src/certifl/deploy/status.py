"""The state of a folder of `certifl deploy init`, on the server's machine or a client's."""

from __future__ import annotations

from pathlib import Path

from certifl.deploy.client.privacy_budget import ledger_lines
from certifl.deploy.client.settings import load_settings
from certifl.deploy.provision.bundle import load_connection
from certifl.deploy.provision.keys import check_certificate, connection_problem
from certifl.deploy.server.process import registered_clients
from certifl.errors import CertiflError


def status_lines(folder: Path) -> tuple[list[str], bool]:
    """The state of a folder as text, and whether it has no problem.

    Raises:
        SpecError: it is not a folder of a federation.
    """
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
    lines = []
    for node in registered_clients(folder):
        client = node["client"]
        who = node["name"] or f"node {node['key'].hex()[:8]}"
        who = who if client is None else f"client {client}"
        since = f" since {node['since']}" if node["since"] and node["status"] == "online" else ""
        lines.append(f"{who}: {node['status']}{since}")
    return lines or ["No client has been admitted yet."]


def _contents(folder: Path) -> str:
    names = {
        "state-*.safetensors": "its state",
        "deployed.safetensors": "the deployed model",
        "certificates.parquet": "certificates",
    }
    present = [text for pattern, text in names.items() if any(folder.glob(pattern))]
    return ", ".join(present) or "nothing"
