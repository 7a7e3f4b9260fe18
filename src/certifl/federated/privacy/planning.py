"""What privacy can be had with, and from a budget to a mechanism and its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from certifl.errors import ModelError, SpecError
from certifl.federated.algorithms import ALGORITHMS, AlgorithmRow
from certifl.federated.privacy.accounting import (
    ClientLedger,
    ExampleLedger,
    noise_for,
    opacus,
    steps_per_epoch,
)
from certifl.federated.privacy.mechanisms import ClientLevel, ExampleLevel
from certifl.federated.schedule import Schedule
from certifl.registry import parameters

_NO_ROW = AlgorithmRow("", parameters(), "")  # of an algorithm without a row: no privacy


def _scheduled(algorithm: Mapping[str, Any]) -> tuple[Mapping[str, Any], AlgorithmRow]:
    """The algorithm of the scheduled rounds (itself, or what `personalized` wraps), its row."""
    row = ALGORITHMS.rows.get(algorithm["name"])
    base = algorithm if row is None or row.wraps is None else algorithm[row.wraps]
    return base, ALGORITHMS.rows.get(base["name"], _NO_ROW)


def sends_nothing(algorithm: Mapping[str, Any]) -> bool:
    """Whether clients send nothing they train."""
    return _scheduled(algorithm)[1].sends_nothing


def allowed(kind: str) -> list[str]:
    """Names of the algorithms that may be trained with "example" or "client" privacy."""
    return [name for name, row in ALGORITHMS.rows.items() if _refusal(row, kind) is None]


def _refusal(row: AlgorithmRow, kind: str) -> str | None:
    return row.no_example_privacy if kind == "example" else row.no_client_privacy


def check_algorithm(algorithm: Mapping[str, Any], kind: str) -> None:
    """Refuse a described algorithm that would send what is unprotected (SpecError)."""
    base, row = _scheduled(algorithm)
    if (reason := _refusal(row, kind)) is not None:
        raise SpecError(
            f'privacy.kind = "{kind}" is not available with {base["name"]!r}: {reason}. '
            f"Choose one of {', '.join(allowed(kind))}, or personalized with one of them as base."
        )
    if kind == "client" and base.get("weighting", "uniform") != "uniform":
        raise SpecError(
            'privacy.kind = "client" averages all clients alike, with a fixed denominator: '
            'remove algorithm.weighting = "size".'
        )


def finetuning_epochs(algorithm: Mapping[str, Any]) -> int:
    """How many passes a client takes after the schedule, for its own model."""
    return algorithm["epochs"] if algorithm["name"] == "personalized" else 0


# Which networks can be trained with privacy.


_ADVICE = (
    'Take model.name = "small_cnn", or a residual network with model.options = { norm = "group" }.'
)


def check_network(model: nn.Module, kind: str) -> None:
    """Refuse networks whose state the mechanism would not protect (ModelError).

    Parameters are protected. BatchNorm is not: it mixes the images of a batch, so no image has its
    own gradient to clip; and its running statistics are sums over images (example level)
    or a client's own averages (client level) that would be sent without clipping or noise. Nor are
    other buffers, or (example level) layers that write their result over their input.
    """
    opacus("opacus.grad_sample")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = (
                "mixes the images of a batch, so that no image has its own gradient"
                if kind == "example"
                else "has running statistics that would be averaged without protection"
            )
            raise ModelError(
                f'privacy.kind = "{kind}" cannot train this network: its BatchNorm ({name}) '
                f"{reason}. {_ADVICE}"
            )
    # Gradients of single images need what `inplace=True` would overwrite.
    overwriting = {n: m for n, m in model.named_modules() if getattr(m, "inplace", False) is True}
    if kind == "example" and overwriting:
        layers = ", ".join(f"{name} ({type(m).__name__})" for name, m in overwriting.items())
        raise ModelError(
            'privacy.kind = "example" needs the output of each layer as it was, and these write '
            f"over it: {layers}. Build them with inplace=False."
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if others := sorted(model.state_dict().keys() - parameters):
        raise ModelError(
            f'privacy.kind = "{kind}" protects parameters only, and this network\'s state also '
            f"holds {others[0]}: register it with persistent=False if it never changes. {_ADVICE}"
        )


@dataclass(frozen=True)
class Budget:
    """A privacy budget: a noise multiplier, or the epsilon that must not be exceeded.

    Attributes:
        max_norm: norm to which gradients (of images) or changes (of clients' models) are clipped.
        delta: probability of the guarantee to fail.
        noise_multiplier: noise in units of `max_norm`; None = computed from `target_epsilon`.
        target_epsilon: for all scheduled rounds. Fine-tuning is extra.
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
    """Example-level privacy for clients of these sizes; SpecError where it is impossible.

    Clients of different sizes draw their images at different rates, so one noise multiplier gives
    each its own epsilon, and one target gives each its own multiplier.

    Args:
        budget, schedule: of the rounds. algorithm: as described by `federated.describe`.
        sizes: number of training images of each client.
        key: secret key of the draws; another one for every training.
    """
    check_algorithm(algorithm, "example")
    for size in sizes:
        budget.check_delta(size, "images of a client")
    base, row = _scheduled(algorithm)
    epochs = row.epochs(base, schedule.local_epochs)
    steps = [steps_per_epoch(size, schedule.batch_size) for size in sizes]
    rates = tuple(1 / one for one in steps)
    planned = tuple(epochs * one for one in steps)
    multipliers = tuple(
        budget.multiplier(rate, schedule.rounds * one)
        for rate, one in zip(rates, planned, strict=True)
    )
    common = budget.noise_multiplier
    level = ExampleLevel(budget.max_norm, multipliers if common is None else common, key)
    tuning = finetuning_epochs(algorithm)
    ledger = ExampleLedger(rates, multipliers, planned, schedule.rounds, budget.delta, tuning)
    return level, ledger


def plan_clients(
    budget: Budget,
    algorithm: Mapping[str, Any],
    rounds: int,
    clients: int,
    rate: float,
    key: bytes,
) -> tuple[ClientLevel, ClientLedger]:
    """Client-level privacy where clients take part with probability `rate`; else SpecError.

    Args:
        budget, rounds: of the schedule. algorithm, key: as in `plan_examples`.
    """
    check_algorithm(algorithm, "client")
    budget.check_delta(clients, "clients")
    multiplier = budget.multiplier(rate, rounds)
    level = ClientLevel(budget.max_norm, multiplier, rate, clients, key)
    return level, ClientLedger(rate, multiplier, rounds, budget.delta)
