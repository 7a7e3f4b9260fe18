"""The server's and the clients' processes, from start to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import PushTaskOutputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from certifl.deploy.client.client import Client
from certifl.deploy.client.retry import Accepted, Retry
from certifl.deploy.client.settings import Settings
from certifl.deploy.client.state import owner_only, private_folder
from certifl.deploy.client_app import respond
from certifl.deploy.provision.keys import check_certificate, public_key_bytes, reach, write_secret
from certifl.deploy.provision.kit import Connection, load_connection
from certifl.deploy.transport import flower_runs as flowerruns
from certifl.deploy.transport.flower_processes import (
    Child,
    Heartbeat,
    direct,
    free_port,
    private_files,
    quiet,
    tail,
)
from certifl.deploy.transport.flower_runs import Place, acquire, runtime_client
from certifl.errors import InputError, StoreMismatch, WorkError
from certifl.federated.worker import warm_up

Told = Callable[[str], None]
_log = logging.getLogger(__name__)
_START_SECONDS = 60.0
_LONGEST_LOG = 4 << 20
_LOCAL_PATIENCE = 3.0
_AGAIN_SECONDS = 5.0
INSECURE = (
    "WITHOUT ENCRYPTION AND WITHOUT KEYS: anybody on the network can read all models and join."
)


def here(folder: Path) -> Place:
    """The server of a folder, as its own machine reaches it."""
    connection = load_connection(folder)
    secret = folder / "superexec.secret"
    if not secret.is_file():
        raise InputError(f"{folder} is no server's folder: it has no {secret.name}.")
    authority = None if connection.insecure else folder / "ca.crt"
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    local = everywhere.get(connection.listen, connection.listen)
    direct(local)
    address = dataclasses.replace(connection, host=local).address
    return Place(address, authority, secret.read_bytes())


def keys_of(folder: Path, told: Told | None = None) -> dict[int, bytes]:
    """Public keys of a server's clients, by number.

    A file that holds no key (yet: it may be half copied) is left out; it is read again next time.

    Args:
        folder: the server's. told: called with a line about each file that is left out.
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
            (told or _log.warning)(f"{error} It is left out, and read again.")
    return keys


