"""From a spec to a finished run folder: data, partition, training, certificates, in this order.

Each step writes its result before the next begins, and a step that finds its result does not
repeat it. The same call therefore starts a run, resumes an interrupted one, and returns a finished
one as it is.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from certifl.certification.network import choose_device, prepare
from certifl.certification.quantization import Calibration
from certifl.data import Partition, named_folder, to_float
from certifl.errors import (
    CertiflError,
    InputError,
    StoreError,
    StoreMismatch,
    WorkError,
)
from certifl.experiments.explore import explore
from certifl.federated.algorithms.personalized import Personalized
from certifl.federated.rounds import Progress
from certifl.federated.states import ClientData
from certifl.federated.trainer import train
from certifl.models import state_of
from certifl.progress import StageCallback
from certifl.runs.atomic import save_tensors, write_json
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import FINISHED, RUNNING, RunFolder
from certifl.runs.published import is_published
from certifl.spec import Spec
from certifl.study.certify import certify_clients, run_arithmetic
from certifl.study.environment import (
    machine_metadata,
    now,
    release_memory,
    threads_of_workers,
    training_threads,
    versions,
)
from certifl.study.opened_run import DATA_DIR, OpenRun
from certifl.study.privacy import spent
from certifl.study.setup import (
    by_client,
    check_training,
    code_folder,
    initial_model,
    local_training,
    open_data,
    participation,
    protection,
    study_metadata,
    training_key,
)
from certifl.tracking import check_trackers
from certifl.tracking.run_tracker import Update, track_finished, tracked

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Where and how a study is computed; nothing here changes what it is.

    Attributes:
        out: the run folder.
        data_dir: folder of data sets. device: "auto", a torch device, or several of one kind,
            "cuda:0,cuda:1": training takes the first, certification all, a process each.
        overwrite: replace a run that lies in `out`.
        siblings: run folders whose finished training may be taken over instead of repeated.
        report: called with progress. command: how the run was started, for the record.
        track: names of experiment trackers that follow the run.
        workers: processes that train clients beside this one, one thread each; 0 = none. Networks
            of a million weights and more then round as on one thread.
        answer_within: seconds after which a client is left out of a round; needs workers.
        explore: deform test images for readers of the report; `certifl explore` does so later.
    """

    out: Path
    data_dir: Path | None = None
    device: str = "auto"
    overwrite: bool = False
    siblings: tuple[Path, ...] = ()
    report: StageCallback | None = None
    command: str = ""
    track: tuple[str, ...] = ()
    workers: int = 0
    answer_within: float | None = None
    explore: bool = True


def run(spec: Spec, options: Options) -> RunFolder:
    """Train, deploy and certify as the spec says; resumes where an earlier call was stopped.

    Raises:
        RequestError: the spec does not fit the data, the folder holds something else, or a
            tracker is not installed.
        TooFewClients, TrainingDiverged: training cannot continue; finished rounds are saved.
        StoreError: the folder cannot be written; its files stay whole.
    """
    return compute(spec, options).folder


def compute(spec: Spec, options: Options) -> OpenRun:
    """As `run`; the run is returned with what was computed, so that it need not be read again."""
    opened = OpenRun(options.out)
    opened.folder.check(spec.hash(), options.overwrite, spec.to_toml())
    check_trackers(options.track)
    if not options.overwrite and opened.complete():
        track_finished(options.track, opened)
        return opened
    opened = OpenRun(options.out)  # what was read of an unfinished run is about to change
    opened.spec = spec
    device = _prepare(opened, options)
    with opened.folder.locked():
        opened.folder.begin(spec.to_toml(), spec.hash(), options.overwrite)
        _describe(opened, options)
        with tracked(options.track, opened) as update:
            with training_threads(opened.architecture):
                opened.last_round = _train(opened, options, device, update)
            release_memory()  # training is over: certification may need all there is
            update()
            if len(devices := device_names(options.device)) > 1:
                run_arithmetic(opened, device)
                cast_votes(opened, options.data_dir, devices, options.report)
            certify_clients(opened, device, options.report)
            update()
        if options.explore:
            explore(opened, device, options.report)
        opened.manifest = opened.folder.update({"status": FINISHED, "finished": now()})
    return opened


def check(spec: Spec, options: Options) -> None:
    """Refuse, with nothing written, a study that does not fit its data, network or device.

    Raises:
        RequestError: it does not.
    """
    opened = OpenRun(options.out)
    opened.spec = spec
    _prepare(opened, options)


