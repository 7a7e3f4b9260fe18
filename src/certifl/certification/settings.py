"""What `certify` is asked for, and the estimators by name: fixed before the first vote.

Nothing here imports torch or scipy, so that specs are checked quickly; an estimator's class is
loaded when it is first built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from certifl.errors import InputError, SpecError
from certifl.registry import Registry, Row, check_parameters, parameters

if TYPE_CHECKING:
    from certifl.certification.estimators import Estimator, Noise

PRECISIONS = ("float32", "bfloat16", "int8")
# Precisions of 0.1.0, which stored votes may still name, and what to choose in their place.
REMOVED_PRECISIONS = {"float32-compiled": "float32", "bfloat16-compiled": "bfloat16"}


def removed_precision(name: str) -> str:
    """What to say to somebody who asks for a precision of `REMOVED_PRECISIONS`."""
    return (
        f'the precision "{name}" was removed in 0.2.0: choose "{REMOVED_PRECISIONS[name]}", the '
        "same arithmetic in another order, so votes differ only where rounding decides."
    )


GRID_POINTS = 50
# Bounds are computed up to so many votes (smoothing/bounds.py). Exact boundaries take 0.2 s a
# radius at 10 million: a record made by others cannot make `verify` compute for hours.
MOST_VOTES = 10**8
MOST_SEQUENTIAL_VOTES = 10**7
MOST_RADII = 1000
_DEFAULTS = {"keep": "certificates", "reach": None}
_HOME, _BOUNDARIES = "certifl.certification.estimators", ("boundaries",)
_KEEP = (Literal["certificates", "curve"], "certificates")
_REACH = (Annotated[float | None, Field(gt=0, description="a positive finite amount")], None)


@dataclass(frozen=True)
class EstimatorRow(Row):
    """An estimator.

    Attributes:
        metadata: names that it adds to the metadata of its certificates.
        beyond_sigma: whether its radii may exceed the sigma of a uniform distribution.
    """

    metadata: tuple[str, ...] = ()
    beyond_sigma: bool = False


ESTIMATORS: Registry[EstimatorRow] = Registry(
    "estimator",
    {
        "top-class": EstimatorRow(f"{_HOME}:TopClass", parameters(), "top class"),
        "runner-up": EstimatorRow(f"{_HOME}:RunnerUp", parameters(), "runner-up"),
        "sequential": EstimatorRow(
            f"{_HOME}:Sequential", parameters(keep=_KEEP), "sequential", metadata=_BOUNDARIES
        ),
        "sequential-top-class": EstimatorRow(
            f"{_HOME}:SequentialTopClass",
            parameters(keep=_KEEP),
            "sequential, top class",
            metadata=_BOUNDARIES,
        ),
        "scan": EstimatorRow(
            "certifl.certification.scan:ScanEstimator",
            parameters(reach=_REACH),
            "scan",
            metadata=("scan", "reach"),
            beyond_sigma=True,
        ),
    },
)
"""All estimators: one row each. A new estimator is one file and one row."""


@dataclass(frozen=True)
class Settings:
    """What `certify` was asked for; InputError for values that are not allowed.

    Equal settings and equal votes give equal certificates.

    Attributes:
        estimator: a name in `ESTIMATORS`.
        n0: votes that choose the class (selection).
        n: fresh votes that bound its probability (estimation); for `sequential` the most it draws.
        alpha: probability, per image, that a certificate claims too much.
        radii: the radii that will be reported; `sequential` stops when none of them is worth more
            votes. With None it stops where the average radius gains too little.
        label_aware: stop early on images whose label is known and whose chosen class is wrong.
        reach: `scan` only, how far from 0 it looks, in the family's unit; None stands for all the
            way round for rotation, and three times sigma for scaling.
        keep: `sequential` only, the price of votes, see `estimators.PRICES`. "certificates": every
            step of the radii that n votes would reach, but for about one image in a thousand.
            "curve": the certified accuracies, but for about two images in a hundred.
    """

    estimator: str = "sequential"
    n0: int = 100
    n: int = 100_000
    alpha: float = 1e-3
    radii: Sequence[float] | None = None
    label_aware: bool = True
    reach: float | None = None
    keep: str = "certificates"

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, str) or self.estimator not in ESTIMATORS:
            known = ", ".join(ESTIMATORS)
            raise InputError(f"estimator must be one of {known}; got {self.estimator!r}.")
        for name in ("n0", "n"):
            object.__setattr__(self, name, _checked_votes(name, getattr(self, name)))
        if not (isinstance(self.alpha, (float, np.floating)) and 0.0 < self.alpha < 0.5):
            raise InputError(
                f"alpha is the probability of a wrong certificate and must lie between 0 and 0.5; "
                f"got {self.alpha!r}."
            )
        object.__setattr__(self, "alpha", float(self.alpha))
        if not isinstance(self.label_aware, bool):
            raise InputError(f"label_aware must be True or False; got {self.label_aware!r:.80}.")
        if self.radii is not None:
            object.__setattr__(self, "radii", _checked_radii(self.radii))
        self._check_sequential_votes()
        self._check_parameters()
        if self.reach is not None:
            object.__setattr__(self, "reach", float(self.reach))

    def _check_sequential_votes(self) -> None:
        exact = ESTIMATORS.rows[self.estimator].metadata == _BOUNDARIES
        if exact and self.n > MOST_SEQUENTIAL_VOTES:
            raise InputError(
                f'The estimator "{self.estimator}" takes n up to {MOST_SEQUENTIAL_VOTES}; got '
                f'{self.n}. Choose a smaller n, or "runner-up", which always casts n votes.'
            )

    def _check_parameters(self) -> None:
        """Refuse parameters that the estimator does not have, and values that are not allowed."""
        values = {name: getattr(self, name) for name in _DEFAULTS}
        given = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
        try:
            check_parameters(self.estimator, ESTIMATORS.rows[self.estimator].parameters, given)
        except SpecError as error:
            raise InputError(str(error)) from error

    def estimator_for(self, perturbation: Noise) -> Estimator:
        """The estimator with these settings, for the noise of one perturbation."""
        return ESTIMATORS[self.estimator](self, perturbation)


def _checked_votes(name: str, value: object) -> int:
    """A number of votes; 1e4 is one, though a float."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name} must be a whole number of votes; got {value!r}.")
    if not 1 <= value <= MOST_VOTES:
        raise InputError(f"{name} must lie between 1 and {MOST_VOTES}; got {value}.")
    return int(value)


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(r) for r in radii}))
    except (TypeError, ValueError) as error:
        raise InputError(f"radii must be a list such as [0.0, 0.1]; got {radii!r}.") from error
    if not values or not all(math.isfinite(r) and r >= 0.0 for r in values):
        raise InputError("radii must be finite numbers of at least 0, and at least one of them.")
    if len(values) > MOST_RADII:
        raise InputError(f"At most {MOST_RADII} radii; got {len(values)}. Choose larger steps.")
    return values
