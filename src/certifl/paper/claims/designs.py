"""Two ways of training on the same images, and how their difference changes with the clients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from certifl.paper.claims.effects import (
    QUANTITIES,
    Effect,
    Quantity,
    Sampler,
    change,
    over_seeds,
    share_of_draws_led,
)
from certifl.paper.claims.rules import Rule, Superiority
from certifl.paper.claims.runs import (
    ANOTHER_COUNT,
    ANOTHER_STEP,
    ANOTHER_TRAINING,
    FEDAVG,
    MIXTURE,
    SMALL,
    Cell,
    Noise,
    Pool,
    Role,
    Scope,
    folders_of,
)


@dataclass(frozen=True)
class Pairs:
    """Two ways of training in every available setting.

    Attributes:
        first, second: the difference is first minus second.
        scope: where the claim applies.
        judged: quantities that decide, with their rule. reported: further quantities.
        same_start: whether both must have been augmented alike during federated training.
        together: whether all values of lambda of a setting are judged as one group.
    """

    first: Role
    second: Role
    scope: Scope
    judged: tuple[tuple[str, Rule], ...]
    reported: tuple[str, ...] = ()
    same_start: bool = False
    together: bool = False

    def findings(self, pool: Pool, sampler: Sampler) -> Found:
        """All pairs of matching runs."""
        firsts, seconds = pool.of(self.first, self.scope), pool.of(self.second, self.scope)
        found: list[Finding] = []
        covered: set[tuple[str, str, int]] = set()
        for first in firsts:
            for second in pool.partners(first, self.second, ANOTHER_TRAINING):
                pair = self._pair(sampler, first, second)
                found += pair
                covered |= {_where(first)} if pair else set()
        tested = {finding.panel for finding in found}
        # A run with another step or tuning is not missing where its setting was compared, nor one
        # whose number of clients the paper does not have.
        lonely = [
            [
                cell
                for cell in cells
                if _where(cell) not in covered
                and (cell.metadata.clients in self.scope.counts.paper or cell.panel not in tested)
            ]
            for cells in (firsts, seconds)
        ]
        missing = (
            *unmatched_runs(pool, lonely[0], self.second),
            *unmatched_runs(pool, lonely[1], self.first),
        )
        seen = {cell.panel for cells in lonely for cell in cells}
        both = f"{self.first.words} and {self.second.words}"
        return _result(found, missing, self.scope, both, seen)

    def _pair(self, sampler: Sampler, first: Cell, second: Cell) -> list[Finding]:
        if self.same_start and first.metadata.federated != second.metadata.federated:
            return []
        difference = f"{label(first, self.first)} minus {label(second, self.second)}"
        group = first.metadata.key(ANOTHER_TRAINING) if self.together else ""
        rules = (*self.judged, *((name, None) for name in self.reported))
        pairs = (
            compared(sampler, QUANTITIES[name], first, second, difference, rule, group)
            for name, rule in rules
        )
        return list(filter(None, pairs))


def _where(cell: Cell) -> tuple[str, str, int]:
    return cell.metadata.data, cell.metadata.certified.description, cell.metadata.clients


Pair = tuple[Cell, Cell]


@dataclass(frozen=True)
class Growth:
    """Whether the difference of two ways of training grows with the number of clients.

    Attributes:
        first, second, scope: as in `Pairs`.
        quantity: whose difference is taken. reported: further ones.
        from_at_most: the smaller number of clients is the largest one up to this, and the larger
            the largest of all; None = the smallest and the largest available.
    """

    first: Role
    second: Role
    scope: Scope
    quantity: str
    reported: tuple[str, ...] = ()
    from_at_most: int | None = None

    def findings(self, pool: Pool, sampler: Sampler) -> Found:
        """One comparison for each set of runs that differ in the number of clients alone."""
        found: list[Finding] = []
        missing: list[str] = []
        rules = ((self.quantity, Superiority()), *((name, None) for name in self.reported))
        for pairs in self._series(pool, sampler).values():
            ends = self._ends(pairs)
            if ends is not None:
                found += filter(
                    None, (self._change(sampler, QUANTITIES[n], *ends, rule) for n, rule in rules)
                )
                continue
            counts = ", ".join(str(first.metadata.clients) for first, _ in pairs)
            missing.append(
                f"{self.first.words} and {self.second.words}, another number of clients: "
                f"{pairs[0][0].metadata.setting} (available: {counts})"
            )
        what = f"{self.first.words} and {self.second.words} at two numbers of clients"
        return _result(found, missing, self.scope, what)

    def _series(self, pool: Pool, sampler: Sampler) -> dict[str, list[Pair]]:
        series: dict[str, list[Pair]] = {}
        for first in pool.of(self.first, self.scope):
            for second in pool.partners(first, self.second, ANOTHER_TRAINING):
                if common_seeds(sampler, first, second):
                    key = [first.metadata.key(ANOTHER_COUNT), *map(_variant, (first, second))]
                    series.setdefault(" ".join(key), []).append((first, second))
        return series

    def _ends(self, pairs: Sequence[Pair]) -> tuple[Pair, Pair] | None:
        ordered = sorted(pairs, key=lambda pair: pair[0].metadata.clients)
        few, many = ordered[0], ordered[-1]
        if self.from_at_most is not None:
            below = [p for p in ordered if p[0].metadata.clients <= self.from_at_most]
            if not below or many[0].metadata.clients <= self.from_at_most:
                return None
            few = below[-1]
        return (few, many) if few[0].metadata.clients < many[0].metadata.clients else None

    def _change(
        self, sampler: Sampler, quantity: Quantity, few: Pair, many: Pair, rule: Rule | None
    ) -> Finding | None:
        before, after = (per_seed(sampler, quantity, *pair) for pair in (few, many))
        seeds = sorted(set(before) & set(after))
        if not seeds:
            return None
        metadata, start = many[0].metadata, few[0].metadata.clients
        noise = metadata.certified.words(metadata.unit)
        difference = f"{self.first.words} minus {self.second.words}"
        first, last = (
            sum(effects[s].estimate for s in seeds) / len(seeds) for effects in (before, after)
        )
        return Finding(
            setting=f"{metadata.data}, {noise}, {start} and {metadata.clients} clients",
            group=metadata.key(ANOTHER_COUNT) + " ".join(map(_variant, many)),
            panel=many[0].panel,
            difference=f"({difference}) at {metadata.clients} clients less the same at {start}",
            quantity=quantity.words,
            effect=over_seeds([change(after[s], before[s]) for s in seeds]),
            rule=rule,
            runs=folders_of((*few, *many)),
            detail=f"{100 * first:+.1f} points at {start} clients, {100 * last:+.1f} at "
            f"{metadata.clients}",
        )


def _variant(cell: Cell) -> str:
    """The algorithm's own parameters and the augmentation, which must agree along a series."""
    chosen = ("algorithm.", "augmentation.")
    return repr(sorted((k, v) for k, v in cell.metadata.settings.items() if k.startswith(chosen)))