def _prepare(run: OpenRun, options: Options) -> str:
    """Load the data, build the network, and find whatever the request can be refused for.

    Nothing is written yet. Returns the device.
    """
    if options.answer_within is not None and not options.workers:
        raise InputError(
            "--answer-within needs --workers: a client that is trained in this very process "
            "cannot be left out."
        )
    spec, device = run.spec, choose_device(device_names(options.device)[0])
    run.dataset, run.partition = dataset, partition = open_data(spec, options.data_dir)
    run.architecture = model = initial_model(spec, dataset)
    calibration = None  # a model that could not vote is refused before it is trained
    if spec.certification.precision == "int8":
        images = to_float(dataset.train.images[:4])
        calibration = Calibration.of(images, spec.perturbation(), spec.seed)
    probe = to_float(dataset.test.images[:1])
    prepare(model, probe, device, spec.certification.precision, calibration=calibration)
    protection(spec, model, sizes := _sizes(partition), b"not the key")
    shape = (dataset.in_channels, *dataset.image_size)
    check_training(spec, model, dict(enumerate(sizes)), shape)
    return str(device)


def _describe(run: OpenRun, options: Options) -> None:
    """Write the manifest and the partition of a run that begins or is resumed."""
    spec, dataset, partition = run.spec, run.dataset, run.partition
    before = run.folder.manifest()
    if before.get("data", {}).get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise StoreMismatch(
            f"{run.path} was begun with other images: the data set {dataset.name!r} has "
            "changed. Restore the original data, or choose another folder with --out."
        )
    data_dir = named_folder(options.data_dir)
    run.folder.update(
        {
            **study_metadata(spec),
            **({} if data_dir is None else {DATA_DIR: str(data_dir.resolve())}),
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
                **machine_metadata(device_names(options.device)[0]),
                **threads_of_workers(run.architecture, options.workers),
            },
            "versions": versions(),
            "command": before.get("command") or options.command,
            "created": before.get("created") or now(),
            **({"client_names": list(partition.names)} if partition.names else {}),
        }
    )
    write_json(run.folder.partition, partition.to_manifest())
    if spec.model.weights is not None and not run.folder.initial.is_file():
        save_tensors(run.folder.initial, state_of(run.architecture))


def _train(run: OpenRun, options: Options, device: str, update: Update) -> StoredRound:
    """Run the rounds that are missing, from a sibling's finished training where one fits."""
    started = time.perf_counter()
    folder, spec, dataset, model = run.folder, run.spec, run.dataset, run.architecture
    parts = [dataset.train.take(client.train) for client in run.partition.clients]
    data = [ClientData(client, part.images, part.labels) for client, part in enumerate(parts)]
    private = protection(spec, model, _sizes(run.partition), training_key(spec, folder.path))
    origin = _sibling_training(run, options.siblings)
    if origin is not None and "training_seconds" not in folder.manifest():
        # They count as this run's, for they were spent.
        folder.update({"training_seconds": origin.manifest().get("training_seconds", 0.0)})
    last = train(
        run.algorithm,
        model,
        data,
        local_training(spec, model, device, private),
        Checkpoints(folder.training),
        progress=_rounds(run, options.report, update),
        participation=participation(spec),
        ledger=private.ledger,
        start_from=None if origin is None else Checkpoints(origin.training),
        rule=private.client or spec.aggregation.build(),
        min_clients=spec.clients.min_clients,
        workers=options.workers,
        answer_within=options.answer_within,
    )
    run.history = [by_client(entry) for entry in last.history]
    folder.write_history(run.history)
    seconds = folder.manifest().get("training_seconds", 0.0) + time.perf_counter() - started
    spending = spent(spec, private, last.history)
    folder.update(
        {"training_seconds": round(seconds, 3), **({"privacy": spending} if spending else {})}
    )
    return last


def _sizes(partition: Partition) -> list[int]:
    return [len(client.train) for client in partition.clients]


def _rounds(
    run: OpenRun, report: StageCallback | None, update: Update
) -> Callable[[Progress], None]:
    scheduled, each = run.spec.training.rounds, run.spec.clients.participants
    extra = run.algorithm.extra_rounds * run.spec.clients.count

    def on_client(progress: Progress) -> None:
        if progress.done == 1:  # every round before this one is committed
            update()
        if report is None:
            return
        participants = progress.participants
        before = min(progress.round, scheduled) * each
        before += max(0, progress.round - scheduled) * participants
        total = scheduled * each + extra  # with private clients, participation is random
        report("training", min(before + progress.done, total), total, "client rounds")

    return on_client


