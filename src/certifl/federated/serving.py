"""A worker process: reads states from the last committed round, trains, answers, never writes."""

from __future__ import annotations

import io
import pickle
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from certifl.errors import CertiflError
from certifl.federated.base import Algorithm
from certifl.federated.client import LocalTraining
from certifl.federated.faults import Fault, attempt
from certifl.federated.states import ClientData, ServerState
from certifl.federated.stored import client_state, server_state
from certifl.models import adopt_code
from certifl.store.checkpoints import StoredRound

__all__ = ["Message", "Question", "load_what_a_step_needs", "pack", "serve", "unpack"]

Question = tuple[StoredRound, int, ClientData]
"""The committed round to start from, a client, its data."""


@dataclass(frozen=True)
class Message:
    """What a worker says.

    Attributes:
        kind: "ready", "result", "fault", or "stop" for an error that must stop the training.
        content: the result, the fault or the error.
        seconds: that the client took.
    """

    kind: str
    content: Any = None
    seconds: float = 0.0


def pack(message: object) -> bytes:
    """A message between processes, tensors as plain bytes.

    torch would send tensors through shared memory and open files, which run out with many clients.
    """
    written = io.BytesIO()
    _Pickler(written, protocol=5).dump(message)
    return written.getvalue()


def unpack(message: bytes) -> Any:
    """What `pack` was given; only for messages of processes that this training started."""
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
    """A worker's life: one thread, one algorithm, one trainer, clients until nobody asks."""
    # Ctrl-C reaches all processes of a terminal; the one that asked decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    code, work = pickle.loads(payload)
    adopt_code(code)
    algorithm, training = pickle.loads(work)
    broadcast: ServerState | None = None
    load_what_a_step_needs()
    line.send_bytes(pack(Message("ready")))
    while True:
        try:
            stored, client, data = unpack(line.recv_bytes())
        except EOFError:
            return
        try:
            if broadcast is None or broadcast.round != stored.number:
                broadcast = server_state(stored)
            answer = _answer(algorithm, training, broadcast, (stored, client, data))
        except CertiflError as error:
            answer = pack(Message("stop", error))
        line.send_bytes(answer)


def load_what_a_step_needs() -> None:
    """Import what torch imports at the first step of a process: not in the first client's time."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    optimizer.step()


def _answer(
    algorithm: Algorithm, training: LocalTraining, broadcast: ServerState, question: Question
) -> bytes:
    stored, client, data = question
    started = time.perf_counter()

    def trained() -> object:
        state = client_state(stored, client)
        return algorithm.client_round(broadcast, state, data, training)

    result = attempt(client, trained)
    seconds = time.perf_counter() - started
    if isinstance(result, Fault):
        return _fault(result.kind, result.reason, seconds)
    packed = attempt(client, lambda: pack(Message("result", result, seconds)))
    if isinstance(packed, Fault):
        return _fault("wrong", f"its answer cannot be sent, {packed.reason}", seconds)
    return packed


def _fault(kind: str, reason: str, seconds: float) -> bytes:
    """Without the exception, whose class may not survive the way."""
    return pack(Message("fault", Fault(kind, reason), seconds))
