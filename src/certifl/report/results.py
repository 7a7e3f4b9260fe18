"""One finished run as stored: its manifest, certificates, training history and spec."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.certification.certificates import ABSTAINED, UNLABELLED, Certificates, Predictions
from certifl.certification.metadata import PERTURBATIONS, entries, masks
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.runs.folder import StoredRun, damaged_manifest
from certifl.safe_io import MALFORMED, read_text

Ints = NDArray[np.int64]

_NEEDED_CONDITIONS = ("family", "sigma", "norm", "unit", "alpha")
_MUST_AGREE = ("family", "norm", "unit")
# Keys of a spec in which runs of one row may differ, and conditions in which they may not.
_NO_SETTINGS = ("seed", "name", "certification.precision")
_DECISIVE = ("family", "sigma", "law", "norm", "alpha", "n0", "n", "estimator")


@dataclass(frozen=True, eq=False)
class RunResults:
    """What a finished run folder holds.

    Attributes:
        folder: the run folder, as it was given.
        label: the regime's name for people, e.g. "FedAvg"; unique within a report.
        manifest: `run.json`: regime, label, data, clients, machine, versions, times.
        certificates: one row per certified test image, the rows of all clients.
        history: one mapping per communication round; empty where nothing was trained.
        spec: the text of `spec.toml`.
        plain: plain predictions of the clients that certify nothing; None where all certify.
    """

    folder: Path
    label: str
    manifest: Mapping[str, Any]
    certificates: Certificates
    history: tuple[Mapping[str, Any], ...]
    spec: str
    plain: Predictions | None = None

    @property
    def regime(self) -> str:
        """The regime's name in specs, e.g. "fedavg"."""
        return str(self.manifest["regime"])

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What holds for all certificates: family, sigma, norm, unit, alpha, ..."""
        return self.certificates.conditions

    @property
    def clients(self) -> Ints:
        """Numbers of the clients that have certificates, in order."""
        return np.unique(self.certificates.client)

    @property
    def told(self) -> bool:
        """Whether the clients told curves alone and kept their certificates to themselves."""
        return TOLD in self.conditions

    @property
    def seed(self) -> int | None:
        """The seed of the study; None where the run does not say it."""
        seed = self.manifest.get("seed")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def runs(self) -> tuple[RunResults, ...]:
        """The run itself, so that it can stand where `Trainings` do."""
        return (self,)

    def name_of(self, client: int) -> str:
        """A client's number, and what it is called where the split of the data knows it."""
        names = self.manifest.get("client_names")
        if not isinstance(names, list) or client >= len(names):
            return str(client)
        return f"{client} ({names[client]})"

    def __repr__(self) -> str:
        return f"RunResults({self.label!r}, {len(self.clients)} clients, {self.certificates!r})"


@dataclass(frozen=True, eq=False)
class Trainings:
    """Runs that differ in their seed alone: one row of a page.

    Attributes:
        label: the algorithm's name for people; unique within a report.
        runs: one of each seed, in the order of the seeds.
    """

    label: str
    runs: tuple[RunResults, ...]

    @property
    def regime(self) -> str:
        """The algorithm's name in specs."""
        return self.runs[0].regime

    @property
    def manifest(self) -> Mapping[str, Any]:
        """`run.json` of the first seed; the others agree in everything but the seed."""
        return self.runs[0].manifest

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What holds for the certificates of the first seed."""
        return self.runs[0].conditions

    @property
    def folder(self) -> Path:
        """Of the first seed."""
        return self.runs[0].folder

    @property
    def clients(self) -> Ints:
        """Numbers of the clients that have certificates with any seed, in order."""
        return np.unique(np.concatenate([run.clients for run in self.runs]))

    @property
    def told(self) -> bool:
        """Whether some of the runs know curves alone."""
        return any(run.told for run in self.runs)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of the runs."""
        return tuple(run.seed for run in self.runs)

    def name_of(self, client: int) -> str:
        """A client's number, and what it is called where the split of the data knows it."""
        return self.runs[0].name_of(client)


Row = RunResults | Trainings
"""What a page shows in one row: runs of several seeds, or one run."""


def flat(rows: Sequence[Row]) -> list[RunResults]:
    """All runs of some rows."""
    return [run for row in rows for run in row.runs]


