"""Differential privacy of training: of every image, or of every client.

| kind | neighbors differ in | who adds the noise | holds against |
|---|---|---|---|
| example | one image of a client, or nothing there | the client, in every step | everyone |
| client | one whole client | the server, in every round | everyone but the server |

docs/privacy.md says what is not protected.
"""

from __future__ import annotations

from certifl.federated.privacy.accounting import (
    ACCOUNTANT,
    ClientLedger,
    ExampleLedger,
    Pass,
    Release,
    composed,
    conflict,
    epsilon,
    noise_for,
    released_epsilon,
    released_steps,
)
from certifl.federated.privacy.mechanisms import (
    ClientLevel,
    ExampleLevel,
    PrivatePasses,
    derived_key,
)
from certifl.federated.privacy.planning import (
    Budget,
    check_algorithm,
    check_network,
    finetuning_epochs,
    plan_clients,
    plan_examples,
    sends_nothing,
)

__all__ = [
    "ACCOUNTANT",
    "Budget",
    "ClientLedger",
    "ClientLevel",
    "ExampleLedger",
    "ExampleLevel",
    "Pass",
    "PrivatePasses",
    "Release",
    "check_algorithm",
    "check_network",
    "composed",
    "conflict",
    "derived_key",
    "epsilon",
    "finetuning_epochs",
    "noise_for",
    "plan_clients",
    "plan_examples",
    "released_epsilon",
    "released_steps",
    "sends_nothing",
]
