"""Metadata of a run: algorithm, data, clients, perturbations and learning rate.

The stored spec is read as plain TOML, so that runs remain comparable whatever a later version
would accept as a spec.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.certification.scan import scan_from
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.path_checks import check_study
from certifl.report import summary
from certifl.report.results import RunResults, decisive_settings, load_run
from certifl.report.wording import family_words, sigma_text
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED, parse_toml

SMALL, LARGE = "small", "large"
# Between the paper's two sigmas of each family: 0.1 and 0.5 (times pi for rotation), 0.12 and 0.5.
_LARGEST_SMALL = {"rotation": 0.25 * math.pi}
_LARGEST_SMALL_ELSE = 0.25

# Settings in which two compared runs may differ; all others must agree.
_NEVER_COMPARED = ("name",)
ANOTHER_SEED = ("seed",)
ANOTHER_TRAINING = (*ANOTHER_SEED, "algorithm", "augmentation")
ANOTHER_STEP = (*ANOTHER_TRAINING, "training.lr")
ANOTHER_COUNT = (*ANOTHER_TRAINING, "clients.count", "certification.images", "data.test_images")


@dataclass(frozen=True)
class Noise:
    """A perturbation as a spec names it.

    Attributes:
        family, sigma: of the perturbation.
        description: all of it as canonical text; equal texts are equal perturbations.
    """

    family: str
    sigma: float
    description: str

    @property
    def size(self) -> str:
        """Whether sigma is closer to the paper's smaller or to its larger one."""
        bound = _LARGEST_SMALL.get(self.family, _LARGEST_SMALL_ELSE)
        return SMALL if self.sigma <= bound else LARGE

    def words(self, unit: str) -> str:
        """Family and sigma for people."""
        metadata = {"family": self.family, "sigma": self.sigma, "unit": unit}
        return f"{family_words(metadata)} σ = {sigma_text(metadata)}"


@dataclass(frozen=True, eq=False)
class RunMetadata:
    """Metadata of a run.

    Attributes:
        base: what `personalized` fine-tunes; None elsewhere.
        certified: the perturbation of the certificates. unit: of its sigma.
        federated: augmentation of the federated (or local) training; None = without.
        personal: augmentation of fine-tuning; None = without, or no fine-tuning.
        personalization: lambda of Eq. (4) where the algorithm has one.
        lr: learning rate of the first epoch.
        settings: the whole spec by "section.key", with the fingerprint of the data.
    """

    algorithm: str
    base: str | None
    data: str
    clients: int
    seed: int
    certified: Noise
    unit: str
    federated: Noise | None
    personal: Noise | None
    personalization: float | None
    lr: float
    settings: Mapping[str, Any]

    def shared(self, ignoring: Sequence[str]) -> dict[str, Any]:
        """The settings without those that may differ (whole sections or single keys)."""
        ignored = (*_NEVER_COMPARED, *ignoring)
        return {
            key: value
            for key, value in self.settings.items()
            if not any(key == name or key.startswith(f"{name}.") for name in ignored)
        }

    def key(self, ignoring: Sequence[str]) -> str:
        """Equal for runs that agree in all other settings."""
        return json.dumps(self.shared(ignoring), sort_keys=True)

    def differences(self, other: RunMetadata, ignoring: Sequence[str]) -> list[str]:
        """Settings in which two runs differ although they must not, in words."""
        mine, its = self.shared(ignoring), other.shared(ignoring)
        names = sorted(k for k in {*mine, *its} if mine.get(k) != its.get(k))
        return [f"{name} ({mine.get(name)} against {its.get(name)})" for name in names]

    @property
    def setting(self) -> str:
        """Data, perturbation and clients in words."""
        return f"{self.data}, {self.certified.words(self.unit)}, {self.clients} clients"


@dataclass(frozen=True, eq=False)
class StudyRun:
    """A finished run with its metadata."""

    metadata: RunMetadata
    results: RunResults


def find_runs(paths: Iterable[str | Path]) -> tuple[list[StudyRun], list[str]]:
    """Read runs from run folders, or from study folders that contain `runs/` or runs.

    Returns:
        (runs, notes): unfinished runs inside a study are left out and named in the notes.

    Raises:
        StoreMismatch: a folder without a run, or a named run that is not finished.
        StoreError: a run that is damaged.
    """
    runs: list[StudyRun] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        for folder, named in _folders(path):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            manifest = {} if named else read_json(folder / "run.json")
            if not named and isinstance(manifest, dict) and manifest.get("status") != "finished":
                notes.append(f"{folder} is not finished and was left out.")
                continue
            results = load_run(folder)
            unfit = None if named else unfit_for_claims(results)
            if unfit is not None:
                notes.append(f"{folder} was left out: {unfit[0]}.")
                continue
            runs.append(read_run(results))
    return runs, notes


_SHOWN = "Leave this run out; `certifl report` shows it."


def unfit_for_claims(results: RunResults) -> tuple[str, str] | None:
    """Why a run cannot be compared with others, and what to do; None where it can."""
    if has_own_perturbations(results):
        return (
            "its clients certify different perturbations",
            f"The claims are about one perturbation for all. {_SHOWN}",
        )
    if results.unseen:
        return (
            "some of its clients took no part in training",
            f"The claims are about those that do. {_SHOWN}",
        )
    if results.curves_only:
        return (
            "its clients share curves only, no single images",
            "Claims are tested image by image. Leave this run out, or repeat it with clients "
            'that share rows (`share = "rows"`).',
        )
    try:
        largest_radius(results)
    except InputError:
        return (
            "its certificates are of a scan and do not say where it looked",
            "Leave this run out, or certify again.",
        )
    return None


