"""The paper's claims as data (sentence, runs, quantity, rule), and tested on given runs.

Words: "robust" is trained with the perturbation that is certified, "nominal" without augmentation.
A small sigma is like the paper's smaller one of the family, a large one like its larger one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from certifl.paper.claims import rules
from certifl.paper.claims.designs import Best, Finding, Growth, Matched, Pairs
from certifl.paper.claims.effects import DRAWS, Sampler, layout_of
from certifl.paper.claims.runs import (
    AFFINE_FEDAVG,
    FEDAVG,
    FROM_AFFINE,
    FROM_NOMINAL,
    FROM_ROBUST,
    LARGE,
    LOCAL,
    MIXTURE,
    NOMINAL_FEDAVG,
    SMALL,
    Counts,
    Pool,
    Scope,
    StudyRun,
    find_runs,
)
from certifl.report.intervals import too_few
from certifl.report.summary import CONFIDENCE

Design = Pairs | Growth | Best | Matched

_MOST_SEVERAL = 50
FEW = Counts(2, 5, (4,))
SEVERAL = Counts(6, _MOST_SEVERAL, (10, 20))
NOT_MANY = Counts(2, _MOST_SEVERAL, (10,))
ANY = Counts(2, math.inf, (10,))
ALL = Counts(2, math.inf, (4, 10, 20))
MANY = Counts(_MOST_SEVERAL + 1, math.inf, (100,))

_BOTH = (SMALL, LARGE)
_MOVES = ("rotation", "translation")
_THREE = ("pixel", "rotation", "translation")

_FEW = Scope(_MOVES, _BOTH, FEW)
_SEVERAL = Scope(_MOVES, _BOTH, SEVERAL)
_FIGURE_1 = Scope(_MOVES, _BOTH, ALL)
_FIGURE_2 = Scope(_THREE, _BOTH, ANY, required=_THREE)
_FIGURE_3 = Scope(_MOVES, _BOTH, ANY, required=_MOVES)
_FIGURE_4_SMALL = Scope(_THREE, (SMALL,), NOT_MANY)
_FIGURE_4_LARGE = Scope(_THREE, (LARGE,), NOT_MANY)
_ANY_SMALL = Scope(_THREE, (SMALL,), Counts(2, math.inf, (10, 100)))
_FIGURE_5 = Scope(_THREE, _BOTH, ANY)
_FIGURE_5_ALL = Scope(_THREE, _BOTH, ANY, required=_MOVES)
_FIGURE_7 = Scope(_THREE, _BOTH, MANY)
_FIGURES_4_AND_7 = Scope(_THREE, _BOTH, Counts(2, math.inf, (10, 100)))


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper that can be wrong.

    Attributes:
        name: section and number. figure: where the paper shows it.
        sentence: the claim in our words. hypothesis: the same as a statement about numbers.
        designs: which runs are compared, and what is measured on them.
        combination: how the verdicts of one group, for instance of all values of lambda, become
            one. across: how those of all groups do.
        show_details: whether the verdict's words include the details of the comparisons.
    """

    name: str
    figure: str
    sentence: str
    hypothesis: str
    designs: tuple[Design, ...]
    combination: rules.Combination = rules.every
    across: rules.Combination = rules.every
    show_details: bool = False

    @property
    def rule(self) -> str:
        """When the claim counts as supported, in words."""
        joined = _SOME if self.across is rules.any_supported else _EVERY
        if self.combination is rules.all_but_one:
            joined = _ALL_BUT_ONE
        return f"{self.judged_by.words}; {joined}"

    @property
    def judged_by(self) -> rules.Equivalence | rules.Superiority | rules.MinimumEffect:
        """The rule of every judged comparison."""
        design = self.designs[0]
        return design.judged[0][1] if isinstance(design, Pairs) else rules.Superiority()


_EVERY = "all comparisons must be supported, one that is not supported refutes the claim"
_SOME = "one supported comparison is enough, since the claim is that it can happen"
_ALL_BUT_ONE = (
    "of three or more values of λ one may fail; all settings must be supported, one that is not "
    "supported refutes the claim"
)

