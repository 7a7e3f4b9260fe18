"""Consistency of the files of a run: spec, run.json, partition.json, history, images.

Everything that follows from spec, seed and data is computed again and compared. Functions return
one sentence per problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from certifl._version import __version__
from certifl.certification import Certificates
from certifl.certification.certificates import Predictions
from certifl.certification.metadata import AMOUNTS, differs, entries, requested_conditions
from certifl.certification.recompute import known_words
from certifl.certification.settings import PRECISIONS
from certifl.data import Dataset, Partition, check, choose
from certifl.errors import InputError, ModelError, StoreError, first_line
from certifl.perturbations import Perturbation, from_record
from certifl.safe_io import MALFORMED
from certifl.smoothing.curves import possible_averages
from certifl.spec import Spec
from certifl.study.opened_run import OpenRun
from certifl.study.privacy import spent
from certifl.study.setup import built, by_client, partition_of, protection, study_metadata

Rows = Certificates | Predictions

_WORDS = ("label", "deploys")  # another version may say the same otherwise
_SHOWN = 5
_ROUNDING = 1e-6  # of accountants
_CURVE_ROUNDING = 1e-9


def _unlike(
    where: str, found: Mapping[str, Any], expected: Mapping[str, Any], source: str
) -> list[str]:
    return [
        f"{where} says {name} = {found.get(name)!r:.80}, {source} {value!r:.80}"
        for name, value in expected.items()
        if differs(found.get(name), value)
    ]


# Certificates and the spec.


def column_problems(path: Path, certificates: Certificates) -> list[str]:
    """Where columns for other readers of the file are not what its other columns give."""
    table = pq.ParquetFile(path).read()
    return [
        f"the column {name} of {path.name} is not what its other columns give"
        for name in ("correct", "votes")
        if name in table.column_names
        and table[name].to_pylist() != getattr(certificates, name).tolist()
    ]


def settings_problems(
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


def curve_settings_problems(client: int, curve: Mapping[str, Any], spec: Spec) -> list[str]:
    """As `settings_problems`, of a shared curve; its client may have its own perturbation."""
    metadata: Any = curve.get("conditions")
    try:
        perturbation = from_record(metadata["description"])
        own = perturbation != spec.perturbations()[client]
        left_out, who = AMOUNTS if own else (), f"of client {client} "
        problems = _metadata_problems(metadata, spec, client, perturbation, who, left_out)
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
        return []  # see `verify.impossible`
    grid, rounding = estimator.grid(), _CURVE_ROUNDING
    if radii.shape != grid.shape or not np.allclose(radii, grid, rtol=rounding, atol=rounding):
        return [f"client {client}: its radii are not those that the spec gives"]
    if counts.shape != grid.shape or images < 1:
        return []
    largest = estimator.largest_radius()
    high = possible_averages(radii, counts, images, largest)[1]
    if acr > high + rounding:
        return [
            f"client {client}: an average certified radius of {acr:.6g} is beyond {high:.6g}, "
            f"since no votes certify more than {largest:.6g}"
        ]
    return []


def _metadata_problems(
    metadata: Mapping[str, Any],
    spec: Spec,
    client: int,
    perturbation: Perturbation,
    who: str,
    left_out: Sequence[str] = (),
) -> list[str]:
    settings = spec.certification.settings(client)
    estimator = settings.estimator_for(perturbation)
    if "boundaries" in estimator.metadata:  # a record of 0.1 names none
        estimator = estimator.recorded(settings, perturbation, metadata)
    expected = requested_conditions(perturbation, settings, spec.seed, estimator)
    # Records of 0.1.0 may name neither; the range of a scan is compared all the same.
    stored = {"keep": "certificates", "reach": expected.get("reach"), **metadata}
    problems = [
        f"the certificates {who}say {key} = {stored.get(key)!r:.80}, the spec {value!r:.80}"
        for key, value in expected.items()
        if key not in left_out
        and known_words(key, stored)
        and (key not in stored or differs(stored[key], value))
    ]
    requested, recorded = spec.certification.precision, metadata.get("precision")
    allowed = (
        [requested] if requested != "auto" else [name for name in PRECISIONS if name != "int8"]
    )
    if recorded not in allowed:
        problems.append(
            f"the certificates {who}say precision = {recorded!r:.80}, the spec {requested!r}"
        )
    return problems


def clients_problems(certificates: Certificates, certifying: Sequence[int]) -> list[str]:
    """Certificates are those of the clients that certify something, once for each image."""
    problems = twice_problems(certificates)
    there = set(certificates.client.tolist())
    if set(certifying) - there:
        problems.append("some clients have no certificates")
    if strangers := sorted(there - set(certifying)):
        problems.append(f"client {strangers[0]} has certificates, but the spec asks for none")
    return problems


def plain_problems(predictions: Predictions, plain: Sequence[int]) -> list[str]:
    """Plain predictions are those of the clients that certify nothing, once for each image."""
    problems = []
    if predictions.clients != list(plain):
        problems.append("plain predictions are not those of the clients that certify nothing")
    if _twice(predictions):
        problems.append("an image is predicted twice for one client")
    return problems


def twice_problems(certificates: Certificates) -> list[str]:
    """An image that counts twice in every mean."""
    return ["an image is certified twice for one client"] if _twice(certificates) else []


def _twice(rows: Rows) -> bool:
    pairs = np.stack([rows.client, rows.index], axis=1)
    return len(np.unique(pairs, axis=0)) != len(pairs)


def too_many(certificates: Certificates, spec: Spec) -> list[str]:
    """More images of a client than the spec certifies."""
    requested = spec.certification.images
    clients, counts = np.unique(certificates.client, return_counts=True)
    return [
        f"client {client}: {count} images, but the spec certifies {requested}"
        for client, count in zip(clients, counts, strict=True)
        if requested is not None and count > requested
    ]


# Images.


def partition_problems(partition: Partition, spec: Spec, dataset: Dataset | None) -> list[str]:
    """Where it is not the one that spec, seed and, where they are at hand, labels give."""
    found = {"split": partition.split, "seed": partition.seed, "clients": len(partition.clients)}
    expected = {"split": spec.clients.split, "seed": spec.seed, "clients": spec.clients.count}
    if problems := _unlike("partition.json", found, expected, "the spec"):
        return problems
    if dataset is None:  # at least, no partition gives an image to two clients
        for name in ("train", "test"):
            images = np.concatenate([getattr(client, name) for client in partition.clients])
            if np.unique(images).size != images.size:
                return [f"partition.json gives a {name} image to two clients"]
        return []
    try:
        check(partition, dataset.train.labels, dataset.test.labels)
        again = partition_of(spec, dataset)
    except InputError as error:
        return [f"partition.json: {error}"]
    if differs(partition.to_manifest(), again.to_manifest()):
        return ["partition.json is not the partition that spec, seed and data give"]
    return []


def chosen_problems(
    rows: Rows, partition: Partition, spec: Spec, clients: Iterable[int]
) -> list[str]:
    """Where the rows are not the images that spec, seed and partition choose, in their order."""
    expected = {
        client: choose(
            partition.clients[client].test, spec.certification.images, spec.seed, client
        )
        for client in clients
        if client < len(partition.clients)
    }
    problems: list[str] = []
    for client, index in expected.items():
        problems += _differing(client, rows.index[rows.client == client], index)
    owners = [np.full(len(index), client) for client, index in expected.items()]
    in_order = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    if not problems and not np.array_equal(rows.client, in_order):
        problems.append("the rows are not in the order of the clients")
    return problems


def _differing(client: int, found: np.ndarray, expected: np.ndarray) -> list[str]:
    if np.array_equal(found, expected):
        return []
    missing, extra = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    problems = []
    if missing.size:
        problems.append(f"client {client}: {_named(missing)} missing")
    if extra.size:
        problems.append(
            f"client {client}: {_named(extra)} not among those that spec and partition choose"
        )
    return problems or [f"client {client}: its images are in another order or number"]


def _named(index: np.ndarray) -> str:
    shown = ", ".join(map(str, index[:_SHOWN].tolist()))
    more = f" and {index.size - _SHOWN} more" if index.size > _SHOWN else ""
    return f"image {shown} is" if index.size == 1 else f"images {shown}{more} are"


def label_problems(rows: Rows, dataset: Dataset) -> list[str]:
    """Where labels are not those of the data set."""
    known = (rows.index >= 0) & (rows.index < len(dataset.test))
    true = dataset.test.labels.numpy()[rows.index[known]]
    wrong = np.flatnonzero(rows.label[known] != true)
    problems = [
        f"client {rows.client[known][row]}, image {rows.index[known][row]}: its label is "
        f"{rows.label[known][row]}, in the data set it is {true[row]}"
        for row in wrong[:_SHOWN]
    ]
    if wrong.size > _SHOWN:
        problems.append(f"{wrong.size - _SHOWN} more labels are not those of the data set")
    return problems


# Training.


def history_problems(run: OpenRun) -> list[str]:
    """Where history.jsonl is not what the final checkpoint says of the rounds."""
    try:
        found = run.history
    except StoreError as error:
        return [str(error).rstrip(".")]
    rounds = [by_client(entry) for entry in run.last_round.history]
    if len(found) != len(rounds):
        return [f"history.jsonl has {len(found)} rounds, the final checkpoint {len(rounds)}"]
    return [
        f"history.jsonl: round {number} is not as the checkpoint recorded it"
        for number, (stored, committed) in enumerate(zip(found, rounds, strict=True), 1)
        if differs(stored, committed)
    ]


def published_history_problems(run: OpenRun) -> list[str]:
    """Where history.jsonl of a published run has other rounds than its spec gives."""
    try:
        found = [entry.get("round") for entry in run.history]
    except StoreError as error:
        return [str(error).rstrip(".")]
    expected = list(range(run.spec.training.rounds + run.algorithm.extra_rounds))
    return ["history.jsonl has other rounds than the spec gives"] * (found != expected)


def privacy_problems(run: OpenRun, dataset: Dataset) -> list[str]:
    """Where run.json says that another privacy was spent than spec, data and history give.

    Raises:
        SpecError: opacus, which accounts for it, is not installed.
    """
    recorded, spec = run.manifest.get("privacy"), run.spec
    sizes = [len(client.train) for client in run.stored_partition.clients]
    try:
        private = protection(spec, built(spec, dataset), sizes, b"not the key")
    except ModelError as error:
        return [f"the network of the spec cannot have been trained: {first_line(error)}"]
    again = spent(spec, private, run.last_round.history)
    if not isinstance(recorded, Mapping):
        return ["run.json does not say what privacy was spent"]
    if "epsilon_sent" in recorded:  # as 0.1.0 did, with a total also for models without noise
        messages, _ = again.pop("epsilon_messages"), again.pop("covers")
        again |= {"epsilon_sent": messages, "epsilon": again["epsilon"] or messages}
    unlike = ("accountant",) if _same_version(run.manifest) else ("accountant", "covers")
    return [
        f"run.json says privacy: {name} = {recorded.get(name)!r:.80}, spec and history "
        f"{value!r:.80}"
        for name, value in again.items()
        if name not in unlike and not _alike(recorded.get(name), value)
    ]


def _alike(recorded: Any, again: Any) -> bool:
    """Equal; numbers up to the rounding of another version of the accountant."""
    if isinstance(again, list):
        same = isinstance(recorded, list) and len(recorded) == len(again)
        return same and all(_alike(*pair) for pair in zip(recorded, again, strict=True))
    if isinstance(again, float) and isinstance(recorded, float):
        return math.isclose(recorded, again, rel_tol=_ROUNDING)
    return not differs(recorded, again)


# The record of the run.


def manifest_problems(
    manifest: Mapping[str, Any],
    spec: Spec,
    certificates: Certificates,
    predictions: Predictions | None,
    dataset: Dataset | None,
) -> list[str]:
    """Where run.json is not what spec, certificates and data give."""
    data, expected = manifest.get("data"), study_metadata(spec)
    for name in ("code", *(() if _same_version(manifest) else _WORDS)):
        del expected[name]
    # Entries that a study like this one does not have.
    expected.setdefault("unseen", None)
    if predictions is None:
        expected["plain"] = None
    if spec.privacy.kind == "none":
        expected["privacy"] = None
    problems = _unlike("run.json", manifest, expected, "the spec")
    if not isinstance(data, Mapping):
        return [*problems, "run.json does not say which data the run is of"]
    if "deployment" not in manifest:
        problems += _data_problems(data, spec, dataset)
        problems += _conditions_problems(manifest, certificates, predictions)
    return problems + _sums(manifest, certificates, predictions)


def _same_version(manifest: Mapping[str, Any]) -> bool:
    versions = manifest.get("versions")
    return isinstance(versions, Mapping) and versions.get("certifl") == __version__


def _data_problems(data: Mapping[str, Any], spec: Spec, dataset: Dataset | None) -> list[str]:
    requested: dict[str, Any] = {
        "name": spec.data.name,
        "train_images": spec.data.train_images,
        "test_images": spec.data.test_images,
    }
    if dataset is not None:
        requested |= {
            "train_images": requested["train_images"] or len(dataset.train),
            "test_images": requested["test_images"] or len(dataset.test),
            "in_channels": dataset.in_channels,
            "image_size": list(dataset.image_size),
            "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names),
        }
    known = {name: value for name, value in requested.items() if value is not None}
    return _unlike("run.json, data:", data, known, "the study")


def _conditions_problems(
    manifest: Mapping[str, Any], certificates: Certificates, predictions: Predictions | None
) -> list[str]:
    """What certificates and run.json both say must be one thing: one process wrote them."""
    data, versions, problems = manifest["data"], manifest.get("versions"), list[str]()
    both = {"data_fingerprint": data.get("fingerprint")}
    if "precision" in manifest:
        both["precision"] = manifest["precision"]
    for what, rows in (("certificates", certificates), ("predictions", predictions)):
        if rows is not None:
            problems += _unlike(f"the file of {what}", rows.conditions, both, "run.json")
    recorded = certificates.conditions.get("versions")
    if isinstance(versions, Mapping) and isinstance(recorded, Mapping):
        known = {name: versions.get(name) for name in ("certifl", "torch", "python")}
        problems += _unlike("the file of certificates", recorded, known, "run.json")
    elif differs(type(versions).__name__, type(recorded).__name__):
        problems.append("run.json and certificates do not both say the versions they were made by")
    classes = certificates.counts.shape[1]
    if data.get("num_classes") != classes:
        problems.append(
            f"the certificates are of {classes} classes, run.json says {data.get('num_classes')}"
        )
    return problems


def _sums(
    manifest: Mapping[str, Any], certificates: Certificates, predictions: Predictions | None
) -> list[str]:
    """Numbers of run.json that add up from the rows."""
    votes = int(certificates.votes.sum()) + int(certificates.selection_counts.sum())
    problems = _unlike("run.json", manifest, {"votes": votes}, "the certificates")
    seconds, recorded = float(certificates.seconds.sum()), manifest.get("certification_seconds")
    if not isinstance(recorded, (int, float)) or not math.isclose(recorded, seconds, abs_tol=2e-3):
        problems.append(
            f"run.json says certification_seconds = {recorded!r:.40}, the certificates "
            f"{seconds:.3f}"
        )
    if predictions is not None:
        plain = {}
        for client in predictions.clients:
            own = predictions.client == client
            correct = int(predictions.correct[own].sum())
            plain[str(client)] = {"images": int(own.sum()), "correct": correct}
        problems += _unlike("run.json", manifest, {"plain": plain}, "the predictions")
    return problems
