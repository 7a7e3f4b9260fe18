"""The privacy of a run: its key, its mechanism, and its entry in the run's manifest."""

from __future__ import annotations

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
    """A label of the privacy: "ε = 8 per image", "noise 1.2 per client"."""
    privacy = spec.privacy
    of = {"example": "image", "client": "client"}[privacy.kind]
    if privacy.target_epsilon is not None:
        return f"ε = {privacy.target_epsilon:g} per {of}"
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

    "epsilon" counts every round, fine-tuning included; "epsilon_sent" only scheduled ones, whose
    results others see. Both have a value for each client; with privacy of clients, for each that
    takes part in rounds.
    """
    ledger = protection.ledger
    if ledger is None:
        return {}
    clients, sent = spec.clients.seen, history[: spec.training.rounds]
    if sends_nothing(spec.algorithm):
        sent = []
    if isinstance(ledger, ExampleLedger):
        noise, total, public = list(ledger.multipliers), ledger.spent(history), ledger.spent(sent)
    else:
        noise = [ledger.multiplier] * clients
        total, public = ([ledger.spent(rounds)] * clients for rounds in (history, sent))
    return {
        "kind": spec.privacy.kind,
        "delta": spec.privacy.delta,
        "max_norm": spec.privacy.max_norm,
        "noise_multiplier": noise,
        "noise_key": spec.privacy.noise_key,
        "accountant": f"{ACCOUNTANT}, opacus {version('opacus')}",
        "epsilon": total,
        "epsilon_sent": public,
    }