def shares_training(spec: Spec) -> bool:
    """Whether a training may be taken over by another run, or taken from one.

    A user's network is always trained: its code may have changed under the same name. So is a run
    whose noise has a secret key: each has its own.
    """
    return ":" not in spec.model.name and spec.privacy.noise_key != "secret"


def _sibling_training(run: OpenRun, siblings: tuple[Path, ...]) -> RunFolder | None:
    """A finished training that this one continues: the same, or the base it personalizes.

    It must have the same images, versions, processor and device: its bits are then those that
    this run would compute.
    """
    spec = run.spec
    if not shares_training(spec):
        return None
    own, hashes = run.folder.manifest(), {spec.training_hash()}
    if isinstance(run.algorithm, Personalized):
        hashes.add(spec.training_hash(of_base=True))
    for sibling in siblings:
        try:
            other = RunFolder(sibling).manifest()
        except StoreError:  # a damaged sibling does not stop the run
            continue
        if is_published(other):  # its rounds are elsewhere
            continue
        alike = all(other.get(key) == own[key] for key in ("data", "machine", "versions"))
        finished = other.get("status") == FINISHED
        if alike and finished and other.get("training_hash") in hashes:
            _log.info("taking over the training in %s", sibling)
            return RunFolder(sibling)
    return None


# Certification shared over several devices of one machine, a process each.
#
# Votes do not depend on where the work is cut, so a process takes every k-th client, casts its
# votes and saves them as a single process would. The run then concludes from the saved votes.


def device_names(text: str) -> tuple[str, ...]:
    """Devices named in one option, "cuda:0,cuda:1"; all must be of one kind.

    Raises:
        InputError: no device, one that is not here, or devices of different kinds, whose votes
            would be votes of differently rounding networks.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError("device is empty; give auto, cpu, cuda, or several as cuda:0,cuda:1.")
    devices = [choose_device(name) for name in names]
    kinds = {torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices}
    if len(kinds) > 1:
        raise InputError(
            f"The devices {text} are of different kinds ({', '.join(sorted(kinds))}); the clients "
            "of one study are certified on one kind."
        )
    return names


def cast_votes(
    run: OpenRun, data_dir: Path | None, devices: Sequence[str], report: StageCallback | None
) -> None:
    """Cast and save the votes of all clients of a trained run, one process per device.

    Raises:
        WorkError: a process failed; the votes saved so far remain.
    """
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    messages: Any = context.Queue()
    folder = code_folder(run.spec.model.name)
    code = None if folder is None else Path(folder)
    processes = [
        context.Process(
            target=_cast,
            args=(messages, run.path, data_dir, code, device, (number, len(devices)), threads),
        )
        for number, device in enumerate(devices)
    ]
    for process in processes:
        process.start()
    try:
        _listen(processes, messages, report)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    if any(process.exitcode for process in processes):
        raise WorkError(
            "A process that cast votes ended early. The votes saved so far remain; repeat the "
            "command, with fewer devices if memory ran out."
        )


def _listen(processes: Sequence[BaseProcess], messages: Any, report: StageCallback | None) -> None:
    """Pass progress on until all processes have ended, or one has failed."""
    progress: dict[int, tuple[int, int]] = {}
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        with contextlib.suppress(queue.Empty):
            number, done, total, failure = messages.get(timeout=0.2)
            if failure:
                raise WorkError(failure)
            progress[number] = (done, total)
            if report is not None and len(progress) == len(processes):
                sums = [sum(part) for part in zip(*progress.values(), strict=True)]
                report("certifying", sums[0], sums[1], "votes at most")


def _cast(
    messages: Any,
    path: Path,
    data_dir: Path | None,
    code: Path | None,
    device: str,
    share: tuple[int, int],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    messages.put((share[0], 0, 0, ""))  # clients that certify nothing report no more

    def send(_what: str, done: int, total: int, _unit: str) -> None:
        messages.put((share[0], done, total, ""))

    try:
        certify_clients(OpenRun(path, data_dir, code), device, send, share)
    except CertiflError as error:
        messages.put((share[0], 0, 0, str(error)))
        raise SystemExit(1) from error
