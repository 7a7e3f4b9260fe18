"""Client rounds in this process, and in a worker process that only reads committed rounds."""

from __future__ import annotations

import io
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from certifl.errors import CertiflError, InputError
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.faults import ClientResult, Fault, try_client
from certifl.federated.rounds import client_state, server_state
from certifl.federated.states import ClientData, ServerState
from certifl.federated.training.local_training import LocalTraining
from certifl.models import adopt_code
from certifl.runs.checkpoints import StoredRound

ClientTask = tuple[StoredRound, int, ClientData]
"""The committed round to start from, a client, its data."""


@dataclass(frozen=True)
class Message:
    """A message from a worker.

    Attributes:
        kind: "ready", "result", "fault", or "stop" for an error that must stop the training.
        content: the result, the fault or the error.
        seconds: duration of the client's round.
    """

    kind: str
    content: Any = None
    seconds: float = 0.0


def pack(message: object) -> bytes:
    """Serialize a message between processes, tensors as bytes.

    torch would use shared memory and open files, which run out with many clients.
    """
    written = io.BytesIO()
    _Pickler(written, protocol=5).dump(message)
    return written.getvalue()


def unpack(message: bytes) -> Any:
    """Deserialize a message of a process that this training started."""
    return pickle.loads(message)


class _Pickler(pickle.Pickler):
    """Tensors that appear twice (a model that is sent and kept) are written once."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        plain = value.detach().to("cpu").contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (content, plain.dtype, tuple(plain.shape))


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def serve(line: Connection, payload: bytes) -> None:
    """Main loop of a worker: train clients on one thread until the connection closes."""
    # Ctrl-C reaches all processes of a terminal; the main process decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    code, work = pickle.loads(payload)
    adopt_code(code)
    algorithm, training = pickle.loads(work)
    broadcast: ServerState | None = None
    warm_up()
    line.send_bytes(pack(Message("ready")))
    while True:
        try:
            stored, client, data = unpack(line.recv_bytes())
        except EOFError:
            return
        try:
            if broadcast is None or broadcast.round != stored.number:
                broadcast = server_state(stored)
            reply = _client_round(algorithm, training, broadcast, (stored, client, data))
        except CertiflError as error:
            reply = pack(Message("stop", error))
        line.send_bytes(reply)


def warm_up() -> None:
    """Take a step, so that torch's lazy imports do not count as the first client's time."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    optimizer.step()


def _client_round(
    algorithm: Algorithm, training: LocalTraining, broadcast: ServerState, task: ClientTask
) -> bytes:
    stored, client, data = task
    started = time.perf_counter()

    def trained() -> object:
        state = client_state(stored, client)
        return algorithm.client_round(broadcast, state, data, training)

    result = try_client(client, trained)
    seconds = time.perf_counter() - started
    if isinstance(result, Fault):
        return _fault(result.kind, result.reason, seconds)
    packed = try_client(client, lambda: pack(Message("result", result, seconds)))
    if isinstance(packed, Fault):
        return _fault("wrong", f"its result cannot be sent, {packed.reason}", seconds)
    return packed


def _fault(kind: str, reason: str, seconds: float) -> bytes:
    """A fault without its exception, whose class may not be picklable."""
    return pack(Message("fault", Fault(kind, reason), seconds))


# Clients in this process, one after the other.


class Clients(Protocol):
    """The clients' data by position: a list, or a sequence that loads client i on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ClientData: ...


def data_of(clients: Clients, client: int) -> ClientData:
    """The data of one client.

    Raises:
        InputError: it is the data of another client.
    """
    data = clients[client]
    if data.client != client:
        raise InputError(
            f"clients[{client}] is the data of client {data.client}: list clients in order."
        )
    return data


class SerialRunner:
    """Trains one client after the other, with one model object."""

    def __init__(self, algorithm: Algorithm, training: LocalTraining, clients: Clients) -> None:
        self._algorithm, self._training, self._clients = algorithm, training, clients

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """Yield the result of every participant, in the order given."""
        broadcast = server_state(current)
        for client in participants:
            started = time.perf_counter()

            def trained(client: int = client) -> object:
                state, data = client_state(current, client), data_of(self._clients, client)
                return self._algorithm.client_round(broadcast, state, data, self._training)

            result = try_client(client, trained)
            seconds = time.perf_counter() - started
            if isinstance(result, Fault):
                yield ClientResult(client, seconds, None, result)
            else:
                yield ClientResult(client, seconds, result)
            del result  # frees it before the next client trains
