"""Data and models of a study, and a finished run opened once for every command that reads it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from certifl.certification.network import Network, prepare
from certifl.certification.quantization import recorded
from certifl.data import (
    ClientIndices,
    Column,
    Dataset,
    Partition,
    assign_images,
    check,
    label_checksum,
    load,
    random_part,
    to_float,
)
from certifl.data.readers import ReadOptions
from certifl.errors import InputError, ModelError, StoreError, StoreMismatch, WorkError
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.rounds import deployed_model
from certifl.federated.states import ModelState
from certifl.models import build, fingerprint, is_users_code, require_code
from certifl.module_copies import copy_of, evaluating
from certifl.path_checks import CLIENT_STUDY
from certifl.perturbations import Perturbation
from certifl.runs.atomic import load_tensors, read_json, write_json, write_text
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import StoredRun
from certifl.spec import Spec, load_stored
from certifl.study.setup import label_of
from certifl.study.weights import begin_with

DATA_DIR = "data_dir"  # in run.json


# The data of a study.


def data_columns(spec: Spec) -> ReadOptions:
    """The columns that a study reads, where its data set is a table."""
    splitter = spec.clients.splitter()
    kept = splitter.column if isinstance(splitter, Column) else None
    return ReadOptions(label=spec.data.label_column, kept=kept, prepare=spec.data.preparation())


def load_data(spec: Spec, data_dir: Path | None, *, offline: bool = False) -> Dataset:
    """The data set of a study, with the column that it is split by.

    Args:
        spec: of the study. data_dir: folder of data sets.
        offline: never use the network.

    Raises:
        DataUnavailable: the data set is not available. InputError: it has no such column.
    """
    columns = data_columns(spec)
    return load(
        spec.data.name,
        data_dir,
        label_column=columns.label,
        keep_column=columns.kept,
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
    # The splitter saw the part; the partition names positions in, and labels of, the whole.
    whole = label_checksum(*labels)
    return dataclasses.replace(dealt, clients=clients, label_checksum=whole)


def study_metadata(spec: Spec) -> dict[str, Any]:
    """The study's entries in run.json, wherever the clients are."""
    algorithm, clients = spec.build_algorithm(), spec.clients
    unseen = list(range(clients.seen, clients.count))
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


# Networks of a study.


def initial_model(spec: Spec, dataset: Dataset) -> nn.Module:
    """The network all clients begin with, in evaluation mode.

    Raises:
        ModelError: a user's network that cannot be built or does not fit the images, or weights
            that do not fit the network.
        InputError: `model.weights` is not a file of plain weights.
    """
    model = build(
        spec.model.name,
        dataset.in_channels,
        dataset.num_classes,
        spec.seed,
        spec.model.options,
        dataset.image_size,
    )
    if spec.model.weights is not None:
        begin_with(model, Path(spec.model.weights), spec.model.name)
    return evaluating(model)


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
        folder: of the run. spec: of the run.
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


class NetworkCache:
    """The latest network prepared for voting; clients that deploy the same model share it."""

    def __init__(self) -> None:
        self._ready: Network | None = None
        self._scales_of: object = None
        self.fingerprint = ""

    def network(
        self, model: nn.Module, prepared: Callable[[], Network], scales_of: object = None
    ) -> Network:
        """The model prepared for voting; the cache's fingerprint is then that of the model.

        Args:
            model: in evaluation mode. prepared: prepares it.
            scales_of: in int8 the client whose images give the scales; None in other precisions.
        """
        name = fingerprint(model)
        if self._ready is None or (name, scales_of) != (self.fingerprint, self._scales_of):
            self._ready = prepared()
            self.fingerprint, self._scales_of = name, scales_of
        return self._ready


@dataclass(frozen=True)
class Deployed:
    """A client's model and what it takes to use it.

    Attributes:
        model: in evaluation mode. spec: of the study. client: number of the client.
        deploys: which model that is, in words.
        in_channels, image_size, class_names: of its images.
    """

    model: nn.Module
    spec: Spec
    client: int
    deploys: str
    in_channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]

    @property
    def perturbation(self) -> Perturbation:
        """What the client certifies.

        Raises:
            InputError: nothing.
        """
        return certified_by(self.spec, self.client)


def certified_by(spec: Spec, client: int) -> Perturbation:
    """The perturbation that a client of a run certifies.

    Raises:
        InputError: it certifies nothing.
    """
    own = spec.perturbations()[client] if client < spec.clients.count else spec.perturbation()
    if own is None:
        raise InputError(
            f"Client {client} of this run certifies nothing, so it has no perturbation. Choose "
            "another client, or use `certifl certify` with --family and --sigma."
        )
    return own


