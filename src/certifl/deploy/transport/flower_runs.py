"""A run of Flower's, worked on in this very process, and the list of nodes that may connect.

The server app that Flower would start from what was submitted is not used: the SuperLink hands
its work to whoever has its secret, which is this process.
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

from certifl.deploy.provision.kit import app_files
from certifl.deploy.transport.flower_processes import Heartbeat, patient
from certifl.errors import WorkError
from certifl.runs.atomic import write_text

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@dataclass(frozen=True)
class Place:
    """Where a SuperLink's or SuperNode's interface is.

    Attributes:
        address: host:port. authority: certificate that its TLS is checked against; None = no TLS.
        secret: whoever has it may take work.
        patience: seconds for which a call is repeated while nobody answers.
    """

    address: str
    authority: Path | None
    secret: bytes
    patience: float = 120.0

    @property
    def certificates(self) -> bytes | None:
        """The authority's certificate."""
        return None if self.authority is None else self.authority.read_bytes()


def runtime_client(place: Place, token: str | None = None) -> RuntimeHttpClient:
    """For taking work; with a token, for doing the work that it stands for."""
    known: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor("certifl")]
    if token is None:
        known.append(
            SuperExecAuthHttpInterceptor(master_secret=place.secret, protected_methods=_ACQUIRE)
        )
    else:
        known.append(RuntimeTokenHttpInterceptor(token))
    return RuntimeHttpClient.from_server_address(
        place.address,
        place.authority is None,
        place.certificates,
        known,
        retry_invoker=patient(place.patience),
    )


def acquire(client: RuntimeHttpClient, kind: str) -> tuple[Any, str] | None:
    """A waiting piece of work of a kind and the token for it; None where there is none."""
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return (found.task, found.token) if found.HasField("task") and found.token else None


@contextlib.contextmanager
def _control(place: Place) -> Iterator[ControlHttpClient]:
    client = ControlHttpClient.from_server_address(
        place.address,
        place.authority is None,
        place.certificates,
        [RuntimeVersionHttpInterceptor("certifl")],
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.FORBIDDEN:
            raise WorkError(
                f"The server at {place.address} takes such requests from its own machine alone: "
                "repeat the command there."
            ) from error
        raise WorkError(f"The server refused: {error.response.text[:300]}") from error
    except httpx.HTTPError as error:
        raise WorkError(
            f"The server at {place.address} does not answer ({error}). Start it with "
            "`certifl deploy server`, then repeat the command."
        ) from error
    finally:
        client.close()


def register(place: Place, keys: Sequence[tuple[str, bytes]]) -> int:
    """Let nodes with these keys connect; how many of them were new."""
    with _control(place) as client:
        known = {info.public_key for info in client.ListNodes(ListNodesRequest()).nodes_info}
        new = [(name, key) for name, key in keys if key not in known]
        for name, key in new:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
    return len(new)


def nodes(place: Place) -> list[dict[str, Any]]:
    """All registered nodes: key, name, status, since when."""
    with _control(place) as client:
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
def opened_run(place: Place, notes: Path) -> Iterator[HttpGrid]:
    """A run of Flower's, and the grid to its nodes; it ends, well or not, with the block.

    Args:
        place: the server.
        notes: keeps the run's number. A run that was killed is ended first: its orders, some of
            them half sent, would keep the nodes waiting until Flower gives it up.

    Raises:
        WorkError: the server is not there, or takes the run away.
    """
    _end_previous(place, notes)
    with _control(place) as control:
        fab, _ = build_fab_from_files(app_files())
        content = Fab("", fab, {})
        started = control.StartRun(StartRunRequest(fab=fab_to_proto(content)))
        if not started.HasField("run_id"):
            raise WorkError("The server did not start a run; its log says why.")
    write_text(notes, f"{started.run_id}\n")
    ended = False
    try:
        with _worked_on(place, int(started.run_id)) as grid:
            yield grid
        ended = True
    finally:
        if not ended:
            _end(place, int(started.run_id))
        notes.unlink(missing_ok=True)


def _end_previous(place: Place, notes: Path) -> None:
    if notes.is_file() and (number := notes.read_text().strip()).isdigit():
        _end(place, int(number))


def _end(place: Place, run_id: int) -> None:
    # It may have ended by itself, or the server may have forgotten it.
    with contextlib.suppress(WorkError), _control(place) as control:
        control.StopRun(StopRunRequest(run_id=run_id))


@contextlib.contextmanager
def _worked_on(place: Place, run_id: int) -> Iterator[HttpGrid]:
    task, token = _acquired(place, run_id)
    grid = HttpGrid(place.address, place.authority is None, place.certificates, token=token)
    grid._retry_invoker = patient(place.patience)
    own = runtime_client(place, token)
    status = SubStatus.FAILED
    try:
        given = own.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        beat = Heartbeat(lambda: own.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        with beat.beating():
            yield grid
        status = SubStatus.COMPLETED
    except httpx.HTTPError as error:
        raise WorkError(
            f"The server at {place.address} no longer answers ({error}). Start it again with "
            "`certifl deploy server`, then repeat the command: it goes on from the last round."
        ) from error
    finally:
        with contextlib.suppress(httpx.HTTPError):
            own.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        grid.close()
        own.close()


def _acquired(place: Place, run_id: int) -> tuple[Any, str]:
    """The server's part of a run; other runs' parts, left by whoever started them, end here."""
    client = runtime_client(place)
    ends = time.monotonic() + 30.0
    try:
        while time.monotonic() < ends:
            found = acquire(client, TaskType.SERVER_APP)
            if found is not None and found[0].run_id == run_id:
                return found
            if found is None:
                time.sleep(0.2)
    except httpx.HTTPStatusError as error:
        raise WorkError(
            "The server does not accept this folder's secret: give the folder that it was started "
            "with."
        ) from error
    finally:
        client.close()
    raise WorkError("The server did not hand out the run that was started.")
