"""A client's process: a SuperNode that talks to the server, while the work is done here.

The SuperNode carries messages; they are answered by the certifl that is installed here. The app
that the server submitted is not run: a server cannot bring code to a client's machine.
"""

from __future__ import annotations

import contextlib
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
from flwr.proto.runtime_pb2 import PushTaskOutputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from certifl.deploy.client.client import Client
from certifl.deploy.client.retry import Accepted, Retry
from certifl.deploy.client.settings import Settings
from certifl.deploy.client_app import respond
from certifl.deploy.provision.bundle import INSECURE, Connection, load_connection
from certifl.deploy.provision.keys import check_certificate, connection_problem
from certifl.deploy.transport.flower_processes import (
    Child,
    Heartbeat,
    bypass_proxies,
    configure_flower,
    free_port,
    locked_folder,
    stop_on_signals,
)
from certifl.deploy.transport.flower_runs import Endpoint, acquire, runtime_client
from certifl.errors import InputError, WorkError
from certifl.federated.worker import warm_up
from certifl.runs.atomic import private_folder, write_secret

_log = logging.getLogger(__name__)
_START_SECONDS = 60.0
_LONGEST_LOG = 4 << 20
_LOCAL_RETRY_SECONDS = 3.0
_POLL = 0.1


def run_client(folder: Path, settings: Settings, report: Callable[[str], None]) -> None:
    """Run a client until it is stopped; one that is refused waits and tries again.

    Raises:
        WorkError: the server cannot be authenticated, or requires a key that the client lacks.
        RequestError: the folder or its settings are wrong.
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
    retry = Retry(connection.address, settings.client, report)
    private_folder(folder)
    report(f"Client {settings.client} connects to {connection.address}; logs in {folder / 'log'}.")
    with locked_folder(folder), stop_on_signals() as stop:
        while not stop.is_set():
            problem = connection_problem(connection.host, connection.port, authority)
            if problem is not None:
                stop.wait(retry.unreachable(problem))
                continue
            stop.wait(_connection_cycle(folder, connection, client, stop, retry))


def _connection_cycle(
    folder: Path, connection: Connection, client: Client, stop: threading.Event, retry: Retry
) -> float:
    """Connect and work until the connection ends; seconds to wait before the next attempt."""
    accepted_keys, started = Accepted(folder), time.monotonic()

    def accepted() -> None:
        accepted_keys.note()
        retry.connected()

    served = _connected(folder, connection, client, stop, accepted)
    if stop.is_set():
        return 0.0
    lasted = time.monotonic() - started
    return retry.ended(lasted) if served else retry.refused(accepted_keys.before())


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
    """Work for the server until the SuperNode ends; False where the server refused it.

    Raises:
        WorkError: the server requires a key, and this client has none.
    """
    port, secret = free_port(), secrets.token_bytes(32)
    write_secret(folder / "flower" / "supernode.secret", secret)
    log = folder / "log" / "supernode.log"
    _rotate(log)
    arguments = _supernode(folder, connection, port)
    start = log.stat().st_size if log.is_file() else 0
    child = Child("flwr.supernode.cli:flower_supernode", arguments, log, folder / "flower")
    try:
        _wait_for_port(child, port, stop)
        endpoint = Endpoint(f"127.0.0.1:{port}", None, secret, _LOCAL_RETRY_SECONDS)
        with _watched(child, start, accepted):
            work(endpoint, client, lambda: child.ended is None and not stop.is_set())
    finally:
        child.stop()
    with log.open("rb") as file:
        file.seek(start)
        return not _refused(file.read().decode(errors="replace"), connection)


def _rotate(log: Path) -> None:
    """Rename a long log, replacing the one renamed before."""
    if log.is_file() and log.stat().st_size > _LONGEST_LOG:
        os.replace(log, log.with_suffix(".log.1"))


@contextlib.contextmanager
def _watched(child: Child, start: int, accepted: Callable[[], None]) -> Iterator[None]:
    """Follow a SuperNode's log: it was accepted, or it dropped a request.

    A SuperNode that dropped a request after handing it over is ended: it would wait for the
    answer to that request, and match every later answer to the request before.
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
        WorkError: it requires a key or another release of Flower, so a retry is useless.
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


def _wait_for_port(child: Child, port: int, stop: threading.Event) -> None:
    ends = time.monotonic() + _START_SECONDS
    while child.ended is None and not stop.is_set() and time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)


def with_data(settings: Settings, data: str | None, dealt: bool) -> Settings:
    """A client's settings with the data named on the command line."""
    values = settings if data is None else settings.model_copy(update={"data": data})
    return values.model_copy(update={"dealt": True}) if dealt else values


def work(endpoint: Endpoint, client: Client, alive: Callable[[], bool]) -> None:
    """Answer the requests of a SuperNode, until it ends or an answer does not reach it.

    A SuperNode waits for the answer to each request, so it is useless after one that was lost.

    Args:
        place: the SuperNode's own interface, on this machine.
        client: answers requests.
        alive: whether to continue.
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
        beat = Heartbeat(lambda: runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        with beat.beating():
            push_message(runtime, respond(message, client), context)
        status = SubStatus.COMPLETED
    finally:
        with contextlib.suppress(httpx.HTTPError):  # then the first error is what matters
            runtime.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        runtime.close()
