"""The metadata of certificates, read back: types are checked, and derived values recomputed.

Anyone may have changed a record. So nothing of it is used before its types were checked, and what
follows from other entries is recomputed and compared.
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
    """Types that must hold before anything is computed."""

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
    """The recorded noise of a perturbation, whose family certifl may not know."""

    family: str
    sigma: float
    law: Law
    unit: str


@dataclass(frozen=True)
class Record:
    """The metadata of certificates of one perturbation.

    Attributes:
        metadata: as stored.
        estimator: how votes became certificates; None for settings that are not allowed.
        perturbation: what was certified; None for a family that certifl does not know.
        problems: what is wrong; if anything is, no row can be judged.
    """

    metadata: Mapping[str, Any]
    estimator: Estimator | None = None
    perturbation: Perturbation | None = None
    problems: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Metadata of the estimator that an older version did not record."""
        row = ESTIMATORS.rows.get(str(self.metadata["estimator"]))
        return [name for name in (row.metadata if row else ()) if name not in self.metadata]


def as_stored(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as a file returns them: plain numbers, lists, texts.

    Raises:
        InputError: values that no file can hold.
    """
    try:
        return json.loads(json.dumps(dict(conditions), default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The metadata of these certificates cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number, a text or a list")


def read_record(conditions: Mapping[str, Any]) -> Record:
    """Metadata, after comparing everything that follows from other entries.

    Raises:
        InputError: unreadable, or without what the estimator needs.
    """
    metadata = as_stored(conditions)
    problem = _type_problem(metadata) or _schedule_problem(metadata)
    if problem is not None:
        return Record(metadata, problems=(problem,))
    perturbation, problems = _described(metadata)
    if problems:
        return Record(metadata, None, perturbation, problems)
    try:
        estimator = _estimator_of(metadata, perturbation)
        if problem := _settings_problem(metadata, estimator):
            return Record(metadata, estimator, perturbation, (problem,))
        problem = estimator.record_problem(metadata)
    except KeyError as error:
        raise InputError(
            f"These certificates do not say how their votes were cast: {error} is missing."
        ) from error
    except InputError as error:
        problem = f"its settings are not allowed: {error}"
        return Record(metadata, None, perturbation, (problem,))
    return Record(metadata, estimator, perturbation, () if problem is None else (problem,))


def _estimator_of(metadata: Mapping[str, Any], perturbation: Perturbation | None) -> Estimator:
    """The estimator that is recorded.

    Raises:
        InputError: settings that are not allowed.
        KeyError: the metadata lack what it needs.
    """
    settings = _settings_of(metadata)
    noise = perturbation or RecordedNoise(
        family=str(metadata.get("family")),
        sigma=metadata["sigma"],
        law=LAWS[metadata["law"]],
        unit=str(metadata.get("unit")),
    )
    return ESTIMATORS[settings.estimator].recorded(settings, noise, metadata)


def _type_problem(metadata: Mapping[str, Any]) -> str | None:
    try:
        _Types.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        return f"its {name} = {first['input']!r:.60} is not allowed: {first['msg']}"
    if metadata["law"] not in LAWS:
        return f"its law {metadata['law']!r} is not one of {', '.join(LAWS)}"
    return None


def _settings_of(metadata: Mapping[str, Any]) -> Settings:
    """The recorded settings; old records do not name `keep`.

    Raises:
        InputError: settings that are not allowed.
    """
    return Settings(
        metadata["estimator"],
        metadata["n0"],
        metadata["n"],
        metadata["alpha"],
        radii=metadata.get("radii"),
        label_aware=metadata.get("label_aware", True),
        reach=metadata.get("reach"),
        keep=metadata.get("keep", "certificates"),
    )


def _schedule_problem(metadata: Mapping[str, Any]) -> str | None:
    """Why looks and levels cannot have been fixed before the first vote; None if they can."""
    looks, levels, alpha = metadata["look_votes"], metadata["look_levels"], metadata["alpha"]
    if not _rising(looks):
        return f"the looks {looks} are not rising numbers of votes"
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
    """Bounds, looks or levels that do not follow from the other settings."""
    expected = {
        "bounds": estimator.bounds,
        "look_votes": list(estimator.looks),
        "look_levels": list(estimator.levels),
    }
    for name, value in expected.items():
        if metadata[name] != value:
            return f"its {name} {metadata[name]} are not those of its settings, {value}"
    return None


def _described(metadata: Mapping[str, Any]) -> tuple[Perturbation | None, tuple[str, ...]]:
    """The perturbation of the description, and entries that do not agree with it."""
    described = metadata.get("description")
    if metadata.get("family") not in PERTURBATIONS or described is None:
        law = LAWS[metadata["law"]]
        wrong = metadata.get("norm", law.norm) != law.norm
        problem = (
            f"its norm {metadata.get('norm')!r} is not that of the law {law.name}, {law.norm}"
        )
        return None, (problem,) if wrong else ()
    try:
        perturbation = from_record(described)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        return None, (f"its description is not one of a perturbation: {error}",)
    actual = {
        n: perturbation.law.name if n == "law" else getattr(perturbation, n)
        for n in _OF_A_PERTURBATION
    }
    return perturbation, tuple(
        f"its {name} {metadata[name]!r} is not that of its description, {value!r}"
        for name, value in actual.items()
        if name in metadata and differs(metadata[name], value) and known_words(name, metadata)
    )


def known_words(name: str, metadata: Mapping[str, Any]) -> bool:
    """Whether this version wrote the entry: others may word the same threat differently."""
    versions = metadata.get("versions")
    actual = isinstance(versions, dict) and versions.get("certifl") == __version__
    return actual or name != "threat"
