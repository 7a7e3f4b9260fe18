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
from certifl.certification.scan import describe_scan, scan_from, scan_of
from certifl.certification.settings import Settings
from certifl.errors import InputError
from certifl.perturbations import PERTURBATIONS, Perturbation, from_record
from certifl.smoothing.laws import LAWS
from certifl.smoothing.strata import Scan, passes_of

_ALIKE = 1e-12  # a reach that is derived from the ends of a stretch is off by a rounding or two
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
class Record:
    """The conditions of certificates of one perturbation.

    Attributes:
        facts: as they are stored.
        settings: how votes became certificates; None where they could not be asked for.
        perturbation: what was certified; None for a family that certifl does not have.
        problems: what is wrong; where there is anything, no row can be judged.
        scan: where the votes of a scan were cast.
        reach_unknown: whether a scan was recorded by a version that left out its reach.
    """

    facts: Mapping[str, Any]
    settings: Settings | None = None
    perturbation: Perturbation | None = None
    problems: tuple[str, ...] = ()
    scan: Scan | None = None
    reach_unknown: bool = False


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


def differs(first: Any, second: Any) -> bool:
    """Whether two stored values are not the same; true is not 1."""
    return json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True)


def read_record(conditions: Mapping[str, Any]) -> Record:
    """Conditions with everything that they say about themselves compared.

    Raises:
        InputError: they cannot be read, or say nothing of the scan they are of.
    """
    facts = as_stored(conditions)
    problem = _type_problem(facts) or _schedule_problem(facts)
    if problem is not None:
        return Record(facts, problems=(problem,))
    settings = _settings_of(facts)
    perturbation, problems = _described(facts)
    if settings.estimator != "scan":
        return Record(facts, settings, perturbation, problems)
    scan = scan_from(facts)
    if not problems:
        problems = tuple(_stretch_problems(facts, scan, settings, perturbation))
    return Record(facts, settings, perturbation, problems, scan, "reach" not in facts)


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
    scanned = facts["estimator"] == "scan"
    if not _rising(looks):
        return f"the looks {looks} are not numbers of votes that rise"
    if len(levels) != (1 if scanned else len(looks)):
        return f"there are {len(levels)} levels for {len(looks)} looks"
    if not all(_number(level) and level > 0.0 for level in levels):
        return f"a level of its looks is not a positive number: {levels}"
    if math.fsum(levels) > alpha:
        return f"the levels of the looks sum to more than alpha = {alpha}"
    try:
        return _scan_problem(facts) if scanned else _settings_problem(facts)
    except InputError as error:
        return f"its settings are none that could be asked for: {error}"


def _rising(looks: list[Any]) -> bool:
    whole = all(type(votes) is int and votes > 0 for votes in looks)
    return bool(looks) and whole and sorted(set(looks)) == list(looks)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _settings_problem(facts: Mapping[str, Any]) -> str | None:
    """Where bounds, looks or levels are not those that the other settings give."""
    settings = _settings_of(facts)
    made = {
        "bounds": settings.bounds,
        "look_votes": list(settings.looks),
        "look_levels": list(settings.levels),
    }
    for name, value in made.items():
        if facts[name] != value:
            return f"its {name} {facts[name]} are not those of its settings, {value}"
    return None


def _scan_problem(facts: Mapping[str, Any]) -> str | None:
    """Where the passes of a scan, after each of which it was read, are not those of its n."""
    if "scan" not in facts:
        return None  # said by whoever reads it
    settings, scan = _settings_of(facts), scan_from(facts)
    if not math.isfinite(scan.width / scan.sigma) or differs(facts["scan"], describe_scan(scan)):
        return f"its scan cannot be read: {facts['scan']}"
    passes = passes_of(settings.n, scan.sigma, scan.width)
    if facts["bounds"] != settings.bounds:
        return f"its bounds {facts['bounds']} are not those of its settings, {settings.bounds}"
    if scan.passes != passes:
        return f"the passes {list(scan.passes)} are not those of its settings, {list(passes)}"
    if list(facts["look_votes"]) != scan.totals.tolist():
        return "the looks are not the passes of its scan"
    if list(facts["look_levels"]) != [facts["alpha"]]:
        return f"its level {facts['look_levels']} is not alpha = {facts['alpha']}"
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


def _stretch_problems(
    facts: Mapping[str, Any], scan: Scan, settings: Settings, perturbation: Perturbation | None
) -> list[str]:
    """Where a scan was not what its reach asks for: a longer stretch has longer intervals."""
    if perturbation is None:
        return ["its scan is of a family that has none"]
    reaches = [settings.reach]
    if "reach" not in facts:
        reaches.append(scan.high - scan.sigma)
    for reach in reaches:
        asked = _asked_scan(perturbation, settings, reach)
        if asked is not None and _same_scan(asked, scan, exactly="reach" in facts):
            return []
    return [
        f"its scan from {scan.low:g} to {scan.high:g} is not the one that sigma, n and reach give"
    ]


def _asked_scan(
    perturbation: Perturbation, settings: Settings, reach: float | None
) -> Scan | None:
    try:
        asked = Settings("scan", settings.n0, settings.n, settings.alpha, reach=reach)
        return scan_of(perturbation, asked)
    except InputError:
        return None  # nobody could have asked for it


def _same_scan(first: Scan, second: Scan, exactly: bool) -> bool:
    if exactly:
        return first == second
    ends = np.allclose([first.low, first.high], [second.low, second.high], rtol=_ALIKE, atol=0.0)
    return bool(ends) and (first.periodic, first.passes) == (second.periodic, second.passes)
