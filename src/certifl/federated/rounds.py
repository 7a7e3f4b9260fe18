"""One round after the other: broadcast, clients, rule, aggregation, commit."""

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
from certifl.federated.faults import Answer, Fault, Inspection, advice, needed, not_finite
from certifl.federated.privacy.accounting import Ledger
from certifl.federated.states import ClientState, ModelState, ServerState, Update
from certifl.registry import check_number
from certifl.runs.checkpoints import Checkpoints, PendingRound, StoredRound

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `done` of the `participants` of `round` (from 0) of `rounds`.

    Attributes:
        round: the one that is worked on.
        rounds: of the whole training, with the algorithm's extra ones.
        done: clients of this round that have answered.
        participants: clients that were asked in this round.
        client: the one that answered last.
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


ProgressCallback = Callable[[Progress], None]


class Runner(Protocol):
    """Whoever works on the clients of a round, here or in other processes."""

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[Answer]:
        """An answer from every participant, in the order given, one at a time."""
        ...


@dataclass(frozen=True)
class Rounds:
    """Everything that the rounds of one training have in common.

    Attributes:
        algorithm, checkpoints, progress, participation, rule, min_clients, ledger: as in `train`.
        runner: works on the clients.
        clients: how many there are.
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
    progress: ProgressCallback | None = None
    participation: Participation | None = None
    rule: Rule | None = None
    min_clients: int | None = None
    ledger: Ledger | None = None

    @property
    def total(self) -> int:
        """The schedule's rounds and the algorithm's extra ones."""
        return self.scheduled + self.algorithm.extra_rounds

    def next(self, current: StoredRound) -> StoredRound:
        """The round after a committed one, committed."""
        started = time.perf_counter()
        broadcast, participants = server_state(current), self.participants(current.number)
        rule = self.rule if current.number < self.scheduled else None
        if rule is not None:
            rule.check(len(participants))
        with self.checkpoints.begin(current.number + 1) as pending:
            gathered = _Gathered(
                self,
                current.number,
                participants,
                pending,
                Inspection(broadcast, self.network),
                needed(len(participants), self.min_clients),
            )
            updates = gathered.updates(self.runner.work(current, participants))
            heard = updates if rule is None else rule(broadcast, updates)
            server = self.algorithm.aggregate(broadcast, heard)
            for _ in updates:  # an algorithm may stop listening; its clients still train
                pass
            del broadcast, heard  # the new state is enough from here on
            if (sick := not_finite(server.parts)) is not None:
                raise TrainingDiverged(None, current.number, f"{sick} is not finite")
            # Whoever was left out keeps what it had.
            for client in set(current.clients).difference(gathered.trained):
                pending.carry_client(client, current)
            pending.put_server(server.parts)
            entry = {
                "round": current.number,
                "seconds": time.perf_counter() - started,
                "participants": participants,
                **gathered.record(),
            }
            if self.ledger is not None:
                entry = self.ledger(current.history, entry)
            return pending.commit(identity=self.identity, history=[*current.history, entry])

    def participants(self, round: int) -> list[int]:
        """Who takes part, in client order; everyone in the algorithm's extra rounds.

        Raises:
            InputError: nobody, or clients that do not exist.
        """
        everyone = range(self.clients)
        if self.participation is None or round >= self.scheduled:
            return list(everyone)
        chosen = sorted(set(self.participation(round)))
        if unknown := [client for client in chosen if client not in everyone]:
            raise InputError(
                f"Round {round} asks for the clients {unknown}, but there are {len(everyone)} "
                "clients, counted from 0."
            )
        return chosen


@dataclass
class _Gathered:
    """What comes back from the clients of one round."""

    rounds: Rounds
    round: int
    participants: list[int]
    pending: PendingRound
    inspection: Inspection
    needed: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[int, Fault] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        return [row["client"] for row in self.rows]

    def updates(self, answers: Iterator[Answer]) -> Iterator[Update]:
        """Updates of clients that did not fail; each state is on disk before it is handed on."""
        for answer in answers:
            fault = answer.fault or self.inspection.problem(answer.client, answer.result)
            if fault is not None:
                self._leave_out(answer.client, fault)
                continue
            update, state = _whole(answer.result)
            self.pending.put_client(answer.client, state.parts)
            # Who it was and how long it took come last: no metric can write them.
            row = {**update.metrics, "client": answer.client, "seconds": answer.seconds}
            self.rows.append(row)
            self._tell(answer.client, update.metrics, None)
            yield update
            del answer, update, state  # or they would be held while the next one arrives

    def record(self) -> dict[str, Any]:
        """The round's part of the history: a row for each client that trained, and who did not."""
        if not self.faults:
            return {"clients": self.rows}
        left_out = [
            {"client": client, "reason": fault.reason} for client, fault in self.faults.items()
        ]
        return {"clients": self.rows, "left_out": left_out}

    def _leave_out(self, client: int, fault: Fault) -> None:
        self.faults[client] = fault
        _log.warning("Client %d is left out of round %d: %s.", client, self.round, fault.reason)
        if len(self.participants) - len(self.faults) < self.needed:
            raise TooFewClients(
                self.round,
                {client: fault.reason for client, fault in self.faults.items()},
                len(self.participants),
                self.needed,
                advice(self.faults.values()),
            ) from fault.error
        self._tell(client, {}, fault.reason)

    def _tell(self, client: int, metrics: dict[str, float], left_out: str | None) -> None:
        if self.rounds.progress is not None:
            done, all_ = len(self.rows) + len(self.faults), len(self.participants)
            now = Progress(self.round, self.rounds.total, done, all_, client, metrics, left_out)
            self.rounds.progress(now)


def _whole(result: object) -> tuple[Update, ClientState]:
    """The result of an answer that was inspected."""
    assert isinstance(result, tuple)
    return result[0], result[1]


# States as a committed round holds them.


def server_state(stored: StoredRound) -> ServerState:
    """The server's state in a committed round."""
    return ServerState(stored.number, stored.server())


def client_state(stored: StoredRound, client: int) -> ClientState:
    """A client's state in a committed round.

    Args:
        stored: the round, as `Checkpoints.latest` gives it.
        client: its number, from 0.

    Raises:
        StoreError: its file is damaged.
    """
    return ClientState(stored.client(client))


def deployed_model(algorithm: Algorithm, stored: StoredRound, client: int) -> ModelState:
    """The model that client `client` uses at test time, as of a committed round.

    Args:
        algorithm: the one that trained it.
        stored: usually the last round.
        client: its number, from 0.

    Raises:
        StoreError: a file of the round is damaged.
    """
    return algorithm.deployed(server_state(stored), client_state(stored, client))


# Who takes part in a round: everyone, or a random share that a resumed training repeats.


Participation = Callable[[int], Sequence[int]]
"""Which clients take part in a round; of the round alone, so that resuming repeats it."""


@dataclass(frozen=True)
class RandomShare:
    """max(1, round(share n)) of the n clients, chosen anew in every round, without replacement.

    The choice is a function of (seed, round) alone.

    Attributes:
        share: in (0, 1]; 1 = everyone.
        clients: n, how many there are.
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
        """How many clients take part in a round."""
        return max(1, round(self.share * self.clients))

    def __call__(self, round: int) -> list[int]:
        """The participants of a round, in client order."""
        drawn = streams.numpy_generator(self.seed, "participation", round)
        return sorted(drawn.choice(self.clients, self.size, replace=False).tolist())
