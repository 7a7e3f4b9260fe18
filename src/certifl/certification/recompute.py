"""Recompute certificates from their votes: every claim must follow from the counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from certifl._version import __version__
from certifl.certification import metadata as groups
from certifl.certification.certificates import ABSTAINED, UNLABELED, Certificates
from certifl.certification.counts import Votes
from certifl.certification.estimators import Estimator, Metadata, RecordedNoise
from certifl.certification.metadata import differs
from certifl.certification.quantization import fingerprint_problems
from certifl.certification.settings import ESTIMATORS, MOST_VOTES, Settings
from certifl.errors import InputError
from certifl.perturbations import PERTURBATIONS, Perturbation, from_record
from certifl.smoothing.laws import LAWS, UNIFORM


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


def read_record(conditions: Mapping[str, Any]) -> Record:
    """Metadata, after comparing all that follows from other entries; InputError if unreadable."""
    try:
        metadata = json.loads(json.dumps(dict(conditions), default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The metadata of these certificates cannot be read: {error}") from error
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


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number, a text or a list")


def _estimator_of(metadata: Mapping[str, Any], perturbation: Perturbation | None) -> Estimator:
    """The recorded estimator; InputError for wrong settings, KeyError if some are missing."""
    settings = Settings(
        metadata["estimator"],
        metadata["n0"],
        metadata["n"],
        metadata["alpha"],
        radii=metadata.get("radii"),
        label_aware=metadata.get("label_aware", True),
        reach=metadata.get("reach"),
        keep=metadata.get("keep", "certificates"),
    )
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


def _schedule_problem(metadata: Mapping[str, Any]) -> str | None:
    """Why looks and levels cannot have been fixed before the first vote; None if they can."""
    looks, levels, alpha = metadata["look_votes"], metadata["look_levels"], metadata["alpha"]
    whole = all(type(votes) is int and votes > 0 for votes in looks)
    if not (looks and whole and sorted(set(looks)) == looks):
        return f"the looks {looks} are not rising numbers of votes"
    if len(levels) not in (1, len(looks)):
        return f"there are {len(levels)} levels for {len(looks)} looks"
    numbers = all(type(level) in (int, float) and 0.0 < level < math.inf for level in levels)
    if not numbers:
        return f"a level of its looks is not a positive number: {levels}"
    if math.fsum(levels) > alpha:
        return f"the levels of the looks sum to more than alpha = {alpha}"
    return None


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
    if metadata.get("family") not in PERTURBATIONS:
        law = LAWS[metadata["law"]]
        wrong = metadata.get("norm", law.norm) != law.norm
        problem = (
            f"its norm {metadata.get('norm')!r} is not that of the law {law.name}, {law.norm}"
        )
        return None, (problem,) if wrong else ()
    described = metadata.get("description")
    if described is None:
        return None, ("it has no description of its perturbation",)
    try:
        perturbation = from_record(described)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        return None, (f"its description is not one of a perturbation: {error}",)
    actual = {
        n: perturbation.law.name if n == "law" else getattr(perturbation, n) for n in groups.NOISE
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


ReportRows = Callable[[np.ndarray, str], None]
"""Called with a mask of rows and what is wrong with them."""

_NEEDED = [name for name, field in _Types.model_fields.items() if field.is_required()]
# Far above rounding differences between versions of scipy, far below anything that matters.
# Granted only where a row claims LESS than its votes give.
_ALIKE = 1e-9
# Relative rounding of float32. certifl 0.1 computed radii of uniform distributions from sigma, not
# from the float32 width on which noise is drawn, so its correct radii may be larger by this.
_OF_FLOAT32 = 2.0**-23
_KINDS = {
    "i": ("client", "index", "label", "predicted", "looks"),
    "f": ("radius", "p_lower", "p_upper", "level", "seconds"),
}


@dataclass(frozen=True)
class Finding:
    """One row that does not follow from its votes.

    Attributes:
        client, index: which image.
        problem: what is wrong, in words with both numbers.
    """

    client: int
    index: int
    problem: str


def verify(certificates: Certificates) -> list[Finding]:
    """All rows that do not follow from their votes; empty if all do.

    Where perturbations differ between clients, every row is compared with its client's.

    Checked for all rows: the metadata agree with each other; looks and levels are those that
    estimator, n, alpha and `keep` give, to the last bit, and the range of a scan is the one its
    reach gives. If they could be chosen after the votes, they could be chosen favorably. The
    scales of a network in int8 give the recorded fingerprint of weights and scales.
    Checked per row: n0 selection votes; a number of estimation votes that is one of the looks; the
    level of that look; that the votes stopped there by the recorded rule; class, bounds, radius
    and interval are those that the counts give, and never more.

    What follows from no count, such as the label, is not checked: see `unverified`.

    Returns:
        A finding for each broken promise, with the row's client, index and problem.

    Raises:
        InputError: the certificates carry no votes (a published TSV, for instance), a column is
            damaged, or the metadata do not say which client certifies which perturbation.
    """
    problem = _column_problem(certificates)
    if problem is not None:
        raise InputError(f"These certificates are damaged: {problem}.")
    if groups.PERTURBATIONS not in certificates.conditions:
        return _verified(certificates)
    try:
        masks = groups.masks(certificates.conditions, certificates.client)
        owners = np.sum([np.zeros(len(certificates), np.int64), *masks], axis=0)
        known = certificates.select(owners == 1).by_perturbation()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"These certificates do not say which client certifies which perturbation ({error})."
        ) from error
    misplaced = [
        Finding(
            int(certificates.client[row]),
            int(certificates.index[row]),
            f"{owners[row]} perturbations are recorded for its client instead of one",
        )
        for row in np.flatnonzero(owners != 1)
    ]
    return [*misplaced, *(f for part in known if len(part) for f in _verified(part))]


def unverified(certificates: Certificates) -> tuple[str, ...]:
    """What `verify` cannot compare with anything, in words."""
    notes = ["labels", "which images, model and data these are", "the seed"]
    notes += ["precision, batch size, device, threads, versions and seconds"]
    if certificates.conditions.get("precision") == "int8":
        notes.append("that the scales of int8 are those of training images")
    parts = certificates.by_perturbation() if len(certificates) else ()
    for record in (read_record(part.conditions) for part in parts):
        if record.perturbation is None:
            notes.append("law, unit and threat of a perturbation that certifl does not know")
        if "reach" in record.missing:
            notes.append("how far the scan was asked to look (an older record)")
    return tuple(dict.fromkeys(notes))


def _column_problem(certificates: Certificates) -> str | None:
    """Why columns cannot be used; None if they can."""
    rows = len(certificates.predicted)
    for kinds, names in _KINDS.items():
        for name in names:
            column = np.asarray(getattr(certificates, name))
            if column.shape != (rows,) or column.dtype.kind != kinds:
                return f"the column {name} does not hold one number for each image"
    for name in ("counts", "selection_counts"):
        table = np.asarray(getattr(certificates, name))
        if table.ndim != 2 or len(table) != rows or table.dtype.kind != "i":
            return f"the column {name} does not hold the votes of each class"
    if certificates.counts.shape[1] != certificates.selection_counts.shape[1]:
        return "counts and selection_counts are of different numbers of classes"
    interval = certificates.interval
    if interval is not None and (interval.shape != (rows, 2) or interval.dtype.kind != "f"):
        return "the ends of its intervals are not numbers"
    return None


def _verified(certificates: Certificates) -> list[Finding]:
    """`verify` for certificates of one perturbation."""
    missing = [name for name in _NEEDED if name not in certificates.conditions]
    if missing or certificates.counts.shape[1] == 0:
        raise InputError(
            "These certificates carry no votes, so their radii cannot be recomputed"
            + (f" (missing: {', '.join(missing)})." if missing else ".")
        )
    findings: list[Finding] = []
    report = _reporter(certificates, findings)
    for client, problem in fingerprint_problems(certificates.conditions):
        report((certificates.client == client) | (client is None), problem)
    record = read_record(certificates.conditions)
    for problem in record.problems:
        # Bounds at levels that were not fixed in advance bound nothing: no row is read further.
        report(np.ones(len(certificates), np.bool_), problem)
    if record.estimator is None or record.problems:
        return findings
    sound = _check_numbers(certificates, report)
    sound &= _check_votes(certificates, record.estimator, report)
    part = certificates.select(sound)
    votes, readable = record.estimator.recorded_votes(part, _reporter(part, findings))
    part = part.select(readable)
    if len(part):
        report = _reporter(part, findings)
        _check_claims(part, votes, record.estimator, record.metadata, report)
    return findings


def _reporter(certificates: Certificates, findings: list[Finding]) -> ReportRows:
    """Adds a finding for each row of a mask over these certificates."""

    def report(rows: np.ndarray, problem: str) -> None:
        for row in np.flatnonzero(rows):
            client, index = int(certificates.client[row]), int(certificates.index[row])
            findings.append(Finding(client, index, problem))

    return report


def _check_numbers(certificates: Certificates, report: ReportRows) -> np.ndarray:
    """Which rows can be used; others are reported."""
    classes, label = certificates.counts.shape[1], certificates.label
    votes = np.concatenate([certificates.counts, certificates.selection_counts], axis=1)
    faults = {
        "it has negative votes": (votes < 0).any(axis=1),
        "it has more votes than can be cast": (votes > MOST_VOTES).any(axis=1),  # sums overflow
        "its client or index is negative": (certificates.client < 0) | (certificates.index < 0),
        f"its label is not one of {classes} classes": (label < UNLABELED) | (label >= classes),
    }
    for problem, rows in faults.items():
        report(rows, problem)
    seconds = certificates.seconds
    report(~(np.isfinite(seconds) & (seconds >= 0)), "its seconds are not a duration")
    return ~np.logical_or.reduce(list(faults.values()))


def _check_votes(
    certificates: Certificates, estimator: Estimator, report: ReportRows
) -> np.ndarray:
    """Rows whose number of votes is one of the looks; others are reported."""
    looks, n0 = np.array(estimator.looks), estimator.settings.n0
    look = certificates.looks - 1
    known = (look >= 0) & (look < len(looks))
    look = np.where(known, look, 0)
    cast, chosen = certificates.votes == looks[look], certificates.selection_counts.sum(axis=1)
    report(~known, "its number of looks is not one that was fixed in advance")
    report(~cast, "its number of votes is not that of its last look")
    report(chosen != n0, f"it does not have n0 = {n0} selection votes")
    report(certificates.level != estimator.level(look), "its level is not that of its look")
    return known & cast & (chosen == n0)


def _granted(metadata: Metadata) -> float:
    """Relative excess of radii that is tolerated: 0.0, except for records of certifl 0.1."""
    versions = metadata.get("versions")
    version = versions.get("certifl") if isinstance(versions, Mapping) else None
    old = isinstance(version, str) and version.startswith("0.1.")
    return _OF_FLOAT32 if old and metadata["law"] == UNIFORM.name else 0.0


def _report_numbers(
    name: str,
    stored: np.ndarray,
    expected: np.ndarray,
    sign: int,
    report: ReportRows,
    granted: float = 0.0,
) -> None:
    """Report what claims more than its votes give (`sign` = 1: larger is more), or other than it.

    Claiming more than is granted (see `_granted`) is found to the last bit. Less may be the
    rounding of another scipy version.
    """
    unknown = np.isnan(expected)
    report(unknown & ~np.isnan(stored), f"it has a {name}, which its estimator does not give")
    within = unknown | (sign * stored <= sign * expected * (1.0 + granted))
    alike = np.isclose(stored, expected, rtol=_ALIKE, atol=_ALIKE)
    alike |= unknown | (sign * stored >= sign * expected)
    for row in np.flatnonzero(~(within & alike)):
        more, less = ("larger", "smaller") if sign > 0 else ("smaller", "larger")
        how = less if within[row] else more
        report(
            np.arange(len(stored)) == row,
            f"its {name} {stored[row]} is {how} than {expected[row]}, the one its votes give",
        )


def _check_claims(
    certificates: Certificates,
    votes: Votes,
    estimator: Estimator,
    metadata: Metadata,
    report: ReportRows,
) -> None:
    """Compare all columns with those that the votes give."""
    expected = estimator.finalize(votes)
    for name in ("interval", "scan_votes"):
        if name not in expected and getattr(certificates, name) is not None:
            everything = np.ones(len(certificates), np.bool_)
            report(everything, f"it has a column {name}, which its estimator does not give")
    certified, claimed = expected["certified"], certificates.predicted != ABSTAINED
    selected = certificates.selection_counts.argmax(axis=1)
    report(claimed & (certificates.predicted != selected), "its class is not the selected one")
    report(claimed & ~certified, "its votes certify nothing, but it does not abstain")
    report(~claimed & certified, "it abstains, but its votes certify its class")
    granted = 0.0 if "interval" in expected else _granted(metadata)
    _report_numbers("radius", certificates.radius, expected["radius"], 1, report, granted)
    for name, sign in {"p_lower": 1, "p_upper": -1}.items():
        _report_numbers(name, getattr(certificates, name), expected[name], sign, report)
    if "interval" in expected and certificates.interval is not None:
        _report_intervals(certificates.interval, expected["interval"], report)
    if estimator.stops_early:
        wrong = estimator.misclassified(votes, certificates.label)
        report(wrong & (votes.looks > 1), _STOPPED_LATE)
        tolerance = max(_ALIKE, _granted(metadata))
        early = estimator.stopped_early(votes, expected["radius"], tolerance)
        report(early & ~wrong, _STOPPED_EARLY)


_STOPPED_LATE = (
    "its class is not its label, so label_aware stops at the first look, but more votes were cast"
)
_STOPPED_EARLY = "its votes stopped earlier than radii, keep and label_aware allow"


def _report_intervals(stored: np.ndarray, expected: np.ndarray, report: ReportRows) -> None:
    """Report intervals that are larger than those of the votes, or other than them."""
    low, high = stored.T
    within = (expected[:, 0] <= low) & (low <= 0) & (high >= 0) & (high <= expected[:, 1])
    alike = np.isclose(stored, expected, rtol=_ALIKE, atol=_ALIKE).all(axis=1)
    for row in np.flatnonzero(~(within & alike)):
        how = "smaller" if within[row] else "larger"
        report(
            np.arange(len(stored)) == row,
            f"its interval {stored[row].tolist()} is {how} than {expected[row].tolist()}, the "
            "interval its votes give",
        )
