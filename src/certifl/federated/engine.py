"""The rounds of a training in one process, with a committed checkpoint after each.

Every round begins from what the disk holds, also when nothing was interrupted, so a resumed
training and an uninterrupted one run the same code on the same bytes. Clients are worked on one
after the other with one model object, and the server takes their updates one at a time: memory
does not grow with the number of clients.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn

from certifl.errors import InputError, StoreMismatch
from certifl.federated.base import (
    Algorithm,
    ClientData,
    ClientState,
    ModelState,
    ServerState,
    Update,
    describe,
)
from certifl.federated.batches import Augmentation
from certifl.federated.client import LocalTraining
from certifl.models import fingerprint, state_of
from certifl.store.checkpoints import Checkpoints, PendingRound, StoredRound

__all__ = [
    "Clients",
    "Participation",
    "Progress",
    "ProgressCallback",
    "client_state",
    "deployed_model",
    "server_state",
    "total_rounds",
    "train",
]


class Clients(Protocol):
    """The clients' data by position: a list, or anything that loads client i when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ClientData: ...


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `done` of the `participants` of `round` (from 0) of `rounds`."""

    round: int
    rounds: int
    done: int
    participants: int
    client: int
    metrics: dict[str, float]


ProgressCallback = Callable[[Progress], None]
Participation = Callable[[int], Sequence[int]]
"""Which clients take part in a round; of the round alone, so that resuming repeats it."""


def train(
    algorithm: Algorithm,
    model: nn.Module,
    clients: Clients,
    training: LocalTraining,
    checkpoints: Checkpoints,
    *,
    progress: ProgressCallback | None = None,
    participation: Participation | None = None,
    start_from: Checkpoints | None = None,
) -> StoredRound:
    """Train together until the schedule's last round (and the algorithm's extra ones).

    Goes on from the last committed round in `checkpoints`, with bit-identical results on the same
    machine; a finished training returns at once. Results do not depend on the order in which
    clients are named or worked on.

    Args:
        algorithm: the way of training together.
        model: its weights are the initial model of all clients; it is not changed.
        clients: `clients[i]` is the data of client i.
        training: a client's half: schedule, augmentations, seed, device.
        checkpoints: where rounds are committed.
        progress: called after every client.
        participation: which clients take part in a round of the schedule; None = all. In an
            algorithm's extra rounds, which need no communication, all do.
        start_from: another training's checkpoints, whose last round to begin from (its algorithm
            may be the base of a `personalized` one); only looked at where `checkpoints` is empty.

    Returns:
        The final round; `server_state`, `client_state` and `deployed_model` read it.

    Raises:
        StoreMismatch: `checkpoints` or `start_from` belong to another training.
        TrainingDiverged: a client's training did; finished rounds are kept.
        StoreError: a checkpoint could not be written; finished rounds are kept.
    """
    identity = _identity(algorithm, model, clients, training)
    rounds = _Rounds(algorithm, clients, training, checkpoints, progress, participation, identity)
    checkpoints.clean()
    current = rounds.resumed() or rounds.begun(model, start_from)
    while current.number < rounds.total:
        current = rounds.next(current)
    return current


def total_rounds(algorithm: Algorithm, training: LocalTraining) -> int:
    """The schedule's rounds and the algorithm's extra ones."""
    return training.schedule.rounds + algorithm.extra_rounds


def server_state(stored: StoredRound) -> ServerState:
    """The server's state in a committed round."""
    return ServerState(stored.number, stored.server())


def client_state(stored: StoredRound, client: int) -> ClientState:
    """A client's state in a committed round."""
    return ClientState(stored.client(client))


def deployed_model(algorithm: Algorithm, stored: StoredRound, client: int) -> ModelState:
    """The model that client `client` uses at test time, as of a committed round."""
    return algorithm.deployed(server_state(stored), client_state(stored, client))


