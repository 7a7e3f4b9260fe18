"""Metadata of a run: algorithm, data, clients, perturbations and learning rate.

The stored spec is read as plain TOML, so that runs remain comparable whatever a later version
would accept as a spec.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.path_checks import check_study
from certifl.report import summary
from certifl.report.results import RunResults, decisive_settings, load_run
from certifl.report.units import family_words, sigma_text
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED, parse_toml
from certifl.smoothing.scan import Scan

SMALL, LARGE = "small", "large"
# Between the paper's two sigmas of each family: 0.1 and 0.5 (times pi for rotation), 0.12 and 0.5.
_LARGEST_SMALL = {"rotation": 0.25 * math.pi}
_LARGEST_SMALL_ELSE = 0.25

# Settings in which two compared runs may differ; all others must agree.
_NEVER_COMPARED = ("name", "certification.precision")
ANOTHER_SEED = ("seed",)
ANOTHER_TRAINING = (*ANOTHER_SEED, "algorithm", "augmentation")
ANOTHER_STEP = (*ANOTHER_TRAINING, "training.lr")
ANOTHER_COUNT = (
    *ANOTHER_TRAINING,
    "clients.count",
    "certification.images",
    "data.test_images",
)


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
        algorithm: local, fedavg, personalized, mixture, ...
        base: what `personalized` fine-tunes; None elsewhere.
        data: name of the data set. clients: how many take part. seed: of everything.
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
            if not named and _unfinished(folder):
                notes.append(f"{folder} is not finished and was left out.")
                continue
            results = load_run(folder)
            unfit = "" if named else _unfit(results)
            if unfit:
                notes.append(f"{folder} was left out: {unfit}.")
                continue
            runs.append(read_run(results))
    return runs, notes


def _unfit(results: RunResults) -> str:
    """Why a run cannot be compared with others; empty where it can."""
    if has_own_perturbations(results):
        return "its clients certify different perturbations"
    if results.unseen:
        return "some of its clients took no part in training"
    if results.curves_only:
        return "its clients share curves only, no single images"
    no_scale = "its certificates are of a scan and do not say where it looked"
    return no_scale if _has_no_scale(results) else ""


def _has_no_scale(results: RunResults) -> bool:
    """Whether it is unknown how large radii can be."""
    try:
        largest_radius(results)
    except InputError:
        return True
    return False


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


def _unfinished(folder: Path) -> bool:
    manifest = read_json(folder / "run.json")
    return isinstance(manifest, dict) and manifest.get("status") != "finished"


def read_run(results: RunResults) -> StudyRun:
    """A run with its metadata.

    Raises:
        StoreMismatch: a run whose radii or images cannot be compared with those of others.
        StoreError: the stored spec is not TOML, or required keys are missing.
    """
    cannot = f"{results.folder} cannot be compared with the paper's claims: "
    if has_own_perturbations(results):
        raise StoreMismatch(
            f"{cannot}its clients certify different perturbations, and the claims are about one "
            "perturbation for all. Leave this run out; `certifl report` shows it."
        )
    if results.unseen:
        raise StoreMismatch(
            f"{cannot}some of its clients took no part in training, and the claims are about "
            "those that do. Leave this run out; `certifl report` shows it."
        )
    if results.curves_only:
        raise StoreMismatch(
            f"{cannot}they are tested image by image, and its clients share curves only. "
            'Leave this run out, or repeat it with clients that share rows (`share = "rows"`).'
        )
    if _has_no_scale(results):
        raise StoreMismatch(
            f"{cannot}its certificates are of a scan and do not say where it looked. Leave this "
            "run out, or certify again."
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
        str(described["family"]),
        float(described["sigma"]),
        json.dumps(described, sort_keys=True),
    )


# The largest radius that a run's certificates can have, of which all radii are shares.


_SCAN = "scan"


def largest_radius(run: RunResults) -> float:
    """The radius of unanimous votes; of a scan, which goes farther, the shorter side it covers.

    Raises:
        InputError: certificates of a scan that do not say where it looked.
    """
    metadata = run.conditions
    if _SCAN in metadata or metadata.get("estimator") == _SCAN:
        return _shorter_side(metadata)
    radius = summary.unanimous_radius(metadata)
    return summary.largest_radius([run]) if radius is None else radius


def _shorter_side(metadata: Mapping[str, Any]) -> float:
    """The shorter side of the scan, as a radius is the shorter side of an interval."""
    try:
        scan = metadata[_SCAN]
        ends = float(metadata["sigma"]), float(scan["low"]), float(scan["high"])
        passes = tuple(int(strata) for strata in scan["passes"])
        low, high = Scan(*ends, periodic=bool(scan["periodic"]), passes=passes).ends
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"These certificates do not say where they were scanned: {error}"
        ) from error
    if min(-low, high) <= 0.0:
        raise InputError("These certificates are of a scan that can certify no radius.")
    return min(-low, high)
