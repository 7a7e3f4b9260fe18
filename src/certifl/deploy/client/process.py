"""A client's process: a SuperNode that talks to the server, while the work is done here.

The SuperNode carries messages; they are answered by the certifl that is installed here. The app
that the server submitted is not run: a server cannot bring code to a client's machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from certifl.deploy.bundle import INSECURE, Connection, load_connection
from certifl.deploy.client.client import Client
from certifl.deploy.client.settings import Settings
from certifl.deploy.client_app import respond
from certifl.deploy.flower import (
    Child,
    Endpoint,
    acquire,
    bypass_proxies,
    configure_flower,
    free_port,
    heartbeats,
    in_background,
    locked_folder,
    runtime_client,
    stop_on_signals,
)
from certifl.deploy.keys import check_certificate, connection_problem
from certifl.errors import InputError, WorkError
from certifl.federated.workers import warm_up
from certifl.runs.atomic import private_folder, write_secret, write_text

_log = logging.getLogger(__name__)
_START_SECONDS = 60.0
_LONGEST_LOG = 4 << 20
_LOCAL_RETRY_SECONDS = 3.0
_POLL = 0.25
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 30.0
_STILL_COUNTED = 90.0
"""Seconds after which Flower no longer counts a killed client as connected (60, with a margin)."""
_SAY_AGAIN = 600.0
_LASTING = 20.0

_KEY = (
    "node.key must be the private half of clients/client-{client}.pub in the server's folder; "
    "the server's operator can put it there at any time"
)


def run_client(folder: Path, settings: Settings, report: Callable[[str], None]) -> None:
    """Run a client until it is stopped; one that is refused waits and tries again.

    WorkError where the server cannot be authenticated, or requires a key that the client lacks.
    """
    connection = load_connection(folder)
    if connection.insecure:
        report(INSECURE)
    _check_data(settings)
    authority = None if connection.insecure else folder / "ca.crt"
    if authority is not None:
        check_certificate(authority)
    configure_flower(folder / "flower")
    bypass_proxies(connection.host)
    warm_up()  # not in the first round's time
    client = Client(settings, folder, report)
    retry, accepted = Retry(connection.address, settings.client, report), Accepted(folder)

    def note_accepted() -> None:
        accepted.note()
        retry.connected()

    private_folder(folder)
    report(f"Client {settings.client} connects to {connection.address}; logs in {folder / 'log'}.")
    with locked_folder(folder), stop_on_signals() as stop:
        while not stop.is_set():
            problem = connection_problem(connection.host, connection.port, authority)
            if problem is not None:
                stop.wait(retry.unreachable(problem))
                continue
            started = time.monotonic()
            served = _connected(folder, connection, client, stop, note_accepted)
            if stop.is_set():
                break
            lasted = time.monotonic() - started
            stop.wait(retry.ended(lasted) if served else retry.refused(accepted.before()))


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
    client: Client,
    stop: threading.Event,
    accepted: Callable[[], None],
) -> bool:
    """Work until the SuperNode ends; False if the server refused it, WorkError without a key."""
    port, secret = free_port(), secrets.token_bytes(32)
    write_secret(folder / "flower" / "supernode.secret", secret)
    log = folder / "log" / "supernode.log"
    if log.is_file() and log.stat().st_size > _LONGEST_LOG:
        os.replace(log, log.with_suffix(".log.1"))  # the one renamed before is lost
    arguments = _supernode(folder, connection, port)
    start = log.stat().st_size if log.is_file() else 0
    child = Child("flwr.supernode.cli:flower_supernode", arguments, log, folder / "flower")
    try:
        ends = time.monotonic() + _START_SECONDS
        while child.ended is None and not stop.is_set() and time.monotonic() < ends:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            time.sleep(0.1)
        endpoint = Endpoint(f"127.0.0.1:{port}", None, secret, _LOCAL_RETRY_SECONDS)
        with _watched(child, start, accepted):
            work(endpoint, client, lambda: child.ended is None and not stop.is_set())
    finally:
        child.stop()
    with log.open("rb") as file:
        file.seek(start)
        return not _refused(file.read().decode(errors="replace"), connection)


@contextlib.contextmanager
def _watched(child: Child, start: int, accepted: Callable[[], None]) -> Iterator[None]:
    """Follow a SuperNode's log: it was accepted, or it dropped a request.

    A SuperNode that dropped a request after handing it over is ended: it would wait for the
    answer to that request, and match every later answer to the request before.
    """

    def watch(over: threading.Event) -> None:
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

    with in_background(watch):
        yield


def _refused(log: str, connection: Connection) -> bool:
    """Whether the server refused this client, by its log; WorkError if a retry is useless."""
    if "[code: 1001]" in log:
        raise WorkError(
            f"The server {connection.address} has another minor release of Flower than this "
            f"machine ({version('flwr')}): install the server's, for instance with pip install "
            '"flwr==1.42.*".'
        )
    if "[code: 2001]" in log:
        raise WorkError(
            f"The server {connection.address} takes clients with keys alone, and this folder has "
            "none. Ask the server's operator for a folder of `certifl deploy init`."
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


def with_data(settings: Settings, data: str | None, dealt: bool) -> Settings:
    """A client's settings with the data named on the command line."""
    values = settings if data is None else settings.model_copy(update={"data": data})
    return values.model_copy(update={"dealt": True}) if dealt else values


