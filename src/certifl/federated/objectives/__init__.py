"""What a client minimizes on a batch: one row each. A new objective is one file and one row.

Nothing here imports torch: an objective's class is loaded when it is first built.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from certifl.lazy import lazy_names
from certifl.registry import NonNegative, Positive, PositiveInt, Registry, Row, parameters

_Sigmas = Annotated[float, Field(ge=0, description="a number of sigmas, at least 0")]

OBJECTIVES: Registry[Row] = Registry(
    "objective",
    {
        "augmented": Row("certifl.federated.objectives.base:Augmented", parameters(), ""),
        "consistency": Row(
            "certifl.federated.objectives.base:Consistency",
            parameters(
                copies=(PositiveInt, 2), weight=(NonNegative, 10.0), entropy=(NonNegative, 0.5)
            ),
            "consistency",
        ),
        "smoothadv": Row(
            "certifl.federated.objectives.smoothadv:SmoothAdv",
            parameters(copies=(PositiveInt, 2), epsilon=(_Sigmas, 1.0), steps=(PositiveInt, 2)),
            "SmoothAdv",
        ),
        "macer": Row(
            "certifl.federated.objectives.macer:Macer",
            parameters(
                copies=(PositiveInt, 4),
                weight=(NonNegative, 1.0),
                gamma=(Positive, 8.0),
                beta=(Positive, 4.0),
            ),
            "MACER",
        ),
        "stability": Row(
            "certifl.federated.objectives.base:Stability",
            parameters(weight=(NonNegative, 2.0)),
            "stability training",
        ),
    },
)


_BASE = "certifl.federated.objectives.base"
_CLASSES = {row.attribute: row.module for row in OBJECTIVES.rows.values()}

__getattr__ = lazy_names(__name__, {**_CLASSES, "Objective": _BASE, "Smoothing": _BASE})