def load_run(folder: str | Path | StoredRun) -> RunResults:
    """Read a finished run folder.

    Args:
        folder: holds run.json, spec.toml, certificates.parquet and history.jsonl; or a run that
            was opened before, whose files are not read again.

    Raises:
        StoreMismatch: the folder holds no run, or one that is not finished.
        StoreError: a file of the run is missing or damaged.
    """
    run = folder if isinstance(folder, StoredRun) else StoredRun(Path(folder))
    _check_manifest(run)
    return RunResults(
        folder=run.path,
        label=str(run.manifest["label"]),
        manifest=run.manifest,
        certificates=_certificates(run),
        history=_history(run),
        spec=_text(run.folder.spec),
        plain=run.predictions,
    )


def load_runs(folders: Sequence[str | Path | StoredRun | RunResults]) -> list[RunResults]:
    """Read the runs of one report.

    Runs of equal label are distinguished by their seed where they differ in nothing else, by name
    or by folder otherwise.

    Args:
        folders: run folders, or runs that were read before.

    Raises:
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a run that is damaged.
    """
    runs = [f if isinstance(f, RunResults) else load_run(f) for f in folders]
    check_comparable(runs)
    rows = by_seed(runs)
    labels = {
        id(run): row.label if len(row.runs) == 1 else f"{row.label}, seed {run.seed}"
        for row in rows
        for run in row.runs
    }
    return [dataclasses.replace(run, label=labels[id(run)]) for run in runs]


def by_seed(runs: Sequence[RunResults]) -> list[Trainings]:
    """The rows of a page: runs that differ in their seed alone are put together.

    A second run of one seed is a row of its own, for nothing says which of the two counts. Runs
    that differ in any other setting are rows of their own as well.
    """
    found: dict[str, list[dict[int | None, RunResults]]] = {}
    order: list[dict[int | None, RunResults]] = []
    for run in runs:
        groups = found.setdefault(_apart_from_seed(run), [])
        free = [group for group in groups if run.seed not in group and None not in group]
        if not free or run.seed is None:
            free = [{}]
            groups += free
            order += free
        free[0][run.seed] = run
    members = [tuple(group[seed] for seed in sorted(group, key=_seed_order)) for group in order]
    return [Trainings(label, own) for label, own in zip(_labels(members), members, strict=True)]


def _seed_order(seed: int | None) -> int:
    return -1 if seed is None else seed


def _apart_from_seed(run: RunResults) -> str:
    """Equal for runs that differ in their seed, their name and their machine alone."""
    try:
        settings = decisive_settings(tomllib.loads(run.spec))
    except tomllib.TOMLDecodeError:
        settings = {"spec": run.spec}
    left = {k: v for k, v in settings.items() if k not in _NO_SETTINGS}
    decisive = {name: run.conditions.get(name) for name in _DECISIVE}
    names = (run.regime, str(run.manifest["label"]), _data_name(run))
    return json.dumps([names, left, decisive], sort_keys=True, default=str)


def _labels(members: Sequence[tuple[RunResults, ...]]) -> list[str]:
    """A name for each row, by what distinguishes the first runs where labels are equal."""
    firsts = [own[0] for own in members]
    labels = [own[0].label if len(own) == 1 else str(own[0].manifest["label"]) for own in members]
    if len(set(labels)) == len(labels):
        return labels
    candidates = labels
    for apart in (_study_name, _folder_name, _number(firsts)):
        candidates = [
            f"{label} ({apart(run)})" if labels.count(label) > 1 else label
            for label, run in zip(labels, firsts, strict=True)
        ]
        if len(set(candidates)) == len(candidates):
            break
    return candidates


def _study_name(run: RunResults) -> str:
    return str(run.manifest.get("name", ""))


def _folder_name(run: RunResults) -> str:
    return run.folder.resolve().name


def _number(runs: Sequence[RunResults]) -> Callable[[RunResults], str]:
    places = {id(run): str(position) for position, run in enumerate(runs, start=1)}
    return lambda run: places[id(run)]


def apart(runs: Sequence[RunResults]) -> list[list[RunResults]]:
    """The runs of a report once for every perturbation, each with the clients that certify it.

    Radii of different perturbations have no common axis and no common mean, so everything is
    shown for one of them at a time. Runs that are comparable come apart alike.
    """
    parts = [run.certificates.by_perturbation() for run in runs]
    return [
        [
            dataclasses.replace(run, certificates=part[at])
            for run, part in zip(runs, parts, strict=True)
        ]
        for at in range(len(parts[0]))
    ]


