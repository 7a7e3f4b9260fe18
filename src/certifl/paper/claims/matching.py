"""Which runs can be set against each other: equal in everything but the way of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from certifl.paper.claims.runs import ANOTHER_SEED, ANOTHER_TRAINING, Facts, StudyRun


@dataclass(frozen=True)
class Role:
    """A way of training that a claim speaks of.

    Attributes:
        words: for people. fits: whether a run was trained that way.
    """

    words: str
    fits: Callable[[Facts], bool]


def _robust(facts: Facts) -> bool:
    """Trained with the very perturbation that is certified."""
    return facts.federated == facts.certified


def _affine(facts: Facts) -> bool:
    federated = facts.federated
    return federated is not None and federated.family == "affine" and not _robust(facts)


def _tuned(facts: Facts) -> bool:
    """FedAvg, fine-tuned with the perturbation that is certified."""
    return (
        facts.regime == "personalized"
        and facts.base == "fedavg"
        and facts.personal == facts.certified
    )


def _fedavg(facts: Facts) -> bool:
    return facts.regime == "fedavg"


def _mixture(facts: Facts) -> bool:
    """A true mixture: lambda = 1 is local training, lambda = 0 trains on no image."""
    value = facts.personalization
    return facts.regime == "mixture" and value is not None and 0.0 < value < 1.0


LOCAL = Role("Local", lambda f: f.regime == "local" and _robust(f))
FEDAVG = Role("FedAvg", lambda f: _fedavg(f) and _robust(f))
NOMINAL_FEDAVG = Role("nominal FedAvg", lambda f: _fedavg(f) and f.federated is None)
AFFINE_FEDAVG = Role("affine FedAvg", lambda f: _fedavg(f) and _affine(f))
FROM_ROBUST = Role("Personalised", lambda f: _tuned(f) and _robust(f))
FROM_NOMINAL = Role("Personalised from nominal", lambda f: _tuned(f) and f.federated is None)
FROM_AFFINE = Role("Personalised from affine", lambda f: _tuned(f) and _affine(f))
MIXTURE = Role("Mixture", lambda f: _mixture(f) and _robust(f))


@dataclass(frozen=True)
class Counts:
    """Numbers of clients that a claim speaks of.

    Attributes:
        low, high: the range. paper: the numbers that the paper has.
    """

    low: int
    high: float
    paper: tuple[int, ...]

    def __contains__(self, clients: int) -> bool:
        return self.low <= clients <= self.high


@dataclass(frozen=True)
class Scope:
    """Where a claim holds.

    Attributes:
        families, sizes: of the certified perturbation and its sigma.
        counts: of clients.
        required: families that the claim speaks of as "all", so that it is supported only where
            each of them was tested at each size of sigma.
    """

    families: tuple[str, ...]
    sizes: tuple[str, ...]
    counts: Counts
    required: tuple[str, ...] = ()

    def __contains__(self, facts: Facts) -> bool:
        return (
            facts.certified.family in self.families
            and facts.certified.size in self.sizes
            and facts.clients in self.counts
        )

    def panels(self) -> list[tuple[str, str]]:
        """All pairs of family and size of sigma."""
        return [(family, size) for family in self.families for size in self.sizes]


@dataclass(frozen=True, eq=False)
class Cell:
    """Runs that differ in their seed alone.

    Attributes:
        facts: of one of them.
        runs: by seed.
    """

    facts: Facts
    runs: Mapping[int, StudyRun]

    @property
    def folders(self) -> tuple[str, ...]:
        """Where the runs lie."""
        return tuple(str(run.results.folder) for _, run in sorted(self.runs.items()))


def names(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The folders of several cells."""
    return tuple(folder for cell in cells for folder in cell.folders)


class Pool:
    """All runs at hand, as cells.

    Args:
        runs: of any number of studies; of equal ones the first is taken.
    """

    def __init__(self, runs: Sequence[StudyRun]) -> None:
        found: dict[str, dict[int, StudyRun]] = {}
        for run in runs:
            found.setdefault(run.facts.key(ANOTHER_SEED), {}).setdefault(run.facts.seed, run)
        self.cells = [Cell(next(iter(by.values())).facts, by) for by in found.values()]

    def of(self, role: Role, scope: Scope) -> list[Cell]:
        """Cells trained in one way, inside a claim's scope, in the order of their settings."""
        fitting = [c for c in self.cells if role.fits(c.facts) and c.facts in scope]
        return sorted(fitting, key=_order)

    def beside(self, cell: Cell, role: Role, apart_from: Sequence[str]) -> list[Cell]:
        """Cells trained in another way that agree in all else, with a seed in common."""
        key = cell.facts.key(apart_from)
        return sorted(
            (
                other
                for other in self.cells
                if role.fits(other.facts)
                and other.facts.key(apart_from) == key
                and set(other.runs) & set(cell.runs)
            ),
            key=_order,
        )

    def nearest(self, cell: Cell, role: Role) -> str:
        """Why no partner of a cell was found: what sets the closest candidate apart."""
        candidates = [
            c
            for c in self.cells
            if role.fits(c.facts)
            and c.facts.data == cell.facts.data
            and c.facts.certified == cell.facts.certified
        ]
        reasons = sorted((_apart(cell, other) for other in candidates), key=len)
        return "; ".join(reasons[0][:3]) if reasons else ""


def _apart(cell: Cell, other: Cell) -> list[str]:
    reasons = cell.facts.differences(other.facts, ANOTHER_TRAINING)
    if not set(cell.runs) & set(other.runs):
        mine, its = sorted(cell.runs)[0], sorted(other.runs)[0]
        reasons.append(f"seed ({mine} against {its})")
    return reasons


def _order(cell: Cell) -> tuple[str, str, float, int, float, str]:
    facts = cell.facts
    value = facts.personalization
    return (
        facts.data,
        facts.certified.family,
        facts.certified.sigma,
        facts.clients,
        math.inf if value is None else value,
        facts.key(ANOTHER_SEED),
    )
