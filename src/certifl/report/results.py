"""Finished runs as stored: manifest, certificates, training history and spec of each."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.certification.certificates import Certificates, Predictions
from certifl.certification.metadata import CURVES_ONLY
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.report.stored import certificates_from_curves, certificates_problem, round_problem
from certifl.runs.folder import StoredRun, damaged_manifest
from certifl.runs.folder import flat as flat_keys
from certifl.safe_io import parse_toml, read_text
from certifl.smoothing.bounds import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

MODEL = "model"  # stands for the algorithm of a model that no study trained
_MUST_AGREE = ("family", "norm", "unit")
# Parts of a run whose clients are reported apart.
TRAINED, UNSEEN = "clients in training", "unseen clients"
# Runs of one row may differ in these keys of the spec, and must agree in this metadata.
_NO_SETTINGS = ("seed", "name")
_DECISIVE = ("family", "sigma", "law", "norm", "alpha", "n0", "n", "estimator")


@dataclass(frozen=True, eq=False)
class RunResults:
    """Contents of a finished run folder.

    Attributes:
        folder: path of the run folder, as given.
        label: name of the algorithm for people, e.g. "FedAvg"; unique within a report.
        manifest: `run.json`: algorithm, label, data, clients, machine, versions, times.
        certificates: one row per certified test image, the rows of all clients.
        history: one mapping per communication round; empty where nothing was trained.
        spec: text of `spec.toml`.
        plain: plain predictions of the clients that certify nothing; None where all certify.
        color: that the user chose, as "#rrggbb"; None = the algorithm's own.
        group: which clients these are, where some took no part in training; "" = all.
    """

    folder: Path
    label: str
    manifest: Mapping[str, Any]
    certificates: Certificates
    history: tuple[Mapping[str, Any], ...]
    spec: str
    plain: Predictions | None = None
    color: str | None = None
    group: str = ""

    @property
    def algorithm(self) -> str:
        """Name of the algorithm in specs, e.g. "fedavg"."""
        return str(self.manifest["regime"])

    @property
    def data(self) -> Mapping[str, Any]:
        """The data set as the manifest describes it; empty where it does not."""
        data = self.manifest.get("data")
        return data if isinstance(data, Mapping) else {}

    @property
    def data_name(self) -> str:
        """Name of the data set; empty where it was not recorded."""
        return str(self.data.get("name", ""))

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Metadata of all certificates: family, sigma, norm, unit, alpha, ..."""
        return self.certificates.conditions

    @cached_property
    def parts(self) -> tuple[RunResults, ...]:
        """The run once for each perturbation, with the clients that certify it."""
        parts = self.certificates.by_perturbation()
        return tuple(dataclasses.replace(self, certificates=part) for part in parts)

    @property
    def clients(self) -> Ints:
        """Numbers of the clients that have certificates, in order."""
        return np.unique(self.certificates.client)

    @property
    def unseen(self) -> tuple[int, ...]:
        """Clients that took part in no round, from the manifest."""
        listed = self.manifest.get("unseen")
        return tuple(c for c in listed if type(c) is int) if isinstance(listed, list) else ()

    @property
    def curves_only(self) -> bool:
        """Whether the clients shared curves and kept their certificates to themselves."""
        return CURVES_ONLY in self.conditions

    @property
    def seed(self) -> int | None:
        """Seed of the study; None where the run does not say it."""
        seed = self.manifest.get("seed")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def runs(self) -> tuple[RunResults, ...]:
        """The run itself: a row of one seed."""
        return (self,)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, where the data set has some."""
        names = self.data.get("class_names")
        return [str(name) for name in names] if isinstance(names, list) and names else None

    def client_name(self, client: int) -> str:
        """A client's number, with its name where the partition of the data has one."""
        names = self.manifest.get("client_names")
        if not isinstance(names, list) or client >= len(names):
            return str(client)
        return f"{client} ({names[client]})"

    def curves(self, radii: Sequence[float | str] | Floats | None = None) -> DataFrame:
        """Certified accuracy by radius; needs pandas, the extra `certifl[pandas]`.

        Args:
            radii: in the unit of the certificates, angles also as "5deg"; None = those of the
                report's curves.

        Returns:
            Indexed by radius: columns mean, min and max over clients, each of which counts once,
            and a column for each client, named by its number.

        Raises:
            InputError: clients certify different perturbations: take one of `parts`.
        """
        from certifl.report.table import curves_frame

        return curves_frame(self, radii)

    def table(self, by: str | None = None) -> DataFrame:
        """The numbers of the report's tables; needs pandas, the extra `certifl[pandas]`.

        Args:
            by: None = one row; "client" or "class" = one for each.

        Returns:
            Columns images, acr (average certified radius), "at R" (certified accuracy at a few
            radii, share of images), abstained, votes_per_image. Without `by` also the 95 % limits
            acr_low and acr_high, and the spread between best and worst client.

        Raises:
            InputError: as `curves`, or single images are not known.
        """
        from certifl.report.table import table_frame

        return table_frame(self, by)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        label: str | None = None,
        color: str | None = None,
        unit: str | None = None,
        bands: bool = True,
    ) -> Axes:
        """Draw certified accuracy against the radius; several calls share axes.

        Args:
            label, color: of the curve; None = the algorithm's.
            ax, unit, bands: as `certifl.plot` takes them, which also says what is returned and
                refused.
        """
        from certifl.report.figures import plot

        chosen = {self.label: label} if label else None
        return plot([self], ax, chosen, None, {self.label: color} if color else None, unit, bands)

    def __repr__(self) -> str:
        return f"RunResults({self.label!r}, {len(self.clients)} clients, {self.certificates!r})"


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs that differ in their seed alone: one row of a page.

    Attributes:
        label: name of the algorithm for people; unique within a report.
        runs: one of each seed, in the order of the seeds.
    """

    label: str
    runs: tuple[RunResults, ...]

    @property
    def algorithm(self) -> str:
        """Name of the algorithm in specs."""
        return self.runs[0].algorithm

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Metadata of the certificates of the first seed."""
        return self.runs[0].conditions

    @property
    def clients(self) -> Ints:
        """Numbers of the clients that have certificates with any seed, in order."""
        return np.unique(np.concatenate([run.clients for run in self.runs]))

    @property
    def curves_only(self) -> bool:
        """Whether some of the runs have curves only."""
        return any(run.curves_only for run in self.runs)


