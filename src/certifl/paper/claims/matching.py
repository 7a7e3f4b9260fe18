"""Which runs can be compared: equal in everything but the way of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from certifl.paper.claims.runs import ANOTHER_SEED, ANOTHER_TRAINING, RunMetadata, StudyRun


@dataclass(frozen=True)
class Role:
    """A way of training that a claim is about.

    Attributes:
        words: for people. fits: whether a run was trained that way.
    """

    words: str
    fits: Callable[[RunMetadata], bool]


def _robust(metadata: RunMetadata) -> bool:
    """Trained with the very perturbation that is certified."""
    return metadata.federated == metadata.certified


def _affine(metadata: RunMetadata) -> bool:
    federated = metadata.federated
    return federated is not None and federated.family == "affine" and not _robust(metadata)


def _tuned(metadata: RunMetadata) -> bool:
    """FedAvg, fine-tuned with the perturbation that is certified."""
    return (
        metadata.algorithm == "personalized"
        and metadata.base == "fedavg"
        and metadata.personal == metadata.certified
    )


def _fedavg(metadata: RunMetadata) -> bool:
    return metadata.algorithm == "fedavg"


def _mixture(metadata: RunMetadata) -> bool:
    """A true mixture: lambda = 1 is local training, lambda = 0 trains on no image."""
    value = metadata.personalization
    return metadata.algorithm == "mixture" and value is not None and 0.0 < value < 1.0


LOCAL = Role("Local", lambda f: f.algorithm == "local" and _robust(f))
FEDAVG = Role("FedAvg", lambda f: _fedavg(f) and _robust(f))
NOMINAL_FEDAVG = Role("nominal FedAvg", lambda f: _fedavg(f) and f.federated is None)
AFFINE_FEDAVG = Role("affine FedAvg", lambda f: _fedavg(f) and _affine(f))
FROM_ROBUST = Role("Personalized", lambda f: _tuned(f) and _robust(f))
FROM_NOMINAL = Role("Personalized from nominal", lambda f: _tuned(f) and f.federated is None)
FROM_AFFINE = Role("Personalized from affine", lambda f: _tuned(f) and _affine(f))
MIXTURE = Role("Mixture", lambda f: _mixture(f) and _robust(f))


@dataclass(frozen=True)
class Counts:
    """Numbers of clients that a claim is about.

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
        required: families without which a claim about "all" of them cannot be supported: each
            must have been tested at each size of sigma.
    """

    families: tuple[str, ...]
    sizes: tuple[str, ...]
    counts: Counts
    required: tuple[str, ...] = ()

    def __contains__(self, metadata: RunMetadata) -> bool:
        return (
            metadata.certified.family in self.families
            and metadata.certified.size in self.sizes
            and metadata.clients in self.counts
        )

    def panels(self) -> list[tuple[str, str]]:
        """All pairs of family and size of sigma."""
        return [(family, size) for family in self.families for size in self.sizes]


@dataclass(frozen=True, eq=False)
class Cell:
    """Runs that differ in their seed alone.

    Attributes:
        metadata: of one of them.
        runs: by seed.
    """

    metadata: RunMetadata
    runs: Mapping[int, StudyRun]

    @property
    def folders(self) -> tuple[str, ...]:
        """Paths of the runs."""
        return tuple(str(run.results.folder) for _, run in sorted(self.runs.items()))


def folders_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The folders of several cells."""
    return tuple(folder for cell in cells for folder in cell.folders)


class Pool:
    """All given runs, as cells.

    Args:
        runs: of any number of studies; of equal runs the first counts.
    """

    def __init__(self, runs: Sequence[StudyRun]) -> None:
        found: dict[str, dict[int, StudyRun]] = {}
        for run in runs:
            found.setdefault(run.metadata.key(ANOTHER_SEED), {}).setdefault(run.metadata.seed, run)
        self.cells = [Cell(next(iter(by.values())).metadata, by) for by in found.values()]

    def of(self, role: Role, scope: Scope) -> list[Cell]:
        """Cells trained in one way, inside a claim's scope, in the order of their settings."""
        fitting = [c for c in self.cells if role.fits(c.metadata) and c.metadata in scope]
        return sorted(fitting, key=_order)

    def partners(self, cell: Cell, role: Role, ignoring: Sequence[str]) -> list[Cell]:
        """Cells trained in another way that agree in all else, with a seed in common."""
        key = cell.metadata.key(ignoring)
        return sorted(
            (
                other
                for other in self.cells
                if role.fits(other.metadata)
                and other.metadata.key(ignoring) == key
                and set(other.runs) & set(cell.runs)
            ),
            key=_order,
        )

    def nearest(self, cell: Cell, role: Role) -> str:
        """Why no partner of a cell was found: how the closest candidate differs."""
        candidates = [
            c
            for c in self.cells
            if role.fits(c.metadata)
            and c.metadata.data == cell.metadata.data
            and c.metadata.certified == cell.metadata.certified
        ]
        reasons = sorted((_differences(cell, other) for other in candidates), key=len)
        return "; ".join(reasons[0][:3]) if reasons else ""


def _differences(cell: Cell, other: Cell) -> list[str]:
    reasons = cell.metadata.differences(other.metadata, ANOTHER_TRAINING)
    if not set(cell.runs) & set(other.runs):
        mine, its = sorted(cell.runs)[0], sorted(other.runs)[0]
        reasons.append(f"seed ({mine} against {its})")
    return reasons


def _order(cell: Cell) -> tuple[str, str, float, int, float, str]:
    metadata = cell.metadata
    value = metadata.personalization
    return (
        metadata.data,
        metadata.certified.family,
        metadata.certified.sigma,
        metadata.clients,
        math.inf if value is None else value,
        metadata.key(ANOTHER_SEED),
    )