# Single comparisons, and the runs that are missing for others.

_PAPER_SIGMA = {
    "rotation": (0.1 * math.pi, 0.5 * math.pi),
    "translation": (0.1, 0.5),
    "pixel": (0.12, 0.5),
}
_UNITS = {"rotation": "radians", "translation": "half-widths", "pixel": "intensity"}


@dataclass(frozen=True, eq=False)
class Finding:
    """One comparison, with its intervals and verdict once it was tested.

    Attributes:
        setting: data, perturbation, clients. group: findings judged as one setting.
        panel: family and size of sigma. difference: what minus what. quantity: of what, in words.
        rule: how it is judged; None = reported only. runs: folders. detail: further words.
        alone: its 95 % interval.
        together: wide enough for all judged comparisons of the claim to hold at once with 95 %;
            the verdict is based on it. Of a comparison that is only reported it is `alone`.
        verdict, why: empty where the comparison is only reported, or no reason is needed.
    """

    setting: str
    group: str
    panel: tuple[str, str]
    difference: str
    quantity: str
    effect: Effect
    rule: Rule | None
    runs: tuple[str, ...]
    detail: str = ""
    alone: tuple[float, float] = (-math.inf, math.inf)
    together: tuple[float, float] = (-math.inf, math.inf)
    verdict: str = ""
    why: str = ""


Found = tuple[list[Finding], list[str]]
"""Comparisons that could be made, and the runs that are missing for others."""


def label(cell: Cell, role: Role) -> str:
    """The role, with lambda where there is one."""
    value = cell.metadata.personalization
    return role.words if value is None else f"{role.words} λ = {value:g}"


def common_seeds(sampler: Sampler, first: Cell, second: Cell) -> list[int]:
    """Seeds for which both cells certified the same images."""
    common = sorted(set(first.runs) & set(second.runs))
    return [s for s in common if sampler.paired(first.runs[s], second.runs[s])]


