"""The largest radius that a run's certificates can have, of which all radii are shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from certifl.errors import InputError
from certifl.report import summary
from certifl.report.results import RunResults
from certifl.smoothing.laws import LAWS
from certifl.smoothing.strata import Scan

_SCAN = "scan"


def largest_radius(run: RunResults) -> float:
    """The radius of unanimous votes; of a scan, which goes farther, as far as it looks.

    Raises:
        InputError: certificates of a scan that do not say where it looked.
    """
    facts = run.conditions
    if _SCAN in facts or facts.get("estimator") == _SCAN:
        return _farthest(facts)
    law = LAWS.get(str(facts.get("law")))
    if law is None or not facts.get("n"):
        return summary.largest_radius([run])
    return law.largest_radius(float(facts["sigma"]), int(facts["n"]), float(facts["alpha"]))


def _farthest(facts: Mapping[str, Any]) -> float:
    """The shorter side of the scan, as a radius is the shorter side of an interval."""
    try:
        told = facts[_SCAN]
        ends = float(facts["sigma"]), float(told["low"]), float(told["high"])
        passes = tuple(int(strata) for strata in told["passes"])
        low, high = Scan(*ends, periodic=bool(told["periodic"]), passes=passes).ends
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"These certificates do not say where they were scanned: {error}"
        ) from error
    if min(-low, high) <= 0.0:
        raise InputError("These certificates are of a scan that can certify no radius.")
    return min(-low, high)
