"""Verification of a finished run: everything that can be recomputed from its own files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certifl.certification import Certificates, unverified, verify
from certifl.certification.api import asked_conditions
from certifl.certification.arithmetic import Arithmetic
from certifl.certification.certificates import Predictions
from certifl.certification.metadata import AMOUNTS, differs, entries
from certifl.certification.recompute import known_words
from certifl.certification.settings import PRECISIONS
from certifl.errors import InputError, SpecError, StoreError
from certifl.experiments.recast import Options, Recast, recast_votes
from certifl.experiments.verify_run import (
    Images,
    available_images,
    chosen_problems,
    column_problems,
    history_problems,
    label_problems,
    manifest_problems,
    partition_problems,
    privacy_problems,
    published_history_problems,
)
from certifl.models import fingerprint
from certifl.perturbations import Perturbation, from_record
from certifl.runs.published import is_published
from certifl.safe_io import MALFORMED
from certifl.spec import Spec
from certifl.study.curves import possible_averages
from certifl.study.opened_run import OpenRun, partition_of
from certifl.study.weights import weights_problems

_SHOWN = 4  # images that are named where the same is wrong with many
_MODELS = "models, which are with the clients"
_SCALES = "the scales of int8 (--recast K computes them again)"
_VOTES = "the votes themselves (--recast K casts some of them again)"
_PUBLISHED = (
    "The run was published without its models: whether its votes are theirs cannot be checked "
    "here. The spec computes it again: `certifl run spec.toml`."
)


@dataclass(frozen=True)
class Verification:
    """The result of checking a run or a file of certificates.

    Attributes:
        checked: number of certificates. problems: one sentence each; empty when all is well.
        kept: what of the run could not be verified here, and why; empty where all of it was.
        compared: what the certificates agree with. unchecked: what nothing was compared with.
        recast: the comparison with votes cast again, where that was wanted.
    """

    checked: int
    problems: tuple[str, ...]
    kept: str = ""
    compared: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    recast: Recast | None = None


def verify_run(
    path: Path, data_dir: Path | None = None, recast: Options | None = None
) -> Verification:
    """Recompute every certificate from its votes, and compare all that a run says of itself.

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
    if run.curves_only:
        found = _of_curves(run)
    else:
        found = _OfRun(run, available_images(run, data_dir)).verification()
    if recast is None or found.problems:
        return found
    if is_published(run.manifest):
        raise InputError(f"{path} was published without its models, which --recast needs.")
    again = recast_votes(run, recast)
    return dataclasses.replace(found, problems=again.problems, recast=again)


def _of_file(path: Path) -> Verification:
    certificates = Certificates.load(path)
    problems = _from_votes(certificates)
    if path.suffix.lower() == ".parquet":
        problems += column_problems(path, certificates)
    if problems:
        return Verification(len(certificates), tuple(problems))
    unchecked = (*unverified(certificates), "the votes themselves")
    return Verification(len(certificates), (), unchecked=unchecked)


