"""Two ways of training on the same images, and how their difference changes with the clients."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from certifl.paper.claims import effects as statistics
from certifl.paper.claims.bootstrap import Sampler
from certifl.paper.claims.effects import QUANTITIES, Effect, Quantity
from certifl.paper.claims.matching import Cell, Pool, Role, Scope, folders_of
from certifl.paper.claims.rules import Rule, Superiority
from certifl.paper.claims.runs import ANOTHER_COUNT, ANOTHER_TRAINING, SMALL, Noise, RunMetadata


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

    def findings(self, pool: Pool, sampler: Sampler) -> DesignResult:
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
                and (cell.metadata.clients in self.scope.counts.paper or panel(cell) not in tested)
            ]
            for cells in (firsts, seconds)
        ]
        known = tested | {panel(cell) for cells in lonely for cell in cells}
        both = f"{self.first.words} and {self.second.words}"
        missing = (
            *unmatched_runs(pool, lonely[0], self.second),
            *unmatched_runs(pool, lonely[1], self.first),
            *untested_panels(self.scope, known, both),
        )
        return DesignResult(tuple(found), missing)

    def _pair(self, sampler: Sampler, first: Cell, second: Cell) -> list[Finding]:
        if self.same_start and first.metadata.federated != second.metadata.federated:
            return []
        difference = f"{label(first, self.first)} minus {label(second, self.second)}"
        group = setting_key(first) if self.together else ""
        rules = (*self.judged, *((name, None) for name in self.reported))
        return present(
            compared(sampler, QUANTITIES[name], first, second, difference, rule, group)
            for name, rule in rules
        )


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

    def findings(self, pool: Pool, sampler: Sampler) -> DesignResult:
        """One comparison for each set of runs that differ in the number of clients alone."""
        found: list[Finding] = []
        missing: list[str] = []
        for pairs in self._series(pool, sampler).values():
            ends = self._ends(pairs)
            if ends is not None:
                found += self._compare(sampler, *ends)
                continue
            counts = ", ".join(str(first.metadata.clients) for first, _ in pairs)
            missing.append(
                f"{self.first.words} and {self.second.words}, another number of clients: "
                f"{pairs[0][0].metadata.setting} (available: {counts})"
            )
        what = f"{self.first.words} and {self.second.words} at two numbers of clients"
        tested = {finding.panel for finding in found}
        return DesignResult(tuple(found), (*missing, *untested_panels(self.scope, tested, what)))

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

    def _compare(self, sampler: Sampler, few: Pair, many: Pair) -> list[Finding]:
        rules = ((self.quantity, Superiority()), *((name, None) for name in self.reported))
        return present(
            self._change(sampler, QUANTITIES[name], few, many, rule) for name, rule in rules
        )

    def _change(
        self, sampler: Sampler, quantity: Quantity, few: Pair, many: Pair, rule: Rule | None
    ) -> Finding | None:
        before, after = (per_seed(sampler, quantity, *pair) for pair in (few, many))
        seeds = sorted(set(before) & set(after))
        if not seeds:
            return None
        metadata, start = many[0].metadata, few[0].metadata.clients
        difference = f"{self.first.words} minus {self.second.words}"
        first, last = (_mean(effects, seeds) for effects in (before, after))
        return Finding(
            setting=_series_setting(metadata, start),
            group=metadata.key(ANOTHER_COUNT) + " ".join(map(_variant, many)),
            panel=panel(many[0]),
            difference=f"({difference}) at {metadata.clients} clients less the same at {start}",
            quantity=quantity.words,
            effect=statistics.over_seeds([statistics.change(after[s], before[s]) for s in seeds]),
            rule=rule,
            runs=folders_of((*few, *many)),
            detail=f"{100 * first:+.1f} points at {start} clients, {100 * last:+.1f} at "
            f"{metadata.clients}",
        )


def _series_setting(metadata: RunMetadata, start: int) -> str:
    words = metadata.certified.words(metadata.unit)
    return f"{metadata.data}, {words}, {start} and {metadata.clients} clients"


def _variant(cell: Cell) -> str:
    """The algorithm's own parameters and the augmentation, which must agree along a series."""
    chosen = ("algorithm.", "augmentation.")
    return repr(sorted((k, v) for k, v in cell.metadata.settings.items() if k.startswith(chosen)))


def _mean(effects: Mapping[int, Effect], seeds: Sequence[int]) -> float:
    return sum(effects[s].estimate for s in seeds) / len(seeds)


# Single comparisons, and the runs that are missing for others.


_PAPER_SIGMA = {
    "rotation": (0.1 * math.pi, 0.5 * math.pi),
    "translation": (0.1, 0.5),
    "pixel": (0.12, 0.5),
}
_UNITS = {"rotation": "radians", "translation": "half-widths", "pixel": "intensity"}


@dataclass(frozen=True, eq=False)
class Finding:
    """One comparison.

    Attributes:
        setting: data, perturbation, clients. group: findings judged as one setting.
        panel: family and size of sigma.
        difference: what minus what. quantity: of what, in words.
        effect: its size. rule: how it is judged; None = reported only.
        runs: folders. detail: further words.
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


@dataclass(frozen=True, eq=False)
class DesignResult:
    """Comparisons that could be made, and the runs that are missing for others."""

    findings: tuple[Finding, ...]
    missing: tuple[str, ...]


def label(cell: Cell, role: Role) -> str:
    """The role, with lambda where there is one."""
    value = cell.metadata.personalization
    return role.words if value is None else f"{role.words} λ = {value:g}"


def panel(cell: Cell) -> tuple[str, str]:
    """Family and size of sigma."""
    return cell.metadata.certified.family, cell.metadata.certified.size


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
        panel=panel(first),
        difference=difference,
        quantity=quantity.words,
        effect=statistics.over_seeds(list(effects.values())),
        rule=rule,
        runs=folders_of((first, second)),
        detail=detail(sampler, first.runs[seed], second.runs[seed]) if detail else "",
    )


def present(found: Iterable[Finding | None]) -> list[Finding]:
    """The comparisons that could be made."""
    return [finding for finding in found if finding is not None]


def unmatched_runs(pool: Pool, cells: Sequence[Cell], wanted: Role) -> list[str]:
    """The missing runs that these cells would be compared with."""
    found = []
    for cell in cells:
        near = pool.nearest(cell, wanted)
        why = f" (the closest one differs in {near})" if near else ""
        seeds = ", ".join(str(seed) for seed in sorted(cell.runs))
        found.append(f"{wanted.words}: {cell.metadata.setting}, seed {seeds}{why}")
    return list(dict.fromkeys(found))


def untested_panels(scope: Scope, known: Collection[tuple[str, str]], what: str) -> list[str]:
    """The paper's panels without any comparison."""
    counts = " or ".join(str(count) for count in scope.counts.paper)
    texts = []
    for family, size in scope.panels():
        if (family, size) not in known:
            noise = Noise(family, _PAPER_SIGMA[family][0 if size == SMALL else 1], "")
            texts.append(f"{what}: {noise.words(_UNITS[family])}, {counts} clients")
    return texts


def setting_key(cell: Cell) -> str:
    """Equal for runs that agree in all but the way of training."""
    return cell.metadata.key(ANOTHER_TRAINING)