_AHEAD = (("acr", rules.Superiority()),)
_SPREAD = (("spread", rules.Superiority()),)
_EQUAL = (("acr", rules.Equivalence()), ("accuracy", rules.Equivalence()))
_ALSO = ("accuracy",)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "4.1 (i)",
        "figures 1 and 6",
        "With few clients (4), each with much data, training alone is about as good as FedAvg, in "
        "accuracy and in robustness.",
        "ACR and accuracy of Local and of FedAvg differ by less than 3 points and by less than a "
        "quarter of the larger one.",
        (Pairs(LOCAL, FEDAVG, _FEW, _EQUAL),),
    ),
    Claim(
        "4.1 (ii)",
        "figures 1 and 6",
        "With more clients (10 or 20), each with little data, FedAvg is more robust than training "
        "alone.",
        "The ACR of FedAvg is larger than that of Local.",
        (Pairs(FEDAVG, LOCAL, _SEVERAL, _AHEAD, _ALSO),),
    ),
    Claim(
        "4.1 (ii) by over 20 points",
        "figures 1 and 6",
        "With more clients (10 or 20), FedAvg can certify over 20 points more of the images than "
        "training alone.",
        "At some radius the certified accuracy of FedAvg exceeds that of Local by over 20 points.",
        (Pairs(FEDAVG, LOCAL, _SEVERAL, (("largest gain", rules.MinimumEffect(0.20)),)),),
        across=rules.any_supported,
    ),
    Claim(
        "4.1 (iii)",
        "figures 1 and 6",
        "Where federated training was robust, personalized models are about as good as the global "
        "one.",
        "ACR and accuracy of Personalized and of FedAvg differ by less than 3 points and by less "
        "than a quarter of the larger one.",
        (Pairs(FROM_ROBUST, FEDAVG, _FIGURE_1, _EQUAL),),
    ),
    Claim(
        "4.1 (iv) spread",
        "figures 1, 6, 8 and 9",
        "Best and worst client lie further apart with training alone than with FedAvg.",
        "Best minus worst client, in ACR, is larger for Local than for FedAvg.",
        (Pairs(LOCAL, FEDAVG, _FIGURE_1, _SPREAD),),
    ),
    Claim(
        "4.1 (iv) growth",
        "figures 1 and 6",
        "The more clients, the more the spread of training alone exceeds that of FedAvg.",
        "The difference of the two spreads is larger with many clients than with few. Spreads of "
        "more clients are larger by chance alone; the variation is reported beside it.",
        (Growth(LOCAL, FEDAVG, _FIGURE_1, "spread", reported=("scatter",)),),
        show_details=True,
    ),
    Claim(
        "4.2 from nominal",
        "figure 2",
        "Robust personalization of a nominally trained model makes it more robust, for all three "
        "perturbations and both sigmas.",
        "The ACR of Personalized from nominal is larger than that of the nominal FedAvg.",
        (Pairs(FROM_NOMINAL, NOMINAL_FEDAVG, _FIGURE_2, _AHEAD, _ALSO),),
    ),
    Claim(
        "4.2 from affine",
        "figure 3",
        "Robust personalization of a model that was trained with affine deformations makes it "
        "more robust, to rotations and to translations.",
        "The ACR of Personalized from affine is larger than that of the affine FedAvg.",
        (Pairs(FROM_AFFINE, AFFINE_FEDAVG, _FIGURE_3, _AHEAD, _ALSO, same_start=True),),
    ),
    Claim(
        "4.3 (i)",
        "figure 4",
        "At a small sigma, a nominal model that was robustly personalized beats robust training "
        "alone.",
        "The ACR of Personalized from nominal is larger than that of Local.",
        (Pairs(FROM_NOMINAL, LOCAL, _FIGURE_4_SMALL, _AHEAD, _ALSO),),
    ),
    Claim(
        "4.3 (i) growth",
        "figure 4",
        "At a small sigma, the advantage of robustly personalizing a nominal model over robust "
        "training alone grows with the number of clients.",
        "The difference of ACR is larger with many clients than with few.",
        (Growth(FROM_NOMINAL, LOCAL, _ANY_SMALL, "acr"),),
        show_details=True,
    ),
    Claim(
        "4.3 (ii)",
        "figure 4",
        "At a large sigma, a nominal model that was robustly personalized is about as robust as "
        "robust training alone.",
        "The ACR of Personalized from nominal and of Local differ by less than 3 points and by "
        "less than a quarter of the larger one.",
        (Pairs(FROM_NOMINAL, LOCAL, _FIGURE_4_LARGE, (("acr", rules.Equivalence()),), _ALSO),),
    ),
    Claim(
        "A.2",
        "figure 7",
        "With 100 clients, robust personalization of a nominal model beats robust training alone.",
        "The ACR of Personalized from nominal is larger than that of Local.",
        (Pairs(FROM_NOMINAL, LOCAL, _FIGURE_7, _AHEAD, _ALSO),),
    ),
    Claim(
        "A.2 growth",
        "figures 4 and 7",
        "With 100 clients, robust personalization of a nominal model is farther ahead of robust "
        "training alone than with few.",
        "The difference of ACR is larger with 100 clients than with the most that are not many.",
        (Growth(FROM_NOMINAL, LOCAL, _FIGURES_4_AND_7, "acr", from_at_most=_MOST_SEVERAL),),
        show_details=True,
    ),
    Claim(
        "4.4 (i)",
        "figures 5 and 10",
        "The mixture is more robust than FedAvg for almost every λ, against every deformation and "
        "with both sigmas.",
        "The ACR of the mixture is larger than that of FedAvg, for all 0 < λ < 1 but one.",
        (Pairs(MIXTURE, FEDAVG, _FIGURE_5_ALL, _AHEAD, together=True),),
        rules.all_but_one,
    ),
    Claim(
        "4.4 (i) best",
        "figures 5 and 10",
        "λ = 0.1, the least personalized mixture, is the most robust one.",
        "The ACR of λ = 0.1 is larger than that of every other λ.",
        (Best(0.1, _FIGURE_5),),
        show_details=True,
    ),
    Claim(
        "4.4 (i) matched steps",
        "figure 5, with further runs",
        "The mixture beats FedAvg because of the pull to the mean, not because a small λ is also "
        "a small learning rate.",
        "The ACR of the mixture with learning rate lr / λ is larger than that of FedAvg with lr, "
        "for all 0 < λ < 1 but one.",
        (Matched(_FIGURE_5),),
        rules.all_but_one,
        show_details=True,
    ),
    Claim(
        "4.4 (ii)",
        "figures 4 and 5",
        "The clients of the mixture lie closer together than those of training alone and of "
        "personalization.",
        "Best minus worst client, in ACR, is larger for Local, and for Personalized from nominal, "
        "than for the mixture.",
        (
            Pairs(LOCAL, MIXTURE, _FIGURE_5, _SPREAD),
            Pairs(FROM_NOMINAL, MIXTURE, _FIGURE_5, _SPREAD),
        ),
    ),
)


