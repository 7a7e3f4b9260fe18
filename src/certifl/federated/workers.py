"""Client rounds in a pool of worker processes that live as long as the training.

Results are yielded in client order, so a round gives the same bits as in one process, given the
same number of torch threads (a worker has one). Workers only read: the main process writes, so
killing a worker damages nothing on disk.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from certifl.errors import CertiflError, InputError, WorkError
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.faults import ClientResult, Fault, try_client
from certifl.federated.local_training import LocalTraining
from certifl.federated.rounds import Clients, data_of, run_client, server_state
from certifl.federated.states import ServerState
from certifl.models import adopt_code, allowed_code
from certifl.registry import check_number
from certifl.runs.checkpoints import StoredRound

_PRELOADED = ["certifl.federated.workers", "torch._dynamo"]
_EXIT_SECONDS = 5.0  # until a process that closed its connection has an exit code
_MOST_KILLED_STARTS = 3  # processes killed while starting, before it is an error
_READY = "ready"

# In a worker. It receives (the committed round to start from, a client, its data), and sends
# `_READY` once, then a `ClientResult` for each client, or an error that must stop the training.


def serve(connection: Connection, payload: bytes) -> None:
    """Main loop of a worker: train clients on one thread until the connection closes."""
    # Ctrl-C reaches all processes of a terminal; the main process decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    code, work = pickle.loads(payload)
    adopt_code(code)
    algorithm, training = pickle.loads(work)
    broadcast: ServerState | None = None
    warm_up()
    connection.send_bytes(pack(_READY))
    while True:
        try:
            stored, client, data = unpack(connection.recv_bytes())
        except EOFError:
            return
        try:
            if broadcast is None or broadcast.round != stored.number:
                broadcast = server_state(stored)
            result = run_client(algorithm, training, broadcast, stored, client, {client: data})
            reply = _packed(result)
        except CertiflError as error:
            reply = pack(error)
        connection.send_bytes(reply)


def warm_up() -> None:
    """Take a step, so that torch's lazy imports do not count as the first client's time."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    optimizer.step()


def _packed(result: ClientResult) -> bytes:
    """A result as bytes; a fault without its exception, whose class may not be picklable."""
    if result.fault is not None:
        return pack(replace(result, fault=replace(result.fault, error=None)))
    packed = try_client(result.client, lambda: pack(result))
    if isinstance(packed, Fault):
        fault = Fault("wrong", f"its result cannot be sent, {packed.reason}")
        return pack(replace(result, content=None, fault=fault))
    return packed


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


# In the main process.