@dataclass(frozen=True)
class _Rounds:
    algorithm: Algorithm
    clients: Clients
    training: LocalTraining
    checkpoints: Checkpoints
    progress: ProgressCallback | None
    participation: Participation | None
    identity: dict[str, Any]

    @property
    def total(self) -> int:
        return total_rounds(self.algorithm, self.training)

    def resumed(self) -> StoredRound | None:
        latest = self.checkpoints.latest()
        if latest is not None and latest.identity != self.identity:
            raise StoreMismatch(
                f"{self.checkpoints.folder} holds another training "
                f"({_difference(latest.identity, self.identity)}). Ask for the "
                "training it holds, or choose another folder."
            )
        return latest

    def begun(self, model: nn.Module, start_from: Checkpoints | None) -> StoredRound:
        origin = None if start_from is None else start_from.latest()
        if origin is None:
            with self.checkpoints.begin(0) as pending:
                pending.put_server(self.algorithm.init(state_of(model)).parts)
                return pending.commit(identity=self.identity, history=[])
        self._check_origin(origin)
        with self.checkpoints.begin(origin.number) as pending:
            pending.carry_all(origin)
            return pending.commit(identity=self.identity, history=origin.history)

    def next(self, current: StoredRound) -> StoredRound:
        started = time.perf_counter()
        broadcast = server_state(current)
        participants = self._participants(current.number)
        rows: list[dict[str, Any]] = []
        with self.checkpoints.begin(current.number + 1) as pending:
            updates = self._updates(broadcast, participants, current, pending, rows)
            server = self.algorithm.aggregate(broadcast, updates)
            for _ in updates:  # an algorithm may stop listening; its clients still train
                pass
            for client in set(current.clients).difference(participants):
                pending.carry_client(client, current)
            pending.put_server(server.parts)
            entry = {
                "round": current.number,
                "seconds": time.perf_counter() - started,
                "participants": participants,
                "clients": rows,
            }
            history = [*current.history, entry]
            return pending.commit(identity=self.identity, history=history)

    def _updates(
        self,
        broadcast: ServerState,
        participants: list[int],
        current: StoredRound,
        pending: PendingRound,
        rows: list[dict[str, Any]],
    ) -> Iterator[Update]:
        """Work on the clients in order; each state is on disk before the update is handed on."""
        for done, client in enumerate(participants, start=1):
            started = time.perf_counter()
            update, state = self.algorithm.client_round(
                broadcast, client_state(current, client), self._data(client), self.training
            )
            pending.put_client(client, state.parts)
            seconds = time.perf_counter() - started
            rows.append({"client": client, "seconds": seconds, **update.metrics})
            if self.progress is not None:
                self.progress(
                    Progress(
                        current.number, self.total, done, len(participants), client, update.metrics
                    )
                )
            yield update

    def _data(self, client: int) -> ClientData:
        data = self.clients[client]
        if data.client != client:
            raise InputError(
                f"clients[{client}] is the data of client {data.client}: list clients in order."
            )
        return data

    def _participants(self, round: int) -> list[int]:
        everyone = range(len(self.clients))
        if self.participation is None or round >= self.training.schedule.rounds:
            return list(everyone)
        chosen = sorted(set(self.participation(round)))
        if unknown := [client for client in chosen if client not in everyone]:
            raise InputError(
                f"Round {round} asks for the clients {unknown}, but there are {len(everyone)} "
                "clients, counted from 0."
            )
        return chosen

    def _check_origin(self, origin: StoredRound) -> None:
        """Rounds of the same training, or of the one it wraps, may be gone on from."""
        own = self.identity
        base = {**own, "finetuning_augmentation": _printed(None)}
        base["algorithm"] = own["algorithm"].get("base", own["algorithm"])
        if origin.identity not in (own, base):
            raise StoreMismatch(
                f"{origin.path} cannot be gone on from: it is a round of another training "
                f"({_difference(origin.identity, base)})."
            )


def _identity(
    algorithm: Algorithm, model: nn.Module, clients: Clients, training: LocalTraining
) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from, as plain JSON."""
    tuning = training.finetuning_augmentation if algorithm.extra_rounds else None
    identity = {
        "algorithm": describe(algorithm),
        "initial_model": fingerprint(model),
        "clients": len(clients),
        "seed": training.seed,
        "schedule": asdict(training.schedule),
        "augmentation": _printed(training.augmentation),
        "finetuning_augmentation": _printed(tuning),
    }
    return json.loads(json.dumps(identity))


def _printed(augmentation: Augmentation | None) -> str:
    """An augmentation in words; one that prints its address is known by its class alone."""
    text = repr(augmentation)
    return type(augmentation).__qualname__ if " at 0x" in text else text


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in sorted(wanted) if found.get(key) != wanted[key]]
    return "; ".join(f"{key}: {found.get(key)} there, {wanted[key]} asked for" for key in keys)