class OpenRun(StoredRun):
    """A run with the spec, images and models behind its results, each read once.

    What was read is checked once: the images are those of the run, the partition belongs to
    them, and a network is the one that was certified.
    """

    def __init__(
        self,
        path: Path,
        data_dir: Path | None = None,
        code: Path | None = None,
        *,
        offline: bool = False,
    ) -> None:
        """Open a run folder; nothing is read yet.

        Args:
            path: the run folder.
            data_dir: folder of data sets; None = where the run found its own.
            code: folder with the network's own code, which the user trusts.
            offline: never download images.
        """
        super().__init__(path)
        self._data_dir, self._code, self._offline = data_dir, code, offline
        self._networks: dict[tuple[str, int | str], NetworkCache] = {}

    @cached_property
    def spec(self) -> Spec:
        """The study.

        Raises:
            StoreError: the file is missing or damaged.
        """
        return load_stored(self.folder.spec)

    @cached_property
    def algorithm(self) -> Algorithm:
        """The algorithm that trained the models."""
        return self.spec.build_algorithm()

    @cached_property
    def perturbations(self) -> list[Perturbation | None]:
        """What each client certifies; None = nothing."""
        return list(self.spec.perturbations())

    @cached_property
    def dataset(self) -> Dataset:
        """The images of the run.

        Raises:
            DataUnavailable: they are not available. StoreMismatch: others have their name.
            StoreError: the run does not say which images it is of.
        """
        dataset = load_data(self.spec, self._data_folder(), offline=self._offline)
        self._check_images(dataset, self.data["fingerprint"])
        return dataset

    def _check_images(self, dataset: Dataset, fingerprint: object) -> None:
        if dataset.fingerprint != fingerprint:
            raise StoreMismatch(
                f"The data set {self.spec.data.name!r} holds other images than were certified in "
                f"{self.path}. Give --data-dir with the original data."
            )

    def _data_folder(self) -> Path | None:
        """The folder of data sets that the user names, or else the one that the run recorded.

        Data inside the run folder are not used: its sender may have invented them.
        """
        if self._data_dir is not None:
            return self._data_dir
        recorded = self.manifest.get(DATA_DIR)
        if not isinstance(recorded, str) or not Path(recorded).is_dir():
            return None
        inside = Path(recorded).resolve().is_relative_to(self.path.resolve())
        return None if inside else Path(recorded)

    @cached_property
    def stored_partition(self) -> Partition:
        """Which images each client holds, as recorded; it may be of other data.

        Raises:
            StoreError: the file is missing or damaged.
        """
        try:
            stored = read_json(self.folder.partition)
            if not isinstance(stored, dict):
                raise InputError("It is not a JSON object.")
            return Partition.from_manifest(stored)
        except (InputError, AttributeError, ValueError, RecursionError) as error:
            raise StoreError(f"partition.json is damaged: {error}") from error

    @cached_property
    def partition(self) -> Partition:
        """Which images each client holds.

        Raises:
            StoreError: the file is missing or damaged, or does not fit the data set.
        """
        partition, dataset = self.stored_partition, self.dataset
        try:
            check(partition, dataset.train.labels, dataset.test.labels)
        except InputError as error:
            raise StoreError(f"partition.json is damaged: {error}") from error
        if len(partition.clients) != self.spec.clients.count:
            raise StoreError("partition.json is damaged: it has another number of clients.")
        return partition

    @cached_property
    def last_round(self) -> StoredRound:
        """The final checkpoint of the training.

        Raises:
            StoreError: it is missing or damaged, so the trained models are not known.
        """
        last = Checkpoints(self.folder.training).latest()
        wanted = self.spec.training.rounds + self.algorithm.extra_rounds
        if last is None or last.number != wanted:
            raise StoreError(
                f"The final checkpoint in {self.folder.training} is missing or damaged, so the "
                "trained models are not known. Compute the run again with --overwrite."
            )
        return last

    @cached_property
    def architecture(self) -> nn.Module:
        """The network of the run, with initial weights.

        Raises:
            ModelError: a user's network whose code was not named, or that cannot be built.
            StoreMismatch: a federation whose clients keep their own models.
        """
        if "deployment" in self.manifest and self.algorithm.keeps_client_state:
            raise StoreMismatch(
                f"The models of {self.path} are with its clients: {self.spec.algorithm['name']} "
                "gives each its own, in deployed.safetensors of its folder."
            )
        data = self.data
        load_code(self.path, self.spec, self._code, self.manifest.get("code"))
        model = self.spec.model
        return build(
            model.name, data["in_channels"], data["num_classes"], self.spec.seed, model.options
        )

    def state(self, client: int) -> ModelState:
        """The weights that a client uses at test time; needs no code of the network.

        Raises:
            StoreError: the final checkpoint is missing or damaged.
        """
        return deployed_model(self.algorithm, self.last_round, client)

    def model(self, client: int) -> nn.Module:
        """The model that a client uses at test time, in evaluation mode; a new one at each call.

        Raises:
            StoreError: the final checkpoint is missing or damaged.
            ModelError: a user's network that cannot be found, or has changed.
            WorkError: it was never trained: a certificate of initial weights means nothing.
        """
        last, state = self.last_round, self.state(client)
        trained = self.spec.training.rounds > 0
        if trained and fingerprint(state) == last.identity.get("initial_model"):
            raise WorkError(
                f"Client {client} would deploy the network with its initial weights: it failed "
                f"in every round, or took no step. The history in {last.path.parent} says why it "
                "was left out; correct that, and compute the run again with --overwrite."
            )
        return _with_weights(
            copy_of(self.architecture),
            state,
            f"The trained weights in {last.path} do not fit the model {self.spec.model.name!r}: "
            "its code must be the one that the run was trained with.",
        )

    def network(self, client: int, device: str, batch_size: int | str = "auto") -> Network:
        """A client's model prepared for voting in the precision in which it was certified.

        Raises:
            StoreMismatch: the stored model or the images are not those that were certified.
        """
        metadata = self.certificates.conditions
        self._check_images(self.dataset, metadata.get("data_fingerprint"))
        cache = self._networks.setdefault((device, batch_size), NetworkCache())
        probe, scales = to_float(self.dataset.test.images[:1]), recorded(metadata, client)
        how = (device, metadata["precision"], batch_size, scales)
        model = self.model(client)
        own = None if scales is None else client
        network = cache.network(model, lambda: prepare(model, probe, *how), own)
        if cache.fingerprint != metadata["model_fingerprint"].get(str(client)):
            raise StoreMismatch(
                f"The stored model of client {client} is not the one that was certified; `certifl "
                "verify` says more. Compute the run again with --overwrite."
            )
        return network

    def deployed(self, client: int) -> Deployed:
        """A client's model with what it takes to use it.

        Raises:
            InputError: there is no such client. StoreError: the run is damaged.
        """
        count, data = self.spec.clients.count, self.data
        if not 0 <= client < count:
            raise InputError(f"--client {client}: the run has the clients 0 to {count - 1}.")
        return Deployed(
            self.model(client),
            self.spec,
            client,
            self.entry("deploys"),
            data["in_channels"],
            tuple(data["image_size"]),
            tuple(data["class_names"]),
        )


