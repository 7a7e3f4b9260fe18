"""From a spec to a finished run folder: data, partition, training, certificates, in this order.

Each step writes what it finished before the next begins, and a step that finds its result does not
repeat it. The same call therefore starts a run, goes on with an interrupted one, and returns a
finished one as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from certifl.certification.network import choose_device, prepare
from certifl.certification.quantization import Calibration
from certifl.data import Dataset, Partition, named_folder, to_float
from certifl.errors import InputError, SpecError, StoreError, StoreMismatch
from certifl.experiments.explore import explore
from certifl.experiments.multi_gpu import cast_votes, device_names
from certifl.federated.algorithms.personalized import Personalized
from certifl.federated.rounds import Progress
from certifl.federated.states import ClientData
from certifl.federated.trainer import train
from certifl.runs.atomic import write_json
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import FINISHED, RUNNING, RunFolder
from certifl.spec import Spec
from certifl.study.certify import certify_clients, run_arithmetic
from certifl.study.environment import (
    give_back_memory,
    machine_facts,
    threads_of_workers,
    training_threads,
    versions,
)
from certifl.study.opened_run import DATA_DIR, deployed, initial_model, open_data, study_facts
from certifl.study.privacy import Protection, protection, spent, training_key
from certifl.study.setup import by_client, check_training, local_training, participation
from certifl.tracking import check_trackers
from certifl.tracking.run_tracker import News, track_finished, tracked

_log = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]
"""Called with (what is under way, done, all, unit)."""


@dataclass(frozen=True)
class Options:
    """Where and how a study is computed; nothing here changes what it is.

    Attributes:
        out: the run folder.
        data_dir: folder of data sets. device: "auto", a torch device, or several of one kind,
            "cuda:0,cuda:1": training takes the first, certification all, a process each.
        overwrite: replace a run that lies in `out`.
        siblings: run folders whose finished training may be taken over instead of repeated.
        report: told about progress.
        command: how the run was started, for the record.
        track: names of experiment trackers that follow the run.
        workers: processes that train clients beside this one, one thread each; 0 = none. Networks
            of a million weights and more then round as on one thread.
        answer_within: seconds after which a client is left out of a round; needs workers.
        explore: deform test images for readers of the report; `explore.explore` does so later.
    """

    out: Path
    data_dir: Path | None = None
    device: str = "auto"
    overwrite: bool = False
    siblings: tuple[Path, ...] = ()
    report: Report | None = None
    command: str = ""
    track: tuple[str, ...] = ()
    workers: int = 0
    answer_within: float | None = None
    explore: bool = True


def run(spec: Spec, options: Options) -> RunFolder:
    """Train, deploy and certify as the spec says; goes on where an earlier call was stopped.

    Raises:
        RequestError: the spec does not fit the data, the folder holds something else, or a
            tracker is not installed.
        TooFewClients, TrainingDiverged: training cannot go on; finished rounds are kept.
        StoreError: the folder cannot be written; what is there stays whole.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite, spec.to_toml())
    check_trackers(options.track)
    if not options.overwrite and folder.complete():
        track_finished(options.track, folder)
        return folder
    # Whatever the request can be refused for is found before anything is written.
    if options.answer_within is not None and not options.workers:
        raise InputError(
            "--answer-within needs --workers: a client that is trained in this very process "
            "cannot be given up on."
        )
    devices = device_names(options.device)
    device = choose_device(devices[0])
    dataset, partition = open_data(spec, options.data_dir)
    if spec.training.crop >= min(dataset.image_size):
        raise SpecError(
            f"training.crop = {spec.training.crop} pads by more than the images have: it must be "
            f"below {min(dataset.image_size)}, usually an eighth of it."
        )
    model = initial_model(spec, dataset)
    _check_votes(spec, model, dataset, device)
    protection(spec, model, _sizes(partition), b"not the key")
    image_shape = (dataset.in_channels, *dataset.image_size)
    check_training(spec, model, _sizes(partition), image_shape)
    with folder.locked():
        folder.begin(spec.to_toml(), spec.hash(), options.overwrite)
        _describe(folder, spec, model, dataset, options)
        write_json(folder.partition, partition.to_manifest())
        if partition.names:
            folder.update({"client_names": list(partition.names)})
        with tracked(options.track, folder) as news:
            with training_threads(model):
                last = _train(folder, spec, model, dataset, partition, options, str(device), news)
            give_back_memory()  # training is over: certification may need all there is
            news()
            network = partial(deployed, last, spec, model)
            if len(devices) > 1:
                run_arithmetic(folder, spec, dataset, partition, network, str(device))
                cast_votes(folder.path, options.data_dir, devices, options.report)
            certify_clients(
                folder,
                spec,
                dataset,
                partition,
                network,
                device=str(device),
                report=options.report,
            )
            news()
        if options.explore:
            explore(folder, spec, dataset, network, str(device), options.report)
        folder.update({"status": FINISHED, "finished": _now()})
    return folder


def _check_votes(spec: Spec, model: nn.Module, dataset: Dataset, device: torch.device) -> None:
    """Refuse a model that could not vote, before it is trained."""
    calibration = None
    if spec.certification.precision == "int8":
        images = to_float(dataset.train.images[:4])
        calibration = Calibration.of(images, spec.perturbation(), spec.seed)
    probe = to_float(dataset.test.images[:1])
    prepare(model, probe, device, spec.certification.precision, calibration=calibration)


