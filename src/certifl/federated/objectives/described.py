"""Objectives as plain tables, as they stand in a spec, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from certifl.federated.objectives.augmented import Augmented
from certifl.federated.objectives.base import Objective
from certifl.federated.objectives.consistency import Consistency
from certifl.federated.objectives.macer import Macer
from certifl.federated.objectives.smoothadv import SmoothAdv
from certifl.federated.objectives.stability import Stability
from certifl.federated.records import named_record

__all__ = ["OBJECTIVES", "describe_objective", "objective_from"]

OBJECTIVES: dict[str, type[Augmented | Consistency | SmoothAdv | Macer | Stability]] = {
    "augmented": Augmented,
    "consistency": Consistency,
    "smoothadv": SmoothAdv,
    "macer": Macer,
    "stability": Stability,
}


def describe_objective(objective: Objective) -> dict[str, Any]:
    """An objective as a table: its name and hyper-parameters; `objective_from` gives it back."""
    options: Any = objective  # a dataclass, which the protocol cannot say
    return {"name": objective.name} | {o.name: getattr(objective, o.name) for o in fields(options)}


def objective_from(description: Mapping[str, Any] | str) -> Objective:
    """The objective described, e.g. `{"name": "consistency", "copies": 2}`, or a bare name.

    Raises:
        SpecError: an unknown objective or hyper-parameter, or a value that is not allowed; the
            message names the key and what is allowed.
    """
    objective, table = named_record("objective", description, OBJECTIVES)
    return objective(**table)
