"""The largest radius that a run's certificates can have, of which all radii are shares."""

from __future__ import annotations

import math

from certifl.certification import estimators
from certifl.errors import InputError
from certifl.report import summary
from certifl.report.results import RunResults


def largest_radius(run: RunResults) -> float:
    """The radius of unanimous votes; of a scan, which goes farther, as far as it looks.

    Raises:
        InputError: certificates of a scan that do not say where it looked.
    """
    largest = estimators.largest_radius(run.conditions)
    if largest <= 0.0:
        raise InputError("These certificates are of a scan that can certify no radius.")
    return largest if math.isfinite(largest) else summary.largest_radius([run])
