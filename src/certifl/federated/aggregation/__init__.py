"""Aggregation rules against malicious updates, one row each.

A rule filters updates before the algorithm aggregates them, and works with every algorithm
(`base.Rule`). Invalid updates (NaN, other shapes) never reach it (`federated.faults`). Nothing
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
from certifl.registry import (
    PositiveInt,
    Registry,
    Row,
    check_number,
    check_parameters,
    parameters,
)

_ROUNDING = 1e-9
_Minority = Annotated[
    float,
    Field(ge=0, lt=0.5, description="a share of the clients, from 0 up to (not including) 0.5"),
]


def _any_number(options: Mapping[str, Any], participants: int) -> None:
    del options, participants


@dataclass(frozen=True)
class RuleRow(Row):
    """A rule.

    Attributes:
        check: (options, participants of a round) -> raises if the participants are too few.
    """

    check: Callable[[Mapping[str, Any], int], None] = _any_number


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
        "mean": RuleRow("certifl.federated.aggregation.rules:Mean", parameters(), "mean"),
        "median": RuleRow("certifl.federated.aggregation.rules:Median", parameters(), "median"),
        "trimmed-mean": RuleRow(
            "certifl.federated.aggregation.rules:TrimmedMean",
            parameters(trim=_Minority),
            "trimmed mean",
            check=_check_trimmed_mean,
        ),
        "krum": RuleRow(
            "certifl.federated.aggregation.rules:Krum",
            parameters(malicious=_Minority, keep=(PositiveInt, 1)),
            "krum",
            check=_check_krum,
        ),
    },
)

_CLASSES = {row.attribute: row.module for row in RULES.rows.values()}
__getattr__ = lazy_names(
    __name__,
    {
        **_CLASSES,
        "Clip": "certifl.federated.aggregation.rules",
        "Rule": "certifl.federated.aggregation.rules",
    },
)


def check_rule(name: str, options: Mapping[str, Any], clip: float | None = None) -> None:
    """Refuse a rule that `make_rule` cannot build.

    Raises:
        SpecError: an unknown rule or option, a missing one, or a value that is not allowed.
    """
    if name not in RULES:
        raise SpecError(f"rule = {name!r} is unknown: choose one of {', '.join(RULES)}.")
    model = RULES.rows[name].parameters
    for key in options:
        if key not in model.model_fields:
            raise SpecError(f"{key} has no effect with rule = {name!r}: remove it.")
    for key, field in model.model_fields.items():
        if field.is_required() and key not in options:
            raise SpecError(f"rule = {name!r} needs {key}: the share that may be malicious.")
    check_parameters(name, model, options)
    if clip is not None:
        check_number("clip", clip, "a number above 0", low=0, open_low=True)


def make_rule(name: str, options: Mapping[str, Any], clip: float | None = None) -> Any:
    """A rule by name, after clipping where a norm is given; None for the plain mean.

    Raises:
        SpecError: as `check_rule`.
    """
    check_rule(name, options, clip)
    if name == "mean" and clip is None:
        return None
    rule = RULES[name](**options)
    if clip is None:
        return rule
    from certifl.federated.aggregation.rules import Clip

    return Clip(clip, rule)