def check_comparable(runs: Sequence[Row]) -> None:
    """Refuse to put runs side by side whose radii or images mean different things.

    Raises:
        StoreMismatch: no run, or runs of different data, family, norm or unit, or whose clients
            certify different perturbations of their own.
    """
    if not runs:
        raise StoreMismatch("A report needs at least one run folder.")
    for run in runs[1:]:
        one, other = (_own_perturbations(r) for r in (runs[0], run))
        _agree(runs[0], run, "perturbations of clients", one, other)
        for name in _MUST_AGREE if one is None else ():
            _agree(runs[0], run, name, runs[0].conditions[name], run.conditions[name])
        _agree(runs[0], run, "data", _data_name(runs[0]), _data_name(run))


def _agree(first: Row, second: Row, name: str, one: object, other: object) -> None:
    if one != other:
        raise StoreMismatch(
            f"{first.folder} and {second.folder} cannot stand in one report: they differ in "
            f"{name} ({one} and {other}), so their radii cannot be compared. Report them "
            "separately."
        )


def _own_perturbations(run: Row) -> dict[str, str] | None:
    """By client what it certifies; None where all certify one perturbation."""
    if PERTURBATIONS not in run.conditions:
        return None
    return {
        f"client {client}": json.dumps(facts.get("description"), sort_keys=True)
        for clients, facts in entries(run.conditions)
        for client in clients or ()
    }


def _data_name(run: Row) -> str:
    data = run.manifest.get("data")
    return str(data.get("name", "")) if isinstance(data, Mapping) else ""


def _check_manifest(run: StoredRun) -> None:
    run.require_finished()
    if not {"label", "regime"} <= set(run.manifest):
        raise damaged_manifest(run.path, "it must name the run's label and regime")


def _certificates(run: StoredRun) -> Certificates:
    if run.curves_only:
        return told_certificates(run)
    problem = _problem(run.certificates)
    if problem:
        raise StoreError(f"{run.folder.certificates} cannot be reported: {problem}.")
    return run.certificates


def _problem(certificates: Certificates) -> str | None:
    """Why these certificates cannot be summarised, or None."""
    try:
        described = [facts for _, facts in entries(certificates.conditions)]
    except (KeyError, TypeError, ValueError):
        return "its conditions do not say whose perturbation is which"
    missing = [n for n in _NEEDED_CONDITIONS if any(n not in facts for facts in described)]
    if missing:
        return f"its conditions do not name {', '.join(missing)}"
    if len(certificates) == 0:
        return "it holds no image"
    if not np.all(np.isfinite(certificates.radius) & (certificates.radius >= 0)):
        return "it holds a radius that is no finite number from 0 up"
    if np.any(certificates.label == UNLABELLED):
        return "some images have no label, so nothing can be called correct"
    places = np.stack([certificates.client, certificates.index], axis=1)
    if len(np.unique(places, axis=0)) != len(places):
        return "the same image of a client appears twice"
    if not all(math.isfinite(float(facts["sigma"])) for facts in described):
        return "its sigma is no finite number"
    owners = np.sum(masks(certificates.conditions, certificates.client), axis=0)
    if np.any(owners != 1):
        return "it does not say which perturbation some client certified"
    return None


def _history(run: StoredRun) -> tuple[Mapping[str, Any], ...]:
    """Every round's entry; a run of a model that was trained elsewhere has none."""
    for number, entry in enumerate(run.history, start=1):
        if problem := _round_problem(entry):
            raise StoreError(f"{run.folder.history}, line {number} is damaged: {problem}.")
    return tuple(run.history)


def _round_problem(entry: Mapping[str, Any]) -> str:
    """Why the page cannot compute with a round; "" where it can."""
    if not isinstance(entry.get("round", 0), int):
        return "its round is not a number"
    clients, left_out = entry.get("clients", {}), entry.get("left_out", [])
    rows = list(clients.values()) if isinstance(clients, dict) else clients
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "its clients are not objects"
    if not isinstance(left_out, list) or not all(_is_fault(fault) for fault in left_out):
        return "it does not say which client was left out, and why"
    return ""


def _is_fault(fault: object) -> bool:
    return (
        isinstance(fault, dict)
        and isinstance(fault.get("client"), int)
        and isinstance(fault.get("reason"), str)
    )


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, InputError) as error:
        raise StoreError(f"Cannot read {path}: {error}. Is this a whole run folder?") from error