def _describe(
    folder: RunFolder, spec: Spec, model: nn.Module, dataset: Dataset, options: Options
) -> None:
    known = folder.manifest()
    before = known.get("data", {}).get("fingerprint", dataset.fingerprint)
    if before != dataset.fingerprint:
        raise StoreMismatch(
            f"{folder.path} was begun with other images: the data set {dataset.name!r} changed "
            "since. Give the data it was begun with, or choose another folder with --out."
        )
    place = named_folder(options.data_dir)
    folder.update(
        {
            **study_facts(spec),
            **({} if place is None else {DATA_DIR: str(place.resolve())}),
            "status": RUNNING,
            "data": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "in_channels": dataset.in_channels,
                "image_size": list(dataset.image_size),
                "num_classes": dataset.num_classes,
                "class_names": list(dataset.class_names),
                "train_images": spec.data.train_images or len(dataset.train),
                "test_images": spec.data.test_images or len(dataset.test),
            },
            "machine": {
                **machine_facts(device_names(options.device)[0]),
                **threads_of_workers(model, options.workers),
            },
            "versions": versions(),
            "command": known.get("command") or options.command,
            "created": known.get("created") or _now(),
        }
    )


def _train(
    folder: RunFolder,
    spec: Spec,
    model: nn.Module,
    dataset: Dataset,
    partition: Partition,
    options: Options,
    device: str,
    news: News,
) -> StoredRound:
    """Run the rounds that are missing, from a sibling's finished training where one fits."""
    started = time.perf_counter()
    private = _protection(folder, spec, model, partition)
    training = local_training(spec, model, device, private)
    clients = [_client_data(dataset, partition, c) for c in range(len(partition.clients))]
    last = train(
        spec.build_algorithm(),
        model,
        clients,
        training,
        Checkpoints(folder.training),
        progress=_rounds(spec, options.report, news),
        participation=participation(spec, len(clients)),
        ledger=private.ledger,
        start_from=_taken_over(folder, _sibling_training(folder, spec, options.siblings)),
        rule=private.client or spec.aggregation.build(),
        min_clients=spec.clients.min_clients,
        workers=options.workers,
        answer_within=options.answer_within,
    )
    folder.write_history([by_client(entry) for entry in last.history])
    seconds = folder.manifest().get("training_seconds", 0.0) + time.perf_counter() - started
    facts = {"training_seconds": round(seconds, 3)}
    if private.ledger is not None:
        facts["privacy"] = spent(spec, private, last.history)
    folder.update(facts)
    return last


def _sizes(partition: Partition) -> list[int]:
    return [len(client.train) for client in partition.clients]


def _protection(
    folder: RunFolder, spec: Spec, model: nn.Module, partition: Partition
) -> Protection:
    key = training_key(spec, folder.path)
    return protection(spec, model, _sizes(partition), key)


def _rounds(spec: Spec, report: Report | None, news: News) -> Callable[[Progress], None]:
    scheduled, each = spec.training.rounds, spec.clients.participants
    extra = spec.build_algorithm().extra_rounds * spec.clients.count

    def told(now: Progress) -> None:
        if now.done == 1:  # every round before this one is committed
            news()
        if report is None:
            return
        before = (
            min(now.round, scheduled) * each + max(0, now.round - scheduled) * now.participants
        )
        total = scheduled * each + extra  # with private clients, how many take part is chance
        report("training", min(before + now.done, total), total, "client rounds")

    return told


def _client_data(dataset: Dataset, partition: Partition, client: int) -> ClientData:
    part = dataset.train.take(partition.clients[client].train)
    return ClientData(client, part.images, part.labels)


def _sibling_training(
    folder: RunFolder, spec: Spec, siblings: tuple[Path, ...]
) -> RunFolder | None:
    """A finished training that this one continues: the same, or the base it personalises.

    Only one of the same images, versions, processor and device is taken over: its bits are then
    those that this run would compute. A network of the user's own is always trained: its code may
    have changed under the same name. So is a run whose noise has a secret key: each has its own.
    """
    if ":" in spec.model.name or spec.privacy.noise_key == "secret":
        return None
    own, wanted = folder.manifest(), {spec.training_hash()}
    if isinstance(spec.build_algorithm(), Personalized):
        wanted.add(spec.training_hash(of_base=True))
    for sibling in siblings:
        try:
            facts = RunFolder(sibling).manifest()
        except StoreError:  # somebody else's trouble
            continue
        alike = all(facts.get(key) == own[key] for key in ("data", "machine", "versions"))
        finished = facts.get("status") == FINISHED
        if alike and finished and facts.get("training_hash") in wanted:
            _log.info("taking over the training in %s", sibling)
            return RunFolder(sibling)
    return None


def _taken_over(folder: RunFolder, origin: RunFolder | None) -> Checkpoints | None:
    """The origin's checkpoints; its seconds count as this run's, for they were spent."""
    if origin is None:
        return None
    if "training_seconds" not in folder.manifest():
        folder.update({"training_seconds": origin.manifest().get("training_seconds", 0.0)})
    return Checkpoints(origin.training)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
