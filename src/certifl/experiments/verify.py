"""Everything about a finished run that can be checked again from its own files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certifl.certification import Certificates, unverified, verify
from certifl.certification.certificates import Predictions
from certifl.certification.certify import asked_conditions
from certifl.certification.metadata import entries
from certifl.certification.precisions import PRECISIONS
from certifl.certification.record import differs, known_words
from certifl.data import Dataset
from certifl.errors import InputError, SpecError, StoreError
from certifl.experiments.verify_run import (
    Images,
    chosen_problems,
    column_problems,
    history_problems,
    images_at_hand,
    label_problems,
    manifest_problems,
    partition_problems,
    privacy_problems,
    read_partition,
)
from certifl.federated.rounds import deployed_model
from certifl.models import fingerprint
from certifl.perturbations import Perturbation, from_record
from certifl.runs.atomic import read_json
from certifl.runs.checkpoints import StoredRound
from certifl.runs.folder import RunFolder
from certifl.safe_io import MALFORMED
from certifl.spec import Spec
from certifl.study.curves import possible_averages
from certifl.study.opened_run import finished_run, last_round, run_spec

_SHOWN = 4  # images that are named where the same is wrong with many
_BY_AMOUNT = ("radii", "scan", "reach", "look_votes", "look_levels")
_MODELS = "models, which are with the clients"
_VOTES = "the votes themselves (--recast K casts some of them again)"


@dataclass(frozen=True)
class Verification:
    """What came of checking a run or a file of certificates.

    Attributes:
        checked: number of certificates. problems: one sentence each; empty when all is well.
        kept: why certificates of the run could not be verified here, and who can; empty where
            all of them were.
        compared: what the certificates agree with. unchecked: what nothing was compared with.
    """

    checked: int
    problems: tuple[str, ...]
    kept: str = ""
    compared: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def verify_run(place: Path, data_dir: Path | None = None) -> Verification:
    """Recompute every certificate from its votes, and compare all that a run says of itself.

    Args:
        place: a run folder, or one certificate file (.parquet).
        data_dir: folder of data sets; else where the run found its data. Nothing is downloaded.

    Raises:
        StoreMismatch: the folder is no run, or is not finished.
        StoreError: a file of the run is missing or damaged.
        InputError: the file holds no certificates, or none with votes.
        DataUnavailable: the data set is not in the folder that was asked for.
    """
    if place.is_file():
        return _of_file(place)
    folder = finished_run(place)
    spec = run_spec(folder)
    if folder.curves.is_file() and not folder.certificates.is_file():
        return _of_curves(folder, spec)
    return _OfRun(folder, spec, images_at_hand(folder, spec, data_dir)).verification()


def _of_file(place: Path) -> Verification:
    certificates = Certificates.load(place)
    problems = _from_votes(certificates)
    if place.suffix.lower() == ".parquet":
        problems += column_problems(place, certificates)
    if problems:
        return Verification(len(certificates), tuple(problems))
    unchecked = (*unverified(certificates), "the votes themselves")
    return Verification(len(certificates), (), unchecked=unchecked)


class _OfRun:
    """A run whose certificates are in its folder."""

    def __init__(self, folder: RunFolder, spec: Spec, images: Images) -> None:
        self.folder, self.spec, self.images = folder, spec, images
        self.manifest = folder.manifest()
        self.notes: list[str] = []
        self.local = "deployment" not in self.manifest
        self.certificates = folder.load_certificates()
        certifies = spec.perturbations()
        self.certifying = [c for c, p in enumerate(certifies) if p is not None]
        self.plain = [c for c, p in enumerate(certifies) if p is None]
        self.predictions = folder.load_predictions() if self.plain and self.local else None

    def verification(self) -> Verification:
        """Everything compared, in the order in which it is easiest to understand."""
        problems = [
            *self._rows(),
            *self._as_asked(),
            *self._whose_images(),
            *self._of_the_data(),
            *self._of_the_training(),
            *manifest_problems(
                self.manifest, self.spec, self.certificates, self.predictions, self._dataset()
            ),
        ]
        if self.spec.hash() != self.manifest.get("spec_hash"):
            problems.append("spec.toml was changed after the run was begun")
        found = tuple(dict.fromkeys(problems))
        compared, unchecked = self._extent()
        return Verification(len(self.certificates), found, "", compared, unchecked)

    def _rows(self) -> list[str]:
        try:
            found = _from_votes(self.certificates)
        except InputError as error:
            found = [str(error)]
        return found + column_problems(self.folder.certificates, self.certificates)

    def _as_asked(self) -> list[str]:
        problems: list[str] = []
        try:
            problems += _asked_problems(self.certificates.conditions, self.spec, self.certifying)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"the conditions of the certificates cannot be read ({error!r})")
        problems += _clients_problems(self.certificates, self.certifying)
        if self.predictions is not None:
            problems += _plain_problems(self.predictions, self.plain)
        return problems

    def _whose_images(self) -> list[str]:
        """Which images each client certifies; a federation's clients choose among their own."""
        if not self.local:
            return _too_many(self.certificates, self.spec)
        try:
            partition = read_partition(self.folder)
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

    def _dataset(self) -> Dataset | None:
        """The data set, where it is at hand and the one that was certified."""
        dataset = self.images.dataset
        named = self.certificates.conditions.get("data_fingerprint")
        return None if dataset is None or dataset.fingerprint != named else dataset

    def _of_the_data(self) -> list[str]:
        if self.images.dataset is None:
            return []
        dataset = self._dataset()
        if dataset is None:
            return [
                f"the data set {self.spec.data.name!r} at hand holds other images than were "
                "certified (its fingerprint differs); --data-dir names another folder"
            ]
        rows = [self.certificates, *([] if self.predictions is None else [self.predictions])]
        return [problem for part in rows for problem in label_problems(part, dataset)]

    def _of_the_training(self) -> list[str]:
        try:
            last = last_round(self.folder, self.spec)
            models = self._models(last)
        except StoreError as error:
            return [str(error)]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            return [f"the final checkpoint cannot be read ({error!r})"]
        return models + history_problems(self.folder, last) + self._privacy(last)

    def _privacy(self, last: StoredRound) -> list[str]:
        """What of the images' privacy was spent; networks of a user's own are not built here."""
        if self.spec.privacy.kind == "none":
            stray = "privacy" in self.manifest
            return ["run.json says what privacy was spent, but none was asked for"] * stray
        dataset = self._dataset()
        if not self.local or dataset is None or ":" in self.spec.model.name:
            self.notes.append("the privacy spent")
            return []
        try:
            partition = read_partition(self.folder)
            return privacy_problems(self.folder, self.spec, partition, last, dataset)
        except (SpecError, StoreError) as error:  # a damaged partition is a finding already
            self.notes.append(f"the privacy spent: {str(error).partition('. ')[0]}")
            return []

    def _models(self, last: StoredRound) -> list[str]:
        # States alone, without the network: checking somebody's run must not run their code.
        recorded: dict[str, Any] = {}
        for rows in (self.certificates, self.predictions):
            named = {} if rows is None else rows.conditions.get("model_fingerprint")
            if not isinstance(named, Mapping):
                return ["the certificates do not say by client which model they are of"]
            recorded |= named
        algorithm, clients = self.spec.build_algorithm(), range(self.spec.clients.count)
        if not self.local:  # who only told its accuracy told no model
            clients = self.certifying
            if algorithm.keeps_client_state:
                self.notes.append(_MODELS)
                return []
        problems = [
            f"client {client}: the stored model is not the one that was certified"
            for client in clients
            if fingerprint(deployed_model(algorithm, last, client)) != recorded.get(str(client))
        ]
        if strangers := sorted(set(recorded) - {str(client) for client in clients}):
            problems.append(f"a model of client {strangers[0]} is recorded, which certified none")
        return problems

    def _extent(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is compared, and what is not."""
        compared = ["spec", "run.json", "history"]
        if _MODELS not in self.notes:
            compared.append("models")
        unchecked = ["batch size, device, threads, seconds"]
        if self.spec.certification.precision == "auto":
            unchecked.insert(0, "precision (auto)")
        if self.local:
            compared.append("partition.json")
        if self._dataset() is not None:
            compared.append(f"images and labels of {self.spec.data.name}")
        else:
            unchecked.append(f"labels not checked: {self.images.why}")
        if not self.local:
            unchecked.append("which images of theirs the clients certified")
        if self.predictions is not None:
            unchecked.append("plain predictions")
        return tuple(compared), (*unchecked, *self.notes, _VOTES)


def _of_curves(folder: RunFolder, spec: Spec) -> Verification:
    """A federation whose clients kept their certificates: what they told, as far as it goes."""
    problems: list[str] = []
    if spec.hash() != folder.manifest().get("spec_hash"):
        problems.append("spec.toml was changed after the run was begun")
    curves, checked = curves_of(folder), 0
    for client, curve in curves.items():
        problems += impossible(client, curve, spec)
        problems += _told_as_asked(client, curve.get("conditions"), spec)
    for path in shared_rows(folder):
        rows = Certificates.load(path)
        problems += _from_votes(rows) + column_problems(path, rows)
        checked += len(rows)
    return Verification(checked, tuple(problems), kept_words(folder.path, len(curves)))


def _told_as_asked(client: int, facts: Any, spec: Spec) -> list[str]:
    """A client may certify a perturbation of its own; everything else is the study's."""
    try:
        perturbation = from_record(facts["description"])
        own = perturbation != spec.perturbations()[client]
        left_out = _BY_AMOUNT if own else ()
        return _other_facts(facts, spec, client, perturbation, f"of client {client} ", left_out)
    except (InputError, KeyError, TypeError, AttributeError, IndexError) as error:
        return [f"client {client}: what it certified is damaged ({error!r})"]


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
    for clients, facts in entries(conditions):
        for client in certifying if clients is None else clients:
            known = 0 <= client < len(perturbations)
            perturbation = perturbations[client] if known else None
            if perturbation is not None:
                who = "" if clients is None else f"of client {client} "
                found = _other_facts(facts, spec, client, perturbation, who)
                problems |= dict.fromkeys(found)
    return list(problems)


def _other_facts(
    facts: Mapping[str, Any],
    spec: Spec,
    client: int,
    perturbation: Perturbation,
    who: str,
    left_out: Sequence[str] = (),
) -> list[str]:
    """Where the conditions of certificates differ from what the spec asks of a client."""
    settings = spec.certification.settings(client)
    wanted = asked_conditions(perturbation, settings, spec.seed)
    # Records of 0.1.0 may name neither; the range of a scan is compared all the same.
    held = {"keep": "certificates", "reach": wanted.get("reach"), **facts}
    problems = [
        f"the certificates {who}say {key} = {held.get(key)!r:.80}, the spec {value!r:.80}"
        for key, value in wanted.items()
        if key not in left_out
        and known_words(key, held)
        and (key not in held or differs(held[key], value))
    ]
    asked, told = spec.certification.precision, facts.get("precision")
    allowed = [asked] if asked != "auto" else [name for name in PRECISIONS if name != "int8"]
    if told not in allowed:
        problems.append(f"the certificates {who}say precision = {told!r:.80}, the spec {asked!r}")
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


# What can be checked of a federation whose clients told curves and kept their certificates.
#
# A curve says how many of a client's test images are certified correct at each radius of the
# study's
# grid, and their average certified radius. Whether these numbers follow from votes only the client
# can check, where the votes are; here it can be seen whether they are possible at all.


_ROUNDING = 1e-9


def curves_of(folder: RunFolder) -> dict[int, Mapping[str, Any]]:
    """The told curves, by client.

    Raises:
        StoreError: the file is damaged.
    """
    held = read_json(folder.curves)
    try:
        return {int(client): dict(curve) for client, curve in held["clients"].items()}
    except MALFORMED as error:
        raise StoreError(f"{folder.curves} is damaged: {error!r}.") from error


def impossible(client: int, curve: Mapping[str, Any], spec: Spec) -> list[str]:
    """Why no certificates can come to this curve; nothing if some can."""
    try:
        radii, counts = [float(r) for r in curve["radii"]], [int(c) for c in curve["correct"]]
        images, acr = int(curve["images"]), float(curve["acr"])
    except MALFORMED as error:
        return [f"client {client}: its curve is damaged ({error!r})"]
    if len(radii) != len(counts) or not radii:
        return [f"client {client}: its curve has {len(counts)} counts for {len(radii)} radii"]
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


def shared_rows(folder: RunFolder) -> list[Path]:
    """Certificates that single clients told in full, where others did not."""
    return sorted(folder.votes(0).parent.glob("rows-*.parquet"))


def kept_words(place: Path, curves: int) -> str:
    """What of such a run is not verified, why, and where it can be."""
    told = "told curves" if curves else "told nothing of them"
    checked = ""
    if curves:
        checked = (
            f" Checked here: {curves} curves agree with the spec and are possible (counts that "
            "fall on its grid, averages that go with them), which does not make them true."
        )
    return (
        f"{place} holds no certificates to verify: its clients certified on their own machines, "
        f"{told} and kept votes and radii of their images.{checked} Every client can verify its "
        "own: `certifl verify studies/ID/certificates.parquet` in its folder."
    )