# Runs whose clients told curves and kept their certificates to themselves.
#
# A curve is, at every radius of a grid, how many of a client's test images are certified correct,
# and their average certified radius. Rows that come to just this are made from it, so that the
# page
# is the one of a run in one place: at the grid's radii, where curves are drawn, and for the
# average,
# they say what was told; between two radii they say nothing that was not implied.
#
# Who abstained, which image is which, and what votes were cast is not told and not shown.


TOLD = "told"
_MOST_IMAGES = 10**7

Floats = NDArray[np.float64]


def told_certificates(run: StoredRun) -> Certificates:
    """Rows that agree with the curves that the clients shared.

    Raises:
        StoreMismatch: no client shared anything. StoreError: the file is damaged.
    """
    curves = run.curves
    if not curves:
        raise StoreMismatch(
            f"In {run.path} every client keeps its certificates to itself: there is nothing to "
            "report. Their own folders hold them."
        )
    try:
        parts = [implied(client, curves[client]) for client in sorted(curves)]
        return Certificates.concatenate(parts)
    except MALFORMED as error:
        raise StoreError(f"{run.folder.curves} is damaged: {error!r}.") from error


def implied(client: int, curve: Mapping[str, Any]) -> Certificates:
    """One client's rows; `curve` holds radii, correct, images, acr and conditions."""
    grid = np.asarray(curve["radii"], np.float64)
    counts = np.asarray(curve["correct"], np.int64)
    images, acr = int(curve["images"]), float(curve["acr"])
    _check(grid, counts, images, acr)
    in_step = counts - np.append(counts[1:], 0)
    reach = _within(grid, in_step, images * acr)
    right = len(reach)
    radius = np.zeros(images)
    radius[:right] = reach
    predicted = np.full(images, ABSTAINED, np.int64)
    predicted[:right] = 0
    none, nothing = np.zeros(images, np.int64), np.full(images, np.nan)
    made = Certificates(
        client=np.full(images, client, np.int64),
        index=np.arange(images),
        label=none,
        predicted=predicted,
        radius=radius,
        p_lower=nothing,
        p_upper=nothing,
        counts=np.zeros((images, 1), np.int64),
        selection_counts=np.zeros((images, 1), np.int64),
        looks=none,
        level=nothing,
        seconds=np.zeros(images),
    )
    conditions = {**curve["conditions"], TOLD: "curve"}
    return dataclasses.replace(made, conditions=conditions)


def _check(grid: Floats, counts: NDArray[np.int64], images: int, acr: float) -> None:
    """Refuse numbers that no certificates come to, before memory is taken for them.

    Raises:
        ValueError: they are such numbers.
    """
    if grid.ndim != 1 or grid.shape != counts.shape or not len(grid):
        raise ValueError(f"{counts.size} counts for {grid.size} radii")
    falling = counts[0] <= images and counts[-1] >= 0 and bool((np.diff(counts) <= 0).all())
    rising = bool(np.isfinite(grid).all()) and grid[0] >= 0 and bool((np.diff(grid) >= 0).all())
    if not (1 <= images <= _MOST_IMAGES and falling and rising):
        raise ValueError("counts must fall from at most all images, at radii that rise")
    if not (np.isfinite(acr) and acr >= 0):
        raise ValueError(f"an average certified radius of {acr}")


def _within(grid: Floats, in_step: NDArray[np.int64], total: float) -> Floats:
    """A radius for every image that is certified correct, in its step of the grid.

    All lie at the same part of their steps, such that they sum to `total`; images at the last
    radius of the grid lie there, or as far beyond it as the sum demands.
    """
    low = np.repeat(grid, in_step)
    if not len(low):
        return low
    room = np.repeat(np.append(np.diff(grid), 0.0), in_step)
    rest = max(0.0, total - float(low.sum()))
    inside = float(room.sum())
    if inside > 0:
        part = min(rest / inside, 1.0 - 1e-9)
        low = low + part * room
        rest -= part * inside
    last = int(in_step[-1])
    if rest > 1e-12 and last:
        low[-last:] += rest / last
    return low


# Keys that specs of older runs lack, which were computed as these values have it.
LATER: Mapping[str, Any] = {"training.steps": "plain", "training.precision": "float32"}


def decisive_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a spec by "section.key".

    Where a key that came later says what every run was before, it is left out, so that runs of
    older versions stand beside newer ones.
    """
    return {key: value for key, value in _by_key(spec) if key not in LATER or value != LATER[key]}


def _by_key(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _by_key(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