def per_seed(sampler: Sampler, quantity: Quantity, first: Cell, second: Cell) -> dict[int, Effect]:
    """The quantity's difference for each training seed."""
    return {
        seed: quantity.of(sampler, first.runs[seed], second.runs[seed])
        for seed in common_seeds(sampler, first, second)
    }


def compared(
    sampler: Sampler,
    quantity: Quantity,
    first: Cell,
    second: Cell,
    difference: str,
    rule: Rule | None,
    group: str = "",
) -> Finding | None:
    """First minus second, called `difference`; None where they share no images."""
    effects = per_seed(sampler, quantity, first, second)
    if not effects:
        return None
    seed = min(effects)
    detail = quantity.detail
    return Finding(
        setting=first.metadata.setting,
        group=group or f"{first.metadata.key(())} {second.metadata.key(())}",
        panel=first.panel,
        difference=difference,
        quantity=quantity.words,
        effect=over_seeds(list(effects.values())),
        rule=rule,
        runs=folders_of((first, second)),
        detail=detail(sampler, first.runs[seed], second.runs[seed]) if detail else "",
    )


def unmatched_runs(pool: Pool, cells: Sequence[Cell], role: Role) -> list[str]:
    """The missing runs that these cells would be compared with."""
    texts = []
    for cell in cells:
        near = pool.nearest(cell, role)
        why = f" (the closest one differs in {near})" if near else ""
        seeds = ", ".join(str(seed) for seed in sorted(cell.runs))
        texts.append(f"{role.words}: {cell.metadata.setting}, seed {seeds}{why}")
    return list(dict.fromkeys(texts))


def _result(
    findings: Sequence[Finding],
    missing: Sequence[str],
    scope: Scope,
    what: str,
    seen: Collection[tuple[str, str]] = (),
) -> Found:
    """The comparisons, and what is missing: runs, and panels of the paper without any run.

    Args:
        what: the runs that would be compared. seen: panels that `missing` names already.
    """
    known = {finding.panel for finding in findings}.union(seen)
    counts = " or ".join(str(count) for count in scope.counts.paper)
    untested = []
    for family, size in scope.panels():
        if (family, size) not in known:
            noise = Noise(family, _PAPER_SIGMA[family][0 if size == SMALL else 1], "")
            untested.append(f"{what}: {noise.words(_UNITS[family])}, {counts} clients")
    return list(findings), [*missing, *untested]


# Claims about lambda: which value is best, and how much of its gain is the pull to the mean.


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

    def findings(self, pool: Pool, sampler: Sampler) -> Found:
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
        return _result(found, missing, self.scope, what)

    def _against(self, pool: Pool, sampler: Sampler, cell: Cell) -> list[Finding]:
        others = [
            other
            for other in pool.partners(cell, MIXTURE, ANOTHER_TRAINING)
            if other is not cell and common_seeds(sampler, cell, other)
        ]
        if not others:
            return []
        certainty, acr = self._certainty(sampler, cell, others), QUANTITIES["acr"]
        group, rule = cell.metadata.key(ANOTHER_TRAINING), Superiority()
        names = {id(one): label(one, MIXTURE) for one in (cell, *others)}
        findings = (
            compared(
                sampler, acr, cell, one, f"{names[id(cell)]} minus {names[id(one)]}", rule, group
            )
            for one in others
        )
        return [dataclasses.replace(one, detail=certainty) for one in filter(None, findings)]

    def _certainty(self, sampler: Sampler, cell: Cell, others: Sequence[Cell]) -> str:
        seeds = sorted(set(cell.runs).intersection(*(other.runs for other in others)))
        if not seeds:
            return ""
        shares = [
            share_of_draws_led(sampler, cell.runs[s], [other.runs[s] for other in others])
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

    def findings(self, pool: Pool, sampler: Sampler) -> Found:
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
        return _result(found, missing, self.scope, what)


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
    acr, group = QUANTITIES["acr"], plain.metadata.key(ANOTHER_TRAINING)
    made = (
        compared(sampler, acr, one, two, words, rule, group) for one, two, words, rule in parts
    )
    named = list(filter(None, made))
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
    lr = cell.metadata.lr * factor
    return [
        other
        for other in pool.partners(cell, role, ANOTHER_STEP)
        if abs(other.metadata.lr - lr) <= _SAME_STEP * lr
        and other.metadata.personalization in (None, cell.metadata.personalization)
    ]
