"""Consistency of the files of a run: spec, run.json, partition.json, history, images.

Everything that follows from spec, seed and data is computed again and compared. Functions return
one sentence per problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from certifl._version import __version__
from certifl.certification import Certificates
from certifl.certification.certificates import Predictions
from certifl.certification.metadata import differs
from certifl.data import Dataset, Partition, check, choose
from certifl.errors import CertiflError, InputError, StoreError, StoreMismatch
from certifl.models import build
from certifl.spec import Spec
from certifl.study.opened_run import OpenRun, partition_of, study_metadata
from certifl.study.privacy import protection, spent
from certifl.study.setup import by_client

_WORDS = ("label", "deploys")  # another version may say the same otherwise
_SHOWN = 5
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Images:
    """The data set of a run, where it is available.

    Attributes:
        dataset: None where it is not. why: then says why.
        others: whether a data set of that name holds other images.
    """

    dataset: Dataset | None
    why: str = ""
    others: bool = False


def available_images(run: OpenRun, data_dir: Path | None) -> Images:
    """The data set of a run: from the folder that the user names, or from where the run found it.

    Raises:
        CertiflError: the data set is not in the folder that the user names.
    """
    if "deployment" in run.manifest:
        return Images(None, "they are with its clients")
    try:
        return Images(run.dataset)
    except StoreMismatch:
        return Images(None, "the data set holds other images", others=True)
    except StoreError:
        raise
    except (CertiflError, OSError) as error:
        if data_dir is not None:
            raise
        return Images(None, str(error).partition(". ")[0].rstrip("."))


def column_problems(path: Path, certificates: Certificates) -> list[str]:
    """Where columns for other readers of the file are not what its other columns give."""
    table = pq.ParquetFile(path).read()
    return [
        f"the column {name} of {path.name} is not what its other columns give"
        for name in ("correct", "votes")
        if name in table.column_names
        and table[name].to_pylist() != getattr(certificates, name).tolist()
    ]


def partition_problems(partition: Partition, spec: Spec, images: Images) -> list[str]:
    """Where it is not the one that spec, seed and, where they are at hand, labels give."""
    wanted = {"split": spec.clients.split, "seed": spec.seed, "clients": spec.clients.count}
    found = {"split": partition.split, "seed": partition.seed, "clients": len(partition.clients)}
    problems = [
        f"partition.json says {name} = {found[name]!r}, the spec {value!r}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if problems:
        return problems
    dataset = images.dataset
    if dataset is None:
        return _shared_images(partition)
    try:
        check(partition, dataset.train.labels, dataset.test.labels)
        again = partition_of(spec, dataset)
    except InputError as error:
        return [f"partition.json: {error}"]
    if differs(partition.to_manifest(), again.to_manifest()):
        return ["partition.json is not the partition that spec, seed and data give"]
    return []


def _shared_images(partition: Partition) -> list[str]:
    """Images that two clients hold, which no partition gives."""
    for name in ("train", "test"):
        held = np.concatenate([getattr(client, name) for client in partition.clients])
        if np.unique(held).size != held.size:
            return [f"partition.json gives a {name} image to two clients"]
    return []


def chosen_problems(
    rows: Certificates | Predictions, partition: Partition, spec: Spec, clients: Iterable[int]
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
    for client, wanted in expected.items():
        problems += _differing(client, rows.index[rows.client == client], wanted)
    owners = [np.full(len(wanted), client) for client, wanted in expected.items()]
    in_order = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    if not problems and not np.array_equal(rows.client, in_order):
        problems.append("the rows are not in the order of the clients")
    return problems


def _differing(client: int, found: np.ndarray, wanted: np.ndarray) -> list[str]:
    if np.array_equal(found, wanted):
        return []
    missing, extra = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
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


def label_problems(rows: Certificates | Predictions, dataset: Dataset) -> list[str]:
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


def history_problems(run: OpenRun) -> list[str]:
    """Where history.jsonl is not what the final checkpoint says of the rounds."""
    try:
        found = run.history
    except StoreError as error:
        return [str(error).rstrip(".")]
    rounds = [by_client(entry) for entry in run.last_round.history]
    if len(found) != len(rounds):
        return [f"history.jsonl has {len(found)} rounds, the final checkpoint {len(rounds)}"]
    wrong = [
        number
        for number, (stored, committed) in enumerate(zip(found, rounds, strict=True), 1)
        if differs(stored, committed)
    ]
    return [f"history.jsonl: round {n} is not as the checkpoint recorded it" for n in wrong]


def published_history_problems(run: OpenRun) -> list[str]:
    """Where history.jsonl of a published run has other rounds than its spec gives."""
    try:
        found = [entry.get("round") for entry in run.history]
    except StoreError as error:
        return [str(error).rstrip(".")]
    wanted = list(range(run.spec.training.rounds + run.algorithm.extra_rounds))
    return ["history.jsonl has other rounds than the spec gives"] * (found != wanted)


def privacy_problems(run: OpenRun, dataset: Dataset) -> list[str]:
    """Where run.json says that another privacy was spent than spec, data and history give.

    Raises:
        SpecError: opacus, which accounts for it, is not installed.
    """
    recorded, spec = run.manifest.get("privacy"), run.spec
    sizes = [len(client.train) for client in run.stored_partition.clients]
    model = build(spec.model.name, dataset.in_channels, dataset.num_classes, spec.seed)
    again = spent(spec, protection(spec, model, sizes, b"not the key"), run.last_round.history)
    if not isinstance(recorded, Mapping):
        return ["run.json does not say what privacy was spent"]
    return [
        f"run.json says privacy: {name} = {recorded.get(name)!r:.80}, spec and history "
        f"{value!r:.80}"
        for name, value in again.items()
        if name != "accountant" and not _alike(recorded.get(name), value)
    ]


def _alike(recorded: Any, again: Any) -> bool:
    """Equal; numbers up to the rounding of another version of the accountant."""
    if isinstance(again, list):
        same = isinstance(recorded, list) and len(recorded) == len(again)
        return same and all(_alike(*pair) for pair in zip(recorded, again, strict=True))
    if isinstance(again, float) and isinstance(recorded, float):
        return math.isclose(recorded, again, rel_tol=_ROUNDING)
    return not differs(recorded, again)


def manifest_problems(
    manifest: Mapping[str, Any],
    spec: Spec,
    certificates: Certificates,
    predictions: Predictions | None,
    dataset: Dataset | None,
) -> list[str]:
    """Where run.json is not what spec, certificates and data give."""
    versions = manifest.get("versions")
    same_version = isinstance(versions, Mapping) and versions.get("certifl") == __version__
    wanted = study_metadata(spec)
    del wanted["code"]
    if not same_version:
        wanted = {name: value for name, value in wanted.items() if name not in _WORDS}
    problems = _unlike("run.json", manifest, wanted, "the spec")
    local = "deployment" not in manifest
    data = manifest.get("data")
    if not isinstance(data, Mapping):
        return [*problems, "run.json does not say which data the run is of"]
    if local:
        problems += _of_the_data(data, spec, dataset)
        problems += _of_the_conditions(manifest, certificates, predictions)
    return problems + _sums(manifest, certificates, predictions)


def _unlike(
    where: str, found: Mapping[str, Any], wanted: Mapping[str, Any], source: str
) -> list[str]:
    return [
        f"{where} says {name} = {found.get(name)!r:.80}, {source} {value!r:.80}"
        for name, value in wanted.items()
        if differs(found.get(name), value)
    ]


def _of_the_data(data: Mapping[str, Any], spec: Spec, dataset: Dataset | None) -> list[str]:
    asked = {
        "name": spec.data.name,
        "train_images": spec.data.train_images,
        "test_images": spec.data.test_images,
    }
    if dataset is not None:
        asked |= {
            "train_images": asked["train_images"] or len(dataset.train),
            "test_images": asked["test_images"] or len(dataset.test),
            "in_channels": dataset.in_channels,
            "image_size": list(dataset.image_size),
            "num_classes": dataset.num_classes,
            "class_names": list(dataset.class_names),
        }
    known = {name: value for name, value in asked.items() if value is not None}
    return _unlike("run.json, data:", data, known, "the study")


def _of_the_conditions(
    manifest: Mapping[str, Any], certificates: Certificates, predictions: Predictions | None
) -> list[str]:
    """What certificates and run.json both say must be one thing: one process wrote them."""
    data, versions = manifest["data"], manifest.get("versions")
    problems = []
    for what, rows in (("certificates", certificates), ("predictions", predictions)):
        if rows is None:
            continue
        both = {"data_fingerprint": data.get("fingerprint")}
        if "precision" in manifest:
            both["precision"] = manifest["precision"]
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
        plain = {str(client): _accuracy(predictions, client) for client in predictions.clients}
        problems += _unlike("run.json", manifest, {"plain": plain}, "the predictions")
    return problems


def _accuracy(predictions: Predictions, client: int) -> dict[str, int]:
    own = predictions.client == client
    return {"images": int(own.sum()), "correct": int(predictions.correct[own].sum())}


def shortened(problems: Sequence[str], most: int) -> list[str]:
    """At most so many sentences, and how many more there are."""
    if len(problems) <= most:
        return list(problems)
    return [*problems[:most], f"and {len(problems) - most} more findings"]
