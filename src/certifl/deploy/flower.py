"""Flower's processes and runs: environment, child processes, tasks, registered nodes.

The server app that Flower would start from what was submitted is not used: the SuperLink gives
its tasks to any process that has its secret, which is the one of `certifl deploy run`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from certifl.deploy.bundle import FLOWER_VARIABLES, app_files
from certifl.errors import StoreMismatch, WorkError
from certifl.runs.atomic import private_files, write_text

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_TERM_SECONDS = 10.0
_HEARTBEAT_SECONDS = 15.0
_MMAP_THRESHOLD, _LARGE = -3, 1 << 18  # glibc's M_MMAP_THRESHOLD, in bytes
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@contextlib.contextmanager
def locked(file: Path, taken: str | None) -> Iterator[None]:
    """Hold a lock file for one process, whose files are private meanwhile.

    `taken` is what the StoreMismatch says where another process holds it; None = wait for that.
    """
    with private_files(), file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if taken is None else fcntl.LOCK_NB))
        except OSError:
            raise StoreMismatch(taken) from None
        yield


def locked_folder(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a folder of a federation for one process, whose files are private meanwhile."""
    taken = f"Another process is using {folder}. Start a server or client only once."
    return locked(folder / ".lock", taken)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that is set on SIGTERM or SIGINT."""
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


def environment(home: Path) -> dict[str, str]:
    """Variables that disable installing at run time and telemetry; Flower's files go to `home`."""
    return {**FLOWER_VARIABLES, "FLWR_HOME": str(home.resolve())}


def configure_flower(home: Path) -> None:
    """Set this environment for the current process, before Flower is used."""
    os.environ.update(environment(home))
    bypass_proxies()


def bypass_proxies(*hosts: str) -> None:
    """Connect to these hosts, and to this machine, without a proxy of the environment.

    A proxy would see the secrets of processes on this machine, and the server's certificate is
    checked on a direct connection before anything is sent.
    """
    for name in ("NO_PROXY", "no_proxy"):
        present = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*present, *_THIS_MACHINE, *hosts]))


def return_freed_memory() -> None:
    """Let this process return large blocks to the system as soon as they are free.

    By default glibc caches blocks of the size of a layer, and never reuses half of them between
    short-lived tensors. Without glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


class Child:
    """One of Flower's processes; it ends with this one.

    Args:
        entry: "module:function" that it runs.
        arguments: of its command line.
        log: where its output goes.
        home: Flower's folder.
    """

    def __init__(self, entry: str, arguments: Sequence[str], log: Path, home: Path) -> None:
        module, _, function = entry.partition(":")
        code = (
            "import sys\n"
            "from flwr.supercore.app_utils import start_parent_process_monitor\n"
            f"start_parent_process_monitor({os.getpid()})\n"
            f"from {module} import {function}\n"
            f"sys.argv[0] = {function.replace('_', '-')!r}\n"
            f"{function}()\n"
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment(home)},
                start_new_session=True,  # Ctrl-C goes to the parent, which stops it
            )

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Terminate it, or else kill it."""
        if self.ended is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_TERM_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@dataclass(frozen=True)
class Endpoint:
    """The interface of a SuperLink or SuperNode.

    Attributes:
        address: host:port. authority: certificate that its TLS is checked against; None = no TLS.
        secret: permits to take tasks.
        retry_seconds: how long a call is repeated while there is no answer.
    """

    address: str
    authority: Path | None
    secret: bytes
    retry_seconds: float = 120.0

    @property
    def server(self) -> tuple[str, bool, bytes | None]:
        """Address, whether it is insecure, the authority's certificate: as Flower takes them."""
        certificate = None if self.authority is None else self.authority.read_bytes()
        return self.address, self.authority is None, certificate

    def retrying(self) -> RetryInvoker:
        """Repeats calls while the other side does not answer."""
        return RetryInvoker(
            wait_gen_factory=lambda: exponential(max_delay=5),
            recoverable_exceptions=(
                httpx.ConnectError,
                httpx.ReadError,
                httpx.WriteError,
                httpx.RemoteProtocolError,
                httpx.TimeoutException,
            ),
            max_tries=None,
            max_time=self.retry_seconds,
            should_giveup=lambda error: "certificate" in str(error).lower(),
        )


def runtime_client(endpoint: Endpoint, token: str | None = None) -> RuntimeHttpClient:
    """A client that takes tasks; with a token, one that works on that task."""
    interceptors: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor("certifl")]
    if token is None:
        interceptors.append(
            SuperExecAuthHttpInterceptor(master_secret=endpoint.secret, protected_methods=_ACQUIRE)
        )
    else:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(
        *endpoint.server, interceptors, retry_invoker=endpoint.retrying()
    )


def acquire(client: RuntimeHttpClient, kind: str) -> tuple[Any, str] | None:
    """A pending task of a kind and its token; None where there is none."""
    reply = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return (reply.task, reply.token) if reply.HasField("task") and reply.token else None


@contextlib.contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread of its own; the event that it is given ends it."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2.0)


