"""From a privacy budget to a mechanism and its ledger, before the first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certifl.errors import SpecError
from certifl.federated.privacy.accounting import (
    ClientLedger,
    ExampleLedger,
    noise_for,
    steps_per_epoch,
)
from certifl.federated.privacy.client_level import ClientLevel
from certifl.federated.privacy.compatibility import check_algorithm, epochs_per_round
from certifl.federated.privacy.example_level import ExampleLevel
from certifl.federated.training.schedule import Schedule


@dataclass(frozen=True)
class Budget:
    """A privacy budget: a noise multiplier, or the epsilon that must not be exceeded.

    Attributes:
        max_norm: norm to which gradients (of images) or changes (of clients' models) are clipped.
        delta: probability of the guarantee to fail.
        noise_multiplier: noise in units of `max_norm`; None = computed from `target_epsilon`.
        target_epsilon: for all scheduled rounds. Fine-tuning, which nobody else sees, is extra.
    """

    max_norm: float
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None

    def multiplier(self, rate: float, steps: int) -> float:
        """The noise multiplier for so many steps at a sampling rate."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        return noise_for(self.target_epsilon, rate, steps, self.delta)

    def check_delta(self, records: int, of: str) -> None:
        """Refuse a delta that permits publishing one of the records."""
        if self.delta * records >= 1:
            raise SpecError(
                f"privacy.delta = {self.delta:g} guarantees nothing to {records} {of}: publishing "
                f"one of them at random would satisfy it. Choose it well below 1 / {records}."
            )


def plan_examples(
    budget: Budget,
    algorithm: Mapping[str, Any],
    schedule: Schedule,
    sizes: Sequence[int],
    key: bytes,
) -> tuple[ExampleLevel, ExampleLedger]:
    """Example-level privacy for clients of these sizes.

    Clients of different sizes draw their images at different rates, so one noise multiplier gives
    each its own epsilon, and one target gives each its own multiplier.

    Args:
        budget: the privacy budget.
        algorithm: as described by `federated.describe`.
        schedule: of the rounds.
        sizes: number of training images of each client.
        key: secret key of the draws; another one for every training.

    Raises:
        SpecError: the algorithm, delta or target is impossible.
    """
    check_algorithm(algorithm, "example")
    for size in sizes:
        budget.check_delta(size, "images of a client")
    epochs = epochs_per_round(algorithm, schedule.local_epochs)
    steps = [steps_per_epoch(size, schedule.batch_size) for size in sizes]
    rates = tuple(1 / one for one in steps)
    planned = tuple(epochs * one for one in steps)
    multipliers = tuple(
        budget.multiplier(rate, schedule.rounds * one)
        for rate, one in zip(rates, planned, strict=True)
    )
    common = budget.noise_multiplier
    level = ExampleLevel(budget.max_norm, multipliers if common is None else common, key)
    return level, ExampleLedger(rates, multipliers, planned, schedule.rounds, budget.delta)


def plan_clients(
    budget: Budget,
    algorithm: Mapping[str, Any],
    rounds: int,
    clients: int,
    rate: float,
    key: bytes,
) -> tuple[ClientLevel, ClientLedger]:
    """Client-level privacy for so many clients.

    Args:
        budget: the privacy budget.
        algorithm: as described by `federated.describe`.
        rounds: of the schedule.
        clients: how many there are.
        rate: probability of each to take part in a round.
        key: secret key of the draws; another one for every training.

    Raises:
        SpecError: the algorithm, delta or target is impossible.
    """
    check_algorithm(algorithm, "client")
    budget.check_delta(clients, "clients")
    multiplier = budget.multiplier(rate, rounds)
    level = ClientLevel(budget.max_norm, multiplier, rate, clients, key)
    return level, ClientLedger(rate, multiplier, rounds, budget.delta)