class _OfRun:
    """A run whose certificates are in its folder."""

    def __init__(self, run: OpenRun, images: Images) -> None:
        self.run, self.spec, self.images = run, run.spec, images
        self.manifest = run.manifest
        self.notes: list[str] = []
        self.local = "deployment" not in self.manifest
        self.published = is_published(self.manifest)
        self.certificates = run.certificates
        self.certifying = [c for c, p in enumerate(run.perturbations) if p is not None]
        self.plain = [c for c, p in enumerate(run.perturbations) if p is None]
        # Because the spec says so: whether run.json does is one of the things checked.
        wanted = self.plain and self.local
        self.predictions = run.folder.load_predictions() if wanted else None

    def verification(self) -> Verification:
        """Everything compared, in the order in which it is easiest to understand."""
        problems = [
            *self._rows(),
            *self._as_asked(),
            *self._whose_images(),
            *self._of_the_data(),
            *self._of_the_training(),
            *manifest_problems(
                self.manifest, self.spec, self.certificates, self.predictions, self.images.dataset
            ),
        ]
        if self.spec.hash() != self.manifest.get("spec_hash"):
            problems.append("spec.toml was changed after the run was begun")
        found = tuple(dict.fromkeys(problems))
        compared, unchecked = self._extent()
        kept = _PUBLISHED if self.published and not found else ""
        return Verification(len(self.certificates), found, kept, compared, unchecked)

    def _rows(self) -> list[str]:
        try:
            found = _from_votes(self.certificates)
        except InputError as error:
            found = [str(error)]
        return found + column_problems(self.run.folder.certificates, self.certificates)

    def _as_asked(self) -> list[str]:
        problems: list[str] = []
        try:
            problems += _asked_problems(self.certificates.conditions, self.spec, self.certifying)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"the conditions of the certificates cannot be read ({error!r})")
        problems += _clients_problems(self.certificates, self.certifying)
        recorded, chosen = self.certificates.conditions.get("precision"), self._chosen()
        if "arithmetic" in self.manifest and not all(self._choices() or [None]):
            problems.append("what auto stands for in run.json cannot be read")
        if chosen and recorded not in chosen:
            problems.append(
                f"the certificates say precision = {recorded!r:.80}, but in run.json auto stands "
                f"for {' or '.join(chosen)}"
            )
        if self.predictions is not None:
            problems += _plain_problems(self.predictions, self.plain)
        return problems

    def _chosen(self) -> list[str]:
        """What "auto" stands for in this run; nothing where run.json does not say it."""
        if self.spec.certification.precision != "auto":
            return []
        return sorted({choice.precision for choice in self._choices() if choice is not None})

    def _choices(self) -> list[Arithmetic | None]:
        """The choices in run.json, one a device; None for what cannot be read."""
        stored = self.manifest.get("arithmetic", {})
        if not isinstance(stored, Mapping):
            return [None]
        return [Arithmetic.read(choice) for choice in stored.values()]

    def _whose_images(self) -> list[str]:
        """Which images each client certifies; a federation's clients choose among their own."""
        if not self.local:
            return _too_many(self.certificates, self.spec)
        if self.published:
            return self._of_published_images()
        try:
            partition = self.run.stored_partition
        except StoreError as error:
            return [str(error)]
        problems = partition_problems(partition, self.spec, self.images)
        if len(partition.clients) != self.spec.clients.count:
            return problems
        if list(partition.names) != self.manifest.get("client_names", []):
            problems.append("run.json and partition.json name the clients differently")
        problems += chosen_problems(self.certificates, partition, self.spec, self.certifying)
        if self.predictions is not None:
            problems += chosen_problems(self.predictions, partition, self.spec, self.plain)
        return problems

    def _of_published_images(self) -> list[str]:
        """As spec, seed and data give them: a published run contains no partition."""
        dataset = self.images.dataset
        if dataset is None:
            self.notes.append("which images the clients certified")
            return _too_many(self.certificates, self.spec)
        try:
            partition = partition_of(self.spec, dataset)
        except InputError as error:
            return [str(error)]
        return chosen_problems(self.certificates, partition, self.spec, self.certifying)

    def _of_the_data(self) -> list[str]:
        dataset = self.images.dataset
        if self.images.others:
            return [
                f"the data set {self.spec.data.name!r} here holds other images than were "
                "certified (its fingerprint differs); --data-dir names another folder"
            ]
        if dataset is None:
            return []
        rows = [self.certificates, *([] if self.predictions is None else [self.predictions])]
        return [problem for part in rows for problem in label_problems(part, dataset)]

    def _of_the_training(self) -> list[str]:
        if self.published:
            self.notes += ["models, which are not published", "history, but for its rounds"]
            return published_history_problems(self.run)
        try:
            models = self._models()
        except StoreError as error:
            return [str(error)]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            return [f"the final checkpoint cannot be read ({error!r})"]
        initial = self.run.last_round.identity.get("initial_model")
        models += weights_problems(self.run.folder, self.spec, initial)
        return models + history_problems(self.run) + self._privacy()

    def _privacy(self) -> list[str]:
        """The images' privacy that was spent; networks of a user's own are not built here."""
        if self.spec.privacy.kind == "none":
            stray = "privacy" in self.manifest
            return ["run.json says what privacy was spent, but the spec has none"] * stray
        dataset = self.images.dataset
        if not self.local or dataset is None or ":" in self.spec.model.name:
            self.notes.append("the privacy spent")
            return []
        try:
            return privacy_problems(self.run, dataset)
        except (SpecError, StoreError) as error:  # a damaged partition is a finding already
            self.notes.append(f"the privacy spent: {str(error).partition('. ')[0]}")
            return []

    def _models(self) -> list[str]:
        # States alone, without the network: checking somebody's run must not run their code.
        recorded: dict[str, Any] = {}
        for rows in (self.certificates, self.predictions):
            named = {} if rows is None else rows.conditions.get("model_fingerprint")
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

    def _extent(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is compared, and what is not."""
        compared = ["spec", "run.json"]
        if not self.published:
            compared += ["history"] if _MODELS in self.notes else ["history", "models"]
        unchecked = ["batch size, device, threads, seconds"]
        if self.spec.certification.precision == "auto" and not self._chosen():
            unchecked.insert(0, "precision (auto)")
        if self.spec.certification.precision == "int8":
            compared.append("fingerprints of weights and scales")
            unchecked.append(_SCALES)
        if self.spec.model.weights is not None and not self.published:
            compared.append("initial weights")
        if self.local and not self.published:
            compared.append("partition.json")
        elif self.published and self.images.dataset is not None:
            compared.append("which images the clients certified")
        if self.images.dataset is not None:
            compared.append(f"images and labels of {self.spec.data.name}")
        else:
            unchecked.append(f"labels not checked: {self.images.why}")
        if not self.local:
            unchecked.append("which images of theirs the clients certified")
        if self.predictions is not None:
            unchecked.append("plain predictions")
        votes = "the votes themselves" if self.published else _VOTES
        return tuple(compared), (*unchecked, *self.notes, votes)


def _of_curves(run: OpenRun) -> Verification:
    """A federation whose clients kept their certificates: the curves they shared."""
    problems: list[str] = []
    if run.spec.hash() != run.manifest.get("spec_hash"):
        problems.append("spec.toml was changed after the run was begun")
    curves, checked = run.curves or {}, 0
    for client, curve in curves.items():
        problems += impossible(client, curve, run.spec)
        problems += _curve_settings_problems(client, curve, run.spec)
    # Rows of single clients that shared them, where others did not.
    for path in sorted(run.folder.votes(0).parent.glob("rows-*.parquet")):
        rows = Certificates.load(path)
        problems += _from_votes(rows) + column_problems(path, rows)
        checked += len(rows)
    return Verification(checked, tuple(problems), _kept_words(run.path, len(curves)))


def _curve_settings_problems(client: int, curve: Mapping[str, Any], spec: Spec) -> list[str]:
    """A client may certify its own perturbation; everything else is the study's."""
    metadata: Any = curve.get("conditions")
    try:
        perturbation = from_record(metadata["description"])
        own = perturbation != spec.perturbations()[client]
        left_out = AMOUNTS if own else ()
        problems = _metadata_problems(
            metadata, spec, client, perturbation, f"of client {client} ", left_out
        )
        return problems + _radii_problems(client, curve, spec, perturbation)
    except (InputError, KeyError, TypeError, AttributeError, IndexError) as error:
        return [f"client {client}: what it certified is damaged ({error!r})"]


def _radii_problems(
    client: int, curve: Mapping[str, Any], spec: Spec, perturbation: Perturbation
) -> list[str]:
    """Where a curve is at other radii than the study's, or goes beyond what votes can certify."""
    estimator = spec.certification.settings(client).estimator_for(perturbation)
    try:
        radii, counts = np.array(curve["radii"], float), np.array(curve["correct"], np.int64)
        images, acr = int(curve["images"]), float(curve["acr"])
    except MALFORMED:
        return []  # see `impossible`
    grid = estimator.grid()
    if radii.shape != grid.shape or not np.allclose(radii, grid, rtol=_ROUNDING, atol=_ROUNDING):
        return [f"client {client}: its radii are not those that the spec gives"]
    if counts.shape != grid.shape or images < 1:
        return []
    largest = estimator.largest_radius()
    high = possible_averages(radii, counts, images, largest)[1]
    if acr > high + _ROUNDING:
        return [
            f"client {client}: an average certified radius of {acr:.6g} is beyond {high:.6g}, "
            f"since no votes certify more than {largest:.6g}"
        ]
    return []


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


def _asked_problems(
    conditions: Mapping[str, Any], spec: Spec, certifying: Sequence[int]
) -> list[str]:
    """Where the conditions in the file are not those that the spec asks for."""
    problems: dict[str, None] = {}  # clients that share a perturbation say it once
    perturbations = spec.perturbations()
    for clients, metadata in entries(conditions):
        for client in certifying if clients is None else clients:
            known = 0 <= client < len(perturbations)
            perturbation = perturbations[client] if known else None
            if perturbation is not None:
                who = "" if clients is None else f"of client {client} "
                found = _metadata_problems(metadata, spec, client, perturbation, who)
                problems |= dict.fromkeys(found)
    return list(problems)


def _metadata_problems(
    metadata: Mapping[str, Any],
    spec: Spec,
    client: int,
    perturbation: Perturbation,
    who: str,
    left_out: Sequence[str] = (),
) -> list[str]:
    """Where the conditions of certificates differ from what the spec asks of a client."""
    settings = spec.certification.settings(client)
    estimator = settings.estimator_for(perturbation)
    if "boundaries" in estimator.metadata:  # a record of 0.1 names none
        estimator = estimator.recorded(settings, perturbation, metadata)
    wanted = asked_conditions(perturbation, settings, spec.seed, estimator)
    # Records of 0.1.0 may name neither; the range of a scan is compared all the same.
    stored = {"keep": "certificates", "reach": wanted.get("reach"), **metadata}
    problems = [
        f"the certificates {who}say {key} = {stored.get(key)!r:.80}, the spec {value!r:.80}"
        for key, value in wanted.items()
        if key not in left_out
        and known_words(key, stored)
        and (key not in stored or differs(stored[key], value))
    ]
    asked, recorded = spec.certification.precision, metadata.get("precision")
    allowed = [asked] if asked != "auto" else [name for name in PRECISIONS if name != "int8"]
    if recorded not in allowed:
        problems.append(
            f"the certificates {who}say precision = {recorded!r:.80}, the spec {asked!r}"
        )
    return problems


def _clients_problems(certificates: Certificates, certifying: Sequence[int]) -> list[str]:
    problems = []
    if _twice(certificates):
        problems.append("an image is certified twice for one client")
    there = set(certificates.client.tolist())
    if set(certifying) - there:
        problems.append("some clients have no certificates")
    if strangers := sorted(there - set(certifying)):
        problems.append(f"client {strangers[0]} has certificates, but the spec asks for none")
    return problems


def _twice(rows: Certificates | Predictions) -> bool:
    pairs = np.stack([rows.client, rows.index], axis=1)
    return len(np.unique(pairs, axis=0)) != len(pairs)


def _plain_problems(predictions: Predictions, plain: Sequence[int]) -> list[str]:
    """Plain predictions are those of the clients that certify nothing, once for each image."""
    problems = []
    if predictions.clients != list(plain):
        problems.append("plain predictions are not those of the clients that certify nothing")
    if _twice(predictions):
        problems.append("an image is predicted twice for one client")
    return problems


def _too_many(certificates: Certificates, spec: Spec) -> list[str]:
    """More images of a client than the spec certifies."""
    asked = spec.certification.images
    clients, counts = np.unique(certificates.client, return_counts=True)
    return [
        f"client {client}: {count} images, but the spec certifies {asked}"
        for client, count in zip(clients, counts, strict=True)
        if asked is not None and count > asked
    ]


# What can be checked of a federation whose clients shared curves only.
#
# A curve says how many of a client's test images are certified correct at each radius of the
# study's
# grid, and their average certified radius. Whether these numbers follow from votes only the client
# can check, where the votes are; here it can be seen whether they are possible at all.


_ROUNDING = 1e-9


def impossible(client: int, curve: Mapping[str, Any], spec: Spec) -> list[str]:
    """Why no certificates can come to this curve; nothing if some can."""
    try:
        radii, counts = [float(r) for r in curve["radii"]], [int(c) for c in curve["correct"]]
        images, acr = int(curve["images"]), float(curve["acr"])
    except MALFORMED as error:
        return [f"client {client}: its curve is damaged ({error!r})"]
    if len(radii) != len(counts) or not radii:
        return [f"client {client}: its curve has {len(counts)} counts for {len(radii)} radii"]
    if images < 1:
        return [f"client {client}: its curve is of {images} images"]
    found = []
    if any(after > before for before, after in itertools.pairwise([images, *counts])):
        found.append(f"client {client}: its counts must fall from at most all {images} images")
    asked = spec.certification.images
    if asked is not None and images > asked:
        found.append(f"client {client}: {images} images, but the spec certifies {asked}")
    low, high = possible_averages(np.array(radii), np.array(counts), images)
    if not low - _ROUNDING <= acr <= high + _ROUNDING:
        found.append(
            f"client {client}: an average certified radius of {acr:.6g} does not go with its "
            f"curve, which allows {low:.6g} to {high:.6g}"
        )
    return found


def _kept_words(path: Path, curves: int) -> str:
    """What of such a run is not verified, why, and where it can be."""
    shared = "shared curves" if curves else "shared nothing of them"
    checked = ""
    if curves:
        checked = (
            f" Checked here: {curves} curves agree with the spec and are possible (counts that "
            "fall on its grid, averages that go with them), which does not make them true."
        )
    return (
        f"{path} holds no certificates to verify: its clients certified on their own machines, "
        f"{shared} and kept votes and radii of their images.{checked} Every client can verify its "
        "own: `certifl verify studies/ID/certificates.parquet` in its folder."
    )
