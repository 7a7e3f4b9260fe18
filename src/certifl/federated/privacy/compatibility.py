"""Which algorithms and networks each kind of privacy can be used with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from certifl.errors import ModelError, SpecError
from certifl.federated.algorithms import ALGORITHMS, AlgorithmRow
from certifl.federated.privacy.accounting import grad_sample
from certifl.registry import parameters

_NO_ROW = AlgorithmRow("", parameters(), "")


def base_of(algorithm: Mapping[str, Any]) -> Mapping[str, Any]:
    """The algorithm of the scheduled rounds: itself, or what `personalized` wraps."""
    row = ALGORITHMS.rows.get(algorithm["name"])
    return algorithm if row is None or row.wraps is None else algorithm[row.wraps]


def row_of(algorithm: Mapping[str, Any]) -> AlgorithmRow:
    """The row of the scheduled rounds' algorithm; one without a row has no privacy."""
    return ALGORITHMS.rows.get(base_of(algorithm)["name"], _NO_ROW)


def sends_nothing(algorithm: Mapping[str, Any]) -> bool:
    """Whether clients send nothing they train."""
    return row_of(algorithm).sends_nothing


def allowed(kind: str) -> list[str]:
    """Names of the algorithms that may be trained with "example" or "client" privacy."""
    return [name for name, row in ALGORITHMS.rows.items() if _reason(row, kind) is None]


def check_algorithm(algorithm: Mapping[str, Any], kind: str) -> None:
    """Refuse an algorithm whose messages the mechanism would not protect.

    Args:
        algorithm: as described by `federated.describe`.
        kind: "example" or "client".

    Raises:
        SpecError: it may not be trained with this kind of privacy.
    """
    base, reason = base_of(algorithm), _reason(row_of(algorithm), kind)
    if reason is not None:
        raise SpecError(
            f'privacy.kind = "{kind}" is not available with {base["name"]!r}: {reason}. '
            f"Choose one of {', '.join(allowed(kind))}, or personalized with one of them as base."
        )
    if kind == "client" and base.get("weighting", "uniform") != "uniform":
        raise SpecError(
            'privacy.kind = "client" averages all clients alike, with a fixed denominator: '
            'remove algorithm.weighting = "size".'
        )


def _reason(row: AlgorithmRow, kind: str) -> str | None:
    return row.no_example_privacy if kind == "example" else row.no_client_privacy


def epochs_per_round(algorithm: Mapping[str, Any], local_epochs: int) -> int:
    """How many passes over its images a client takes in a scheduled round.

    Args:
        algorithm: as described by `federated.describe`; one that example level allows.
        local_epochs: of the schedule.
    """
    return row_of(algorithm).epochs(base_of(algorithm), local_epochs)


def finetuning_epochs(algorithm: Mapping[str, Any]) -> int:
    """How many passes a client takes after the schedule, for its own model."""
    return algorithm["epochs"] if algorithm["name"] == "personalized" else 0


# Which networks can be trained with privacy.


_ADVICE = (
    'Take model.name = "small_cnn", or a residual network with model.options = { norm = "group" }.'
)


def check_network(model: nn.Module, kind: str) -> None:
    """Refuse networks whose state the mechanism would not protect.

    Parameters are protected. BatchNorm is not: it mixes the images of a batch, so no image has its
    own gradient to clip; and its running statistics are sums over images (example level)
    or a client's own averages (client level) that would be sent without clipping or noise.

    Args:
        model: the network.
        kind: "example" or "client".

    Raises:
        ModelError: it has BatchNorm, buffers beside its parameters, or (example level) layers that
            write their result over their input.
        SpecError: opacus is not installed.
    """
    grad_sample()
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
    if kind == "example":
        _check_in_place(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if others := sorted(model.state_dict().keys() - parameters):
        raise ModelError(
            f'privacy.kind = "{kind}" protects parameters only, and this network\'s state also '
            f"holds {others[0]}: register it with persistent=False if it never changes. {_ADVICE}"
        )


def _check_in_place(model: nn.Module) -> None:
    """Refuse `inplace=True`: gradients of single images need what it would overwrite."""
    overwriting = {n: m for n, m in model.named_modules() if getattr(m, "inplace", False) is True}
    if overwriting:
        layers = ", ".join(
            f"{name} ({type(layer).__name__})" for name, layer in overwriting.items()
        )
        raise ModelError(
            'privacy.kind = "example" needs the output of each layer as it was, and these write '
            f"over it: {layers}. Build them with inplace=False."
        )