@contextlib.contextmanager
def heartbeats(runtime: RuntimeHttpClient) -> Iterator[None]:
    """Report to Flower every few seconds that a task is alive, until it drops the task."""

    def beat(over: threading.Event) -> None:
        while not over.is_set():
            with contextlib.suppress(httpx.HTTPError, WorkError):  # reported where it matters
                if not runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    return
            over.wait(_HEARTBEAT_SECONDS)

    with in_background(beat):
        yield


@contextlib.contextmanager
def _control(endpoint: Endpoint) -> Iterator[ControlHttpClient]:
    client = ControlHttpClient.from_server_address(
        *endpoint.server, [RuntimeVersionHttpInterceptor("certifl")]
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.FORBIDDEN:
            raise WorkError(
                f"The server at {endpoint.address} takes such requests from its own machine "
                "alone: repeat the command there."
            ) from error
        raise WorkError(f"The server refused: {error.response.text[:300]}") from error
    except httpx.HTTPError as error:
        raise WorkError(
            f"The server at {endpoint.address} does not answer ({error}). Start it with "
            "`certifl deploy server`, then repeat the command."
        ) from error
    finally:
        client.close()


def register(endpoint: Endpoint, name: str, key: bytes) -> None:
    """Let a node with this public key connect; nothing if it may already."""
    with _control(endpoint) as client:
        registered = client.ListNodes(ListNodesRequest()).nodes_info
        if key not in {info.public_key for info in registered}:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def nodes(endpoint: Endpoint) -> list[NodeInfo]:
    """All registered nodes."""
    with _control(endpoint) as client:
        return list(client.ListNodes(ListNodesRequest()).nodes_info)


@contextlib.contextmanager
def opened_run(endpoint: Endpoint, notes: Path) -> Iterator[HttpGrid]:
    """A run of Flower, and the grid to its nodes; the run ends with the block.

    `notes` stores the run's number. A run that was killed is ended first: its requests, some of
    them delivered, would block the nodes until Flower drops it.

    Raises:
        StoreMismatch: the same command is running already, and continues.
        WorkError: the server does not answer.
    """
    notes.parent.mkdir(parents=True, exist_ok=True)
    under_way = (
        "Another `certifl deploy` command for the same run folder, or another check, is under "
        "way: wait for it to end, or stop it first."
    )
    with locked(notes.with_suffix(".lock"), under_way):
        if notes.is_file() and (number := notes.read_text().strip()).isdigit():
            _end(endpoint, int(number))
        with locked(notes.with_name("starting.lock"), None):  # others would take its task
            run_id = _start(endpoint)
            write_text(notes, f"{run_id}\n")
            task, token = _acquired(endpoint, run_id)
        try:
            with _worked_on(endpoint, task, token) as grid:
                yield grid
        except BaseException:
            _end(endpoint, run_id)
            raise
        finally:
            notes.unlink(missing_ok=True)


def _start(endpoint: Endpoint) -> int:
    with _control(endpoint) as control:
        fab, _ = build_fab_from_files(app_files())
        started = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", fab, {}))))
        if not started.HasField("run_id"):
            raise WorkError("The server did not start a run; its log says why.")
    return int(started.run_id)


def _end(endpoint: Endpoint, run_id: int) -> None:
    # It may have ended, or the server may not know it any more.
    with contextlib.suppress(WorkError), _control(endpoint) as control:
        control.StopRun(StopRunRequest(run_id=run_id))


@contextlib.contextmanager
def _worked_on(endpoint: Endpoint, task: Any, token: str) -> Iterator[HttpGrid]:
    grid = HttpGrid(*endpoint.server, token=token)
    grid._retry_invoker = endpoint.retrying()
    own = runtime_client(endpoint, token)
    status = SubStatus.FAILED
    try:
        task_input = own.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run_id
        TaskIdentity.node_id = task_input.context.node_id
        grid.set_run(run_from_proto(task_input.run))
        with heartbeats(own):
            yield grid
        status = SubStatus.COMPLETED
    except httpx.HTTPError as error:
        raise WorkError(
            f"The server at {endpoint.address} no longer answers ({error}). Start it again with "
            "`certifl deploy server`, then repeat the command: it resumes from the last round."
        ) from error
    finally:
        with contextlib.suppress(httpx.HTTPError):
            own.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        grid.close()
        own.close()


def _acquired(endpoint: Endpoint, run_id: int) -> tuple[Any, str]:
    """The server's task of a run; tasks of other, abandoned runs end here."""
    client = runtime_client(endpoint)
    ends = time.monotonic() + 30.0
    try:
        while time.monotonic() < ends:
            task = acquire(client, TaskType.SERVER_APP)
            if task is not None and task[0].run_id == run_id:
                return task
            if task is None:
                time.sleep(0.2)
    except httpx.HTTPStatusError as error:
        raise WorkError(
            "The server does not accept this folder's secret: give the folder that it was started "
            "with."
        ) from error
    finally:
        client.close()
    raise WorkError("The server did not hand out the run that was started.")