def _with_weights(model: nn.Module, state: Mapping[str, Tensor], misfit: str) -> nn.Module:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(misfit) from error
    return evaluating(model)


@dataclass(frozen=True)
class ClientStudy:
    """A client's own folder of one study, on its own machine.

    ```
    study.json            the client's number, shapes and class names of its images
    spec.toml             the study, with the client's own perturbation where it has one
    deployed.safetensors  the model that the client uses at test time
    ```

    Attributes:
        folder: `studies/<id>` in the client's folder.
    """

    folder: Path

    @property
    def _metadata(self) -> Path:
        return self.folder / CLIENT_STUDY

    def exists(self) -> bool:
        """Whether this is such a folder."""
        return self._metadata.is_file()

    def describe(self, spec: Spec, client: int, data: Mapping[str, Any]) -> None:
        """Write what the deployed model needs to be used.

        Args:
            spec: of the study, as the client certifies it. client: its number.
            data: in_channels, image_size and class_names of its images.
        """
        deploys = spec.build_algorithm().deploys
        write_text(self.folder / "spec.toml", spec.to_toml())
        write_json(self._metadata, {"client": client, "deploys": deploys, "data": dict(data)})

    def deployed(self, client: int | None, code: Path | None = None) -> Deployed:
        """The client's model with what it takes to use it.

        Args:
            client: whose model is wanted; None = the client of this folder.
            code: folder with the network's own code, which the user trusts.

        Raises:
            InputError: another client than this one.
            StoreMismatch: the client has not certified in this study yet.
            StoreError: a file is damaged. ModelError: it does not fit the network, or the
                network has its own code and `code` does not name its folder.
        """
        weights = self.folder / "deployed.safetensors"
        own, deploys, channels, size, names = self._described()
        if client is not None and client != own:
            raise InputError(
                f"{self.folder} is of client {own} and holds its model alone: leave out "
                f"--client, or use the folder of client {client}."
            )
        spec = load_stored(self.folder / "spec.toml")
        if not weights.is_file():
            raise StoreMismatch(
                f"{self.folder} holds no deployed model yet: it is stored when the certification "
                "of the study begins."
            )
        load_code(self.folder, spec, code)
        network = build(spec.model.name, channels, len(names), spec.seed, spec.model.options)
        misfit = (
            f"{weights} does not fit the network {spec.model.name!r}: its code must be the one "
            "that it was trained with."
        )
        model = _with_weights(network, load_tensors(weights), misfit)
        return Deployed(model, spec, own, deploys, channels, size, names)

    def _described(self) -> tuple[int, str, int, tuple[int, int], tuple[str, ...]]:
        stored = read_json(self._metadata)
        try:
            data = stored["data"]
            height, width = map(int, data["image_size"])
            return (
                int(stored["client"]),
                str(stored["deploys"]),
                int(data["in_channels"]),
                (height, width),
                tuple(map(str, data["class_names"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self._metadata} is damaged ({type(error).__name__}).") from error
