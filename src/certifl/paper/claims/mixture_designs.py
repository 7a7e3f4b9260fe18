"""Claims about lambda: which value is best, and how much of its gain is the pull to the mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from certifl.paper.claims import effects as statistics
from certifl.paper.claims.bootstrap import Sampler
from certifl.paper.claims.designs import (
    DesignResult,
    Finding,
    common_seeds,
    compared,
    label,
    present,
    setting_key,
    untested_panels,
)
from certifl.paper.claims.effects import QUANTITIES
from certifl.paper.claims.matching import FEDAVG, MIXTURE, Cell, Pool, Role, Scope
from certifl.paper.claims.rules import Rule, Superiority
from certifl.paper.claims.runs import ANOTHER_STEP, ANOTHER_TRAINING

# A learning rate written with few digits still counts as lr / lambda.
_SAME_STEP = 0.01


@dataclass(frozen=True)
class Best:
    """Whether one value of lambda gives the largest ACR of all.

    Attributes:
        value: of lambda. scope: where the claim applies.
    """

    value: float
    scope: Scope

    def findings(self, pool: Pool, sampler: Sampler) -> DesignResult:
        """The value against every other one with the same learning rate."""
        cells = pool.of(MIXTURE, self.scope)
        named = [c for c in cells if math.isclose(_lambda(c), self.value)]
        found = [f for cell in named for f in self._against(pool, sampler, cell)]
        missing: list[str] = []
        if not found and cells:
            has = ", ".join(sorted({f"{_lambda(c):g}" for c in cells}))
            missing.append(
                f"Mixture λ = {self.value:g} and another λ with the same learning rate "
                f"(available: λ = {has})"
            )
        what = f"Mixture λ = {self.value:g} and others"
        tested = {finding.panel for finding in found}
        return DesignResult(tuple(found), (*missing, *untested_panels(self.scope, tested, what)))

    def _against(self, pool: Pool, sampler: Sampler, cell: Cell) -> list[Finding]:
        others = [
            other
            for other in pool.partners(cell, MIXTURE, ANOTHER_TRAINING)
            if other is not cell and common_seeds(sampler, cell, other)
        ]
        if not others:
            return []
        certainty, acr = self._certainty(sampler, cell, others), QUANTITIES["acr"]
        findings = [
            compared(
                sampler,
                acr,
                cell,
                other,
                f"{label(cell, MIXTURE)} minus {label(other, MIXTURE)}",
                Superiority(),
                setting_key(cell),
            )
            for other in others
        ]
        return [dataclasses.replace(found, detail=certainty) for found in present(findings)]

    def _certainty(self, sampler: Sampler, cell: Cell, others: Sequence[Cell]) -> str:
        seeds = sorted(set(cell.runs).intersection(*(other.runs for other in others)))
        if not seeds:
            return ""
        shares = [
            statistics.share_of_draws_led(
                sampler, cell.runs[s], [other.runs[s] for other in others]
            )
            for s in seeds
        ]
        share = 100 * sum(shares) / len(shares)
        return f"λ = {self.value:g} leads all others in {share:.0f} % of the draws of images"


@dataclass(frozen=True)
class Matched:
    """Which part of a mixture's gain is due to the pull to the mean, and which to smaller steps.

    Eq. (5) takes steps of lr lambda on the loss. With lr / lambda instead of lr these steps are
    FedAvg's, and the remaining gain is due to the pull:

      M(lambda, lr) - F(lr)
        = [M(lambda, lr / lambda) - F(lr)] + [M(lambda, lr) - M(lambda, lr / lambda)]

    where M and F are the mixture's and FedAvg's ACR. The first bracket is judged. Where a FedAvg
    with lr lambda was run too, the gain is also split with the small step on both sides.

    Attributes:
        scope: where the claim applies.
    """

    scope: Scope

    def findings(self, pool: Pool, sampler: Sampler) -> DesignResult:
        """One decomposition for each lambda that has a run with matched steps."""
        found: list[Finding] = []
        missing: list[str] = []
        for plain in pool.of(MIXTURE, self.scope):
            for fedavg in pool.partners(plain, FEDAVG, ANOTHER_TRAINING):
                matched = _with_step(pool, plain, MIXTURE, 1.0 / _lambda(plain))
                small = _with_step(pool, plain, FEDAVG, _lambda(plain))
                for one in matched:
                    found += _split(sampler, plain, fedavg, one, small)
                if not matched:
                    step = plain.metadata.lr / _lambda(plain)
                    name = f"{label(plain, MIXTURE)} with training.lr = {step:.4g}"
                    missing.append(f"{name}: {plain.metadata.setting}")
        what = "Mixture with lr and with lr / λ, and FedAvg with lr"
        tested = {finding.panel for finding in found}
        return DesignResult(tuple(found), (*missing, *untested_panels(self.scope, tested, what)))


def _split(
    sampler: Sampler, plain: Cell, fedavg: Cell, matched: Cell, small: Sequence[Cell]
) -> list[Finding]:
    value = f"λ = {_lambda(plain):g}"
    parts: list[tuple[Cell, Cell, str, Rule | None]] = [
        (matched, fedavg, f"{value}: the pull, at FedAvg's step (lr / λ)", Superiority()),
        (plain, matched, f"{value}: the smaller step", None),
        (plain, fedavg, f"{value}: the whole gain, their sum", None),
    ]
    for other in small:
        parts.append((plain, other, f"{value}: the pull, at the small step (FedAvg lr λ)", None))
        parts.append((other, fedavg, f"{value}: the small step without pull (FedAvg lr λ)", None))
    acr, group = QUANTITIES["acr"], setting_key(plain)
    named = present(
        compared(sampler, acr, one, two, words, rule, group) for one, two, words, rule in parts
    )
    if len(named) < len(parts):
        return []
    pull, step, gain = (100 * finding.effect.estimate for finding in named[:3])
    detail = (
        f"at {value}, of a gain of {gain:+.1f} points {pull:+.1f} are the pull and {step:+.1f} "
        "the smaller step"
    )
    return [dataclasses.replace(named[0], detail=detail), *named[1:]]


def _lambda(cell: Cell) -> float:
    value = cell.metadata.personalization
    return math.nan if value is None else value


def _with_step(pool: Pool, cell: Cell, role: Role, factor: float) -> list[Cell]:
    """Cells with so many times the learning rate of a cell, and its lambda if they have any."""
    wanted = cell.metadata.lr * factor
    return [
        other
        for other in pool.partners(cell, role, ANOTHER_STEP)
        if abs(other.metadata.lr - wanted) <= _SAME_STEP * wanted
        and other.metadata.personalization in (None, cell.metadata.personalization)
    ]
