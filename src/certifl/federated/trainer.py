"""Federated training with a committed checkpoint after every round.

Every round starts from the checkpoint on disk, whether interrupted or not, so a resumed training
runs the same code on the same bytes as an uninterrupted one. Clients train one after the other
with one model object, or in a few processes; the server consumes their updates one at a time:
memory does not grow with the number of clients. A client that fails is left out of a round
(`federated.faults`).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import Any

from torch import nn

from certifl.errors import InputError, StoreMismatch
from certifl.federated.aggregation import Rule
from certifl.federated.algorithms import describe
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.batches import Augmentation, PerClient
from certifl.federated.local_training import LocalTraining, check_images
from certifl.federated.objectives import Augmented, Objective
from certifl.federated.privacy.accounting import Ledger
from certifl.federated.privacy.mechanisms import ClientLevel
from certifl.federated.privacy.planning import check_network
from certifl.federated.rounds import (
    Clients,
    Participation,
    RandomShare,
    RoundCallback,
    Rounds,
    Runner,
    SerialRunner,
)
from certifl.federated.workers import WorkerPool
from certifl.models import fingerprint, state_of
from certifl.registry import check_number
from certifl.runs.checkpoints import Checkpoints, StoredRound


def train(
    algorithm: Algorithm,
    model: nn.Module,
    clients: Clients,
    training: LocalTraining,
    checkpoints: Checkpoints,
    *,
    progress: RoundCallback | None = None,
    participation: Participation | None = None,
    start_from: Checkpoints | None = None,
    rule: Rule | None = None,
    min_clients: int | None = None,
    workers: int = 0,
    answer_within: float | None = None,
    ledger: Ledger | None = None,
    runner: Runner | None = None,
) -> StoredRound:
    """Train for the schedule's rounds and the algorithm's extra ones.

    Resumes from the last committed round in `checkpoints`, with bit-identical results on the same
    machine; a finished training returns at once. Results do not depend on `workers`, given the
    same number of torch threads (a worker has one).

    A client that fails is left out of the round with a warning. Its state is unchanged, and the
    history says why it was left out. Faults need not repeat when the round is: a client that was
    too slow may be in time after a resume.

    Args:
        algorithm: the federated algorithm.
        model: the initial model of all clients; it is not changed.
        clients: `clients[i]` is the data of client i.
        training: local training: schedule, augmentations, seed, device.
        checkpoints: where rounds are committed.
        progress: called after every client.
        participation: which clients take part in a round of the schedule; None = all. In an
            algorithm's extra rounds, which need no communication, all do.
        start_from: another training's checkpoints, to start from their last round (its algorithm
            may be the base of a `personalized` one); ignored unless `checkpoints` is empty.
        rule: robust or private aggregation, before the algorithm's own; None = none. A private
            rule draws the participants itself.
        min_clients: how many of a round's participants must not fail; None = half of them,
            rounded up.
        workers: worker processes that train clients; 0 = this process does.
        answer_within: timeout of a client in seconds; needs workers.
        ledger: adds the privacy spent to the history of each round; None = no privacy.
        runner: runs the client rounds elsewhere; `clients` is then only counted.

    Returns:
        The final round; `server_state`, `client_state` and `deployed_model` read it.

    Raises:
        RequestError: the request is wrong, for instance a client has no images.
        StoreMismatch: `checkpoints` or `start_from` belong to another training.
        TooFewClients: too many clients of a round failed; finished rounds are saved.
        TrainingDiverged: the server's state is no longer finite; finished rounds are saved.
        StoreError: a checkpoint could not be written; finished rounds are saved.
    """
    _check(len(clients), min_clients, workers, answer_within)
    if isinstance(clients, (list, tuple)):  # other sequences may load images on access
        check_images(training.network, {data.client: len(data) for data in clients})
    if isinstance(rule, ClientLevel):  # accounts for its own draw of participants
        if participation is not None:
            raise InputError(
                "Client-level privacy draws the participants itself: omit participation."
            )
        check_network(model, rule.kind)
        participation = rule.participants
    identity = _identity(algorithm, model, clients, training, participation, rule)
    current = checkpoints.latest()
    if current is not None and current.identity != identity:
        raise StoreMismatch(
            f"{checkpoints.folder} belongs to another training "
            f"({_difference(current.identity, identity)}). Choose another folder, or the settings "
            "of the stored training."
        )
    checkpoints.clean(None if current is None else current.number)
    if current is not None and current.number == total_rounds(algorithm, training):
        return current
    with contextlib.ExitStack() as stack:
        runner = SerialRunner(algorithm, training, clients) if runner is None else runner
        if workers:
            pool = WorkerPool(algorithm, training, clients, workers, answer_within)
            runner = stack.enter_context(pool)
        rounds = Rounds(
            algorithm,
            runner,
            checkpoints,
            clients=len(clients),
            scheduled=training.schedule.rounds,
            # Only shapes and dtypes are used: no memory.
            network={name: value.to("meta") for name, value in model.state_dict().items()},
            identity=identity,
            progress=progress,
            participation=participation,
            rule=rule,
            min_clients=min_clients,
            ledger=ledger,
        )
        if current is None:
            current = _first_round(checkpoints, identity, algorithm, model, start_from)
        while current.number < rounds.total:
            current = rounds.next(current)
    return current


def total_rounds(algorithm: Algorithm, training: LocalTraining) -> int:
    """The schedule's rounds and the algorithm's extra ones, which come last."""
    return training.schedule.rounds + algorithm.extra_rounds


def _check(
    clients: int, min_clients: int | None, workers: int, answer_within: float | None
) -> None:
    if min_clients is not None:
        allowed = f"a whole number from 1 to the number of clients, {clients}"
        check_number("min_clients", min_clients, allowed, low=1, high=clients, whole=True)
    check_number("workers", workers, "a whole number of at least 0", low=0, whole=True)
    if answer_within is not None and not workers:
        raise InputError("answer_within needs workers: a client in this process has no timeout.")


def _first_round(
    checkpoints: Checkpoints,
    identity: dict[str, Any],
    algorithm: Algorithm,
    model: nn.Module,
    start_from: Checkpoints | None,
) -> StoredRound:
    origin = None if start_from is None else start_from.latest()
    if origin is None:
        with checkpoints.begin(0) as pending:
            pending.put_server(algorithm.init(state_of(model)).parts)
            return pending.commit(identity=identity, history=[])
    # Only rounds of the same training, or of the one it wraps, may be resumed.
    base = {**identity, "finetuning_augmentation": _printed(None)}
    base["algorithm"] = identity["algorithm"].get("base", identity["algorithm"])
    if origin.identity not in (identity, base):
        raise StoreMismatch(
            f"{origin.path} cannot be resumed: it is a round of another training "
            f"({_difference(origin.identity, base)})."
        )
    with checkpoints.begin(origin.number) as pending:
        pending.carry_all(origin)
        return pending.commit(identity=identity, history=origin.history)


def _identity(
    algorithm: Algorithm,
    model: nn.Module,
    clients: Clients,
    training: LocalTraining,
    participation: Participation | None,
    rule: Rule | None,
) -> dict[str, Any]:
    """What a checkpoint must match to be resumed, as plain JSON.

    Defaults are left out, so that checkpoints written before a setting existed still match.
    """
    tuned = "base" in describe(algorithm)  # other extra rounds have the federated augmentation
    tuning = training.finetuning_augmentation if tuned else None
    identity = {
        "algorithm": describe(algorithm),
        "initial_model": fingerprint(model),
        "clients": len(clients),
        "seed": training.seed,
        "schedule": asdict(training.schedule),
        "augmentation": _printed(training.augmentation),
        "finetuning_augmentation": _printed(tuning),
    }
    if training.objective != Augmented():
        identity["objective"] = _printed(training.objective)
    if training.precision != "float32":
        identity["precision"] = training.precision
    if training.memory_format != "auto":
        identity["memory_format"] = training.memory_format
    if isinstance(participation, RandomShare) and (
        participation.share < 1 or participation.clients < len(clients)
    ):
        identity["participation"] = asdict(participation)
    if training.privacy is not None:
        identity["privacy"] = training.privacy.described()
    if isinstance(rule, ClientLevel):
        identity["privacy"] = rule.described()
    elif rule is not None:
        identity["aggregation"] = repr(rule)
    return json.loads(json.dumps(identity))


def _printed(augmentation: Augmentation | PerClient | Objective | None) -> str:
    """The repr of an augmentation; the class name where the repr is an address."""
    text = repr(augmentation)
    return type(augmentation).__qualname__ if " at 0x" in text else text


def _difference(stored: dict[str, Any], requested: dict[str, Any]) -> str:
    pairs = {key: (stored.get(key), requested.get(key)) for key in sorted({**stored, **requested})}
    return "; ".join(
        f"{key}: {one} stored, {other} requested"
        for key, (one, other) in pairs.items()
        if one != other
    )
