"""What a study begins with, the images dealt out to the clients, and what is left of a run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from torch import nn

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
from certifl.data.readers import ColumnNames
from certifl.errors import ModelError, StoreError, StoreMismatch, WorkError
from certifl.federated.rounds import deployed_model
from certifl.models import build, fingerprint, require_code
from certifl.module_copies import evaluating
from certifl.path_checks import check_run
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import RunFolder
from certifl.spec import Spec, load_stored
from certifl.study.setup import label_of

DATA_DIR = "data_dir"  # in run.json


def asked_columns(spec: Spec) -> ColumnNames:
    """The columns that a study asks for, where its data set is a table."""
    splitter = spec.clients.splitter()
    kept = splitter.column if isinstance(splitter, Column) else None
    return ColumnNames(label=spec.data.label_column, kept=kept)


def load_data(spec: Spec, data_dir: Path | None, *, offline: bool = False) -> Dataset:
    """The data set of a study, with the column that it is split by.

    Args:
        spec: of the study. data_dir: folder of data sets.
        offline: never ask the network.

    Raises:
        DataUnavailable: the data set is not at hand. InputError: it has no such column.
    """
    columns = asked_columns(spec)
    return load(
        spec.data.name,
        data_dir,
        label_column=columns.label,
        keep_column=columns.kept,
        test_split=spec.data.test_split,
        offline=offline,
    )


def open_data(spec: Spec, data_dir: Path | None) -> tuple[Dataset, Partition]:
    """The whole data set, and who holds which of its images by position.

    Raises:
        DataUnavailable: the data set is not at hand. InputError: it is too small for the spec.
    """
    dataset = load_data(spec, data_dir)
    return dataset, partition_of(spec, dataset)


def partition_of(spec: Spec, dataset: Dataset) -> Partition:
    """Who holds which images of the whole data set: a function of spec and data alone.

    Raises:
        InputError: the data set is too small for the spec.
    """
    splits = (dataset.train, dataset.test)
    wanted = (spec.data.train_images, spec.data.test_images)
    train, test = (
        random_part(len(split), count, spec.seed, which)
        for split, count, which in zip(splits, wanted, ("train", "test"), strict=True)
    )
    labels = tuple(split.labels.numpy() for split in splits)
    columns = [split.column for split in splits]
    dealt = assign_images(
        spec.clients.splitter(),
        (labels[0][train], labels[1][test]),
        tuple(
            None if column is None else column[part]
            for column, part in zip(columns, (train, test), strict=True)
        ),
        spec.clients.count,
        spec.seed,
    )
    clients = tuple(ClientIndices(train[c.train], test[c.test]) for c in dealt.clients)
    # The splitter saw the part; the manifest names positions in, and labels of, the whole.
    whole = label_checksum(*labels)
    return dataclasses.replace(dealt, clients=clients, label_checksum=whole)


def data_folder(folder: RunFolder, asked: Path | None) -> Path | None:
    """The folder of data sets as it is asked for, or else where the run found its data.

    It may lie elsewhere by now: whoever reads it compares fingerprints.
    """
    if asked is not None:
        return asked
    before = folder.manifest().get(DATA_DIR)
    return Path(before) if before is not None and Path(before).is_dir() else None


def finished_run(place: Path) -> RunFolder:
    """A run folder in which everything was computed.

    Raises:
        StoreMismatch: it is no run, or not finished. StoreError: its manifest is damaged.
    """
    folder = RunFolder(place)
    check_run(place)
    if not folder.finished():
        raise StoreMismatch(
            f"The run in {place} is not finished; repeat the command that started it."
        )
    return folder


def run_spec(folder: RunFolder) -> Spec:
    """The spec of a run, from its folder.

    Raises:
        StoreError: it is missing or damaged.
    """
    return load_stored(folder.spec)


def study_facts(spec: Spec) -> dict[str, Any]:
    """What the record of a run says about its study, wherever the clients are."""
    algorithm = spec.build_algorithm()
    return {
        "name": spec.name,
        "regime": algorithm.name,
        "label": label_of(spec),
        "deploys": algorithm.deploys,
        "seed": spec.seed,
        "clients": spec.clients.count,
        "model": spec.model.name,
        "code": code_folder(spec.model.name),
        "training_hash": spec.training_hash(),
    }


# The networks of a study: as all clients begin with them, and as each of them deploys one.


def initial_model(spec: Spec, dataset: Dataset) -> nn.Module:
    """The network all clients begin with, in evaluation mode.

    Raises:
        ModelError: a user's network that cannot be built or does not fit the images.
    """
    model = build(
        spec.model.name,
        dataset.in_channels,
        dataset.num_classes,
        spec.seed,
        spec.model.options,
        dataset.image_size,
    )
    return evaluating(model)


def code_folder(name: str) -> str | None:
    """Where the package of a user's `module:function` was found; None for a network from here."""
    top = sys.modules.get(name.partition(":")[0].partition(".")[0]) if ":" in name else None
    file = getattr(top, "__file__", None)
    if file is None:
        return None
    place = Path(file).resolve()
    return str(place.parent.parent if place.stem == "__init__" else place.parent)


