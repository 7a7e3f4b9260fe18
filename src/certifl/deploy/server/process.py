"""The server's process: Flower's SuperLink behind a gate, and the keys that it admits."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from certifl.deploy import flower
from certifl.deploy.bundle import INSECURE, Connection, load_connection
from certifl.deploy.flower import (
    Child,
    Endpoint,
    bypass_proxies,
    configure_flower,
    locked_folder,
    stop_on_signals,
    tail,
)
from certifl.deploy.keys import check_certificate, connection_problem, public_key_bytes
from certifl.errors import InputError, WorkError

_log = logging.getLogger(__name__)
_START_SECONDS = 60.0
_RETRY_SECONDS = 5.0


def local_endpoint(folder: Path) -> Endpoint:
    """The server of a folder, as reached from its own machine."""
    connection = load_connection(folder)
    secret = folder / "superexec.secret"
    if not secret.is_file():
        raise InputError(f"{folder} is not a server's folder: it has no {secret.name}.")
    authority = None if connection.insecure else folder / "ca.crt"
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    local = everywhere.get(connection.listen, connection.listen)
    bypass_proxies(local)
    address = dataclasses.replace(connection, host=local).address
    return Endpoint(address, authority, secret.read_bytes())


def client_keys(folder: Path, report: Callable[[str], None] | None = None) -> dict[int, bytes]:
    """Public keys of a server's clients, by number.

    A file that is not a key (it may be half copied) is reported and skipped, and read again.
    """
    keys: dict[int, bytes] = {}
    for path in sorted((folder / "clients").glob("client-*.pub")):
        number = path.stem.removeprefix("client-")
        try:
            if not (number.isascii() and number.isdigit()):
                raise InputError(f"{path} names no client: call it client-3.pub, for instance.")
            key = public_key_bytes(path)
            if key in keys.values() or int(number) in keys:
                raise InputError(f"{path} is the key of another client too, or of the same twice.")
            keys[int(number)] = key
        except InputError as error:
            (report or _log.warning)(f"{error} It is skipped for now, and will be read again.")
    return keys


class KeyFolder(Mapping[int, bytes]):
    """The public keys now in a server's folder: keys may be added while a study runs.

    It is true where the federation uses keys, also while none can be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._secure = not load_connection(folder).insecure

    def __bool__(self) -> bool:
        return self._secure

    def __getitem__(self, client: int) -> bytes:
        return client_keys(self._folder)[client]

    def __iter__(self) -> Iterator[int]:
        return iter(client_keys(self._folder))

    def __len__(self) -> int:
        return len(client_keys(self._folder))


def run_server(folder: Path, report: Callable[[str], None]) -> None:
    """Run a folder's server until it is stopped; WorkError where it cannot start, or ended."""
    connection, endpoint = load_connection(folder), local_endpoint(folder)
    if connection.insecure:
        report(INSECURE)
    else:
        check_certificate(folder / "server.crt")
        check_certificate(folder / "ca.crt")
    home, log = folder / "flower", folder / "log" / "server.log"
    with locked_folder(folder), stop_on_signals() as stop:
        configure_flower(home)
        child = Child(
            "certifl.deploy.gate:main",
            _superlink(folder, connection),
            log,
            home,
        )
        try:
            _wait_until_up(child, endpoint)
            report(f"Server at {connection.address}; log in {log}.")
            admission = _KeyAdmission(folder, endpoint, report)
            while not stop.is_set():
                admission.check()  # also of keys that come later
                if child.ended is not None:
                    end = tail(child.log)
                    raise WorkError(f"The server ended on its own; its log says:\n{end}")
                stop.wait(1.0)
        finally:
            child.stop()


def _superlink(folder: Path, connection: Connection) -> list[str]:
    arguments = ["--host", connection.listen, "--port", str(connection.port)]
    arguments += ["--database", str(folder / "state.db"), "--isolation", "process"]
    arguments += ["--superexec-auth-secret-file", str(folder / "superexec.secret")]
    if connection.insecure:
        return [*arguments, "--insecure"]
    arguments += ["--ssl-ca-certfile", str(folder / "ca.crt")]
    arguments += ["--ssl-certfile", str(folder / "server.crt")]
    arguments += ["--ssl-keyfile", str(folder / "server.key")]
    return [*arguments, "--enable-supernode-auth"]


def _wait_until_up(child: Child, endpoint: Endpoint) -> None:
    host, _, port = endpoint.address.rpartition(":")
    host, ends = host.strip("[]"), time.monotonic() + _START_SECONDS
    while True:
        answers = connection_problem(host, int(port), endpoint.authority) is None
        if child.ended is not None:
            raise WorkError(_not_started(endpoint, tail(child.log), child.log))
        if answers:
            return
        if time.monotonic() > ends:
            raise WorkError(f"The server did not start in time; its log is {child.log}.")
        time.sleep(0.2)


def _not_started(endpoint: Endpoint, end: str, log: Path) -> str:
    """Why a server ended immediately, by the end of its log."""
    if "Can't locate revision" in end:
        return (
            "The server did not start: its state.db was written by a later release of Flower than "
            f"{version('flwr')}. Install that release again; or move state.db aside, and clients "
            "are admitted anew from their keys in clients/."
        )
    return (
        f"The server did not start. Is another program listening on {endpoint.address}? "
        f"Its log {log} ends with:\n{end}"
    )


class _KeyAdmission:
    """Admits the clients whose keys are in a server's folder.

    A key that cannot be read or registered is reported once, and tried again.
    """

    def __init__(self, folder: Path, endpoint: Endpoint, report: Callable[[str], None]) -> None:
        self._folder, self._endpoint, self._report = folder, endpoint, report
        self._seen: dict[int, bytes] | None = None
        self._reported: set[str] = set()
        self._next = 0.0

    def check(self) -> None:
        """Register new keys."""
        keys = client_keys(self._folder, self._once)
        if keys == self._seen or time.monotonic() < self._next:
            return
        admitted = [client for client, key in sorted(keys.items()) if self._admit(client, key)]
        self._report(f"{len(admitted)} clients may connect.")
        if len(admitted) == len(keys):
            self._seen = keys
        else:
            self._next = time.monotonic() + _RETRY_SECONDS

    def _admit(self, client: int, key: bytes) -> bool:
        try:
            flower.register(self._endpoint, f"client-{client}", key)
        except WorkError as error:
            self._once(
                f"The key of client {client} could not be admitted and will be tried "
                f"again: {error}"
            )
            return False
        return True

    def _once(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            self._report(line)
