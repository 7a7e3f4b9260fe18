"""Clients worked on by processes beside this one, which are kept for the whole training.

Answers are handed on in client order, so a round is the same bits as in one process, given the
same number of torch threads: a worker always has one. Workers only read; whatever comes back is
written by the process that asked, so that killing any of them harms nothing on disk.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
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
_LAST_WORDS = 5.0  # seconds in which a process whose line is closed has its exit code
_STARTS_KILLED = 3  # processes killed while they start, before that is an error


class WorkerPool:
    """Processes with a copy of algorithm and trainer each, started when first needed.

    A worker that ends by itself, or does not answer in time, costs its client the round and is
    replaced. Answers that come before their turn wait, fewer than twice the workers.

    Args:
        algorithm, training, clients: as in `train`; the first two are pickled once.
        workers: how many processes, from 1.
        answer_within: seconds after which a client is given up on; None = never.

    Raises:
        SpecError: a number that is not allowed.
        InputError: algorithm or network cannot be sent to another process.
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
        self._clients, self._count, self._patience = clients, workers, answer_within
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
        """An answer from every participant, in the order given.

        Raises:
            RequestError, StoreError: as the same work in this process would.
            WorkError: workers cannot be started, or memory ran out.
        """
        while len(self._workers) < min(self._count, len(participants)):
            self._workers.append(_Worker(self._payload))
        done: dict[int, ClientResult] = {}
        asked = given = 0
        while given < len(participants):
            ahead = min(len(participants), given + 2 * self._count)
            while asked < ahead and (worker := self._free()) is not None:
                asked += self._ask(worker, asked, participants[asked], current, done)
            if given in done:
                yield done.pop(given)
                given += 1
            else:
                self._listen(done)

    def _free(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.free), None)

    def _ask(
        self,
        worker: _Worker,
        place: int,
        client: int,
        current: StoredRound,
        done: dict[int, ClientResult],
    ) -> bool:
        """Hand a client to a worker; False if that worker turns out to have ended."""
        data = try_client(client, lambda: data_of(self._clients, client))
        if isinstance(data, Fault):
            done[place] = ClientResult(client, 0.0, None, data)
            return True
        if worker.ask(place, client, pack((current.only(client), client, data))):
            return True
        self._replace(worker)
        return False

    def _listen(self, done: dict[int, ClientResult]) -> None:
        """Wait until a worker says something, ends, or has had its time."""
        speaking = connection.wait([worker.line for worker in self._workers], self._time_left())
        for worker in list(self._workers):
            if worker.line in speaking:
                self._hear(worker, done)
            elif worker.place is not None and self._late(worker):
                reason = f"it did not answer within {self._patience:g} seconds"
                done[worker.place] = ClientResult(
                    worker.client, worker.seconds, None, Fault("late", reason)
                )
                self._replace(worker)

    def _time_left(self) -> float | None:
        """Seconds until the next client is given up on; None = nobody will be."""
        spent = [worker.seconds for worker in self._workers if worker.place is not None]
        return max(0.0, self._patience - max(spent)) if self._patience and spent else None

    def _late(self, worker: _Worker) -> bool:
        return self._patience is not None and worker.seconds >= self._patience

    def _hear(self, worker: _Worker, done: dict[int, ClientResult]) -> None:
        try:
            said = worker.line.recv_bytes()
        except (EOFError, OSError):
            self._ended(worker, done)
            return
        message = try_client(worker.client, lambda: unpack(said))
        if isinstance(message, Message) and message.kind == "ready":
            worker.ready = True
        elif isinstance(message, Message) and message.kind == "stop":
            raise message.content
        elif worker.place is not None:
            done[worker.place] = _read(worker.client, worker.seconds, message)
            worker.place = None

    def _ended(self, worker: _Worker, done: dict[int, ClientResult]) -> None:
        """A process that ended by itself: its client's fault, if it was at one."""
        place, client, seconds = worker.place, worker.client, worker.seconds
        if not worker.ready:
            code = worker.end(_LAST_WORDS)
            self._workers.remove(worker)
            if code is not None and code < 0 and self._killed_at_start < _STARTS_KILLED:
                self._killed_at_start += 1  # by a signal: the next one may live
                self._workers.append(_Worker(self._payload))
                return
            raise WorkError(
                f"A worker process ended while it started (exit code {code}); what it said "
                "stands above. A script that trains with workers must do so under "
                "`if __name__ == '__main__':`. Without workers, one process does all."
            )
        code = self._replace(worker, _LAST_WORDS)
        if place is not None:
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            fault = Fault("ended", f"its process ended ({how})")
            done[place] = ClientResult(client, seconds, None, fault)

    def _replace(self, worker: _Worker, wait: float = 0.0) -> int | None:
        """End a worker and start another in its place; the exit code if it had ended before."""
        code = worker.end(wait)
        self._workers[self._workers.index(worker)] = _Worker(self._payload)
        return code


class _Worker:
    """One process, the line to it, and which client it is at."""

    def __init__(self, payload: bytes) -> None:
        # A clean process that has torch loaded forks them: a worker is replaced in no time, and
        # nothing of this process (its threads, a GPU in use) is inherited.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, payload), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = False
        self.place: int | None = None
        self.client = -1
        self._asked = 0.0

    @property
    def free(self) -> bool:
        return self.ready and self.place is None

    @property
    def seconds(self) -> float:
        """Since it was asked."""
        return time.monotonic() - self._asked

    def ask(self, place: int, client: int, question: bytes) -> bool:
        """Hand a client over; the clock starts. False if the process has ended."""
        try:
            self.line.send_bytes(question)
        except OSError:
            return False
        self.place, self.client, self._asked = place, client, time.monotonic()
        return True

    def end(self, wait: float = 0.0) -> int | None:
        """Stop the process, whatever it is at; its exit code if it ends by itself until then."""
        self._process.join(wait)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._process.close()
        self.line.close()
        return code


def _read(client: int, seconds: float, message: object) -> ClientResult:
    """The answer in a message; one that cannot be read is a fault."""
    if isinstance(message, Fault):
        fault = Fault("wrong", f"its answer cannot be read, {message.reason}")
        return ClientResult(client, seconds, None, fault)
    assert isinstance(message, Message)
    if message.kind == "fault":
        return ClientResult(client, message.seconds, None, message.content)
    return ClientResult(client, message.seconds, message.content)


def _payload(algorithm: Algorithm, training: LocalTraining) -> bytes:
    try:
        # Apart, because the code must be allowed before the rest can be read.
        return pickle.dumps((allowed_code(), pickle.dumps((algorithm, training))))
    except Exception as error:
        raise InputError(
            f"This training cannot be sent to worker processes ({type(error).__name__}: {error}). "
            "Define the network's classes and functions at the top of a module (no lambda, no "
            "class within a function), or train without workers."
        ) from error
