"""What a study will cost on this machine, from a few measured steps; no results are written.

Votes are counted exactly (at most) or by a stated share (expected). Times are those of a round of
one client and of a few batches of votes, on random images of the right shape, times how often the
study does them. Nothing is downloaded; a folder of images that is not decoded yet is decoded into
the cache that every command keeps.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from certifl.certification import counts as engine
from certifl.certification.arithmetic import Trial, ready
from certifl.certification.counts import Request
from certifl.certification.network import Network, choose_device
from certifl.certification.quantization import Calibration
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import ESTIMATORS
from certifl.data import Column, Partition, named_folder, random_part
from certifl.data.dataset import cache_folder, cache_key, cache_path
from certifl.data.loading import hub_choices
from certifl.data.readers import ReadOptions
from certifl.errors import DataUnavailable
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.batches import augmentation_of, combine_augmentations
from certifl.federated.local_training import LocalTraining, check_images
from certifl.federated.states import ClientData, ClientState, Parts, ServerState
from certifl.models import build, state_of
from certifl.perturbations import Perturbation
from certifl.rng import generator, image_key
from certifl.spec import Spec
from certifl.study.environment import machine_metadata, training_threads
from certifl.study.setup import Protection, data_columns, load_data, local_training, open_data

if TYPE_CHECKING:
    from certifl.spec.study import Choice

EXPECTED_SHARE = 0.3  # of all votes, where they stop early: 0.08 to 0.45 was seen

_SECONDS = 1.0  # of calls measured, and what one call may take before it is measured alone
_BATCHES = 4
_CHECKPOINTS = 3  # two are kept while the next is written


@dataclass(frozen=True)
class Plan:
    """What a study will take.

    Attributes:
        votes_at_most, votes_expected: of all clients together.
        training_seconds: of all rounds.
        tuning_seconds: of these, what is left where the training that it continues is finished.
        certification_seconds_at_most, certification_seconds: of those votes.
        votes_per_second: measured.
        memory_bytes: peak of the process. device_bytes: peak on the GPU, 0 without one.
        disk_bytes: checkpoints and certificates.
        setting: what it was planned for, in words: device, precision, parameters, images.
        assumptions: what the numbers rest on, in sentences.
    """

    votes_at_most: int
    votes_expected: int
    training_seconds: float
    tuning_seconds: float
    certification_seconds_at_most: float
    certification_seconds: float
    votes_per_second: float
    memory_bytes: int
    device_bytes: int
    disk_bytes: int
    setting: dict[str, str]
    assumptions: tuple[str, ...]


def plan(spec: Spec, data_dir: Path | None = None, device: str = "auto") -> Plan:
    """Measure a few steps of a study and say what all of it will take.

    Args:
        spec: the study. data_dir: folder of data sets; not needed for those in `KNOWN`.
        device: "auto" or a torch device.

    Raises:
        DataUnavailable: a data set that is not known here and not at hand.
        RequestError: a spec that does not fit the data, or a model that cannot be built.
    """
    where = choose_device(device)
    data, assumed = data_size(spec, data_dir)
    train, test = _images_of_clients(spec, data, data_dir)
    images_of = np.minimum(test, spec.certification.images or test.max())
    images_of[[one is None for one in spec.perturbations()]] = 0  # nothing to certify
    certified = int(images_of.sum())
    model = build(
        spec.model.name,
        data.shape[0],
        data.classes,
        spec.seed,
        spec.model.options,
        (data.shape[1], data.shape[2]),
    )
    check_images(model, dict(enumerate(train.tolist())))
    (training, tuning), parts = _training_seconds(spec, model, data, train, where)
    network = _network(spec, model.eval(), data, where, certified)
    speed = _votes_per_second(spec, network, data, images_of)
    settings = spec.certification.settings()
    at_most = engine.expected_votes(certified, settings)
    share = EXPECTED_SHARE if ESTIMATORS[spec.certification.estimator].stops_early else 1.0
    expected = math.ceil(share * at_most)
    images = (data.train + data.test) * math.prod(data.shape)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Plan(
        votes_at_most=at_most,
        votes_expected=expected,
        training_seconds=training,
        tuning_seconds=tuning,
        certification_seconds_at_most=at_most / speed,
        certification_seconds=expected / speed,
        votes_per_second=speed,
        memory_bytes=(peak if sys.platform == "darwin" else 1024 * peak) + images,
        device_bytes=torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0,
        disk_bytes=_disk(spec, parts, certified, data.classes),
        setting={
            "device": str(machine_metadata(str(where))["device"]),
            "precision of votes": network.precision,
            "noisy images per batch": f"{network.batch_size:,}",
            "parameters of the model": f"{sum(p.numel() for p in model.parameters()):,}",
            "clients": f"{len(train):,}",
            "training images": f"{int(train.sum()):,}",
            "images to certify": f"{certified:,}",
        },
        assumptions=(assumed, *_assumptions(spec, share)),
    )


def _assumptions(spec: Spec, share: float) -> list[str]:
    votes = (
        f"Votes expected are {100 * share:.0f} % of those at most, a rough share: between 8 % and "
        "45 % were seen on trained models. Fewer radii to report, fewer votes."
        if share < 1.0
        else f"The estimator {spec.certification.estimator!r} casts all votes for every image."
    )
    return [
        "Training time is that of one client's round, measured on random images, times clients "
        "and rounds, without the writing of checkpoints.",
        votes,
        "Nothing else runs on the machine; memory is that of this process after the measured "
        "steps, with all images of the data set held in it.",
    ]


def _images_of_clients(
    spec: Spec, data: DataSize, data_dir: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images per client, allocated with labels in equal shares.

    Where the clients follow from a column of the data set, its own.
    """
    splitter = spec.clients.splitter()
    if isinstance(splitter, Column):
        return _numbers(open_data(spec, data_dir)[1])
    splits = ((data.train, spec.data.train_images), (data.test, spec.data.test_images))
    taken = [
        random_part(available, count, spec.seed, which)
        for (available, count), which in zip(splits, ("train", "test"), strict=True)
    ]
    labels = [part % data.classes for part in taken]
    return _numbers(splitter.split(labels[0], labels[1], spec.clients.count, spec.seed))


