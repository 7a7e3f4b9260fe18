"""Client rounds in a pool of worker processes that live as long as the training.

Results are yielded in client order, so a round gives the same bits as in one process, given the
same number of torch threads (a worker has one). Workers only read: the main process writes, so
killing a worker damages nothing on disk.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait as wait_for
from types import TracebackType

from certifl.errors import InputError, WorkError
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.faults import ClientResult, Fault, try_client
from certifl.federated.training.local_training import LocalTraining
from certifl.federated.worker import Clients, Message, data_of, pack, serve, unpack
from certifl.models import allowed_code
from certifl.registry import check_number
from certifl.runs.checkpoints import StoredRound

_PRELOADED = ["certifl.federated.worker", "torch._dynamo"]
_EXIT_SECONDS = 5.0  # until a process that closed its connection has an exit code
_MOST_KILLED_STARTS = 3  # processes killed while starting, before it is an error


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
        check_number("workers", workers, "a whole number from 1", low=1, whole=True)
        if answer_within is not None:
            allowed = "a number of seconds above 0"
            check_number("answer_within", answer_within, allowed, low=0, open_low=True)
        self._payload = _payload(algorithm, training)
        self._clients, self._count, self._timeout = clients, workers, answer_within
        self._workers: list[_Worker] = []
        self._killed_at_start = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """Yield the result of every participant, in the order given.

        Raises:
            RequestError, StoreError: as the same work in this process would.
            WorkError: workers cannot be started, or memory ran out.
        """
        while len(self._workers) < min(self._count, len(participants)):
            self._workers.append(_Worker(self._payload))
        done: dict[int, ClientResult] = {}
        sent = yielded = 0
        while yielded < len(participants):
            ahead = min(len(participants), yielded + 2 * self._count)
            while sent < ahead and (worker := self._free()) is not None:
                sent += self._send(worker, sent, participants[sent], current, done)
            if yielded in done:
                yield done.pop(yielded)
                yielded += 1
            else:
                self._receive(done)

    def _free(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.free), None)

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
        readable = wait_for([worker.connection for worker in self._workers], self._time_left())
        for worker in list(self._workers):
            if worker.connection in readable:
                self._read(worker, done)
            elif worker.position is not None and self._timed_out(worker):
                reason = f"it did not answer within {self._timeout:g} seconds"
                done[worker.position] = ClientResult(
                    worker.client, worker.seconds, None, Fault("late", reason)
                )
                self._replace(worker)

    def _time_left(self) -> float | None:
        """Seconds until the next client times out; None = none will."""
        spent = [worker.seconds for worker in self._workers if worker.position is not None]
        return max(0.0, self._timeout - max(spent)) if self._timeout and spent else None

    def _timed_out(self, worker: _Worker) -> bool:
        return self._timeout is not None and worker.seconds >= self._timeout

    def _read(self, worker: _Worker, done: dict[int, ClientResult]) -> None:
        try:
            received = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._exited(worker, done)
            return
        message = try_client(worker.client, lambda: unpack(received))
        if isinstance(message, Message) and message.kind == "ready":
            worker.ready = True
        elif isinstance(message, Message) and message.kind == "stop":
            raise message.content
        elif worker.position is not None:
            done[worker.position] = _result_in(worker.client, worker.seconds, message)
            worker.position = None

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


def _result_in(client: int, seconds: float, message: object) -> ClientResult:
    """The result in a message; a message that cannot be read is a fault."""
    if isinstance(message, Fault):
        fault = Fault("wrong", f"its result cannot be read, {message.reason}")
        return ClientResult(client, seconds, None, fault)
    assert isinstance(message, Message)
    if message.kind == "fault":
        return ClientResult(client, message.seconds, None, message.content)
    return ClientResult(client, message.seconds, message.content)


def _payload(algorithm: Algorithm, training: LocalTraining) -> bytes:
    try:
        # Pickled separately: the code must be allowed before the rest can be read.
        return pickle.dumps((allowed_code(), pickle.dumps((algorithm, training))))
    except Exception as error:
        raise InputError(
            f"This training cannot be sent to worker processes ({type(error).__name__}: {error}). "
            "Define the network's classes and functions at the top of a module (no lambda, no "
            "class within a function), or set workers = 0."
        ) from error
