"""What a study is made of: data, partition, network, training with its privacy, and labels."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from certifl.data import (
    ClientIndices,
    Column,
    Dataset,
    Partition,
    assign_images,
    label_checksum,
    load,
    random_part,
)
from certifl.data.readers import ReadOptions
from certifl.errors import InputError, ModelError, SpecError, StoreError
from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.batches import PerClient, combine_augmentations
from certifl.federated.local_training import LocalTraining, check_batches, check_images
from certifl.federated.objectives import OBJECTIVES
from certifl.federated.privacy import (
    ClientLedger,
    ClientLevel,
    ExampleLedger,
    ExampleLevel,
    check_network,
    derived_key,
    plan_clients,
    plan_examples,
)
from certifl.federated.privacy.mechanisms import try_clipping
from certifl.federated.trainer import Participation, RandomShare
from certifl.models import build, is_users_code, require_code
from certifl.models.state import load_weights, read_checkpoint, weights_in
from certifl.module_copies import evaluating
from certifl.path_checks import WEIGHTS, check_file
from certifl.perturbations import Perturbation
from certifl.runs.atomic import load_tensors, write_secret
from certifl.safe_io import SPEC_BYTES, read_bytes
from certifl.spec import Spec
from certifl.study.privacy import private_label

_log = logging.getLogger(__name__)


# Data and their partition over the clients.


def data_columns(spec: Spec) -> ReadOptions:
    """The columns that a study reads, where its data set is a table."""
    splitter = spec.clients.splitter()
    column = splitter.column if isinstance(splitter, Column) else None
    prepare = spec.data.preparation()
    return ReadOptions(label=spec.data.label_column, keep_column=column, prepare=prepare)


def load_data(spec: Spec, data_dir: Path | None, *, offline: bool = False) -> Dataset:
    """The data set of a study, with the column that it is split by; offline without downloads.

    Raises:
        DataUnavailable: the data set is not available. InputError: it has no such column.
    """
    columns = data_columns(spec)
    return load(
        spec.data.name,
        data_dir,
        label_column=columns.label,
        keep_column=columns.keep_column,
        test_split=spec.data.test_split,
        resize=spec.data.resize,
        crop=spec.data.crop,
        window=spec.data.window,
        offline=offline,
    )


def open_data(spec: Spec, data_dir: Path | None) -> tuple[Dataset, Partition]:
    """The whole data set, and its partition over the clients by position.

    Raises:
        DataUnavailable: the data set is not available. InputError: it is too small for the spec.
    """
    dataset = load_data(spec, data_dir)
    return dataset, partition_of(spec, dataset)


def partition_of(spec: Spec, dataset: Dataset) -> Partition:
    """The partition of the whole data set: a function of spec and data alone.

    Raises:
        InputError: the data set is too small for the spec.
    """
    splits = (dataset.train, dataset.test)
    train, test = (
        random_part(len(split), count, spec.seed, which)
        for split, count, which in zip(
            splits, (spec.data.train_images, spec.data.test_images), ("train", "test"), strict=True
        )
    )
    labels = tuple(split.labels.numpy() for split in splits)
    columns = tuple(
        None if split.column is None else split.column[part]
        for split, part in zip(splits, (train, test), strict=True)
    )
    found = assign_images(
        spec.clients.splitter(),
        (labels[0][train], labels[1][test]),
        (columns[0], columns[1]),
        spec.clients.count,
        spec.seed,
    )
    # The splitter saw the part; the partition names positions in, and labels of, the whole.
    return dataclasses.replace(
        found,
        clients=tuple(ClientIndices(train[c.train], test[c.test]) for c in found.clients),
        label_checksum=label_checksum(*labels),
    )


# Networks.


def built(spec: Spec, dataset: Dataset) -> nn.Module:
    """The network of a spec as it is before weights of a file are read into it.

    Raises:
        ModelError: it cannot be built, or does not fit the images.
    """
    model = spec.model
    channels, classes, size = dataset.in_channels, dataset.num_classes, dataset.image_size
    return build(model.name, channels, classes, spec.seed, model.options, size)


def initial_model(spec: Spec, dataset: Dataset) -> nn.Module:
    """The network all clients begin with, in evaluation mode.

    Raises:
        ModelError: a user's network that cannot be built or does not fit the images, or weights
            that do not fit the network.
        InputError: `model.weights` is not a file of plain weights.
    """
    model = built(spec, dataset)
    if spec.model.weights is not None:
        begin_with(model, Path(spec.model.weights), spec.model.name)
    return evaluating(model)


def begin_with(model: nn.Module, path: Path, name: str) -> None:
    """Give a network, called `name`, the weights of a .safetensors file or one of `torch.save`.

    Raises:
        InputError: there is no such file, or it is not a file of plain weights.
        ModelError: the weights do not fit the network.
    """
    if change := load_weights(model, _read_weights(path), f"{path} does not fit {name}"):
        _log.warning("%s: %s", path, change)


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    check_file(path, WEIGHTS)
    if path.suffix == ".safetensors":
        try:
            return load_tensors(path)
        except StoreError as error:
            raise InputError(
                f"{error} The file is incomplete: save model.state_dict() again with "
                "safetensors.torch.save_file."
            ) from error
    try:  # torch writes without compression: what expands was not written by it
        with zipfile.ZipFile(path) as packed:
            inside = sum(entry.file_size for entry in packed.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        inside = 0  # older files of torch are no archive; damaged ones are refused when read
    if inside > path.stat().st_size:
        raise InputError(
            f"{path} would expand to {inside:,} bytes. Save model.state_dict() with torch.save."
        )
    return weights_in(read_checkpoint(path), str(path))


def code_folder(name: str) -> str | None:
    """The folder of a user's `module:function`; None for a network of this package."""
    own = is_users_code(name)
    top = sys.modules.get(name.partition(":")[0].partition(".")[0]) if own else None
    file = getattr(top, "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return str(path.parent.parent if path.stem == "__init__" else path.parent)


def load_code(folder: Path, spec: Spec, code: Path | None, recorded: object = None) -> None:
    """Make a run's own network importable from a folder that the user names.

    A run folder may come from anybody, so it never decides what code runs: neither its spec nor
    the path it recorded is followed unless the user says where that code is.

    Args:
        folder, spec: of the run.
        code: the folder that holds the network's module; None = the user named none.
        recorded: where it was when the run was made, for the message.

    Raises:
        ModelError: the run has its own code and `code` is not given, or does not hold it.
    """
    name = spec.model.name
    if not is_users_code(name):
        return
    if code is None:
        hint = f"; it was in {recorded} when the run was made" if isinstance(recorded, str) else ""
        raise ModelError(
            f"The run in {folder} uses its own code, {name!r}. Code is not run because a "
            "run folder names it: if you trust that code, name the folder that holds it with "
            f"--code DIR{hint}."
        )
    require_code(name, code)


# Labels.


def study_metadata(spec: Spec) -> dict[str, Any]:
    """The study's entries in run.json, wherever the clients are."""
    algorithm, clients = spec.build_algorithm(), spec.clients
    unseen = list(range(clients.training_count, clients.count))
    return {
        "name": spec.name,
        "regime": algorithm.name,
        "label": label_of(spec),
        "deploys": algorithm.deploys,
        "seed": spec.seed,
        "clients": clients.count,
        **({"unseen": unseen} if unseen else {}),
        "model": spec.model.name,
        "code": code_folder(spec.model.name),
        "training_hash": spec.training_hash(),
    }


def label_of(spec: Spec) -> str:
    """The algorithm's name for people, with what sets it apart from others of its kind.

    That is lambda, the objective where it is not the paper's, robust aggregation, partial
    participation, privacy, and what augmented training where it is not the perturbation certified:
    "Mixture, λ = 0.1, MACER", "FedAvg (nominal)", "Personalized (affine start)".
    """
    if spec.training.rounds == 0:
        return "Given weights"
    algorithm, certified = spec.algorithm, combine_augmentations(spec.perturbations())
    name = ALGORITHMS.rows[algorithm["name"]].label
    base = algorithm.get("base", {"name": "fedavg"})["name"]
    if base != "fedavg":
        name = f"{name} {ALGORITHMS.rows[base].label}"
    name = ", ".join([name, *_distinctions(spec)])
    trained, tuned = spec.augmentations()
    if trained == certified:
        return name
    if trained is None or isinstance(trained, PerClient):
        word = "nominal"
    else:
        alone = None if isinstance(certified, PerClient) else certified
        same = alone is not None and alone.family == trained.family
        word = f"trained with σ = {_sigma(trained)}" if same else trained.family
    return f"{name} ({word} start)" if tuned != trained else f"{name} ({word})"


def _distinctions(spec: Spec) -> list[str]:
    algorithm, objective, words = spec.algorithm, spec.objective["name"], list[str]()
    if "personalization" in algorithm:
        words.append(f"λ = {algorithm['personalization']:g}")
    if "mu" in algorithm:
        words.append(f"μ = {algorithm['mu']:g}")
    if objective != "augmented":
        words.append(OBJECTIVES.rows[objective].label)
    if spec.aggregation.rule != "mean":
        words.append(spec.aggregation.rule.replace("-", " "))
    if spec.aggregation.clip is not None:
        words.append(f"clipped at {spec.aggregation.clip:g}")
    if spec.clients.participation < 1:
        words.append(f"{100 * spec.clients.participation:.3g} % a round")
    if spec.privacy.kind != "none":
        words.append(private_label(spec))
    return words


def _sigma(perturbation: Perturbation) -> str:
    if perturbation.unit == "radians":
        return f"{math.degrees(perturbation.sigma):.3g}°"
    return f"{perturbation.sigma:.3g}"


# Training: what every client's half is made of, and how its rounds are recorded.


def local_training(
    spec: Spec, model: nn.Module, device: str, private: Protection
) -> LocalTraining:
    """A client's half of a study's training, the same for every client."""
    federated, personal = spec.augmentations()
    return LocalTraining(
        model,
        spec.training.schedule(),
        seed=spec.seed,
        augmentation=federated,
        finetuning_augmentation=personal,
        objective=spec.build_objective(),
        privacy=private.example,
        device=device,
        precision=spec.training.precision,
        memory_format=spec.training.memory_format,
    )


def check_training(
    spec: Spec, model: nn.Module, sizes: Mapping[int, int], image_shape: tuple[int, int, int]
) -> None:
    """Refuse, before anything is written, a training that these clients cannot do.

    Args:
        sizes: number of training images by client. image_shape: (c, h, w).

    Raises:
        SpecError: crops beyond the images.
        ModelError: BatchNorm and a client or batches of one image, or a network that has no
            gradients of single images where privacy needs them.
    """
    smallest = min(image_shape[1:])
    if spec.training.crop >= smallest:
        raise SpecError(
            f"training.crop = {spec.training.crop} pads by more than the images have: it must be "
            f"below {smallest}, usually an eighth of it."
        )
    check_batches(model, spec.training.batch_size)
    check_images(model, sizes)
    if spec.privacy.kind == "example":
        try_clipping(model, image_shape)


def participation(spec: Spec) -> Participation | None:
    """Which clients take part in a round; None = all, or the privacy's own choice."""
    share, private = spec.clients.participation, spec.privacy.kind == "client"
    if private or (share == 1 and not spec.clients.unseen):
        return None
    return RandomShare(share, spec.clients.training_count, spec.seed)


def by_client(entry: dict[str, Any]) -> dict[str, Any]:
    """A round of the history with its clients under their numbers."""
    rows = {
        str(row["client"]): {k: v for k, v in row.items() if k != "client"}
        for row in entry["clients"]
    }
    return {**entry, "clients": rows}


# The privacy of a run: its key and its mechanism.

KEY_FILE = "privacy.key"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Protection:
    """Mechanism and ledger of a private training; empty where the spec has no privacy."""

    example: ExampleLevel | None = None
    client: ClientLevel | None = None
    ledger: ExampleLedger | ClientLedger | None = None


def protection(spec: Spec, model: nn.Module, sizes: Sequence[int], key: bytes) -> Protection:
    """Mechanism and ledger of a spec, for the network that is trained.

    Args:
        sizes: number of training images of each client.
        key: of the training, `training_key`; any key to check whether the request is possible.

    Raises:
        ModelError: the network cannot be trained with privacy.
        SpecError: the target is impossible, or opacus is not installed.
    """
    privacy = spec.privacy
    if privacy.kind == "none":
        return Protection()
    check_network(model, privacy.kind)
    if privacy.kind == "example":
        example, ledger = plan_examples(
            privacy.budget(), spec.algorithm, spec.training.schedule(), sizes, key
        )
        return Protection(example=example, ledger=ledger)
    client, ledger = plan_clients(
        privacy.budget(),
        spec.algorithm,
        spec.training.rounds,
        spec.clients.training_count,
        spec.clients.participation,
        key,
    )
    return Protection(client=client, ledger=ledger)


def training_key(spec: Spec, folder: Path) -> bytes:
    """The key of a training's noise and samples, another one for every training.

    A personalized training has the key of its base: their common rounds are the same. A secret is
    drawn when first needed, and stored in the run folder.

    Raises:
        StoreError: the secret cannot be read or written.
    """
    secret = str(spec.seed).encode()
    if spec.privacy.noise_key == "secret":
        secret = _secret(folder / KEY_FILE)
    return derived_key(secret, "training", spec.training_hash(of_base=True))


def _secret(path: Path) -> bytes:
    if not path.exists():
        write_secret(path, os.urandom(_KEY_BYTES))
    try:
        content = read_bytes(path, SPEC_BYTES)
    except (OSError, InputError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Restore its permissions.") from error
    if len(content) != _KEY_BYTES:
        raise StoreError(
            f"{path} is damaged: it must hold {_KEY_BYTES} bytes. Without it the training cannot "
            "be resumed; repeat the run with --overwrite."
        )
    return content
