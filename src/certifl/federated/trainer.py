"""Training together on one machine, with a committed checkpoint after every round.

Every round begins from what the disk holds, also when nothing was interrupted, so a resumed
training and an uninterrupted one run the same code on the same bytes. Clients are worked on one
after the other with one model object, or by a few processes; the server takes their updates one at
a time: memory does not grow with the number of clients. A client that fails is left out of a round
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
from certifl.federated.objectives import Augmented, Objective
from certifl.federated.privacy.accounting import Ledger
from certifl.federated.privacy.client_level import ClientLevel
from certifl.federated.privacy.compatibility import check_network
from certifl.federated.rounds import (
    Participation,
    ProgressCallback,
    RandomShare,
    Rounds,
    Runner,
)
from certifl.federated.training.batches import Augmentation, PerClient
from certifl.federated.training.local_training import LocalTraining, check_images
from certifl.federated.worker import Clients, Serial
from certifl.federated.worker_pool import Pool
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
    progress: ProgressCallback | None = None,
    participation: Participation | None = None,
    start_from: Checkpoints | None = None,
    rule: Rule | None = None,
    min_clients: int | None = None,
    workers: int = 0,
    answer_within: float | None = None,
    ledger: Ledger | None = None,
    runner: Runner | None = None,
) -> StoredRound:
    """Train together until the schedule's last round (and the algorithm's extra ones).

    Goes on from the last committed round in `checkpoints`, with bit-identical results on the same
    machine; a finished training returns at once. Results do not depend on the order in which
    clients are named or worked on, nor on `workers`, given the same number of torch threads: a
    worker has one.

    A client that fails is left out of the round with a warning, its own state stays what it was,
    and the history says who was left out and why. Such a round is repeated on a resume only as far
    as the fault is; a client that was too slow may be in time then.

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
        rule: robust or private aggregation, before the algorithm's own; None = none. A private
            one says who takes part.
        min_clients: how many of a round's participants must not fail; None = half of them,
            rounded up.
        workers: processes that work on clients beside this one; 0 = this one does.
        answer_within: seconds after which a client is given up on; needs workers.
        ledger: writes what privacy was spent into the history of each round; None = nothing.
        runner: works on the clients instead, wherever they are; `clients` then only counts them.

    Returns:
        The final round; `server_state`, `client_state` and `deployed_model` read it.

    Raises:
        RequestError: what was asked for cannot be done, for instance a client without images.
        StoreMismatch: `checkpoints` or `start_from` belong to another training.
        TooFewClients: too many clients of a round failed; finished rounds are kept.
        TrainingDiverged: the server's state is no longer finite; finished rounds are kept.
        StoreError: a checkpoint could not be written; finished rounds are kept.
    """
    _check(len(clients), min_clients, workers, answer_within)
    if isinstance(clients, (list, tuple)):  # others may read a client's images when asked for it
        check_images(training.network, {data.client: len(data) for data in clients})
    participation = _drawn(rule, participation, model)
    identity = _identity(algorithm, model, clients, training, participation, rule)
    current = _resumed(checkpoints, identity)
    checkpoints.clean(None if current is None else current.number)
    if current is not None and current.number == total_rounds(algorithm, training):
        return current
    with contextlib.ExitStack() as stack:
        runner = Serial(algorithm, training, clients) if runner is None else runner
        if workers:
            pool = Pool(algorithm, training, clients, workers, answer_within)
            runner = stack.enter_context(pool)
        rounds = Rounds(
            algorithm,
            runner,
            checkpoints,
            clients=len(clients),
            scheduled=training.schedule.rounds,
            # Shapes and types are all that is looked at: they need no memory.
            network={name: value.to("meta") for name, value in model.state_dict().items()},
            identity=identity,
            progress=progress,
            participation=participation,
            rule=rule,
            min_clients=min_clients,
            ledger=ledger,
        )
        if current is None:
            current = _begun(checkpoints, identity, algorithm, model, start_from)
        while current.number < rounds.total:
            current = rounds.next(current)
    return current


def total_rounds(algorithm: Algorithm, training: LocalTraining) -> int:
    """The schedule's rounds and the algorithm's extra ones.

    Args:
        algorithm: its `extra_rounds` come last, without communication.
        training: holds the schedule.
    """
    return training.schedule.rounds + algorithm.extra_rounds


def _check(
    clients: int, min_clients: int | None, workers: int, answer_within: float | None
) -> None:
    if min_clients is not None:
        allowed = f"a whole number from 1 to the number of clients, {clients}"
        check_number("min_clients", min_clients, allowed, low=1, high=clients, whole=True)
    check_number("workers", workers, "a whole number from 0", low=0, whole=True)
    if answer_within is not None and not workers:
        raise InputError(
            "answer_within needs workers: a client in this very process cannot be given up on."
        )


def _drawn(
    rule: Rule | None, participation: Participation | None, model: nn.Module
) -> Participation | None:
    """Who takes part; what a private rule accounts for is a draw of its own."""
    if not isinstance(rule, ClientLevel):
        return participation
    if participation is not None:
        raise InputError("Client-level privacy draws the participants itself: give no others.")
    check_network(model, rule.kind)
    return rule.participants


def _resumed(checkpoints: Checkpoints, identity: dict[str, Any]) -> StoredRound | None:
    latest = checkpoints.latest()
    if latest is not None and latest.identity != identity:
        raise StoreMismatch(
            f"{checkpoints.folder} holds another training "
            f"({_difference(latest.identity, identity)}). Ask for the "
            "training it holds, or choose another folder."
        )
    return latest


def _begun(
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
    _check_origin(origin, identity)
    with checkpoints.begin(origin.number) as pending:
        pending.carry_all(origin)
        return pending.commit(identity=identity, history=origin.history)


def _check_origin(origin: StoredRound, own: dict[str, Any]) -> None:
    """Rounds of the same training, or of the one it wraps, may be gone on from."""
    base = {**own, "finetuning_augmentation": _printed(None)}
    base["algorithm"] = own["algorithm"].get("base", own["algorithm"])
    if origin.identity not in (own, base):
        raise StoreMismatch(
            f"{origin.path} cannot be gone on from: it is a round of another training "
            f"({_difference(origin.identity, base)})."
        )


def _identity(
    algorithm: Algorithm,
    model: nn.Module,
    clients: Clients,
    training: LocalTraining,
    participation: Participation | None,
    rule: Rule | None,
) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from, as plain JSON.

    What has its default is left out, so that checkpoints written before it existed still agree.
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
    if isinstance(participation, RandomShare) and participation.share < 1:
        identity["participation"] = asdict(participation)
    if training.privacy is not None:
        identity["privacy"] = training.privacy.described()
    if isinstance(rule, ClientLevel):
        identity["privacy"] = rule.described()
    elif rule is not None:
        identity["aggregation"] = repr(rule)
    return json.loads(json.dumps(identity))


def _printed(augmentation: Augmentation | PerClient | Objective | None) -> str:
    """An augmentation in words; one that prints its address is known by its class alone."""
    text = repr(augmentation)
    return type(augmentation).__qualname__ if " at 0x" in text else text


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = sorted(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
    return "; ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} asked for" for key in keys)