def _numbers(partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    train = np.array([len(client.train) for client in partition.clients])
    return train, np.array([len(client.test) for client in partition.clients])


def _pixels(data: DataSize, count: int) -> Tensor:
    drawn = generator(0, "plan", count)
    return torch.randint(256, (count, *data.shape), generator=drawn, dtype=torch.uint8)


def _network(
    spec: Spec, model: nn.Module, data: DataSize, where: torch.device, images: int
) -> Network:
    precision, perturbation = spec.certification.precision, spec.perturbation()
    pixels, calibration = _pixels(data, 16).float() / 255, None
    if precision == "int8":
        calibration = Calibration.of(pixels, perturbation, spec.seed)
    trial = Trial.of(perturbation, spec.certification.settings(), spec.seed, images)
    return ready(model, pixels, trial, where, precision, calibration=calibration)


def _training_seconds(
    spec: Spec, model: nn.Module, data: DataSize, train: np.ndarray, device: torch.device
) -> tuple[tuple[float, float], tuple[Parts, Parts]]:
    """Seconds of all rounds of all clients, and of the last extra one; what is kept after one."""
    schedule, algorithm = spec.training.schedule(), spec.build_algorithm()
    short = {"rounds": 1, "local_epochs": 1}
    once = spec.model_copy(update={"training": spec.training.model_copy(update=short)})
    with training_threads(model):
        training = local_training(once, model, str(device), Protection())
        measured = _Rounds(algorithm, training, algorithm.init(state_of(model)), data)
        few, more = (
            max(2, min(math.ceil(train.mean()), batches * schedule.batch_size))
            for batches in (1, _BATCHES)
        )
        taking_part = spec.clients.participants / spec.clients.count
        passes, seconds, tuning = taking_part * schedule.rounds * schedule.local_epochs, 0.0, 0.0
        for client, images in _alike(spec.augmentations(), train).values():
            size, epoch = few, measured.seconds(client, 0, few)
            if epoch < _SECONDS / _BATCHES:
                size, epoch = more, measured.seconds(client, 0, more)
            extra = [measured.seconds(client, 1, size) for _ in range(algorithm.extra_rounds)]
            seconds += (epoch * passes + sum(extra)) / size * images
            tuning += sum(extra[-1:]) / size * images
    return (seconds, tuning), (measured.start.parts, measured.client_state.parts)


class _Rounds:
    """Rounds of one client at a time, to be measured; its state is passed on."""

    def __init__(
        self, algorithm: Algorithm, training: LocalTraining, start: ServerState, data: DataSize
    ) -> None:
        self._algorithm, self._training, self._data = algorithm, training, data
        self.start, self.client_state = start, ClientState()

    def seconds(self, client: int, number: int, size: int) -> float:
        """Seconds of round `number` of a client with so many images."""
        labels = torch.arange(size) % self._data.classes
        own = ClientData(client, _pixels(self._data, size), labels)
        server = ServerState(number, self.start.parts)

        def work() -> None:
            _, self.client_state = self._algorithm.client_round(
                server, self.client_state, own, self._training
            )

        return _measured(work, self._training.device)


def _alike(
    choices: Sequence[Choice], images: np.ndarray
) -> dict[tuple[str, ...], tuple[int, float]]:
    """Clients that work alike, by families: one of them, and the images of all."""
    groups: dict[tuple[str, ...], tuple[int, float]] = {}
    for client, count in enumerate(images.tolist()):
        own = [augmentation_of(choice, client) for choice in choices]
        key = tuple(getattr(one, "family", "") for one in own)
        first, before = groups.get(key, (client, 0.0))
        groups[key] = (first, before + count)
    return groups


def _votes_per_second(spec: Spec, network: Network, data: DataSize, images: np.ndarray) -> float:
    """Of all certified images together, which may be of several perturbations."""
    perturbations = spec.perturbations()
    groups = _alike([combine_augmentations(perturbations)], images).values()
    parts = [(perturbations[client], count) for client, count in groups]
    seconds = sum(
        count / _pace(perturbation, spec.seed, network, data)
        for perturbation, count in parts
        if perturbation is not None
    )
    return float(images.sum()) / seconds


def _pace(perturbation: Perturbation, seed: int, network: Network, data: DataSize) -> float:
    counter = VoteCounter(network, perturbation, seed)
    images = (_pixels(data, 1).float() / 255).to(network.device)
    key, votes = image_key(images[0]), 2 * network.batch_size

    def work() -> None:
        counter.count(images, [Request(0, 0, key, "estimation", 0, votes)], slots=1)

    return votes / _measured(work, network.device)


def _measured(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the fastest in about a second of calls and at least one.

    The fastest, because other work on the machine only ever adds. A call before them is not
    counted: libraries choose and compile their kernels in it, which can take a hundred times what
    a call takes afterwards.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    taken, begun = math.inf, clock()
    while math.isinf(taken) or clock() - begun < _SECONDS:
        started = clock()
        work()
        taken = min(taken, clock() - started)
    return taken


def _disk(spec: Spec, parts: tuple[Parts, Parts], images: int, classes: int) -> int:
    """Bytes of checkpoints (server, and clients that keep something), votes and certificates."""
    server, client = (
        sum(value.nbytes for part in state.values() for value in part.values()) for state in parts
    )
    votes = images * (2 * classes + 8) * 8
    return _CHECKPOINTS * (server + client * spec.clients.count) + 2 * votes


# Numbers and shapes of data sets, without reading those that everybody knows.


@dataclass(frozen=True)
class DataSize:
    """What must be known of a data set to plan with it.

    Attributes:
        train, test: numbers of images. shape: (c, h, w). classes: number of classes.
    """

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int


KNOWN = {
    "digits": DataSize(1397, 400, (1, 8, 8), 10),
    "mnist": DataSize(60_000, 10_000, (1, 28, 28), 10),
    "fashion_mnist": DataSize(60_000, 10_000, (1, 28, 28), 10),
    "cifar10": DataSize(50_000, 10_000, (3, 32, 32), 10),
    "cifar100": DataSize(50_000, 10_000, (3, 32, 32), 100),
}
"""Data sets that are planned for without being read."""


def data_size(spec: Spec, data_dir: Path | None) -> tuple[DataSize, str]:
    """Sizes of a spec's data set, and a sentence on where they come from.

    Raises:
        DataUnavailable: it is neither known here nor at hand.
    """
    name, columns, test = spec.data.name, data_columns(spec), spec.data.test_split
    prepare = columns.prepare
    if name in KNOWN and columns.no_columns and test is None and prepare.crop is None:
        size = KNOWN[name]
        if prepare.resize is not None:
            size = replace(size, shape=(size.shape[0], *prepare.resize))
        return size, f"Measured on random images of the shape of {name}; it was not read."
    if not _at_hand(name, data_dir, columns, test):
        raise DataUnavailable(
            f"A plan needs the size of the images of {name!r}, which is not on this machine, and "
            "it downloads nothing. Put it into a folder and give --data-dir (or a path as "
            f"data.name), or plan with one of {', '.join(KNOWN)}."
        )
    whole = load_data(spec, data_dir)
    shape = (whole.in_channels, *whole.image_size)
    size = DataSize(len(whole.train), len(whole.test), shape, whole.num_classes)
    return size, f"Measured on random images; numbers and shape are those of {name}."


def _at_hand(name: str, data_dir: Path | None, columns: ReadOptions, test: str | None) -> bool:
    """Whether loading finds a folder, or images decoded before, and needs no network."""
    base = name.partition("[")[0].strip()
    folders = [Path(base).expanduser()] if "/" in base or base[:1] in (".", "~") else []
    folder = named_folder(data_dir)
    if folder is not None:
        tail = base.rsplit("/", 1)[-1]
        names = {base, tail, tail.replace("_", "-"), tail.replace("-", "_")}
        folders += [folder / one for one in names]
    decoded = cache_path(cache_folder(), name, cache_key((), *hub_choices(base, columns, test)))
    return decoded.is_file() or any(each.is_dir() for each in folders)