def has_own_perturbations(results: RunResults) -> bool:
    """Whether the spec of a run has per-client perturbations."""
    try:
        section = parse_toml(results.spec).get("certification", {})
    except InputError:
        return False  # damage is reported when the metadata are read
    overrides = section.get("own") if isinstance(section, dict) else None
    return len(results.parts) > 1 or bool(overrides)


def _folders(path: Path) -> list[tuple[Path, bool]]:
    """Run folders, and whether they were named themselves."""
    check_study(path)
    if (path / "run.json").is_file():
        return [(path, True)]
    marks = sorted(path.glob("runs/*/run.json")) or sorted(path.glob("*/run.json"))
    return [(mark.parent, False) for mark in marks]


def read_run(results: RunResults) -> StudyRun:
    """A run with its metadata.

    Raises:
        StoreMismatch: a run whose radii or images cannot be compared with those of others.
        StoreError: the stored spec is not TOML, or required keys are missing.
    """
    unfit = unfit_for_claims(results)
    if unfit is not None:
        raise StoreMismatch(
            f"{results.folder} cannot be compared with the paper's claims: {'. '.join(unfit)}"
        )
    try:
        spec = parse_toml(results.spec)
        return StudyRun(_metadata(spec, results), results)
    except MALFORMED as error:
        raise StoreError(
            f"{results.folder / 'spec.toml'} is damaged: it does not describe the run "
            f"({type(error).__name__}: {error}). Repeat the command that made the run."
        ) from error


def _metadata(spec: Mapping[str, Any], results: RunResults) -> RunMetadata:
    algorithm = spec["algorithm"]
    base = algorithm.get("base")
    augmentation = spec.get("augmentation", {})
    federated = _noise(augmentation.get("federated", "none"))
    chosen = augmentation.get("personalized", "same")
    personal = federated if chosen == "same" else _noise(chosen)
    certified = _noise(spec["certification"]["perturbation"])
    if certified is None:
        raise ValueError("no perturbation is certified")
    inner = algorithm if base is None else base
    fingerprint = results.data.get("fingerprint", "")
    return RunMetadata(
        algorithm=str(algorithm["name"]),
        base=None if base is None else str(base["name"]),
        data=str(spec["data"]["name"]),
        clients=int(spec["clients"]["count"]),
        seed=int(spec["seed"]),
        certified=certified,
        unit=str(results.conditions["unit"]),
        federated=federated,
        personal=None if base is None else personal,
        personalization=inner.get("personalization"),
        lr=float(spec["training"]["lr"]),
        settings={**decisive_settings(spec), "data.fingerprint": fingerprint},
    )


def _noise(described: Any) -> Noise | None:
    if described == "none":
        return None
    return Noise(
        str(described["family"]), float(described["sigma"]), json.dumps(described, sort_keys=True)
    )


# The largest radius that a run's certificates can have, of which all radii are shares.


def largest_radius(run: RunResults) -> float:
    """The radius of unanimous votes; of a scan, which goes farther, the shorter side it covers.

    Raises:
        InputError: certificates of a scan that do not say where it looked.
    """
    metadata = run.conditions
    if "scan" in metadata or metadata.get("estimator") == "scan":
        low, high = scan_from(metadata).ends
        if min(-low, high) <= 0.0:
            raise InputError("These certificates are of a scan that can certify no radius.")
        return min(-low, high)
    radius = summary.unanimous_radius(metadata)
    return summary.largest_radius([run]) if radius is None else radius


# Which runs can be compared: equal in everything but the way of training.


@dataclass(frozen=True)
class Role:
    """A way of training that a claim is about: in words, and whether a run was trained so."""

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


def _mixture(metadata: RunMetadata) -> bool:
    """A true mixture: lambda = 1 is local training, lambda = 0 trains on no image."""
    value = metadata.personalization
    return metadata.algorithm == "mixture" and value is not None and 0.0 < value < 1.0


LOCAL = Role("Local", lambda f: f.algorithm == "local" and _robust(f))
FEDAVG = Role("FedAvg", lambda f: f.algorithm == "fedavg" and _robust(f))
NOMINAL_FEDAVG = Role("nominal FedAvg", lambda f: f.algorithm == "fedavg" and f.federated is None)
AFFINE_FEDAVG = Role("affine FedAvg", lambda f: f.algorithm == "fedavg" and _affine(f))
FROM_ROBUST = Role("Personalized", lambda f: _tuned(f) and _robust(f))
FROM_NOMINAL = Role("Personalized from nominal", lambda f: _tuned(f) and f.federated is None)
FROM_AFFINE = Role("Personalized from affine", lambda f: _tuned(f) and _affine(f))
MIXTURE = Role("Mixture", lambda f: _mixture(f) and _robust(f))


@dataclass(frozen=True)
class Counts:
    """Numbers of clients that a claim is about: a range, and those that the paper has."""

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
    """Runs by seed that differ in it alone, with the metadata of one of them."""

    metadata: RunMetadata
    runs: Mapping[int, StudyRun]

    @property
    def panel(self) -> tuple[str, str]:
        """Family and size of sigma."""
        return self.metadata.certified.family, self.metadata.certified.size


def folders_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The folders of the runs of several cells, by cell and seed."""
    return tuple(str(c.runs[seed].results.folder) for c in cells for seed in sorted(c.runs))


class Pool:
    """All given runs, of any number of studies, as cells; of equal runs the first counts."""

    def __init__(self, runs: Sequence[StudyRun]) -> None:
        cells: dict[str, dict[int, StudyRun]] = {}
        for run in runs:
            cells.setdefault(run.metadata.key(ANOTHER_SEED), {}).setdefault(run.metadata.seed, run)
        self.cells = [Cell(next(iter(by.values())).metadata, by) for by in cells.values()]

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
