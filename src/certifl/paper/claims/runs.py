"""What a run is: its regime, data, clients, perturbations and step, read from its own record.

The stored spec is read as plain TOML: what a run was is a fact of its folder, whatever a later
version would accept as a spec.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.certification.metadata import PERTURBATIONS
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.paper.claims.radii import largest_radius
from certifl.report.results import RunResults, decisive_settings, load_run
from certifl.report.units import family_words, sigma_text
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED, parse_toml

SMALL, LARGE = "small", "large"
# Between the paper's two sigmas of each family: 0.1 and 0.5 (times pi for rotation), 0.12 and 0.5.
_LARGEST_SMALL = {"rotation": 0.25 * math.pi}
_LARGEST_SMALL_ELSE = 0.25

# Settings that may differ where two runs are compared; every other one must agree.
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
        family, sigma: as everywhere.
        description: the whole of it as canonical text; equal texts are equal perturbations.
    """

    family: str
    sigma: float
    description: str

    @property
    def size(self) -> str:
        """Whether sigma is like the paper's smaller or like its larger one."""
        bound = _LARGEST_SMALL.get(self.family, _LARGEST_SMALL_ELSE)
        return SMALL if self.sigma <= bound else LARGE

    def words(self, unit: str) -> str:
        """Family and sigma for people."""
        facts = {"family": self.family, "sigma": self.sigma, "unit": unit}
        return f"{family_words(facts)} σ = {sigma_text(facts)}"


@dataclass(frozen=True, eq=False)
class Facts:
    """What a run is.

    Attributes:
        regime: local, fedavg, personalized, mixture, ...
        base: what `personalized` fine-tunes; None elsewhere.
        data: name of the data set. clients: how many take part. seed: of everything.
        certified: the perturbation of the certificates. unit: of its sigma.
        federated: augmentation of the federated (or local) training; None = without.
        personal: augmentation of fine-tuning; None = without, or no fine-tuning.
        personalization: lambda of Eq. (4) where the algorithm has one.
        lr: learning rate of the first epoch.
        settings: the whole spec, flat, with the fingerprint of the data.
    """

    regime: str
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

    def shared(self, apart_from: Sequence[str]) -> dict[str, Any]:
        """The settings without those that may differ (whole sections or single keys)."""
        left_out = (*_NEVER_COMPARED, *apart_from)
        return {
            key: value
            for key, value in self.settings.items()
            if not any(key == name or key.startswith(f"{name}.") for name in left_out)
        }

    def key(self, apart_from: Sequence[str]) -> str:
        """Equal for runs that agree in everything else."""
        return json.dumps(self.shared(apart_from), sort_keys=True)

    def differences(self, other: Facts, apart_from: Sequence[str]) -> list[str]:
        """Where two runs disagree although they must not, in words."""
        mine, its = self.shared(apart_from), other.shared(apart_from)
        names = sorted(k for k in {*mine, *its} if mine.get(k) != its.get(k))
        return [f"{name} ({mine.get(name)} against {its.get(name)})" for name in names]

    @property
    def setting(self) -> str:
        """Data, perturbation and clients in words."""
        return f"{self.data}, {self.certified.words(self.unit)}, {self.clients} clients"


@dataclass(frozen=True, eq=False)
class StudyRun:
    """A finished run and what it is."""

    facts: Facts
    results: RunResults


def find_runs(places: Iterable[str | Path]) -> tuple[list[StudyRun], list[str]]:
    """Read runs from run folders, or from study folders that hold `runs/` or runs.

    Returns:
        (runs, notes): unfinished runs inside a study are left out and named in the notes.

    Raises:
        StoreMismatch: a folder that holds no run, or a named run that is not finished.
        StoreError: a run that is damaged.
    """
    runs: list[StudyRun] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for place in map(Path, places):
        for folder, named in _folders(place):
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
        return "its clients certify perturbations of their own"
    if results.told:
        return "its clients told curves, no single images"
    lost = "its certificates are of a scan and do not say where it looked"
    return lost if _has_no_scale(results) else ""


def _has_no_scale(results: RunResults) -> bool:
    """Whether radii are shares of nothing: it is unknown how large they can be."""
    try:
        largest_radius(results)
    except InputError:
        return True
    return False


def has_own_perturbations(results: RunResults) -> bool:
    """Whether clients of a run certify, or leave uncertified, what each of them chose."""
    try:
        asked = parse_toml(results.spec).get("certification", {})
    except InputError:
        return False  # what is damaged is told when its facts are read
    own = asked.get("own") if isinstance(asked, dict) else None
    return PERTURBATIONS in results.conditions or bool(own)


def _folders(place: Path) -> list[tuple[Path, bool]]:
    if (place / "run.json").is_file():
        return [(place, True)]
    found = sorted(place.glob("runs/*/run.json")) or sorted(place.glob("*/run.json"))
    if not found:
        raise StoreMismatch(
            f"{place} holds no run: there is neither a run.json in it nor a run in its folders. "
            "Give run folders, or the folder of a study that was computed."
        )
    return [(path.parent, False) for path in found]


def _unfinished(folder: Path) -> bool:
    held = read_json(folder / "run.json")
    return isinstance(held, dict) and held.get("status") != "finished"


def read_run(results: RunResults) -> StudyRun:
    """A run with its facts.

    Raises:
        StoreMismatch: a run whose radii or images cannot be compared with those of others.
        StoreError: the stored spec is no TOML, or does not say what a run is.
    """
    if has_own_perturbations(results):
        raise StoreMismatch(
            f"{results.folder} cannot be held against the paper's claims: its clients certify "
            "perturbations of their own, and the claims are about one perturbation for all. Leave "
            "this run out; `certifl report` shows it."
        )
    if results.told:
        raise StoreMismatch(
            f"{results.folder} cannot be held against the paper's claims: they are tested image "
            "by image, and its clients told curves and kept the certificates of their images. "
            'Leave this run out, or repeat it with clients that share rows (`share = "rows"`).'
        )
    if _has_no_scale(results):
        raise StoreMismatch(
            f"{results.folder} cannot be held against the paper's claims: its certificates are of "
            "a scan and do not say where it looked. Leave this run out, or certify again."
        )
    try:
        spec = parse_toml(results.spec)
        return StudyRun(_facts(spec, results), results)
    except MALFORMED as error:
        raise StoreError(
            f"{results.folder / 'spec.toml'} is damaged: it does not say what the run was "
            f"({type(error).__name__}: {error}). Repeat the command that made the run."
        ) from error


def _facts(spec: Mapping[str, Any], results: RunResults) -> Facts:
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
    held = results.manifest.get("data")
    fingerprint = held.get("fingerprint", "") if isinstance(held, Mapping) else ""
    return Facts(
        regime=str(algorithm["name"]),
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