class KeyFolder(Mapping[int, bytes]):
    """The public keys in a server's folder as they are now: some come while a study runs.

    It counts as filled where the federation has keys at all, also while none can be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._secure = not load_connection(folder).insecure

    def __bool__(self) -> bool:
        return self._secure

    def __getitem__(self, client: int) -> bytes:
        return keys_of(self._folder)[client]

    def __iter__(self) -> Iterator[int]:
        return iter(keys_of(self._folder))

    def __len__(self) -> int:
        return len(keys_of(self._folder))


def admitted(folder: Path) -> list[dict[str, Any]]:
    """The clients of a running server: number, whether connected, since when."""
    numbers = {key: client for client, key in keys_of(folder).items()}
    found = flowerruns.nodes(here(folder))
    return [{**node, "client": numbers.get(node["key"])} for node in found]


def serve(folder: Path, told: Told) -> None:
    """Run a folder's server until it is stopped.

    Raises:
        WorkError: it cannot start, or ended by itself. RequestError: the folder is none.
    """
    connection, place = load_connection(folder), here(folder)
    if connection.insecure:
        told(INSECURE)
    else:
        check_certificate(folder / "server.crt")
        check_certificate(folder / "ca.crt")
    home, log = folder / "flower", folder / "log" / "server.log"
    with private_files(), _held(folder), _stopped() as stop:
        quiet(home)
        child = Child(
            "certifl.deploy.transport.flower_processes:main",
            _superlink(folder, connection),
            log,
            home,
        )
        try:
            _wait_until_up(child, place, log)
            told(f"Server at {connection.address}; log in {log}.")
            _watch(folder, place, child, stop, told)
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


def _wait_until_up(child: Child, place: Place, log: Path) -> None:
    host, _, port = place.address.rpartition(":")
    ends = time.monotonic() + _START_SECONDS
    host = host.strip("[]")
    while reach(host, int(port), place.authority) is not None or child.ended is not None:
        if child.ended is not None:
            raise WorkError(_not_started(place, tail(log), log))
        if time.monotonic() > ends:
            raise WorkError(f"The server did not start in time; its log is {log}.")
        time.sleep(0.2)


def _not_started(place: Place, end: str, log: Path) -> str:
    """Why a server ended at once, by the end of its log."""
    if "Can't locate revision" in end:
        return (
            "The server did not start: its state.db was written by a later release of Flower than "
            f"{version('flwr')}. Install that release again; or move state.db aside, and clients "
            "are admitted anew from their keys in clients/."
        )
    return (
        f"The server did not start. Is another program listening on {place.address}? "
        f"Its log {log} ends with:\n{end}"
    )


def _watch(folder: Path, place: Place, child: Child, stop: threading.Event, told: Told) -> None:
    """Admit keys, also those that come later, until the server ends."""
    admitting = _Admitting(folder, place, told)
    while not stop.is_set():
        admitting.look()
        if child.ended is not None:
            raise WorkError(f"The server ended by itself; its log says:\n{tail(child.log)}")
        stop.wait(1.0)


class _Admitting:
    """Lets the clients connect whose keys are in a server's folder.

    A key that cannot be read or registered is named once, and tried again; it ends nothing.
    """

    def __init__(self, folder: Path, place: Place, told: Told) -> None:
        self._folder, self._place, self._told = folder, place, told
        self._seen: dict[int, bytes] | None = None
        self._said: set[str] = set()
        self._next = 0.0

    def look(self) -> None:
        """See whether there are new keys."""
        keys = keys_of(self._folder, self._once)
        if keys == self._seen or time.monotonic() < self._next:
            return
        problems = [self._registered(client, key) for client, key in sorted(keys.items())]
        self._told(f"{problems.count(None)} clients may connect.")
        if all(problem is None for problem in problems):
            self._seen = keys
        else:
            self._next = time.monotonic() + _AGAIN_SECONDS

    def _registered(self, client: int, key: bytes) -> str | None:
        try:
            flowerruns.register(self._place, [(f"client-{client}", key)])
        except WorkError as error:
            self._once(f"The key of client {client} is not admitted, and tried again: {error}")
            return str(error)
        return None

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._told(line)


def take_part(folder: Path, settings: Settings, told: Told) -> None:
    """Run a client until it is stopped; one that is refused waits and tries again.

    Raises:
        WorkError: the server is not who it should be, or takes clients with keys alone.
        RequestError: the folder or its settings are wrong.
    """
    connection = load_connection(folder)
    if connection.insecure:
        told(INSECURE)
    _check_data(settings)
    authority = None if connection.insecure else folder / "ca.crt"
    if authority is not None:
        check_certificate(authority)
    quiet(folder / "flower")
    direct(connection.host)
    warm_up()  # not in the first round's time
    party = Client(settings, folder, told)
    retry = Retry(connection.address, settings.client, told)
    private_folder(folder)
    told(f"Client {settings.client} connects to {connection.address}; logs in {folder / 'log'}.")
    with _held(folder), _stopped() as stop:
        while not stop.is_set():
            problem = reach(connection.host, connection.port, authority)
            if problem is not None:
                stop.wait(retry.unreachable(problem))
                continue
            stop.wait(_until_ended(folder, connection, party, stop, retry))


def _until_ended(
    folder: Path, connection: Connection, party: Client, stop: threading.Event, retry: Retry
) -> float:
    """Work for the server until that ends; how many seconds to wait before the next attempt."""
    known, began = Accepted(folder), time.monotonic()

    def accepted() -> None:
        known.note()
        retry.connected()

    served = _connected(folder, connection, party, stop, accepted)
    if stop.is_set():
        return 0.0
    lasted = time.monotonic() - began
    return retry.ended(lasted) if served else retry.refused(known.before())


def _check_data(settings: Settings) -> None:
    path = Path(re.sub(r"\[[^\[\]]+\]$", "", settings.data)).expanduser()
    if not settings.data:
        raise InputError(
            "This client has no data: give --data FOLDER, or write data into client.toml."
        )
    if not settings.dealt and not path.is_dir() and ("/" in settings.data):
        raise InputError(f"There is no folder {path}: correct --data, or data in client.toml.")


def _connected(
    folder: Path,
    connection: Connection,
    party: Client,
    stop: threading.Event,
    accepted: Callable[[], None],
) -> bool:
    """Work for the server until the SuperNode ends; False where the server refused it.

    Raises:
        WorkError: the server takes clients with keys alone, and this one has none.
    """
    port, secret = free_port(), secrets.token_bytes(32)
    write_secret(folder / "flower" / "supernode.secret", secret)
    log = folder / "log" / "supernode.log"
    _begin_anew(log)
    arguments = _supernode(folder, connection, port)
    start = log.stat().st_size if log.is_file() else 0
    child = Child("flwr.supernode.cli:flower_supernode", arguments, log, folder / "flower")
    try:
        _wait_for_port(child, port, stop)
        place = Place(f"127.0.0.1:{port}", None, secret, _LOCAL_PATIENCE)
        with _watched(child, start, accepted):
            work(place, party, lambda: child.ended is None and not stop.is_set())
    finally:
        child.stop()
    with log.open("rb") as file:
        file.seek(start)
        return not _refused(file.read().decode(errors="replace"), connection)


def _begin_anew(log: Path) -> None:
    """Put a log that has grown long aside, in place of the one before; attempts add to it."""
    if log.is_file() and log.stat().st_size > _LONGEST_LOG:
        os.replace(log, log.with_suffix(".log.1"))


@contextlib.contextmanager
def _watched(child: Child, start: int, accepted: Callable[[], None]) -> Iterator[None]:
    """Read along in a SuperNode's log: it was accepted, or it dropped an order.

    One that dropped an order which it had already handed over to be worked on is ended: it would
    wait for the answer to that order, and take every answer for the one before.
    """
    over = threading.Event()

    def watch() -> None:
        position = start
        while not over.wait(1.0) and child.ended is None:
            with child.log.open("rb") as log:
                log.seek(position)
                new = log.read()
            position += new.rfind(b"\n") + 1
            if b"SuperNode ID: " in new:
                accepted()
            if b"Ignoring message" in new:
                child.stop()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2.0)


def _refused(log: str, connection: Connection) -> bool:
    """Whether the server did not accept this client, by what its SuperNode wrote.

    Raises:
        WorkError: it takes clients with keys alone, or of its own release of Flower, whatever is
            repeated.
    """
    if "[code: 1001]" in log:
        raise WorkError(
            f"The server {connection.address} has another minor release of Flower than this "
            f"machine ({version('flwr')}): install the server's, for instance with pip install "
            '"flwr==1.42.*".'
        )
    if "[code: 2001]" in log:
        raise WorkError(
            f"The server {connection.address} takes clients with keys alone, and this folder has "
            "none. Ask whoever runs the server for a folder of `certifl deploy init`."
        )
    return "[code: 2004]" in log


def _supernode(folder: Path, connection: Connection, port: int) -> list[str]:
    arguments = ["--superlink", connection.address, "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--isolation", "process"]
    secret = folder / "flower" / "supernode.secret"
    arguments += ["--superexec-auth-secret-file", str(secret)]
    if connection.insecure:
        return [*arguments, "--insecure"]
    arguments += ["--root-certificates", str(folder / "ca.crt")]
    return [*arguments, "--auth-supernode-private-key", str(folder / "node.key")]


def _wait_for_port(child: Child, port: int, stop: threading.Event) -> None:
    ends = time.monotonic() + _START_SECONDS
    while child.ended is None and not stop.is_set() and time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a party's folder for one process; what it writes is its owner's alone."""
    with owner_only(), (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreMismatch(
                f"Another process is at work for {folder}. A party is started once."
            ) from None
        yield


@contextlib.contextmanager
def _stopped() -> Iterator[threading.Event]:
    """An event that is set when this process is asked to end."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_data(settings: Settings, data: str | None, dealt: bool) -> Settings:
    """A party's settings with what its command says of the data."""
    values = settings if data is None else settings.model_copy(update={"data": data})
    return values.model_copy(update={"dealt": True}) if dealt else values


# A client at work: a SuperNode that talks to the server, and this process, which does the work.
#
# The SuperNode carries messages; the work is done here, by the certifl that is installed here. The
# app that the server submitted is not run: a server cannot bring code to a client's machine.


_POLL = 0.1


def work(place: Place, party: Client, alive: Callable[[], bool]) -> None:
    """Answer what the SuperNode hands over, until it ends or an answer does not reach it.

    A SuperNode waits for the answer to each order, so after one that was lost it is of no use.

    Args:
        place: the SuperNode's own interface, on this machine.
        party: answers orders.
        alive: whether to go on.
    """
    waiting = runtime_client(place)
    try:
        while alive():
            found = acquire(waiting, TaskType.CLIENT_APP)
            if found is None:
                time.sleep(_POLL)
            else:
                _done(place, party, found[1])
    except Exception as error:  # whatever it is: begin again with a fresh SuperNode
        if alive():
            _log.warning("A message was lost on the way: %s", error)
    finally:
        waiting.close()


def _done(place: Place, party: Client, token: str) -> None:
    """One message answered."""
    client = runtime_client(place, token)
    status = SubStatus.FAILED
    try:
        message, context, _run, _fab = pull_task_input(client)
        beat = Heartbeat(lambda: client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        with beat.beating():
            push_message(client, respond(message, party), context)
        status = SubStatus.COMPLETED
    finally:
        with contextlib.suppress(httpx.HTTPError):  # then what came before is what matters
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        client.close()
