"""A run of Flower, whose server app is this process, and the list of nodes that may connect.

The server app that Flower would start from what was submitted is not used: the SuperLink gives
its tasks to any process that has its secret, which is this one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
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
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from certifl.deploy.provision.bundle import app_files
from certifl.deploy.transport.flower_processes import Heartbeat, retrying
from certifl.errors import WorkError
from certifl.runs.atomic import write_text

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


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
    def certificates(self) -> bytes | None:
        """The authority's certificate."""
        return None if self.authority is None else self.authority.read_bytes()


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
        endpoint.address,
        endpoint.authority is None,
        endpoint.certificates,
        interceptors,
        retry_invoker=retrying(endpoint.retry_seconds),
    )


def acquire(client: RuntimeHttpClient, kind: str) -> tuple[Any, str] | None:
    """A pending task of a kind and its token; None where there is none."""
    reply = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return (reply.task, reply.token) if reply.HasField("task") and reply.token else None


@contextlib.contextmanager
def _control(endpoint: Endpoint) -> Iterator[ControlHttpClient]:
    client = ControlHttpClient.from_server_address(
        endpoint.address,
        endpoint.authority is None,
        endpoint.certificates,
        [RuntimeVersionHttpInterceptor("certifl")],
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


def register(endpoint: Endpoint, keys: Sequence[tuple[str, bytes]]) -> int:
    """Let nodes with these keys connect; returns how many of them were new."""
    with _control(endpoint) as client:
        registered = {info.public_key for info in client.ListNodes(ListNodesRequest()).nodes_info}
        new = [(name, key) for name, key in keys if key not in registered]
        for name, key in new:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
    return len(new)


def nodes(endpoint: Endpoint) -> list[dict[str, Any]]:
    """All registered nodes: key, name, status, since when."""
    with _control(endpoint) as client:
        return [
            {
                "key": info.public_key,
                "name": info.name,
                "status": info.status,
                "since": info.last_activated_at,
            }
            for info in client.ListNodes(ListNodesRequest()).nodes_info
        ]


@contextlib.contextmanager
def opened_run(endpoint: Endpoint, notes: Path) -> Iterator[HttpGrid]:
    """A run of Flower, and the grid to its nodes; the run ends with the block.

    Args:
        place: the server.
        notes: stores the run's number. A run that was killed is ended first: its requests, some of
            them half sent, would block the nodes until Flower drops it.

    Raises:
        WorkError: the server does not answer, or drops the run.
    """
    _end_previous(endpoint, notes)
    with _control(endpoint) as control:
        fab, _ = build_fab_from_files(app_files())
        content = Fab("", fab, {})
        started = control.StartRun(StartRunRequest(fab=fab_to_proto(content)))
        if not started.HasField("run_id"):
            raise WorkError("The server did not start a run; its log says why.")
    write_text(notes, f"{started.run_id}\n")
    ended = False
    try:
        with _worked_on(endpoint, int(started.run_id)) as grid:
            yield grid
        ended = True
    finally:
        if not ended:
            _end(endpoint, int(started.run_id))
        notes.unlink(missing_ok=True)


def _end_previous(endpoint: Endpoint, notes: Path) -> None:
    if notes.is_file() and (number := notes.read_text().strip()).isdigit():
        _end(endpoint, int(number))


def _end(endpoint: Endpoint, run_id: int) -> None:
    # It may have ended, or the server may not know it any more.
    with contextlib.suppress(WorkError), _control(endpoint) as control:
        control.StopRun(StopRunRequest(run_id=run_id))


@contextlib.contextmanager
def _worked_on(endpoint: Endpoint, run_id: int) -> Iterator[HttpGrid]:
    task, token = _acquired(endpoint, run_id)
    grid = HttpGrid(
        endpoint.address, endpoint.authority is None, endpoint.certificates, token=token
    )
    grid._retry_invoker = retrying(endpoint.retry_seconds)
    own = runtime_client(endpoint, token)
    status = SubStatus.FAILED
    try:
        task_input = own.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, run_id
        TaskIdentity.node_id = task_input.context.node_id
        grid.set_run(run_from_proto(task_input.run))
        beat = Heartbeat(lambda: own.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        with beat.beating():
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
