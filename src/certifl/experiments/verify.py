"""Verification of a finished run: everything that can be recomputed from its own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.certification import Certificates, unverified, verify
from certifl.certification.arithmetic import Arithmetic
from certifl.certification.certificates import Predictions
from certifl.data import Dataset
from certifl.errors import CertiflError, InputError, SpecError, StoreError, StoreMismatch
from certifl.experiments import consistency
from certifl.experiments.recast import Options, Recast, recast_votes
from certifl.models import fingerprint
from certifl.runs.atomic import load_tensors
from certifl.runs.published import is_published
from certifl.safe_io import MALFORMED
from certifl.smoothing.curves import impossible_curve
from certifl.spec import Spec
from certifl.study.opened_run import OpenRun
from certifl.study.setup import partition_of

_SHOWN = 4  # images that are named where the same is wrong with many
_MODELS = "models, which are with the clients"
_PUBLISHED = (
    "The run was published without its models: whether these cast the votes cannot be checked "
    "here. `certifl run` computes the run again from its spec.toml."
)


@dataclass(frozen=True)
class Verification:
    """The result of checking a run or a file of certificates.

    Attributes:
        checked: number of certificates. problems: one sentence each; empty when all is well.
        elsewhere: what of the run cannot be verified here, and why; empty where all of it was.
        compared: what the certificates agree with. unchecked: what nothing was compared with.
        recast: the comparison with votes cast again, if any were.
    """

    checked: int
    problems: tuple[str, ...]
    elsewhere: str = ""
    compared: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    recast: Recast | None = None


def verify_run(
    path: Path, data_dir: Path | None = None, recast: Options | None = None
) -> Verification:
    """Recompute every certificate from its votes, and compare the run's files with each other.

    Args:
        path: a run folder, also a published one, or one certificate file (.parquet).
        data_dir: folder of data sets; else where the run found its data. Nothing is downloaded.
        recast: which votes are cast again where no problem was found; None = none.

    Raises:
        StoreMismatch: the folder is not a run, or is not finished.
        StoreError: a file of the run is missing or damaged.
        InputError: the file holds no certificates, or none with votes.
        DataUnavailable: the data set is not in the folder that the user names.
    """
    if path.is_file():
        found = _of_file(path)
        if recast is not None and not found.problems:
            raise InputError(
                f"{path} is a file: --recast needs the run folder, with its models and spec."
            )
        return found
    run = OpenRun(path, data_dir, None if recast is None else recast.code, offline=True)
    run.require_finished()
    found = (
        _of_curves(run) if run.curves_only else _StoredCertificates(run, data_dir).verification()
    )
    if recast is None or found.problems:
        return found
    if is_published(run.manifest):
        raise InputError(f"{path} was published without its models, which --recast needs.")
    again = recast_votes(run, recast)
    return dataclasses.replace(found, problems=again.problems, recast=again)


def _of_file(path: Path) -> Verification:
    certificates = Certificates.load(path)
    problems = _from_votes(certificates)
    problems += consistency.twice_problems(certificates)
    if path.suffix.lower() == ".parquet":
        problems += consistency.column_problems(path, certificates)
    if problems:
        return Verification(len(certificates), tuple(problems))
    unchecked = (*unverified(certificates), "the votes themselves")
    return Verification(len(certificates), (), unchecked=unchecked)


def _from_votes(certificates: Certificates) -> list[str]:
    """What does not follow from votes; one sentence where the same is wrong with many images."""
    images: dict[str, list[str]] = {}
    for found in verify(certificates):
        images.setdefault(found.problem, []).append(f"client {found.client}, image {found.index}")
    return [f"{_several(named, len(certificates))}: {what}" for what, named in images.items()]


def _several(named: Sequence[str], everything: int) -> str:
    if len(named) <= _SHOWN:
        return "; ".join(named)
    if len(named) == everything:
        return f"all {everything} images"
    return f"{'; '.join(named[:_SHOWN])} and {len(named) - _SHOWN} more"


def _spec_problems(run: OpenRun) -> list[str]:
    changed = run.spec.hash() != run.manifest.get("spec_hash")
    return ["spec.toml was changed after the run was begun"] * changed


class _StoredCertificates:
    """A run whose certificates are in its folder."""

    def __init__(self, run: OpenRun, data_dir: Path | None) -> None:
        self.run, self.spec, self.manifest = run, run.spec, run.manifest
        self.notes: list[str] = []
        self.local = "deployment" not in self.manifest
        self.published = is_published(self.manifest)
        # Images of another data set are a problem; where there are none, `no_images` says why.
        self.other_images, self.no_images = False, ""
        self.dataset = self._available_images(data_dir)
        self.certificates = run.certificates
        self.certifying = [c for c, p in enumerate(run.perturbations) if p is not None]
        self.plain = [c for c, p in enumerate(run.perturbations) if p is None]
        # Because the spec says so: whether run.json does is one of the things checked.
        predicted = self.plain and self.local
        self.predictions: Predictions | None = run.folder.load_predictions() if predicted else None

    def _available_images(self, data_dir: Path | None) -> Dataset | None:
        """The data set, from the folder that the user names, or from where the run found it."""
        if not self.local:
            self.no_images = "they are with its clients"
            return None
        try:
            return self.run.dataset
        except StoreMismatch:
            self.other_images, self.no_images = True, "the data set holds other images"
        except StoreError:
            raise
        except (CertiflError, OSError) as error:
            if data_dir is not None:
                raise
            self.no_images = str(error).partition(". ")[0].rstrip(".")
        return None

    @property
    def rows(self) -> list[Certificates | Predictions]:
        return [part for part in (self.certificates, self.predictions) if part is not None]

    def verification(self) -> Verification:
        """Everything compared, in the order in which it is easiest to understand."""
        found = dict.fromkeys(
            [
                *self._certificates(),
                *self._settings(),
                *self._images(),
                *self._labels(),
                *self._training(),
                *consistency.manifest_problems(
                    self.manifest, self.spec, self.certificates, self.predictions, self.dataset
                ),
                *_spec_problems(self.run),
            ]
        )
        elsewhere = _PUBLISHED if self.published and not found else ""
        compared, unchecked = self._extent()
        return Verification(len(self.certificates), tuple(found), elsewhere, compared, unchecked)

    def _certificates(self) -> list[str]:
        try:
            found = _from_votes(self.certificates)
        except InputError as error:
            found = [str(error)]
        path = self.run.folder.certificates
        return found + consistency.column_problems(path, self.certificates)

    def _settings(self) -> list[str]:
        metadata = self.certificates.conditions
        try:
            problems = consistency.settings_problems(metadata, self.spec, self.certifying)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems = [f"the conditions of the certificates cannot be read ({error!r})"]
        problems += consistency.clients_problems(self.certificates, self.certifying)
        chosen = self._precisions()
        if None in chosen:
            problems.append("what auto stands for in run.json cannot be read")
        known, recorded = sorted(filter(None, chosen)), metadata.get("precision")
        if self._automatic and known and recorded not in known:
            problems.append(
                f"the certificates say precision = {recorded!r:.80}, but in run.json auto stands "
                f"for {' or '.join(known)}"
            )
        if self.predictions is not None:
            problems += consistency.plain_problems(self.predictions, self.plain)
        return problems

    @property
    def _automatic(self) -> bool:
        return self.spec.certification.precision == "auto"

    def _precisions(self) -> set[str | None]:
        """What "auto" stands for in run.json, on some devices; None for what cannot be read."""
        if "arithmetic" not in self.manifest:
            return set()
        stored = self.manifest["arithmetic"]
        read = map(Arithmetic.read, stored.values() if isinstance(stored, Mapping) else ())
        return {choice and choice.precision for choice in read} or {None}

    def _images(self) -> list[str]:
        """Which images each client certifies; a federation's clients choose among their own."""
        if not self.local or (self.published and self.dataset is None):
            if self.local:
                self.notes.append("which images the clients certified")
            return consistency.too_many(self.certificates, self.spec)
        problems: list[str] = []
        try:
            if self.published:  # it holds no partition: as spec, seed and data give it
                assert self.dataset is not None, "the case without it is above"
                partition = partition_of(self.spec, self.dataset)
            else:
                partition = self.run.stored_partition
                problems = consistency.partition_problems(partition, self.spec, self.dataset)
        except (InputError, StoreError) as error:
            return [str(error)]
        if len(partition.clients) != self.spec.clients.count:
            return problems
        if list(partition.names) != self.manifest.get("client_names", []):
            source = "spec and data" if self.published else "partition.json"
            problems.append(f"run.json and {source} name the clients differently")
        for rows, clients in zip(self.rows, (self.certifying, self.plain), strict=False):
            problems += consistency.chosen_problems(rows, partition, self.spec, clients)
        return problems

    def _labels(self) -> list[str]:
        if self.other_images:
            return [
                f"the data set {self.spec.data.name!r} here holds other images than were "
                "certified (its fingerprint differs); --data-dir names another folder"
            ]
        if self.dataset is None:
            return []
        return [p for rows in self.rows for p in consistency.label_problems(rows, self.dataset)]

    def _training(self) -> list[str]:
        if self.published:
            self.notes += ["models, which are not published", "history, but for its rounds"]
            return consistency.published_history_problems(self.run)
        try:
            problems = self._models()
        except StoreError as error:
            return [str(error)]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            return [f"the final checkpoint cannot be read ({error!r})"]
        problems += self._initial_weights()
        return problems + consistency.history_problems(self.run) + self._privacy()

    def _models(self) -> list[str]:
        # States alone, without the network: checking somebody's run must not run their code.
        recorded: dict[str, Any] = {}
        for rows in self.rows:
            named = rows.conditions.get("model_fingerprint")
            if not isinstance(named, Mapping):
                return ["the certificates do not say by client which model they are of"]
            recorded |= named
        run, clients = self.run, range(self.spec.clients.count)
        _ = run.last_round  # also where the models cannot be compared, it must be whole
        if not self.local:  # a client that shared only its accuracy shared no model
            clients = self.certifying
            if run.algorithm.keeps_client_state:
                self.notes.append(_MODELS)
                return []
        problems = [
            f"client {client}: the stored model is not the one that was certified"
            for client in clients
            if fingerprint(run.state(client)) != recorded.get(str(client))
        ]
        if strangers := sorted(set(recorded) - {str(client) for client in clients}):
            problems.append(f"a model of client {strangers[0]} is recorded, which certified none")
        return problems

    def _initial_weights(self) -> list[str]:
        """Where stored weights of the user are not those that the training began with."""
        path, identity = self.run.folder.initial, self.run.last_round.identity
        if self.spec.model.weights is None:
            return []
        try:
            same = fingerprint(load_tensors(path)) == identity.get("initial_model")
        except StoreError as error:
            return [str(error).rstrip(".")]
        return [] if same else [f"{path.name} is not what the training began with"]

    def _privacy(self) -> list[str]:
        """The images' privacy that was spent; networks of a user's own are not built here."""
        if self.spec.privacy.kind == "none":
            return []
        if not self.local or self.dataset is None or ":" in self.spec.model.name:
            self.notes.append("the privacy spent")
            return []
        try:
            return consistency.privacy_problems(self.run, self.dataset)
        except (SpecError, StoreError) as error:  # a damaged partition is a finding already
            self.notes.append(f"the privacy spent: {str(error).partition('. ')[0]}")
            return []

    def _extent(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        stored, there = not self.published, self.dataset is not None
        int8 = self.spec.certification.precision == "int8"
        compared = {
            "spec": True,
            "run.json": True,
            "history": stored,
            "models": stored and _MODELS not in self.notes,
            "fingerprints of weights and scales": int8,
            "initial weights": stored and self.spec.model.weights is not None,
            "partition.json": stored and self.local,
            "which images the clients certified": self.published and there,
            f"images and labels of {self.spec.data.name}": there,
        }
        unchecked = {
            "precision (auto)": self._automatic and not any(self._precisions()),
            "batch size, device, threads, seconds": True,
            "the scales of int8 (--recast K computes them again)": int8,
            f"labels not checked: {self.no_images}": not there,
            "which images of theirs the clients certified": not self.local,
            "plain predictions": self.predictions is not None,
            **dict.fromkeys(self.notes, True),
            "the votes themselves": self.published,
            "the votes themselves (--recast K casts some of them again)": stored,
        }
        done, left = ([k for k, v in items.items() if v] for items in (compared, unchecked))
        return tuple(done), tuple(left)


def _of_curves(run: OpenRun) -> Verification:
    """A federation whose clients kept their certificates: the curves they shared.

    A curve says how many of a client's test images are certified correct at each radius of the
    study's grid, and their average certified radius. Whether these numbers follow from votes only
    the client can check; here it can be seen whether they are possible at all.
    """
    problems, curves, checked = _spec_problems(run), run.curves or {}, 0
    for client, curve in curves.items():
        problems += impossible(client, curve, run.spec)
        problems += consistency.curve_settings_problems(client, curve, run.spec)
    # Rows of single clients that shared them, where others did not.
    for path in sorted(run.folder.votes(0).parent.glob("rows-*.parquet")):
        rows = Certificates.load(path)
        problems += _from_votes(rows) + consistency.column_problems(path, rows)
        checked += len(rows)
    shared, possible = "shared nothing of them", ""
    if curves:
        shared = "shared curves"
        possible = (
            f" Checked here: {len(curves)} curves agree with the spec and are possible (counts "
            "that fall on its grid, averages that fit them), which does not make them true."
        )
    elsewhere = (
        f"{run.path} holds no certificates to verify: its clients certified on their own "
        f"machines, {shared} and kept votes and radii of their images.{possible} Every client can "
        "verify its own: `certifl verify studies/ID/certificates.parquet` in its folder."
    )
    return Verification(checked, tuple(problems), elsewhere)


def impossible(client: int, curve: Mapping[str, Any], spec: Spec) -> list[str]:
    """Why no certificates can come to a client's curve; nothing if some can."""
    try:
        radii, counts = [float(r) for r in curve["radii"]], [int(c) for c in curve["correct"]]
        images, acr = int(curve["images"]), float(curve["acr"])
    except MALFORMED as error:
        return [f"client {client}: its curve is damaged ({error!r})"]
    if images < 1:
        return [f"client {client}: its curve is of {images} images"]
    asked, why = spec.certification.images, impossible_curve(radii, counts, images, acr)
    found = [] if why is None else [f"client {client}: {why}"]
    if asked is not None and images > asked:
        found.append(f"client {client}: {images} images, but the spec certifies {asked}")
    return found
