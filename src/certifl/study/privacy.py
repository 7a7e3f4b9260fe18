"""What training spent of privacy, and what that covers: in run.json, labels and cards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from certifl.federated.privacy import (
    ACCOUNTANT,
    ExampleLedger,
    epsilon,
    finetuning_epochs,
    plan_clients,
    sends_nothing,
)
from certifl.spec import Spec

if TYPE_CHECKING:
    from certifl.study.setup import Protection


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
        clients = spec.clients.training_count
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
        spec.clients.training_count,
        spec.clients.participation,
        b"",
    )
    return [epsilon(ledger.multiplier, ledger.rate, ledger.rounds, ledger.delta)]


def rounded_up(bound: float) -> str:
    """Two digits after the point, rounded up: a bound remains one."""
    if math.isinf(bound):
        return "infinite"
    return f"{math.ceil(100 * bound - 1e-9) / 100:.2f}"
