"""The claims put to the test on the runs at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from certifl.paper.claims.bootstrap import DRAWS, Sampler, layout_of
from certifl.paper.claims.catalogue import CLAIMS, Claim
from certifl.paper.claims.designs import Finding
from certifl.paper.claims.matching import Pool
from certifl.paper.claims.rules import NOT_TESTED, SUPPORTED, UNDECIDED, Judged
from certifl.paper.claims.runs import StudyRun, find_runs
from certifl.report.summary import CONFIDENCE


@dataclass(frozen=True, eq=False)
class Tested:
    """One comparison with its interval and what follows from it.

    Attributes:
        finding: what was compared.
        alone: its 95 % interval.
        together: wide enough for all judged comparisons of the claim to hold at once with 95 %;
            the verdict rests on it. Of a comparison that is told it is `alone` again.
        judged: the verdict; None where the comparison is told, not judged.
    """

    finding: Finding
    alone: tuple[float, float]
    together: tuple[float, float]
    judged: Judged | None

    @property
    def told(self) -> bool:
        """Whether it decides nothing, so that its interval holds alone."""
        return self.judged is None


@dataclass(frozen=True, eq=False)
class ClaimResult:
    """One claim with its verdict.

    Attributes:
        claim: what was tested. verdict: supported, not supported, undecided, not tested.
        comparisons: all that could be made; those that are judged rest on one level.
        missing: runs that other comparisons would need, in words.
        partly: whether something the claim speaks of was not tested.
    """

    claim: Claim
    verdict: str
    comparisons: tuple[Tested, ...]
    missing: tuple[str, ...]
    partly: bool

    @property
    def judged(self) -> tuple[Tested, ...]:
        """The comparisons that decide."""
        return tuple(t for t in self.comparisons if t.judged is not None)


@dataclass(frozen=True, eq=False)
class Report:
    """All claims, and what else a reader must know.

    Attributes:
        results: one for each claim.
        runs: how many could be compared. seeds: trainings with other seeds.
        draws: how often images were drawn again. notes: what was left out.
    """

    results: tuple[ClaimResult, ...]
    runs: int
    seeds: tuple[int, ...]
    draws: int
    notes: tuple[str, ...]


def check_claims(places: Sequence[str | Path], draws: int = DRAWS) -> Report:
    """Put the paper's claims to the test.

    Args:
        places: run folders, or study folders that hold `runs/` or runs.
        draws: how often images are drawn again.

    Returns:
        A verdict for each claim. Within one claim all judged intervals hold together with 95 %
        (Bonferroni: each is given 1 - 0.05 / k); claims are not corrected for one another.

    Raises:
        StoreMismatch: a folder without a run, or a named run that is not finished.
        StoreError: a run that is damaged.
    """
    runs, notes = find_runs(places)
    return check_runs(runs, draws, notes)


def check_runs(runs: Sequence[StudyRun], draws: int = DRAWS, notes: Sequence[str] = ()) -> Report:
    """As `check_claims`, of runs that were read before."""
    whole = [run for run in runs if layout_of(run).enough]
    if len(whole) < len(runs):
        notes = (
            *notes,
            f"{len(runs) - len(whole)} of {len(runs)} runs certify fewer than ten images, or one "
            "image a client: no interval can be given for them, and they were left out.",
        )
    pool, sampler = Pool(whole), Sampler(whole, draws)
    return Report(
        results=tuple(_check(claim, pool, sampler) for claim in CLAIMS),
        runs=len(whole),
        seeds=tuple(sorted({run.facts.seed for run in whole})),
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


def _test(finding: Finding, error: float) -> Tested:
    alone = finding.effect.interval(1.0 - CONFIDENCE)
    if finding.rule is None:
        return Tested(finding, alone, alone, None)
    together = finding.effect.interval(error)
    return Tested(finding, alone, together, finding.rule.judge(*together, finding.effect.level))


def _verdict(claim: Claim, tested: Sequence[Tested]) -> str:
    groups: dict[str, list[str]] = {}
    for one in tested:
        if one.judged is not None:
            groups.setdefault(one.finding.group, []).append(one.judged.verdict)
    if not groups:
        return NOT_TESTED
    return claim.across([claim.combination(group) for group in groups.values()])
