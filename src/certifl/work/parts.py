"""What a study begins with, the images dealt out to the clients, and what is left of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from certifl.data import (
    ClientIndices,
    Column,
    Dataset,
    Partition,
    deal_out,
    label_checksum,
    load,
    random_part,
)
from certifl.data.readers import ColumnNames
from certifl.errors import StoreMismatch
from certifl.requests import check_run
from certifl.spec import Spec, load_stored
from certifl.store.runs import RunFolder
from certifl.work.labels import label_of
from certifl.work.networks import code_folder

__all__ = [
    "DATA_DIR",
    "asked_columns",
    "data_folder",
    "finished_run",
    "load_data",
    "open_data",
    "partition_of",
    "run_spec",
    "study_facts",
]

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
    dealt = deal_out(
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
