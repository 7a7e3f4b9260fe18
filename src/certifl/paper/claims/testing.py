"""The claims tested on given runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from certifl.paper.claims.catalogue import CLAIMS, Claim
from certifl.paper.claims.designs import Finding
from certifl.paper.claims.effects import DRAWS, Sampler, layout_of
from certifl.paper.claims.rules import NOT_TESTED, SUPPORTED, UNDECIDED
from certifl.paper.claims.runs import Pool, StudyRun, find_runs
from certifl.report.intervals import too_few
from certifl.report.summary import CONFIDENCE


@dataclass(frozen=True, eq=False)
class Outcome:
    """One comparison with its intervals and verdict.

    Attributes:
        alone: its 95 % interval.
        together: wide enough for all judged comparisons of the claim to hold at once with 95 %;
            the verdict is based on it. Of a comparison that is only reported it is `alone`.
        verdict, why: empty where the comparison is only reported, or no reason is needed.
    """

    finding: Finding
    alone: tuple[float, float]
    together: tuple[float, float]
    verdict: str = ""
    why: str = ""


@dataclass(frozen=True, eq=False)
class ClaimResult:
    """One claim with its verdict.

    Attributes:
        comparisons: all that could be made; those that are judged share one level.
        missing: runs that other comparisons would need, in words.
        partly: whether part of the claim was not tested.
    """

    claim: Claim
    verdict: str
    comparisons: tuple[Outcome, ...]
    missing: tuple[str, ...]
    partly: bool

    @property
    def judged(self) -> tuple[Outcome, ...]:
        """The comparisons that decide."""
        return tuple(t for t in self.comparisons if t.verdict)


@dataclass(frozen=True, eq=False)
class Report:
    """All claims, with notes for the reader.

    Attributes:
        runs: number that could be compared. seeds: of the trainings.
        draws: number of bootstrap draws. notes: what was left out.
    """

    results: tuple[ClaimResult, ...]
    runs: int
    seeds: tuple[int, ...]
    draws: int
    notes: tuple[str, ...]


def check_claims(paths: Sequence[str | Path], draws: int = DRAWS) -> Report:
    """Test the paper's claims.

    Args:
        paths: run folders, or study folders that contain `runs/` or runs.
        draws: number of bootstrap draws.

    Returns:
        A verdict for each claim. Within one claim all judged intervals hold together with 95 %
        (Bonferroni: each is given 1 - 0.05 / k); claims are not corrected for one another.

    Raises:
        StoreMismatch: a folder without a run, or a named run that is not finished.
        StoreError: a run that is damaged.
    """
    runs, notes = find_runs(paths)
    return check_runs(runs, draws, notes)


def check_runs(
    runs: Sequence[StudyRun],
    draws: int = DRAWS,
    notes: Sequence[str] = (),
    claims: Sequence[Claim] = CLAIMS,
) -> Report:
    """As `check_claims`, of runs that were read before, and of some claims alone."""
    whole = [run for run in runs if not too_few(layout_of(run).sizes)]
    if len(whole) < len(runs):
        notes = (
            *notes,
            f"{len(runs) - len(whole)} of {len(runs)} runs certify fewer than ten images, or one "
            "image per client: no interval can be given for them, and they were left out.",
        )
    pool, sampler = Pool(whole), Sampler(whole, draws)
    return Report(
        results=tuple(_check(claim, pool, sampler) for claim in claims),
        runs=len(whole),
        seeds=tuple(sorted({run.metadata.seed for run in whole})),
        draws=draws,
        notes=tuple(notes),
    )


def _check(claim: Claim, pool: Pool, sampler: Sampler) -> ClaimResult:
    parts = [design.findings(pool, sampler) for design in claim.designs]
    findings = [finding for part in parts for finding in part.findings]
    count = sum(finding.rule is not None for finding in findings)
    error = (1.0 - CONFIDENCE) / max(1, count)
    tested = tuple(_test(finding, error) for finding in findings)
    partly = not claim.needs <= {finding.panel for finding in findings} or not all(
        part.findings for part in parts
    )
    missing = dict.fromkeys(text for part in parts for text in part.missing)
    verdict = _verdict(claim, tested)
    if verdict == SUPPORTED and partly:
        verdict = UNDECIDED
    return ClaimResult(claim, verdict, tested, tuple(missing), partly)


def _test(finding: Finding, error: float) -> Outcome:
    alone = finding.effect.interval(1.0 - CONFIDENCE)
    if finding.rule is None:
        return Outcome(finding, alone, alone)
    together = finding.effect.interval(error)
    judgment = finding.rule.judge(*together, finding.effect.level)
    return Outcome(finding, alone, together, judgment.verdict, judgment.why)


def _verdict(claim: Claim, tested: Sequence[Outcome]) -> str:
    groups: dict[str, list[str]] = {}
    for one in tested:
        if one.verdict:
            groups.setdefault(one.finding.group, []).append(one.verdict)
    if not groups:
        return NOT_TESTED
    return claim.across([claim.combination(group) for group in groups.values()])
