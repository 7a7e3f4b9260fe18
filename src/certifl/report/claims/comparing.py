"""One comparison of runs, and which runs were missing for others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from certifl.report.claims import statistics
from certifl.report.claims.facts import ANOTHER_TRAINING, SMALL, Noise
from certifl.report.claims.pool import Cell, Pool, Role, Scope, names
from certifl.report.claims.resampling import Sampler
from certifl.report.claims.rules import Rule
from certifl.report.claims.statistics import Effect, Quantity

__all__ = [
    "Finding",
    "Found",
    "Partner",
    "common_seeds",
    "compared",
    "label",
    "panel",
    "partnerless",
    "per_seed",
    "present",
    "setting_key",
    "untested",
]

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
        setting: data, perturbation, clients. group: findings that are judged as one setting.
        panel: family and size of sigma.
        difference: what minus what. quantity: of what, in words.
        effect: how large. rule: how it is judged; None = it is told, not judged.
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
class Found:
    """Comparisons that could be made, and runs without which others could not."""

    findings: tuple[Finding, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Partner:
    """A cell and how a claim calls it."""

    cell: Cell
    words: str


def label(cell: Cell, role: Role) -> str:
    """The role, with lambda where there is one."""
    value = cell.facts.personalization
    return role.words if value is None else f"{role.words} λ = {value:g}"


def panel(cell: Cell) -> tuple[str, str]:
    """Family and size of sigma."""
    return cell.facts.certified.family, cell.facts.certified.size


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
    first: Partner,
    second: Partner,
    rule: Rule | None,
    group: str = "",
) -> Finding | None:
    """First minus second; None where they share no images."""
    one, two = first.cell, second.cell
    effects = per_seed(sampler, quantity, one, two)
    if not effects:
        return None
    seed = min(effects)
    told = quantity.detail
    return Finding(
        setting=one.facts.setting,
        group=group or f"{one.facts.key(())} {two.facts.key(())}",
        panel=panel(one),
        difference=f"{first.words} minus {second.words}",
        quantity=quantity.words,
        effect=statistics.over_seeds(list(effects.values())),
        rule=rule,
        runs=names((one, two)),
        detail=told(sampler, one.runs[seed], two.runs[seed]) if told else "",
    )


def present(found: Iterable[Finding | None]) -> list[Finding]:
    """Those that could be made."""
    return [finding for finding in found if finding is not None]


def partnerless(pool: Pool, cells: Sequence[Cell], wanted: Role) -> list[str]:
    """The runs that these cells would be compared with, if only they were there."""
    found = []
    for cell in cells:
        near = pool.nearest(cell, wanted)
        why = f" (the closest one differs in {near})" if near else ""
        seeds = ", ".join(str(seed) for seed in sorted(cell.runs))
        found.append(f"{wanted.words}: {cell.facts.setting}, seed {seeds}{why}")
    return list(dict.fromkeys(found))


def untested(scope: Scope, known: Collection[tuple[str, str]], what: str) -> list[str]:
    """The paper's panels of which nothing is known."""
    counts = " or ".join(str(count) for count in scope.counts.paper)
    texts = []
    for family, size in scope.panels():
        if (family, size) not in known:
            noise = Noise(family, _PAPER_SIGMA[family][0 if size == SMALL else 1], "")
            texts.append(f"{what}: {noise.words(_UNITS[family])}, {counts} clients")
    return texts


def setting_key(cell: Cell) -> str:
    """Equal for runs that agree in all but the way of training."""
    return cell.facts.key(ANOTHER_TRAINING)
