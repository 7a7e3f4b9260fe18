"""Recompute every radius from its votes: a stored certificate must follow from its counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from certifl.certification.certificates import ABSTAINED, Certificates
from certifl.certification.groups import PERTURBATIONS, masks
from certifl.certification.scan import read_votes, scan_from, unpacked
from certifl.certification.settings import Settings
from certifl.errors import InputError
from certifl.smoothing.bounds import BOUNDS
from certifl.smoothing.laws import LAWS
from certifl.smoothing.strata import passes_of

__all__ = ["Finding", "verify"]

Report = Callable[[np.ndarray, str], None]
"""Called with a mask of rows and what is wrong with them."""

_NEEDED = (
    *("law", "sigma", "estimator", "bounds", "alpha", "n0", "n"),
    *("look_votes", "look_levels"),
)


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
    """All rows whose class or radius claims more than their votes give; empty when all is well.

    Where clients certify perturbations of their own, every row is held against its client's.

    Checked for all rows: the looks and their levels are those that estimator, n, alpha and `keep`
    give, to the last bit. Who could choose them after the votes, could choose where they lie well.
    Checked per row: n0 selection votes; a number of estimation votes that is one of the looks;
    the level of that look; the class is the most voted of the selection; the radius is at most the
    one recomputed from the counts, and for a scan the interval at most the one recomputed from
    the votes in their order.

    Returns:
        A finding for each promise that is broken, with the row's client, index and problem.

    Raises:
        InputError: the certificates carry no votes (a published TSV, for instance), or do not say
            for which clients which perturbation holds.
    """
    if PERTURBATIONS not in certificates.conditions:
        return _verified(certificates)
    try:
        held = masks(certificates.conditions, certificates.client)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"These certificates do not say whose perturbation is which ({error})."
        ) from error
    owners = np.sum(held, axis=0)
    strangers = [
        Finding(
            int(certificates.client[row]),
            int(certificates.index[row]),
            f"{owners[row]} perturbations are recorded for its client instead of one",
        )
        for row in np.flatnonzero(owners != 1)
    ]
    known = certificates.select(owners == 1)
    return [*strangers, *(f for part in known.by_perturbation() for f in _verified(part))]


def _verified(certificates: Certificates) -> list[Finding]:
    """The same for certificates of one perturbation."""
    facts = certificates.conditions
    missing = [name for name in _NEEDED if name not in facts]
    if missing or certificates.counts.shape[1] == 0:
        raise InputError(
            "These certificates carry no votes, so their radii cannot be recomputed"
            + (f" (missing: {', '.join(missing)})." if missing else ".")
        )
    scanned = facts["estimator"] == "scan"
    findings: list[Finding] = []

    def report(rows: np.ndarray, problem: str) -> None:
        for row in np.flatnonzero(rows):
            client, index = int(certificates.client[row]), int(certificates.index[row])
            findings.append(Finding(client, index, problem))

    everything = np.ones(len(certificates), np.bool_)
    problem = _schedule_problem(facts, scanned)
    if problem is not None:
        # Bounds at levels that were not fixed in advance bound nothing: no row is read further.
        report(everything, problem)
        return findings
    looks, levels = np.array(facts["look_votes"]), np.array(facts["look_levels"])
    look = certificates.looks - 1
    known = (look >= 0) & (look < len(looks))
    look = np.where(known, look, 0)
    report(~known, "its number of looks is not one that was fixed in advance")
    report(certificates.votes != looks[look], "its number of votes is not that of its last look")
    report(
        certificates.selection_counts.sum(axis=1) != facts["n0"],
        f"it has not n0 = {facts['n0']} selection votes",
    )
    level = np.full(len(look), facts["alpha"]) if scanned else levels[look]
    report(~np.isclose(certificates.level, level, rtol=1e-12), "its level is not its look's")
    selected = certificates.selection_counts.argmax(axis=1)
    claimed = certificates.predicted != ABSTAINED
    report(claimed & (certificates.predicted != selected), "its class is not the selected one")
    if scanned:
        _check_intervals(certificates, report)
    else:
        _check_claims(certificates, looks[look], level, report)
    return findings


def _schedule_problem(facts: Mapping[str, Any], scanned: bool) -> str | None:
    """Why looks and levels may not have been fixed before the first vote; None where they were."""
    looks, levels, alpha = facts["look_votes"], facts["look_levels"], facts["alpha"]
    if not _rising(looks):
        return f"the looks {looks} are not numbers of votes that rise"
    if len(levels) != (1 if scanned else len(looks)):
        return f"there are {len(levels)} levels for {len(looks)} looks"
    if not all(_number(level) and level > 0.0 for level in levels):
        return f"a level of its looks is no positive number: {levels}"
    if math.fsum(levels) > alpha:
        return f"the levels of the looks sum to more than alpha = {alpha}"
    return _scan_problem(facts) if scanned else _settings_problem(facts)


def _rising(looks: list[Any]) -> bool:
    whole = all(isinstance(votes, (int, np.integer)) and votes > 0 for votes in looks)
    return bool(looks) and whole and sorted(set(looks)) == list(looks)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _settings_problem(facts: Mapping[str, Any]) -> str | None:
    """Where bounds, looks or levels are not those that the other settings give."""
    keep = facts.get("keep", "certificates")  # records older than the choice do not name it
    try:
        settings = Settings(facts["estimator"], facts["n0"], facts["n"], facts["alpha"], keep=keep)
    except (TypeError, InputError) as error:
        return f"its settings are none that could be asked for: {error}"
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
    scan = scan_from(facts)
    try:
        passes = passes_of(facts["n"], scan.sigma, scan.width)
    except (TypeError, InputError) as error:
        return f"its settings are none that could be asked for: {error}"
    if scan.passes != passes:
        return f"the passes {list(scan.passes)} are not those of its settings, {list(passes)}"
    if list(facts["look_votes"]) != scan.totals.tolist():
        return "the looks are not the passes of its scan"
    if list(facts["look_levels"]) != [facts["alpha"]]:
        return f"its level {facts['look_levels']} is not alpha = {facts['alpha']}"
    return None


def _check_claims(
    certificates: Certificates, votes: np.ndarray, levels: np.ndarray, report: Report
) -> None:
    facts = certificates.conditions
    rows = np.arange(len(certificates))
    selected = certificates.selection_counts.argmax(axis=1)
    top = np.minimum(certificates.counts[rows, selected], votes)
    others = certificates.counts.copy()
    others[rows, selected] = -1
    runner = np.minimum(others.max(axis=1), votes - top)
    p_lower, p_upper = BOUNDS[facts["bounds"]](top, runner, votes, levels)
    radius = np.where(
        p_lower > p_upper, LAWS[facts["law"]].radius(facts["sigma"], p_lower, p_upper), 0.0
    )
    claimed = certificates.predicted != ABSTAINED
    report(claimed & (p_lower <= p_upper), "its votes certify nothing, yet it does not abstain")
    for row in np.flatnonzero(~(certificates.radius <= radius)):
        mask = rows == row
        report(
            mask,
            f"its radius {certificates.radius[row]} is larger than {radius[row]}, "
            "the radius its votes give",
        )


def _check_intervals(certificates: Certificates, report: Report) -> None:
    facts, rows = certificates.conditions, np.arange(len(certificates))
    scan, classes = scan_from(facts), certificates.counts.shape[1]
    if certificates.interval is None or certificates.scan_votes is None:
        raise InputError("These certificates carry no votes of a scan; verify the .parquet file.")
    selected = certificates.selection_counts.argmax(axis=1)
    claimed = certificates.predicted != ABSTAINED
    low, high = certificates.interval.T
    report(
        ~(certificates.radius <= np.minimum(-low, high)),
        "its radius is larger than the shorter side of its interval",
    )
    for row in rows:
        mask = rows == row
        try:
            path = unpacked(certificates.scan_votes[row], classes)
            if not np.array_equal(np.bincount(path, minlength=classes), certificates.counts[row]):
                raise ValueError("they are not those that were counted")
            certified, ends = read_votes(scan, path, selected[row], facts["alpha"])
        except (ValueError, InputError) as error:
            report(mask, f"its votes cannot be read: {error}")
            continue
        if claimed[row] and not certified:
            report(mask, "its votes certify nothing, yet it does not abstain")
        if not (ends[0] <= low[row] <= 0 <= high[row] <= ends[1]):
            report(
                mask,
                f"its interval {[low[row], high[row]]} is larger than {ends.tolist()}, "
                "the interval its votes give",
            )