Row = RunResults | SeedGroup  # one row of a page: runs of several seeds, or one run


def flat(rows: Sequence[Row]) -> list[RunResults]:
    """All runs of some rows."""
    return [run for row in rows for run in row.runs]


def all_clients(rows: Sequence[Row]) -> list[int]:
    """Numbers of the clients that have certificates in any row, in order."""
    return sorted({int(client) for row in rows for client in row.clients})


def load_run(folder: str | Path | StoredRun) -> RunResults:
    """Read a finished run folder.

    Args:
        folder: holds run.json, spec.toml, certificates.parquet and history.jsonl; or a run that
            was opened before, whose files are not read again.

    Raises:
        StoreMismatch: the folder contains no finished run.
        StoreError: a file of the run is missing or damaged.
    """
    run = folder if isinstance(folder, StoredRun) else StoredRun(Path(folder))
    run.require_finished()
    if not {"label", "regime"} <= set(run.manifest):
        raise damaged_manifest(run.path, "it must name the run's label and regime")
    label = str(run.manifest["label"]).replace("Personalised", "Personalized")  # runs of 0.1.0
    certificates = certificates_from_curves(run) if run.curves_only else run.certificates
    problem = None if run.curves_only else certificates_problem(certificates)
    if problem:
        raise StoreError(f"{run.folder.certificates} cannot be reported: {problem}.")
    # A run of a model that was trained elsewhere has no history.
    for number, entry in enumerate(run.history, start=1):
        if problem := round_problem(entry):
            raise StoreError(f"{run.folder.history}, line {number} is damaged: {problem}.")
    try:
        spec = read_text(run.folder.spec)
    except (OSError, InputError) as error:
        raise StoreError(
            f"Cannot read {run.folder.spec}: {error}. Is this a whole run folder?"
        ) from error
    manifest = {**run.manifest, "label": label}
    history = tuple(run.history)
    return RunResults(run.path, label, manifest, certificates, history, spec, run.predictions)


