"""The rounds of a training: broadcast, client rounds, aggregation, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from certifl import rng as streams
from certifl.errors import InputError, TooFewClients, TrainingDiverged
from certifl.federated.aggregation import Rule
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.faults import (
    ClientResult,
    Fault,
    ResultChecker,
    not_finite,
    required_clients,
    suggestions,
    try_client,
)
from certifl.federated.local_training import LocalTraining
from certifl.federated.privacy.accounting import Ledger
from certifl.federated.schedule import participants
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.registry import check_number
from certifl.runs.checkpoints import Checkpoints, PendingRound, StoredRound

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a training: `done` of `participants` clients in `round` (from 0) of `rounds`.

    Attributes:
        round: the current one.
        rounds: of the whole training, with the algorithm's extra ones.
        done: clients that have finished this round.
        participants: clients selected for this round.
        client: the client that finished last.
        metrics: of this client; empty where it was left out.
        left_out: why this client was left out of the round; None = it was not.
    """

    round: int
    rounds: int
    done: int
    participants: int
    client: int
    metrics: dict[str, float]
    left_out: str | None = None


RoundCallback = Callable[[Progress], None]


class Runner(Protocol):
    """Runs the client rounds: in this process, in others, or over a network."""

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """Yield the result of every participant, in the order given, one at a time."""
        ...


class Clients(Protocol):
    """The clients' data by position: a list, or a sequence that loads client i on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ClientData: ...


def data_of(clients: Clients, client: int) -> ClientData:
    """The data of one client; InputError where it is another client's."""
    data = clients[client]
    if data.client != client:
        raise InputError(
            f"clients[{client}] is the data of client {data.client}: list clients in order."
        )
    return data


def run_client(
    algorithm: Algorithm,
    training: LocalTraining,
    broadcast: ServerState,
    current: StoredRound,
    client: int,
    clients: Clients,
) -> ClientResult:
    """One client's round and its duration, or its fault."""
    started = time.perf_counter()

    def trained() -> object:
        state, data = client_state(current, client), data_of(clients, client)
        return algorithm.client_round(broadcast, state, data, training)

    result = try_client(client, trained)
    seconds = time.perf_counter() - started
    if isinstance(result, Fault):
        return ClientResult(client, seconds, None, result)
    return ClientResult(client, seconds, result)


@dataclass(frozen=True)
class SerialRunner:
    """Trains one client after the other in this process, with one model object."""

    algorithm: Algorithm
    training: LocalTraining
    clients: Clients

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """Yield the result of every participant, in the order given."""
        broadcast = server_state(current)
        for client in participants:
            yield run_client(
                self.algorithm, self.training, broadcast, current, client, self.clients
            )


@dataclass(frozen=True)
class Rounds:
    """What the rounds of one training have in common.

    Attributes:
        algorithm, checkpoints, progress, participation, rule, min_clients, ledger: as in `train`.
        runner: runs the client rounds.
        clients: number of clients.
        scheduled: rounds of the schedule; the algorithm's extra ones come after them.
        network: a state of the network that is trained, for its keys, shapes and dtypes.
        identity: what is stored with every round.
    """

    algorithm: Algorithm
    runner: Runner
    checkpoints: Checkpoints
    clients: int
    scheduled: int
    network: ModelState
    identity: dict[str, Any]
    progress: RoundCallback | None = None
    participation: Participation | None = None
    rule: Rule | None = None
    min_clients: int | None = None
    ledger: Ledger | None = None

    @property
    def total(self) -> int:
        """The schedule's rounds and the algorithm's extra ones."""
        return self.scheduled + self.algorithm.extra_rounds

    def next(self, current: StoredRound) -> StoredRound:
        """Run and commit the round after a committed one."""
        started = time.perf_counter()
        broadcast, participants = server_state(current), self.participants(current.number)
        rule = self.rule if current.number < self.scheduled else None
        if rule is not None:
            rule.check(len(participants))
        with self.checkpoints.begin(current.number + 1) as pending:
            collected = _RoundResults(
                self,
                current.number,
                participants,
                pending,
                ResultChecker(broadcast, self.network),
                required_clients(len(participants), self.min_clients),
            )
            updates = collected.updates(self.runner.work(current, participants))
            filtered = updates if rule is None else rule(broadcast, updates)
            server = self.algorithm.aggregate(broadcast, filtered)
            for _ in updates:  # an algorithm may ignore the rest; its clients still train
                pass
            del broadcast, filtered  # frees their memory
            if (bad := not_finite(server.parts)) is not None:
                raise TrainingDiverged(None, current.number, f"{bad} is not finite")
            # Clients that did not train keep their states.
            trained = [row["client"] for row in collected.rows]
            for client in set(current.clients).difference(trained):
                pending.carry_client(client, current)
            pending.put_server(server.parts)
            entry = {
                "round": current.number,
                "seconds": time.perf_counter() - started,
                "participants": participants,
                **collected.record(),
            }
            if self.ledger is not None:
                entry = self.ledger(current.history, entry)
            return pending.commit(identity=self.identity, history=[*current.history, entry])

    def participants(self, round: int) -> list[int]:
        """Participants in order, all in extra rounds; InputError for unknown clients."""
        everyone = range(self.clients)
        if self.participation is None or round >= self.scheduled:
            return list(everyone)
        chosen = sorted(set(self.participation(round)))
        if unknown := [client for client in chosen if client not in everyone]:
            raise InputError(
                f"The participants of round {round} include clients {unknown}, but there are only "
                f"{len(everyone)} clients, counted from 0."
            )
        return chosen


