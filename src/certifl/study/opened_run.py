"""A finished run opened once for every command that reads it, and the models that clients use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from certifl.certification.network import Network, prepare
from certifl.certification.quantization import recorded
from certifl.data import Dataset, Partition, check, to_float
from certifl.errors import InputError, ModelError, StoreError, StoreMismatch, WorkError
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.rounds import deployed_model
from certifl.federated.states import ModelState
from certifl.models import build, fingerprint
from certifl.module_copies import copy_of, evaluating
from certifl.path_checks import CLIENT_STUDY
from certifl.perturbations import Perturbation
from certifl.runs.atomic import load_tensors, read_json, write_json, write_text
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import StoredRun
from certifl.safe_io import MALFORMED
from certifl.spec import Spec, load_stored
from certifl.study.setup import load_code, load_data

DATA_DIR = "data_dir"  # in run.json
_EPSILON = "epsilon.json"  # in a client's folder of a study


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
        """What the client certifies."""
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
    them, and a network is the one that was certified. Whatever is asked for raises a StoreError
    where a file that it needs is missing or damaged.
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
        """The study."""
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
        """Which images each client holds, as recorded; it may be of other data."""
        try:
            stored = read_json(self.folder.partition)
            if not isinstance(stored, dict):
                raise InputError("It is not a JSON object.")
            return Partition.from_manifest(stored)
        except (InputError, AttributeError, ValueError, RecursionError) as error:
            raise StoreError(f"partition.json is damaged: {error}") from error

    @cached_property
    def partition(self) -> Partition:
        """Which images each client holds."""
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
        """The final checkpoint of the training."""
        last = Checkpoints(self.folder.training).latest()
        rounds = self.spec.training.rounds + self.algorithm.extra_rounds
        if last is None or last.number != rounds:
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
        data, model = self.data, self.spec.model
        load_code(self.path, self.spec, self._code, self.manifest.get("code"))
        return build(
            model.name,
            data["in_channels"],
            data["num_classes"],
            self.spec.seed,
            model.options,
            tuple(data["image_size"]),
        )

    def state(self, client: int) -> ModelState:
        """The weights that a client uses at test time; needs no code of the network."""
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


def open_deployed(
    path: Path, client: int | None, code: Path | None
) -> tuple[Deployed, OpenRun | None]:
    """The model of a client of a run, or of the client whose own folder it is; with the run.

    Args:
        path: a finished run, or a client's own folder of a study, `CLIENT/studies/ID`.
        client: None = client 0 of a run, or the one whose folder it is. code: as `OpenRun`.

    Raises:
        StoreMismatch: neither. InputError: there is no such client. StoreError: it is damaged.
    """
    study = ClientStudy(path)
    if study.exists():
        return study.deployed(client, code), None
    run = OpenRun(path, code=code)
    run.require_finished()
    return run.deployed(client or 0), run


@dataclass(frozen=True)
class ClientStudy:
    """A client's own folder of one study, on its own machine.

    ```
    study.json            the client's number, shapes and class names of its images
    spec.toml             the study, with the client's own perturbation where it has one
    deployed.safetensors  the model that the client uses at test time
    epsilon.json          what it spent of its images' privacy, where the client adds the noise
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

    def record_epsilon(self, spent: float) -> None:
        """Write what the deployed model spent of its images' privacy."""
        write_json(self.folder / _EPSILON, {"epsilon": spent})

    def epsilon(self) -> list[float] | None:
        """What the deployed model spent of its images' privacy; None where it is not recorded.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.folder / _EPSILON
        if not path.is_file():
            return None
        try:
            return [float(read_json(path)["epsilon"])]
        except MALFORMED as error:
            raise StoreError(f"{path} is damaged ({type(error).__name__}).") from error

    def deployed(self, client: int | None, code: Path | None = None) -> Deployed:
        """The client's model with what it takes to use it.

        Args:
            client: whose model; None = the client of this folder. code: as `OpenRun`.

        Raises:
            InputError: another client than this one.
            StoreMismatch: the client has not certified in this study yet.
            StoreError: a file is damaged. ModelError: it does not fit the network, or the
                network has its own code and `code` does not name its folder.
        """
        weights, data = self.folder / "deployed.safetensors", read_json(self._metadata)
        try:
            own, deploys, data = int(data["client"]), str(data["deploys"]), data["data"]
            height, width = map(int, data["image_size"])
            channels, names = int(data["in_channels"]), tuple(map(str, data["class_names"]))
        except MALFORMED as error:
            raise StoreError(f"{self._metadata} is damaged ({type(error).__name__}).") from error
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
        options, size = spec.model.options, (height, width)
        network = build(spec.model.name, channels, len(names), spec.seed, options, size)
        misfit = (
            f"{weights} does not fit the network {spec.model.name!r}: its code must be the one "
            "that it was trained with."
        )
        model = _with_weights(network, load_tensors(weights), misfit)
        return Deployed(model, spec, own, deploys, channels, (height, width), names)
