"""Recompute every row of certificates from its votes: what is claimed must follow from counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from certifl.certification.certificates import ABSTAINED, UNLABELLED, Certificates
from certifl.certification.metadata import PERTURBATIONS, masks
from certifl.certification.record import Record, read_record
from certifl.certification.scan import read_votes, settled, unpacked
from certifl.certification.settings import ESTIMATORS
from certifl.errors import InputError
from certifl.smoothing.bounds import BOUNDS
from certifl.smoothing.laws import LAWS, UNIFORM
from certifl.smoothing.scan import Reading
from certifl.smoothing.sequential import grid_steps, reachable_radius

ReportRows = Callable[[np.ndarray, str], None]
"""Called with a mask of rows and what is wrong with them."""

_NEEDED = (
    *("law", "sigma", "estimator", "bounds", "alpha", "n0", "n"),
    *("look_votes", "look_levels"),
)
# Far above what another version of scipy rounds otherwise, far below anything that matters. It is
# granted only where a row claims LESS than its votes give.
_ALIKE = 1e-9
# By how much a float32 rounds down. certifl 0.1 put sigma itself into radii of uniform laws, and
# not the float32 width on which the noise is drawn, so that its honest radii are larger by it.
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
    """All rows that do not follow from their votes; empty when all is well.

    Where clients certify perturbations of their own, every row is compared with its client's.

    Checked for all rows: the conditions agree with each other; looks and levels are those that
    estimator, n, alpha and `keep` give, to the last bit, and the range of a scan is the one its
    reach gives. Who could choose them after the votes could choose where they lie well.
    Checked per row: n0 selection votes; a number of estimation votes that is one of the looks; the
    level of that look; that the votes stopped there by the recorded rule; class, bounds, radius
    and interval are those that the counts give, and never more.

    What follows from no count, such as the label, is not checked: see `unverified`.

    Returns:
        A finding for each promise that is broken, with the row's client, index and problem.

    Raises:
        InputError: the certificates carry no votes (a published TSV, for instance), a column is
            damaged, or they do not say for which clients which perturbation holds.
    """
    problem = _column_problem(certificates)
    if problem is not None:
        raise InputError(f"These certificates are damaged: {problem}.")
    if PERTURBATIONS not in certificates.conditions:
        return _verified(certificates)
    try:
        held = masks(certificates.conditions, certificates.client)
        owners = np.sum([np.zeros(len(certificates), np.int64), *held], axis=0)
        known = certificates.select(owners == 1).by_perturbation()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"These certificates do not say whose perturbation is which ({error})."
        ) from error
    strangers = [
        Finding(
            int(certificates.client[row]),
            int(certificates.index[row]),
            f"{owners[row]} perturbations are recorded for its client instead of one",
        )
        for row in np.flatnonzero(owners != 1)
    ]
    return [*strangers, *(f for part in known if len(part) for f in _verified(part))]


def unverified(certificates: Certificates) -> tuple[str, ...]:
    """What the certificates say that `verify` cannot compare with anything, in words."""
    notes = ["labels", "which images, model and data these are", "the seed"]
    notes += ["precision, batch size, device, threads, versions and seconds"]
    parts = certificates.by_perturbation() if len(certificates) else ()
    for record in (read_record(part.conditions) for part in parts):
        if record.perturbation is None:
            notes.append("unit and threat of a perturbation that certifl does not have")
        if record.reach_unknown:
            notes.append("how far the scan was asked to look (an older record)")
    return tuple(dict.fromkeys(notes))


def _column_problem(certificates: Certificates) -> str | None:
    """Why columns cannot be computed with; None where they can."""
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
    """The same for certificates of one perturbation."""
    missing = [name for name in _NEEDED if name not in certificates.conditions]
    if missing or certificates.counts.shape[1] == 0:
        raise InputError(
            "These certificates carry no votes, so their radii cannot be recomputed"
            + (f" (missing: {', '.join(missing)})." if missing else ".")
        )
    findings: list[Finding] = []

    def report(rows: np.ndarray, problem: str) -> None:
        for row in np.flatnonzero(rows):
            client, index = int(certificates.client[row]), int(certificates.index[row])
            findings.append(Finding(client, index, problem))

    record = read_record(certificates.conditions)
    for problem in record.problems:
        # Bounds at levels that were not fixed in advance bound nothing: no row is read further.
        report(np.ones(len(certificates), np.bool_), problem)
    if not record.problems:
        _check_rows(certificates, record, report)
    return findings


def _check_rows(certificates: Certificates, record: Record, report: ReportRows) -> None:
    sound = _check_numbers(certificates, report) & _check_votes(certificates, record, report)
    chosen = np.flatnonzero(sound)
    if not len(chosen):
        return

    def report_sound(rows: np.ndarray, problem: str) -> None:
        mask = np.zeros(len(certificates), np.bool_)
        mask[chosen[rows]] = True
        report(mask, problem)

    part = certificates.select(chosen)
    if record.scan is not None:
        _check_intervals(part, record, report_sound)
    else:
        _check_claims(part, record, report_sound)


def _check_numbers(certificates: Certificates, report: ReportRows) -> np.ndarray:
    """Which rows can be computed with; others are reported."""
    classes, label = certificates.counts.shape[1], certificates.label
    votes = np.concatenate([certificates.counts, certificates.selection_counts], axis=1)
    faults = {
        "it has negative votes": (votes < 0).any(axis=1),
        "its client or index is negative": (certificates.client < 0) | (certificates.index < 0),
        f"its label is not one of {classes} classes": (label < UNLABELLED) | (label >= classes),
    }
    for problem, rows in faults.items():
        report(rows, problem)
    seconds = certificates.seconds
    report(~(np.isfinite(seconds) & (seconds >= 0)), "its seconds are not a time")
    return ~np.logical_or.reduce(list(faults.values()))


def _check_votes(certificates: Certificates, record: Record, report: ReportRows) -> np.ndarray:
    """Which rows have as many votes as one of the looks; others are reported."""
    facts = record.facts
    looks, levels = np.array(facts["look_votes"]), np.array(facts["look_levels"])
    look = certificates.looks - 1
    known = (look >= 0) & (look < len(looks))
    look = np.where(known, look, 0)
    cast, chosen = certificates.votes == looks[look], certificates.selection_counts.sum(axis=1)
    report(~known, "its number of looks is not one that was fixed in advance")
    report(~cast, "its number of votes is not that of its last look")
    report(chosen != facts["n0"], f"it has not n0 = {facts['n0']} selection votes")
    level = np.full(len(look), facts["alpha"]) if record.scan is not None else levels[look]
    report(certificates.level != level, "its level is not its look's")
    return known & cast & (chosen == facts["n0"])


def _check_class(certificates: Certificates, certified: np.ndarray, report: ReportRows) -> None:
    claimed = certificates.predicted != ABSTAINED
    selected = certificates.selection_counts.argmax(axis=1)
    report(claimed & (certificates.predicted != selected), "its class is not the selected one")
    report(claimed & ~certified, "its votes certify nothing, yet it does not abstain")
    report(~claimed & certified, "it abstains, yet its votes certify its class")


def _granted(facts: Mapping[str, Any]) -> float:
    """What radii may exceed those of today by, relatively: 0.0 but for records of certifl 0.1."""
    versions = facts.get("versions")
    version = versions.get("certifl") if isinstance(versions, Mapping) else None
    old = isinstance(version, str) and version.startswith("0.1.")
    return _OF_FLOAT32 if old and facts["law"] == UNIFORM.name else 0.0


def _report_numbers(
    name: str,
    stored: np.ndarray,
    made: np.ndarray,
    sign: int,
    report: ReportRows,
    granted: float = 0.0,
) -> None:
    """Report what claims more than its votes give (`sign` = 1: larger is more), or other than it.

    Claiming more than is granted (see `_granted`) is found to the last bit. Less may be a rounding
    of another scipy.
    """
    source = "the one its votes give"
    within = sign * stored <= sign * made * (1.0 + granted)
    alike = np.isclose(stored, made, rtol=_ALIKE, atol=_ALIKE) | (sign * stored >= sign * made)
    for row in np.flatnonzero(~(within & alike)):
        more, less = ("larger", "smaller") if sign > 0 else ("smaller", "larger")
        how = less if within[row] else more
        report(
            np.arange(len(stored)) == row,
            f"its {name} {stored[row]} is {how} than {made[row]}, {source}",
        )


def _check_claims(certificates: Certificates, record: Record, report: ReportRows) -> None:
    facts, law = record.facts, LAWS[record.facts["law"]]
    look = certificates.looks - 1
    votes, levels = np.array(facts["look_votes"])[look], np.array(facts["look_levels"])[look]
    top, runner = _tops(certificates)
    p_lower, p_upper = BOUNDS[facts["bounds"]](top, runner, votes, levels)
    certified = np.asarray(p_lower > p_upper)
    radius = np.where(certified, law.radius(facts["sigma"], p_lower, p_upper), 0.0)
    if certificates.interval is not None or certificates.scan_votes is not None:
        report(np.ones(len(look), np.bool_), "it has an interval, but is of no scan")
    _check_class(certificates, certified, report)
    _report_numbers("radius", certificates.radius, radius, 1, report, _granted(facts))
    _report_numbers("p_lower", certificates.p_lower, np.asarray(p_lower), 1, report)
    _report_numbers("p_upper", certificates.p_upper, np.asarray(p_upper), -1, report)
    if ESTIMATORS[facts["estimator"]][1]:
        _check_stops(certificates, record, radius, report)


def _tops(certificates: Certificates) -> tuple[np.ndarray, np.ndarray]:
    """Estimation votes of the selected class, and the most of any other."""
    rows, selected = np.arange(len(certificates)), certificates.selection_counts.argmax(axis=1)
    others = certificates.counts.copy()
    others[rows, selected] = -1
    return certificates.counts[rows, selected], np.maximum(others.max(axis=1), 0)


def _wrong(certificates: Certificates, record: Record) -> np.ndarray:
    """Images on which votes stopped because their class is wrong."""
    assert record.settings is not None
    labelled = certificates.label != UNLABELLED
    selected = certificates.selection_counts.argmax(axis=1)
    return labelled & (selected != certificates.label) & record.settings.label_aware


def _check_stops(
    certificates: Certificates, record: Record, radius: np.ndarray, report: ReportRows
) -> None:
    """Votes stop where radii, label and label_aware say so: altered ones do not fit the votes."""
    settings, perturbation = record.settings, record.perturbation
    assert settings is not None
    wrong, last = _wrong(certificates, record), len(settings.looks)
    report(wrong & (certificates.looks > 1), _STOPPED_LATE)
    if perturbation is None:
        return
    try:
        grid = settings.grid(perturbation)
    except InputError:
        return  # so few votes that none could be certified: they were all cast
    rows = np.flatnonzero(~wrong & (certificates.looks < last))
    top, runner = _tops(certificates)
    best = reachable_radius(
        top[rows],
        runner[rows],
        certificates.looks[rows] - 1,
        settings.looks,
        settings.levels,
        perturbation.law,
        perturbation.sigma,
        BOUNDS[settings.bounds],
        give_up=settings.give_up(grid),
    )
    # A grid step that is missed by a rounding counts as reached.
    near = max(_ALIKE, _granted(record.facts))
    gained = grid_steps(best * (1 - near), grid) > grid_steps(radius[rows] * (1 + near), grid)
    early = np.zeros(len(certificates), np.bool_)
    early[rows[gained]] = True
    report(early, _STOPPED_EARLY)


_STOPPED_LATE = (
    "its class is not its label, so label_aware stops at the first look, but more votes were cast"
)
_STOPPED_EARLY = "its votes stopped earlier than radii, keep and label_aware allow"


def _check_intervals(certificates: Certificates, record: Record, report: ReportRows) -> None:
    if certificates.interval is None or certificates.scan_votes is None:
        raise InputError("These certificates carry no votes of a scan; verify the .parquet file.")
    rows, low, high = np.arange(len(certificates)), *certificates.interval.T
    shorter = np.minimum(-low, high) + 0.0
    report(
        ~(certificates.radius <= shorter),
        "its radius is larger than the shorter side of its interval",
    )
    report(
        certificates.radius < shorter - _ALIKE,
        "its radius is smaller than the shorter side of its interval",
    )
    known = np.isfinite(certificates.p_lower) | np.isfinite(certificates.p_upper)
    report(known, "it has bounds of a probability, which a scan has not")
    certified, early = certificates.predicted != ABSTAINED, np.zeros(len(certificates), np.bool_)
    for row in range(len(rows)):
        reading = _read(
            certificates, record, row, lambda problem, row=row: report(rows == row, problem)
        )
        if reading is not None:
            certified[row] = reading.certified[0]
            early[row] = not _stops(certificates, record, row, reading)
    wrong = _wrong(certificates, record)
    report(wrong & (certificates.looks > 1), _STOPPED_LATE)
    report(early & ~wrong, _STOPPED_EARLY)
    _check_class(certificates, certified, report)


def _stops(certificates: Certificates, record: Record, row: int, reading: Reading) -> bool:
    """Whether the votes of one image could end where they did, were its class right."""
    assert record.scan is not None
    assert record.settings is not None
    last = certificates.looks[row] == len(record.scan.passes)
    return bool(last) or settled(reading, record.scan, record.settings)


def _read(
    certificates: Certificates, record: Record, row: int, report: Callable[[str], None]
) -> Reading | None:
    """What the votes of one image certify; what does not follow from them is reported."""
    assert record.scan is not None
    assert certificates.scan_votes is not None
    assert certificates.interval is not None
    counts = certificates.counts[row]
    try:
        path = unpacked(certificates.scan_votes[row], len(counts), int(counts.sum()))
        if not np.array_equal(np.bincount(path, minlength=len(counts)), counts):
            raise ValueError("they are not those that were counted")
        selected = int(certificates.selection_counts[row].argmax())
        reading = read_votes(record.scan, path, selected, record.facts["alpha"])
    except (ValueError, InputError) as error:
        report(f"its votes cannot be read: {error}")
        return None
    (low, high), ends = certificates.interval[row], reading.interval[0]
    if not (ends[0] <= low <= 0 <= high <= ends[1]):
        report(_not_the(certificates.interval[row], "larger", ends))
    elif not np.allclose([low, high], ends, rtol=_ALIKE, atol=_ALIKE):
        report(_not_the(certificates.interval[row], "smaller", ends))
    return reading


def _not_the(interval: np.ndarray, how: str, ends: np.ndarray) -> str:
    return (
        f"its interval {interval.tolist()} is {how} than {ends.tolist()}, the interval its votes "
        "give"
    )
