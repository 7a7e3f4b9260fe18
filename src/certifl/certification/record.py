"""The conditions of certificates, read back: of the right types, and in agreement.

A record may have been changed by anyone. So nothing of it is used before its types were checked,
and whatever follows from something else in it is made again and compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from certifl._version import __version__
from certifl.certification.estimators import Estimator
from certifl.certification.metadata import differs
from certifl.certification.settings import ESTIMATORS, Settings
from certifl.errors import InputError
from certifl.perturbations import PERTURBATIONS, Perturbation, from_record
from certifl.smoothing.laws import LAWS, Law

_OF_A_PERTURBATION = ("family", "sigma", "law", "norm", "unit", "threat")


class _Types(BaseModel):
    """What must be readable before anything is computed from it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    law: str
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    estimator: str
    bounds: str
    alpha: Annotated[float, Field(allow_inf_nan=False)]
    n0: int
    n: int
    look_votes: list[Any]
    look_levels: list[Any]
    family: str | None = None
    description: dict[str, Any] | None = None
    radii: list[float] | None = None
    label_aware: bool = True
    keep: str = "certificates"
    reach: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seed: int = 0


@dataclass(frozen=True)
class RecordedNoise:
    """The noise of a perturbation that certifl may not have, as a record says it."""

    family: str
    sigma: float
    law: Law
    unit: str


@dataclass(frozen=True)
class Record:
    """The metadata of certificates of one perturbation.

    Attributes:
        metadata: as they are stored.
        estimator: how votes became certificates; None where it could not be asked for.
        perturbation: what was certified; None for a family that certifl does not have.
        problems: what is wrong; where there is anything, no row can be judged.
    """

    metadata: Mapping[str, Any]
    estimator: Estimator | None = None
    perturbation: Perturbation | None = None
    problems: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """What an older version did not record yet of its estimator."""
        row = ESTIMATORS.rows.get(str(self.metadata["estimator"]))
        return [name for name in (row.metadata if row else ()) if name not in self.metadata]


def as_stored(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions as a file gives them back: plain numbers, lists, texts.

    Raises:
        InputError: they hold what no file can.
    """
    try:
        return json.loads(json.dumps(dict(conditions), default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"The conditions of these certificates cannot be read: {error}"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number, a text or a list")


def read_record(conditions: Mapping[str, Any]) -> Record:
    """Metadata with everything that they say about themselves compared.

    Raises:
        InputError: they cannot be read, or lack what their estimator needs.
    """
    metadata = as_stored(conditions)
    problem = _type_problem(metadata) or _schedule_problem(metadata)
    if problem is not None:
        return Record(metadata, problems=(problem,))
    perturbation, problems = _described(metadata)
    try:
        estimator = _estimator_of(metadata)
        if problem := _settings_problem(metadata, estimator):
            return Record(metadata, estimator, perturbation, (problem,))
        problem = estimator.record_problem(metadata)
    except KeyError as error:
        raise InputError(
            f"These certificates do not say how their votes were cast: {error} is missing."
        ) from error
    except InputError as error:
        problem = f"its settings are none that could be asked for: {error}"
        return Record(metadata, None, perturbation, (problem,))
    if problem is not None and not problems:
        problems = (problem,)
    return Record(metadata, estimator, perturbation, problems)


def _estimator_of(metadata: Mapping[str, Any]) -> Estimator:
    """The estimator that is recorded.

    Raises:
        InputError: its settings could not have been asked for.
        KeyError: the metadata lack what it needs.
    """
    settings = _settings_of(metadata)
    noise = RecordedNoise(
        family=str(metadata.get("family")),
        sigma=metadata["sigma"],
        law=LAWS[metadata["law"]],
        unit=str(metadata.get("unit")),
    )
    return ESTIMATORS[settings.estimator].recorded(settings, noise, metadata)


def _type_problem(facts: Mapping[str, Any]) -> str | None:
    try:
        _Types.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        return f"its {name} = {first['input']!r:.60} cannot be: {first['msg']}"
    if facts["law"] not in LAWS:
        return f"its law {facts['law']!r} is not one of {', '.join(LAWS)}"
    return None


def _settings_of(facts: Mapping[str, Any]) -> Settings:
    """The settings that are recorded; records older than `keep` do not name it.

    Raises:
        InputError: they could not have been asked for.
    """
    return Settings(
        facts["estimator"],
        facts["n0"],
        facts["n"],
        facts["alpha"],
        radii=facts.get("radii"),
        label_aware=facts.get("label_aware", True),
        reach=facts.get("reach"),
        keep=facts.get("keep", "certificates"),
    )


def _schedule_problem(facts: Mapping[str, Any]) -> str | None:
    """Why looks and levels may not have been fixed before the first vote; None where they were."""
    looks, levels, alpha = facts["look_votes"], facts["look_levels"], facts["alpha"]
    if not _rising(looks):
        return f"the looks {looks} are not numbers of votes that rise"
    if len(levels) not in (1, len(looks)):
        return f"there are {len(levels)} levels for {len(looks)} looks"
    if not all(_number(level) and level > 0.0 for level in levels):
        return f"a level of its looks is not a positive number: {levels}"
    if math.fsum(levels) > alpha:
        return f"the levels of the looks sum to more than alpha = {alpha}"
    return None


def _rising(looks: list[Any]) -> bool:
    whole = all(type(votes) is int and votes > 0 for votes in looks)
    return bool(looks) and whole and sorted(set(looks)) == list(looks)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _settings_problem(metadata: Mapping[str, Any], estimator: Estimator) -> str | None:
    """Where bounds, looks or levels are not those that the other settings give."""
    expected = {
        "bounds": estimator.bounds,
        "look_votes": list(estimator.looks),
        "look_levels": list(estimator.levels),
    }
    for name, value in expected.items():
        if metadata[name] != value:
            return f"its {name} {metadata[name]} are not those of its settings, {value}"
    return None


def _described(facts: Mapping[str, Any]) -> tuple[Perturbation | None, tuple[str, ...]]:
    """The perturbation that is described, and what else is said of it but does not agree."""
    described = facts.get("description")
    if facts.get("family") not in PERTURBATIONS or described is None:
        law = LAWS[facts["law"]]
        wrong = facts.get("norm", law.norm) != law.norm
        said = f"its norm {facts.get('norm')!r} is not that of the law {law.name}, {law.norm}"
        return None, (said,) if wrong else ()
    try:
        made = from_record(described)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        return None, (f"its description is not one of a perturbation: {error}",)
    own = {n: made.law.name if n == "law" else getattr(made, n) for n in _OF_A_PERTURBATION}
    return made, tuple(
        f"its {name} {facts[name]!r} is not that of its description, {value!r}"
        for name, value in own.items()
        if name in facts and differs(facts[name], value) and known_words(name, facts)
    )


def known_words(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether this version wrote it: another may describe the same threat in other words."""
    versions = facts.get("versions")
    own = isinstance(versions, dict) and versions.get("certifl") == __version__
    return own or name != "threat"
