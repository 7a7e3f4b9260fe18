"""Aggregation rules against malicious updates, one row each.

A rule filters updates before the algorithm aggregates them, and works with every algorithm
(`rules.Rule`). Invalid updates (NaN, other shapes) never reach it (`federated.faults`). Nothing
here imports torch: a rule's class is loaded when it is first built.

| rule | robust to | memory |
|---|---|---|
| mean | no malicious client | one update |
| median | fewer than half of the clients | all updates of a round |
| trimmed-mean | a share `trim` of them | all updates |
| krum | a share `malicious` of them, n >= 2 f + 3 | all updates |
| clip, before any of these | bounds the influence of each client | one update |

A robust combination gives every client the same weight, and what is rare among honest clients is
treated like an attack: the more their data differ, the more it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from certifl.errors import SpecError
from certifl.lazy import lazy_names
from certifl.registry import PositiveInt, Registry, Row, parameters

_RULES = "certifl.federated.aggregation.rules"
_ROUNDING = 1e-9
_Minority = Annotated[
    float,
    Field(ge=0, lt=0.5, description="a share of the clients, from 0 up to (not including) 0.5"),
]


@dataclass(frozen=True)
class RuleRow(Row):
    """A rule.

    Attributes:
        check: (options, participants of a round) -> raises if the participants are too few.
    """

    check: Callable[[Mapping[str, Any], int], None] = lambda *_: None


def share_of(share: float, count: int) -> int:
    """A share of some clients as a whole number, rounded up (0.07 of 100 are 7)."""
    return math.ceil(share * count - _ROUNDING)


def _check_trimmed_mean(options: Mapping[str, Any], participants: int) -> None:
    dropped = share_of(options["trim"], participants)
    if 2 * dropped >= participants:
        raise SpecError(
            f"trim = {options['trim']} drops {dropped} of {participants} values at each end and "
            "leaves none: lower it, or let more clients take part in a round."
        )


def _check_krum(options: Mapping[str, Any], participants: int) -> None:
    share, keep = options["malicious"], options.get("keep", 1)
    wrong = share_of(share, participants)
    if participants < 2 * wrong + 3:
        raise SpecError(
            f"krum with malicious = {share} of {participants} clients means {wrong} malicious "
            f"ones and needs at least {2 * wrong + 3} clients in a round: lower it, or let more "
            "clients take part."
        )
    if keep > participants - wrong:
        raise SpecError(
            f"keep = {keep} would keep malicious updates: with malicious = {share}, at most "
            f"{participants - wrong} of {participants} can be kept."
        )


RULES: Registry[RuleRow] = Registry(
    "rule",
    {
        "mean": RuleRow(f"{_RULES}:Mean", parameters(), "mean"),
        "median": RuleRow(f"{_RULES}:Median", parameters(), "median"),
        "trimmed-mean": RuleRow(
            f"{_RULES}:TrimmedMean",
            parameters(trim=_Minority),
            "trimmed mean",
            check=_check_trimmed_mean,
        ),
        "krum": RuleRow(
            f"{_RULES}:Krum",
            parameters(malicious=_Minority, keep=(PositiveInt, 1)),
            "krum",
            check=_check_krum,
        ),
    },
)

_CLASSES = [row.attribute for row in RULES.rows.values()]
__getattr__ = lazy_names(__name__, dict.fromkeys([*_CLASSES, "Clip", "Rule"], _RULES))


def make_rule(name: str, options: Mapping[str, Any], clip: float | None = None) -> Any:
    """A rule by name (else SpecError), after clipping to a given norm; None for the mean."""
    RULES.check_named(name, options)
    if name == "mean" and clip is None:
        return None
    rule = RULES[name](**options)
    if clip is None:
        return rule
    from certifl.federated.aggregation.rules import Clip

    return Clip(clip, rule)
