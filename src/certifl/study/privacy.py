"""The privacy of a run: its key, its mechanism, and its entry in the run's manifest."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from certifl.errors import InputError, StoreError
from certifl.federated.privacy import (
    ACCOUNTANT,
    ClientLedger,
    ClientLevel,
    ExampleLedger,
    ExampleLevel,
    check_network,
    derived_key,
    epsilon,
    finetuning_epochs,
    plan_clients,
    plan_examples,
    sends_nothing,
)
from certifl.runs.atomic import write_secret
from certifl.safe_io import SPEC_BYTES, read_bytes
from certifl.spec import Spec

KEY_FILE = "privacy.key"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Protection:
    """Mechanism and ledger of a private training; empty where the spec has no privacy."""

    example: ExampleLevel | None = None
    client: ClientLevel | None = None
    ledger: ExampleLedger | ClientLedger | None = None


def protection(spec: Spec, model: nn.Module, sizes: Sequence[int], key: bytes) -> Protection:
    """Mechanism and ledger of a spec.

    Args:
        spec: of the run.
        model: the network that is trained.
        sizes: number of training images of each client.
        key: of the training, `training_key`; any key to check whether the request is possible.

    Raises:
        ModelError: the network cannot be trained with privacy.
        SpecError: the target is impossible, or opacus is not installed.
    """
    privacy = spec.privacy
    if privacy.kind == "none":
        return Protection()
    check_network(model, privacy.kind)
    if privacy.kind == "example":
        example, ledger = plan_examples(
            privacy.budget(), spec.algorithm, spec.training.schedule(), sizes, key
        )
        return Protection(example=example, ledger=ledger)
    client, ledger = plan_clients(
        privacy.budget(),
        spec.algorithm,
        spec.training.rounds,
        spec.clients.seen,
        spec.clients.participation,
        key,
    )
    return Protection(client=client, ledger=ledger)


def private_label(spec: Spec) -> str:
    """A label of the privacy: "ε = 8 per image", "noise 1.2 per client".

    A target is that of the schedule's rounds, so the label says where more was spent, or where
    models are certified that it does not cover.
    """
    privacy = spec.privacy
    of = {"example": "image", "client": "client"}[privacy.kind]
    if privacy.target_epsilon is not None:
        label = f"ε = {privacy.target_epsilon:g} per {of}"
        if noiseless(spec):
            return f"{label}, own models without"
        return f"{label} before fine-tuning" if finetuning_epochs(spec.algorithm) else label
    return f"noise {privacy.noise_multiplier:g} per {of}"


def training_key(spec: Spec, folder: Path) -> bytes:
    """The key of a training's noise and samples, another one for every training.

    A personalized training has the key of its base: their common rounds are the same.

    Args:
        spec: of the run.
        folder: the run folder, which stores a secret; it is drawn when first needed.

    Raises:
        StoreError: the secret cannot be read or written.
    """
    secret = str(spec.seed).encode()
    if spec.privacy.noise_key == "secret":
        secret = _secret(folder / KEY_FILE)
    return derived_key(secret, "training", spec.training_hash(of_base=True))


def _secret(path: Path) -> bytes:
    if not path.exists():
        write_secret(path, os.urandom(_KEY_BYTES))
    try:
        content = read_bytes(path, SPEC_BYTES)
    except (OSError, InputError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Restore its permissions.") from error
    if len(content) != _KEY_BYTES:
        raise StoreError(
            f"{path} is damaged: it must hold {_KEY_BYTES} bytes. Without it the training cannot "
            "be resumed; repeat the run with --overwrite."
        )
    return content


def spent(
    spec: Spec, protection: Protection, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The manifest's entry on privacy after these rounds; empty without privacy.

    "epsilon" is for all that a report shows: curves of deployed models are post-processing of
    every round, fine-tuning and local training included. It is None where a model is deployed
    that has no noise (`noiseless`). "epsilon_messages" is for the messages of training alone.
    Both have a value for each client; with privacy of clients, for each that takes part in rounds.
    """
    ledger = protection.ledger
    if ledger is None:
        return {}
    total: list[float] | None
    if isinstance(ledger, ExampleLedger):
        sent = [] if sends_nothing(spec.algorithm) else history[: spec.training.rounds]
        noise, total, messages = (
            list(ledger.multipliers),
            ledger.spent(history),
            ledger.spent(sent),
        )
    else:
        clients = spec.clients.seen
        noise, messages = [ledger.multiplier] * clients, [ledger.spent(history)] * clients
        total = None if noiseless(spec) else messages
    return {
        "kind": spec.privacy.kind,
        "delta": spec.privacy.delta,
        "max_norm": spec.privacy.max_norm,
        "noise_multiplier": noise,
        "noise_key": spec.privacy.noise_key,
        "accountant": f"{ACCOUNTANT}, opacus {version('opacus')}",
        "epsilon": total,
        "epsilon_messages": messages,
        "covers": _COVERS[spec.privacy.kind, noiseless(spec)],
    }


_COVERS = {
    ("example", False): "epsilon: everything that depends on training images, so all results that "
    "are sent or reported; epsilon_messages: what clients send in training, which is all that "
    'leaves them with share = "none"',
    ("client", False): "the models that the server sends, one of which is deployed; not what the "
    "server receives",
    ("client", True): "epsilon_messages: the models that the server sends. The clients' own "
    "models, which are certified, have no noise: no epsilon covers results about them",
}


def noiseless(spec: Spec) -> bool:
    """Whether clients deploy models of their own to which nobody added noise.

    Client-level privacy protects what the server sends, and nothing that a client keeps.
    """
    return spec.privacy.kind == "client" and spec.build_algorithm().keeps_client_state


def release_words(spec: Spec, client: int, spent: Sequence[float]) -> str:
    """What epsilon says about a client's deployed model, for those to whom it is given.

    Args:
        spec: of the study. client: whose model it is.
        spent: epsilon of every client, or of this one alone; empty = it is not known.
    """
    privacy, own = spec.privacy, spec.build_algorithm().keeps_client_state
    if noiseless(spec):
        return (
            'no ε: privacy.kind = "client" covers the models that the server sends, and this one '
            "is the client's own, trained without noise"
        )
    if not spent:
        return "not recorded here; the client's own ledger has it"
    if privacy.kind == "client":
        words = f"ε = {rounded_up(max(spent))} at δ = {privacy.delta:g} for each client"
    elif own:
        total = spent[client if len(spent) > 1 else 0]
        words = (
            f"ε = {rounded_up(total)} at δ = {privacy.delta:g} for each training image of the "
            "client, all its training together"
        )
    else:
        words = (
            f"ε = {rounded_up(max(spent))} at δ = {privacy.delta:g} for each training image"
            + (" of every client" if len(spent) > 1 else " of the client")
        )
    if privacy.noise_key == "seed":
        words += "; but the noise follows from the seed, so anyone with the spec can remove it"
    return words


def planned_spending(spec: Spec) -> list[float]:
    """What the rounds of client-level privacy spend by the spec; it is the same for all clients.

    Raises:
        SpecError: opacus is not installed.
    """
    _, ledger = plan_clients(
        spec.privacy.budget(),
        spec.algorithm,
        spec.training.rounds,
        spec.clients.seen,
        spec.clients.participation,
        b"",
    )
    return [epsilon(ledger.multiplier, ledger.rate, ledger.rounds, ledger.delta)]


def rounded_up(bound: float) -> str:
    """Two digits after the point, rounded up: a bound remains one."""
    return f"{math.ceil(100 * bound - 1e-9) / 100:.2f}"