def results_of(certificates: Certificates, name: str = "", path: Path | None = None) -> RunResults:
    """Certificates of a model that no study trained, as results that a report takes.

    Args:
        certificates: with labels; each row counts as another image.
        name: of the model; "Model" where empty.
        path: of their file; None where they are in memory only.

    Raises:
        InputError: they cannot be reported: no image, or none with a label.
    """
    distinct = np.unique(np.stack([certificates.client, certificates.index], axis=1), axis=0)
    if len(distinct) < len(certificates):  # of several calls, each of which counts from 0
        certificates = dataclasses.replace(certificates, index=np.arange(len(certificates)))
    problem = certificates_problem(certificates)
    if problem:
        where = "These certificates" if path is None else str(path)
        raise InputError(f"{where} cannot be reported: {problem}.")
    label = name.strip() or "Model"
    clients = len(np.unique(certificates.client))
    manifest = {"regime": MODEL, "label": label, "name": label, "clients": clients}
    folder = Path("certificates.parquet") if path is None else path
    return RunResults(folder, label, manifest, certificates, (), "")


def load_model(path: Path, name: str | None = None) -> RunResults:
    """Read the certificates of one model, named as the user says or by its file.

    Raises:
        InputError: the file holds no certificates, or some that cannot be reported.
    """
    return results_of(Certificates.load(path), path.stem if name is None else name, path)


def load_runs(folders: Sequence[str | Path | StoredRun | RunResults]) -> list[RunResults]:
    """Read the runs of one report, those that were not read before.

    Runs of equal label are distinguished by their seed where they differ in nothing else, by name
    or by folder otherwise.

    Raises:
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a run that is damaged. InputError: a folder that is named twice.
    """
    paths = [Path(f).resolve() for f in folders if isinstance(f, str | Path)]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is named twice. Name each run once.")
    runs = [f if isinstance(f, RunResults) else load_run(f) for f in folders]
    check_comparable(runs)
    labels = {
        id(run): row.label if len(row.runs) == 1 else f"{row.label}, seed {run.seed}"
        for row in by_seed(runs)
        for run in row.runs
    }
    return [dataclasses.replace(run, label=labels[id(run)]) for run in runs]


def by_seed(runs: Sequence[RunResults]) -> list[SeedGroup]:
    """Group runs that differ in their seed alone: the rows of a page.

    A second run of one seed is a separate row, since nothing says which of the two counts. Runs
    that differ in any other setting are separate rows as well.
    """
    by_settings: dict[str, list[dict[int | None, RunResults]]] = {}
    rows: list[dict[int | None, RunResults]] = []
    for run in runs:
        groups = by_settings.setdefault(_settings_key(run), [])
        free = [group for group in groups if run.seed not in group and None not in group]
        if not free or run.seed is None:
            free = [{}]
            groups += free
            rows += free
        free[0][run.seed] = run
    members = [
        tuple(by[s] for s in sorted(by, key=lambda s: -1 if s is None else s)) for by in rows
    ]
    return [SeedGroup(label, own) for label, own in zip(_labels(members), members, strict=True)]


def _settings_key(run: RunResults) -> str:
    """Equal for runs that differ in their seed, name and machine alone."""
    try:
        settings = decisive_settings(parse_toml(run.spec))
    except InputError:
        settings = {"spec": run.spec}
    compared = {k: v for k, v in settings.items() if k not in _NO_SETTINGS}
    decisive = {name: run.conditions.get(name) for name in _DECISIVE}
    names = (run.algorithm, str(run.manifest["label"]), run.data_name)
    return json.dumps([names, compared, decisive], sort_keys=True, default=str)