def load_code(folder: Path, spec: Spec, code: Path | None, before: object = None) -> None:
    """Make a run's own network importable from a folder that the user names; does nothing else.

    A run folder may come from anybody, so it never decides what code runs: neither its spec nor
    the place it recorded is followed unless the user says where that code is.

    Args:
        folder: of the run. spec: of the run.
        code: the folder that holds the network's module; None = the user named none.
        before: where it was when the run was made, for the message.

    Raises:
        ModelError: the run has code of its own and `code` is not given, or does not hold it.
    """
    name = spec.model.name
    if ":" not in name:
        return
    if code is None:
        known = f"; it was in {before} when the run was made" if isinstance(before, str) else ""
        raise ModelError(
            f"The run in {folder} uses code of its own, {name!r}. Code is not run because a "
            "run folder names it: if you trust that code, name the folder that holds it with "
            f"--code DIR{known}."
        )
    require_code(name, code)


def run_model(folder: RunFolder, spec: Spec, code: Path | None = None) -> nn.Module:
    """The network of a run, with initial weights.

    Args:
        folder: of the run. spec: of the run.
        code: the folder that holds the module of a network of the user's; see `load_code`.

    Raises:
        ModelError: a user's network whose code was not named, or that cannot be built any more.
        StoreError: the run's manifest is damaged.
        StoreMismatch: a federation's clients have models of their own, which are with them.
    """
    if "deployment" in folder.manifest() and spec.build_algorithm().keeps_client_state:
        raise StoreMismatch(
            f"The models of {folder.path} are with its clients: {spec.algorithm['name']} gives "
            "each its own, in deployed.safetensors of its folder."
        )
    data = folder.data()
    load_code(folder.path, spec, code, folder.manifest().get("code"))
    return build(
        spec.model.name, data["in_channels"], data["num_classes"], spec.seed, spec.model.options
    )


def last_round(folder: RunFolder, spec: Spec) -> StoredRound:
    """The final checkpoint of a finished training.

    Raises:
        StoreError: it is missing or damaged, so the trained models are not known.
    """
    last = Checkpoints(folder.training).latest()
    wanted = spec.training.rounds + spec.build_algorithm().extra_rounds
    if last is None or last.number != wanted:
        raise StoreError(
            f"The final checkpoint in {folder.training} is missing or damaged, so the trained "
            "models are not known. Compute the run again with --overwrite."
        )
    return last


def deployed(last: StoredRound, spec: Spec, model: nn.Module, client: int) -> nn.Module:
    """The model that a client uses at test time, in evaluation mode.

    Args:
        last: the final checkpoint.
        spec: of the run.
        model: the architecture; its weights are replaced.
        client: number of the client.

    Raises:
        ModelError: the network is no longer the one that was trained.
        WorkError: it never was: a certificate of initial weights would mean nothing.
    """
    state = deployed_model(spec.build_algorithm(), last, client)
    if fingerprint(state) == last.identity.get("initial_model"):
        raise WorkError(
            f"Client {client} would deploy the network with the weights it began with: it failed "
            f"in every round, or took no step. The history in {last.path.parent} says why it was "
            "left out; see to that, and compute the run again with --overwrite."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"The trained weights in {last.path} do not fit the model {spec.model.name!r}: its "
            "code must be the one that the run was trained with."
        ) from error
    return model.eval()


def trained_model(
    folder: RunFolder, spec: Spec, client: int, code: Path | None = None
) -> nn.Module:
    """The model that a client of a finished run uses at test time, in evaluation mode.

    Raises:
        StoreError: the final checkpoint is missing or damaged.
        ModelError: a user's network that cannot be found, or was changed since.
    """
    return deployed(last_round(folder, spec), spec, run_model(folder, spec, code), client)
