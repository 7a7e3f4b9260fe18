"""Which algorithms each kind of privacy has been argued through for.

Example level: everything that a client sends or keeps must be a function of noisy sums, of which
every batch gives at most one (`PrivatePasses` sees to the second part). Client level: the server
must send nothing but functions of the models' private average, so clients may send nothing else.
An algorithm that stands in neither table is refused: nobody has looked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from certifl.errors import SpecError

__all__ = [
    "ALLOWED",
    "SENDS_NOTHING",
    "base_of",
    "check_algorithm",
    "epochs_per_round",
    "finetuning_epochs",
]

SENDS_NOTHING = ("local",)

_AVERAGED = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "mixture")
ALLOWED = {
    "example": ("local", *_AVERAGED, "scaffold", "ditto", "fedbn", "fedrep"),
    "client": (*_AVERAGED, "l2gd", "ditto", "flix", "apfl", "fedbn", "fedrep", "perfedavg"),
}
_REASONS = {
    ("example", "l2gd"): "its steps are as many as coins say, and are not accounted for",
    ("example", "flix"): "it trains models beforehand whose steps are not accounted for",
    ("example", "apfl"): "it takes two gradients of one batch",
    ("example", "perfedavg"): "it takes several gradients of one batch",
    ("client", "local"): "its clients send nothing, so there is nothing to protect",
    ("client", "scaffold"): "its clients send control variates, which are not protected",
}


def base_of(algorithm: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a description trains together: itself, or what `personalized` wraps."""
    return algorithm["base"] if algorithm["name"] == "personalized" else algorithm


def check_algorithm(algorithm: Mapping[str, Any], kind: str) -> None:
    """Refuse an algorithm whose messages the mechanism would not protect.

    Args:
        algorithm: as described by `federated.describe`.
        kind: "example" or "client".

    Raises:
        SpecError: it may not be trained with this kind of privacy.
    """
    base = base_of(algorithm)
    name, allowed = base["name"], ALLOWED[kind]
    if name not in allowed:
        reason = _REASONS.get((kind, name), "nobody has shown that all it sends is protected")
        raise SpecError(
            f'privacy.kind = "{kind}" cannot be had with {name!r}: {reason}. '
            f"Choose one of {', '.join(allowed)}, or personalized with one of them as base."
        )
    if kind == "client" and base.get("weighting", "uniform") != "uniform":
        raise SpecError(
            'privacy.kind = "client" averages all clients alike, with a fixed denominator: '
            'remove algorithm.weighting = "size".'
        )


def epochs_per_round(algorithm: Mapping[str, Any], local_epochs: int) -> int:
    """How many passes over its images a client takes in a round of the schedule.

    Args:
        algorithm: as described by `federated.describe`; one that example level allows.
        local_epochs: of the schedule.
    """
    base = base_of(algorithm)
    if base["name"] == "ditto":
        return 2 * local_epochs
    if base["name"] == "fedrep" and base.get("head") != "":
        return base["head_epochs"] + local_epochs
    return local_epochs


def finetuning_epochs(algorithm: Mapping[str, Any]) -> int:
    """How many passes a client takes after the schedule, for a model that stays with it."""
    return algorithm["epochs"] if algorithm["name"] == "personalized" else 0