# The claims tested on given runs.


@dataclass(frozen=True, eq=False)
class ClaimResult:
    """One claim with its verdict.

    Attributes:
        comparisons: all that could be made; those that are judged share one level.
        missing: runs that others would need, in words. partly: part of it was not tested.
    """

    claim: Claim
    verdict: str
    comparisons: tuple[Finding, ...]
    missing: tuple[str, ...]
    partly: bool

    @property
    def judged(self) -> tuple[Finding, ...]:
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
        paths: as `find_runs`. draws: number of bootstrap draws.

    Returns:
        A verdict for each claim. Within one claim all judged intervals hold together with 95 %
        (Bonferroni: each is given 1 - 0.05 / k); claims are not corrected for one another.

    Raises:
        StoreMismatch, StoreError: as `find_runs`.
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
    findings = [finding for found, _ in parts for finding in found]
    count = sum(finding.rule is not None for finding in findings)
    error = (1.0 - CONFIDENCE) / max(1, count)
    tested = tuple(_tested(finding, error) for finding in findings)
    scopes = [design.scope for design in claim.designs]
    needed = {(family, size) for s in scopes for family in s.required for size in s.sizes}
    panels = {finding.panel for finding in findings}
    partly = not needed <= panels or not all(found for found, _ in parts)
    missing = dict.fromkeys(text for _, texts in parts for text in texts)
    verdict = _verdict(claim, tested)
    if verdict == rules.SUPPORTED and partly:
        verdict = rules.UNDECIDED
    return ClaimResult(claim, verdict, tested, tuple(missing), partly)


def _tested(finding: Finding, error: float) -> Finding:
    alone = finding.effect.interval(1.0 - CONFIDENCE)
    if finding.rule is None:
        return replace(finding, alone=alone, together=alone)
    together = finding.effect.interval(error)
    found = finding.rule.judge(*together, finding.effect.level)
    return replace(finding, alone=alone, together=together, verdict=found.verdict, why=found.why)


def _verdict(claim: Claim, tested: Sequence[Finding]) -> str:
    groups: dict[str, list[str]] = {}
    for one in tested:
        if one.verdict:
            groups.setdefault(one.group, []).append(one.verdict)
    if not groups:
        return rules.NOT_TESTED
    return claim.across([claim.combination(group) for group in groups.values()])