@dataclass
class _RoundResults:
    rounds: Rounds
    round: int
    participants: list[int]
    pending: PendingRound
    checker: ResultChecker
    required: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[int, Fault] = field(default_factory=dict)

    def updates(self, results: Iterator[ClientResult]) -> Iterator[Update]:
        """Yield the updates of clients that did not fail, after their states are on disk."""
        for result in results:
            fault = result.fault or self.checker.fault(result.client, result.content)
            if fault is not None:
                self._leave_out(result.client, fault)
                continue
            assert isinstance(result.content, tuple)  # update and client state, as checked
            update, state = result.content
            self.pending.put_client(result.client, state.parts)
            # Client and seconds come last, so that no metric can overwrite them.
            row = {**update.metrics, "client": result.client, "seconds": result.seconds}
            self.rows.append(row)
            self._report(result.client, update.metrics, None)
            yield update
            del result, update, state  # frees them before the next one arrives

    def record(self) -> dict[str, Any]:
        """The round's history: a row for each client that trained, and reasons for the others."""
        left_out = [{"client": c, "reason": fault.reason} for c, fault in self.faults.items()]
        return {"clients": self.rows, **({"left_out": left_out} if left_out else {})}

    def _leave_out(self, client: int, fault: Fault) -> None:
        self.faults[client] = fault
        _log.warning("Client %d is left out of round %d: %s.", client, self.round, fault.reason)
        if len(self.participants) - len(self.faults) < self.required:
            raise TooFewClients(
                self.round,
                {client: fault.reason for client, fault in self.faults.items()},
                len(self.participants),
                self.required,
                suggestions(self.faults.values()),
            ) from fault.error
        self._report(client, {}, fault.reason)

    def _report(self, client: int, metrics: dict[str, float], left_out: str | None) -> None:
        if self.rounds.progress is not None:
            done, all_ = len(self.rows) + len(self.faults), len(self.participants)
            now = Progress(self.round, self.rounds.total, done, all_, client, metrics, left_out)
            self.rounds.progress(now)


# States in a committed round.


def server_state(stored: StoredRound) -> ServerState:
    """The server's state in a committed round."""
    return ServerState(stored.number, stored.server())


def client_state(stored: StoredRound, client: int) -> ClientState:
    """A client's state in a committed round; StoreError where its file is damaged."""
    return ClientState(stored.client(client))


def deployed_model(algorithm: Algorithm, stored: StoredRound, client: int) -> ModelState:
    """The model that a client uses at test time, as of a round; StoreError if damaged."""
    return algorithm.deployed(server_state(stored), client_state(stored, client))


# Participation: all clients, or a random share that a resumed training repeats.


Participation = Callable[[int], Sequence[int]]
"""Participants of a round, as a function of the round alone, so that resuming repeats it."""


@dataclass(frozen=True)
class RandomShare:
    """max(1, round(share n)) of the n clients, drawn in every round without replacement.

    The draw is a function of (seed, round) alone.

    Attributes:
        share: in (0, 1]; 1 = all clients.
        clients: n, the number of clients.
        seed: the study's seed.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data, 2017, Algorithm 1 (the fraction C).
    """

    share: float
    clients: int
    seed: int

    def __post_init__(self) -> None:
        allowed = "a number above 0, up to 1"
        check_number("participation", self.share, allowed, low=0, high=1, open_low=True)

    @property
    def size(self) -> int:
        """Number of participants of a round."""
        return participants(self.share, self.clients)

    def __call__(self, round: int) -> list[int]:
        """The participants of a round, in client order."""
        drawn = streams.numpy_generator(self.seed, "participation", round)
        return sorted(drawn.choice(self.clients, self.size, replace=False).tolist())