def _labels(members: Sequence[tuple[RunResults, ...]]) -> list[str]:
    """A name for each row, by what distinguishes the first runs where labels are equal."""
    firsts = [own[0] for own in members]
    labels = [own[0].label if len(own) == 1 else str(own[0].manifest["label"]) for own in members]
    numbers = {id(run): str(number) for number, run in enumerate(firsts, start=1)}
    details: tuple[Callable[[RunResults], str], ...] = (
        lambda run: str(run.manifest.get("name", "")),
        lambda run: run.folder.resolve().name,
        lambda run: numbers[id(run)],
    )
    distinct = labels
    for detail in details:
        if len(set(distinct)) == len(distinct):
            break
        distinct = [
            f"{label} ({detail(run)})" if labels.count(label) > 1 else label
            for label, run in zip(labels, firsts, strict=True)
        ]
    return distinct


def by_perturbation(runs: Sequence[RunResults]) -> list[list[RunResults]]:
    """The runs of a report once for every perturbation, each with the clients that certify it.

    Radii of different perturbations have no common axis and no common mean. Clients that took
    part in no round of some run are apart from the others, too. Parts of comparable runs
    correspond.
    """
    parts = [list(part) for part in zip(*(run.parts for run in runs), strict=True)]
    unseen = {client for run in runs for client in run.unseen}
    if not unseen:
        return parts
    halves = []
    for part, group in itertools.product(parts, (TRAINED, UNSEEN)):
        half = []
        for run in part:
            rows = np.isin(run.certificates.client, sorted(unseen)) == (group == UNSEEN)
            own = run.certificates.select(rows)
            half.append(dataclasses.replace(run, certificates=own, group=group))
        if all(len(run.certificates) for run in half):
            halves.append(half)
    return halves


def check_comparable(runs: Sequence[Row]) -> None:
    """Refuse to compare runs whose radii or images mean different things.

    Raises:
        StoreMismatch: no run, or runs of different data, family, norm or unit.
    """
    if not runs:
        raise StoreMismatch("A report needs at least one run folder.")
    first, *others = (row.runs[0] for row in runs)
    mine = _comparable_values(first)
    for run in others:
        its = _comparable_values(run)
        for name, one in mine.items():
            if one != (other := its.get(name)):
                raise StoreMismatch(
                    f"{first.folder} and {run.folder} cannot be in one report: they differ in "
                    f"{name} ({one} and {other}), so their radii cannot be compared. Report them "
                    "separately."
                )


def _comparable_values(run: RunResults) -> dict[str, object]:
    """What must be equal for two runs in one report, by name."""
    by_client = None
    if len(run.parts) > 1:
        by_client = {
            f"client {client}": json.dumps(part.conditions.get("description"), sort_keys=True)
            for part in run.parts
            for client in part.clients
        }
    same = {} if by_client else {name: run.conditions[name] for name in _MUST_AGREE}
    return {"perturbations of clients": by_client, **same, "data": run.data_name}


def require_one_perturbation(run: RunResults) -> None:
    """Refuse a run whose clients certify different perturbations.

    Raises:
        InputError: they do: their radii have no common axis.
    """
    if len(run.parts) > 1:
        noise = ", ".join(str(part.conditions.get("family")) for part in run.parts)
        raise InputError(
            f"The clients of {run.label} certify different perturbations ({noise}), whose radii "
            "have no common axis. Take them one by one: for part in result.parts."
        )


# Keys that specs of older runs lack, with the values those runs were computed with.
LATER: Mapping[str, Any] = {
    "training.steps": "plain",
    "training.precision": "float32",
    "training.memory_format": "auto",
}


def decisive_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a spec by "section.key", which decide whether runs can be compared.

    A later key with the value that all older runs had is left out, so that runs of older versions
    can be compared with newer ones; so is a precision that votes with the trained network. One in
    int8 is another network.
    """
    settings = {k: v for k, v in flat_keys(spec).items() if k not in LATER or v != LATER[k]}
    if settings.get("certification.precision") != "int8":
        settings.pop("certification.precision", None)
    return settings