def work(endpoint: Endpoint, client: Client, alive: Callable[[], bool]) -> None:
    """Answer the requests of a SuperNode, until it ends or an answer does not reach it.

    A SuperNode waits for the answer to each request, so it is useless after one that was lost.
    """
    waiting = runtime_client(endpoint)
    try:
        while alive():
            task = acquire(waiting, TaskType.CLIENT_APP)
            if task is None:
                time.sleep(_POLL)
            else:
                _answer_task(endpoint, client, task[1])
    except Exception as error:  # whatever it is: restart with a new SuperNode
        if alive():
            _log.warning("A message was lost on the way: %s", error)
    finally:
        waiting.close()


def _answer_task(endpoint: Endpoint, client: Client, token: str) -> None:
    """Answer one message."""
    runtime = runtime_client(endpoint, token)
    status = SubStatus.FAILED
    try:
        message, context, _run, _fab = pull_task_input(runtime)
        with heartbeats(runtime):
            push_message(runtime, respond(message, client), context)
        status = SubStatus.COMPLETED
    finally:
        with contextlib.suppress(httpx.HTTPError):  # then the first error is what matters
            runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        runtime.close()


# When a client that is not connected tries again, and what it reports meanwhile.
#
# Flower gives the same answer to an unknown key and to a client that it counts as connected, as it
# does for up to a minute after a client was killed. So a refusal is never final: the client waits,
# tries again and reports the possible reason, again only after a change or ten minutes.


class Accepted:
    """Whether the server has accepted this folder's key before; stored in a small file.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._key = folder / "flower" / "accepted", folder / "node.key"

    def before(self) -> bool:
        """Whether the current key was accepted before."""
        return self._file.is_file() and self._file.read_text() == self._digest()

    def note(self) -> None:
        """Store that the current key was accepted."""
        if not self.before():
            write_text(self._file, self._digest())

    def _digest(self) -> str:
        content = self._key.read_bytes() if self._key.is_file() else b""
        return hashlib.sha256(content).hexdigest()


class Retry:
    """Waits between attempts: longer from one to the next, as long as none lasts.

    Args:
        server: its address. client: number of the client.
        report: called with a line when something changes.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        server: str,
        client: int,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self._client, self._report, self._clock = server, client, report, clock
        self._wait = _FIRST_WAIT
        self._refused_since: float | None = None
        self._reported_at: dict[str, float] = {}

    def unreachable(self, problem: str) -> float:
        """The server does not answer; how many seconds to wait."""
        self._report_once("Waiting for the server", f": {problem}.")
        return self._next_wait()

    def refused(self, accepted_before: bool) -> float:
        """The server does not accept the client; how many seconds to wait."""
        now = self._clock()
        if self._refused_since is None:
            self._refused_since = now
        self._report_once(self._why(accepted_before, now - self._refused_since), " Trying again.")
        return self._next_wait()

    def ended(self, lasted: float) -> float:
        """A connection ended after so many seconds; how many to wait."""
        if lasted >= _LASTING:
            self._wait = _FIRST_WAIT
            self._reported_at.clear()
        self._report_once("The connection ended; reconnecting.", "")
        return self._next_wait()

    def connected(self) -> None:
        """The server has accepted the client."""
        self._refused_since = None
        self._report_once("The server has accepted this client.", "")

    def _why(self, accepted_before: bool, refused_for: float) -> str:
        whose = f"The server {self._server}"
        key = _KEY.format(client=self._client)
        if refused_for >= _STILL_COUNTED:
            return (
                f"{whose} has not accepted this client for more than {_STILL_COUNTED:g} seconds: "
                f"it does not know its key, or another client with this key is connected. {key}."
            )
        if accepted_before:
            return (
                f"{whose} does not accept this client at the moment: for about a minute "
                "it still counts a client that was killed as connected."
            )
        return (
            f"{whose} does not accept this client: it does not know this client's key, or counts "
            f"it as connected still, as for about a minute after it was killed. {key}."
        )

    def _report_once(self, what: str, more: str) -> None:
        """Report something that was not reported in the last minutes."""
        now, before = self._clock(), self._reported_at.get(what)
        if before is None or now - before >= _SAY_AGAIN:
            self._reported_at[what] = now
            self._report(what + more)

    def _next_wait(self) -> float:
        wait = self._wait
        self._wait = min(2 * wait, _LONGEST_WAIT)
        return wait