class WorkerPool:
    """Processes with a copy of algorithm and training each, started when first needed.

    A worker that exits or times out costs its client the round and is replaced. Fewer than
    2 * workers results wait for their turn.

    Args:
        algorithm, training, clients: as in `train`; the first two are pickled once.
        workers: number of processes, from 1.
        answer_within: timeout of a client in seconds; None = none.

    Raises:
        SpecError: a number that is not allowed.
        InputError: algorithm or network cannot be pickled.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        training: LocalTraining,
        clients: Clients,
        workers: int,
        answer_within: float | None = None,
    ) -> None:
        check_number("workers", workers, "a whole number of at least 1", low=1, whole=True)
        if answer_within is not None:
            allowed = "a number of seconds above 0"
            check_number("answer_within", answer_within, allowed, low=0, open_low=True)
        try:
            # Pickled separately: the code must be allowed before the rest can be read.
            self._payload = pickle.dumps((allowed_code(), pickle.dumps((algorithm, training))))
        except Exception as error:
            raise InputError(
                "This training cannot be sent to worker processes "
                f"({type(error).__name__}: {error}). Define the network's classes and functions "
                "at the top of a module (no lambda, no class within a function), or set "
                "workers = 0."
            ) from error
        self._clients, self._count, self._timeout = clients, workers, answer_within
        self._workers: list[_Worker] = []
        self._killed_at_start = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """Yield every result in order; errors are those of the same work here, and WorkError."""
        while len(self._workers) < min(self._count, len(participants)):
            self._workers.append(_Worker(self._payload))
        done: dict[int, ClientResult] = {}
        sent = yielded = 0
        while yielded < len(participants):
            ahead = min(len(participants), yielded + 2 * self._count)
            while sent < ahead and (worker := next((w for w in self._workers if w.free), None)):
                sent += self._send(worker, sent, participants[sent], current, done)
            if yielded in done:
                yield done.pop(yielded)
                yielded += 1
            else:
                self._receive(done)

    def _send(
        self,
        worker: _Worker,
        position: int,
        client: int,
        current: StoredRound,
        done: dict[int, ClientResult],
    ) -> bool:
        """Send a client to a worker; False if the worker has exited."""
        data = try_client(client, lambda: data_of(self._clients, client))
        if isinstance(data, Fault):
            done[position] = ClientResult(client, 0.0, None, data)
            return True
        if worker.send(position, client, pack((current.only(client), client, data))):
            return True
        self._replace(worker)
        return False

    def _receive(self, done: dict[int, ClientResult]) -> None:
        """Wait until a worker sends a message, exits, or times out."""
        spent = [worker.seconds for worker in self._workers if worker.position is not None]
        left = max(0.0, self._timeout - max(spent)) if self._timeout and spent else None
        readable = wait_for([worker.connection for worker in self._workers], left)
        for worker in list(self._workers):
            if worker.connection in readable:
                self._read(worker, done)
            elif worker.position is not None and self._timeout is not None:
                seconds = worker.seconds
                if seconds >= self._timeout:
                    reason = f"it did not answer within {self._timeout:g} seconds"
                    fault = Fault("late", reason)
                    done[worker.position] = ClientResult(worker.client, seconds, None, fault)
                    self._replace(worker)

    def _read(self, worker: _Worker, done: dict[int, ClientResult]) -> None:
        try:
            received = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._exited(worker, done)
            return
        message = try_client(worker.client, lambda: unpack(received))
        if message == _READY:
            worker.ready = True
        elif isinstance(message, CertiflError):
            raise message
        elif worker.position is not None:
            if isinstance(message, Fault):
                fault = Fault("wrong", f"its result cannot be read, {message.reason}")
                message = ClientResult(worker.client, worker.seconds, None, fault)
            done[worker.position], worker.position = message, None

    def _exited(self, worker: _Worker, done: dict[int, ClientResult]) -> None:
        """A process that exited: a fault of its client, if it had one."""
        position, client, seconds = worker.position, worker.client, worker.seconds
        if not worker.ready:
            code = worker.end(_EXIT_SECONDS)
            self._workers.remove(worker)
            if code is not None and code < 0 and self._killed_at_start < _MOST_KILLED_STARTS:
                self._killed_at_start += 1  # by a signal: the next one may start
                self._workers.append(_Worker(self._payload))
                return
            raise WorkError(
                f"A worker process exited while it started (exit code {code}); its messages are "
                "above. A script that trains with workers must do so under "
                "`if __name__ == '__main__':`. With workers = 0, no processes are started."
            )
        code = self._replace(worker, _EXIT_SECONDS)
        if position is not None:
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            fault = Fault("ended", f"its process exited ({how})")
            done[position] = ClientResult(client, seconds, None, fault)

    def _replace(self, worker: _Worker, wait: float = 0.0) -> int | None:
        """Stop a worker and start another; the exit code if it had exited before."""
        code = worker.end(wait)
        self._workers[self._workers.index(worker)] = _Worker(self._payload)
        return code


class _Worker:
    """One process, the connection to it, and its current client."""

    def __init__(self, payload: bytes) -> None:
        # Forked from a clean server process with torch loaded: a worker is replaced quickly and
        # inherits nothing of this process (threads, a GPU in use).
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, payload), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = False
        self.position: int | None = None
        self.client = -1
        self._sent_at = 0.0

    @property
    def free(self) -> bool:
        return self.ready and self.position is None

    @property
    def seconds(self) -> float:
        """Since its client was sent."""
        return time.monotonic() - self._sent_at

    def send(self, position: int, client: int, task: bytes) -> bool:
        """Send a client and start its timeout; False if the process has exited."""
        try:
            self.connection.send_bytes(task)
        except OSError:
            return False
        self.position, self.client, self._sent_at = position, client, time.monotonic()
        return True

    def end(self, wait: float = 0.0) -> int | None:
        """Kill the process after `wait` seconds; its exit code if it exited before."""
        self._process.join(wait)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()
        return code
