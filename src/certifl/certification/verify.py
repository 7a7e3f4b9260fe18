"""Recompute every radius from its votes: a stored certificate must follow from its counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from certifl.certification.certificates import ABSTAINED, Certificates
from certifl.certification.groups import PERTURBATIONS, masks
from certifl.certification.scan import read_votes, scan_from, unpacked
from certifl.errors import InputError
from certifl.smoothing.bounds import BOUNDS
from certifl.smoothing.laws import LAWS

__all__ = ["Finding", "verify"]

Report = Callable[[np.ndarray, str], None]
"""Called with a mask of rows and what is wrong with them."""

_NEEDED = ("law", "sigma", "bounds", "alpha", "n0", "n", "look_votes", "look_levels")


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

    Checked per row: n0 selection votes; a number of estimation votes that is one of the looks
    fixed in advance; the level of that look; levels that sum to at most alpha; the class is the
    most voted of the selection; the radius is at most the one recomputed from the counts, and for
    a scan the interval at most the one recomputed from the votes in their order.

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
    scanned = facts.get("estimator") == "scan"
    looks, levels = np.array(facts["look_votes"]), np.array(facts["look_levels"])
    findings: list[Finding] = []

    def report(rows: np.ndarray, problem: str) -> None:
        for row in np.flatnonzero(rows):
            client, index = int(certificates.client[row]), int(certificates.index[row])
            findings.append(Finding(client, index, problem.format(row=row)))

    everything = np.ones(len(certificates), np.bool_)
    if levels.sum() > facts["alpha"] * (1 + 1e-12):
        report(everything, f"the levels of the looks sum to more than alpha = {facts['alpha']}")
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
    if not np.array_equal(scan.totals, facts["look_votes"]):
        report(rows >= 0, "the looks are not the passes of its scan")
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
