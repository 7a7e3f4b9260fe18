"""Which algorithms each kind of privacy has been argued through for, as their rows say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from certifl.errors import SpecError
from certifl.federated.algorithm_table import ALGORITHMS, AlgorithmRow

__all__ = [
    "allowed",
    "base_of",
    "check_algorithm",
    "epochs_per_round",
    "finetuning_epochs",
    "row_of",
    "sends_nothing",
]


def base_of(algorithm: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a description trains together: itself, or what `personalized` wraps."""
    wraps = ALGORITHMS.rows[algorithm["name"]].wraps
    return algorithm if wraps is None else algorithm[wraps]


def row_of(algorithm: Mapping[str, Any]) -> AlgorithmRow:
    """The row of what a description trains together."""
    return ALGORITHMS.rows[base_of(algorithm)["name"]]


def sends_nothing(algorithm: Mapping[str, Any]) -> bool:
    """Whether clients keep all they train to themselves."""
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
    """How many passes over its images a client takes in a round of the schedule.

    Args:
        algorithm: as described by `federated.describe`; one that example level allows.
        local_epochs: of the schedule.
    """
    return row_of(algorithm).epochs(base_of(algorithm), local_epochs)


def finetuning_epochs(algorithm: Mapping[str, Any]) -> int:
    """How many passes a client takes after the schedule, for a model that stays with it."""
    return algorithm["epochs"] if algorithm["name"] == "personalized" else 0
