"""A whole study with remote clients: rounds, certificates, one run folder.

The run folder is that of a study on one machine: the same spec, checkpoints and history. The
server can be stopped at any moment, and the same call resumes from the last committed round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from certifl.deploy.flower import configure_flower, opened_run, return_freed_memory
from certifl.deploy.messages import GridTransport
from certifl.deploy.server.collect import collect_certificates
from certifl.deploy.server.process import KeyFolder, local_endpoint
from certifl.deploy.server.remote_runner import ClientRegistry, RemoteData, RemoteRunner
from certifl.deploy.server.start import (
    Options,
    Reference,
    assemble,
    check_clients,
    check_start,
    new_registry,
    record,
)
from certifl.federated.algorithms.base import needed_by_clients
from certifl.federated.local_training import LocalTraining
from certifl.federated.privacy import ExampleLedger
from certifl.federated.rounds import Progress
from certifl.federated.trainer import train
from certifl.progress import StageCallback
from certifl.runs.atomic import private_files
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import FINISHED, RUNNING, RunFolder
from certifl.spec import Spec
from certifl.study.environment import machine_metadata, now, versions
from certifl.study.privacy import spent
from certifl.study.setup import (
    Protection,
    by_client,
    local_training,
    participation,
    protection,
    study_metadata,
    training_key,
)

_log = logging.getLogger(__name__)


def coordinate(spec: Spec, transport: GridTransport, options: Options) -> RunFolder:
    """Train and certify with remote clients; resumes where an earlier call was stopped.

    Raises:
        RequestError: the folder holds something else, or clients do not match.
        StoreError: it cannot be written.
        TooFewClients, TrainingDiverged: training cannot continue; finished rounds are saved.
        WorkError: too few clients joined, or one did not certify; the same command resumes.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite, spec.to_toml())
    if not options.overwrite and folder.complete():
        return folder
    check_start(spec, options)
    with private_files(), folder.locked():
        folder.begin(spec.to_toml(), spec.hash(), options.overwrite)
        deployment = folder.manifest().get("deployment", {})
        id = deployment.get("id") or uuid.uuid4().hex
        record(folder, {"id": id})
        train, tests = (
            {int(client): images for client, images in deployment.get(name, {}).items()}
            for name in ("train_images", "test_images")
        )
        reference = Reference(deployment.get("facts"), spec, train, tests)
        registry = new_registry(spec, transport, options, id, reference)
        assemble(registry, reference, options)
        assert reference.model is not None
        assert reference.properties is not None
        _record_images(folder, reference)
        _describe(folder, spec, reference, options)
        last = _train(folder, spec, reference, registry, options)
        collect_certificates(folder, spec, registry, last, options, reference.tests)
        _record_images(folder, reference)
        folder.update({"status": FINISHED, "finished": now()})
    return folder


def _record_images(folder: RunFolder, reference: Reference) -> None:
    """Store how many images clients have, so that they are held to it after a resume."""
    named = {"train_images": reference.train, "test_images": reference.tests}
    record(folder, {k: {str(c): n for c, n in images.items()} for k, images in named.items()})


def _describe(folder: RunFolder, spec: Spec, reference: Reference, options: Options) -> None:
    manifest, properties = folder.manifest(), reference.properties or {}
    folder.update(
        {
            **study_metadata(spec),
            "status": RUNNING,
            "deployment": {**manifest["deployment"], "facts": properties, "share": options.share},
            "data": {
                "name": properties.get("name", spec.data.name),
                "fingerprint": properties.get("fingerprint", "known to the clients alone"),
                "in_channels": properties["in_channels"],
                "image_size": properties["image_size"],
                "num_classes": len(properties["class_names"]),
                "class_names": properties["class_names"],
                "train_images": sum(reference.train.values()),
                "test_images": manifest.get("data", {}).get("test_images", 0),
            },
            "machine": machine_metadata("cpu"),
            "versions": versions(),
            "command": manifest.get("command") or options.command,
            "created": manifest.get("created") or now(),
        }
    )


def _train(
    folder: RunFolder,
    spec: Spec,
    reference: Reference,
    registry: ClientRegistry,
    options: Options,
) -> StoredRound:
    started, model, algorithm = time.perf_counter(), reference.model, spec.build_algorithm()
    assert model is not None
    # 1 where a client never joined
    sizes = [max(1, reference.train.get(client, 1)) for client in range(spec.clients.count)]
    private: Protection = protection(spec, model, sizes, training_key(spec, folder.path))
    # Nothing is trained here: on "meta" it takes no memory, and describes what is trained.
    training: LocalTraining = local_training(spec, model, "meta", private)

    def begins() -> None:
        reference.release()
        _record_images(folder, reference)

    last = train(
        algorithm,
        model,
        RemoteData(spec.clients.count),
        training,
        Checkpoints(folder.training),
        progress=_rounds(spec, options.report),
        participation=participation(spec),
        rule=private.client or spec.aggregation.build(),
        min_clients=spec.clients.min_clients,
        ledger=private.ledger,
        runner=RemoteRunner(
            registry,
            options.timeouts,
            needed=functools.partial(needed_by_clients, algorithm),
            begins=begins,
            sends=lambda round: algorithm.sends(round, spec.training.rounds),
            steps=private.ledger.steps
            if isinstance(private.ledger, ExampleLedger)
            else lambda _client, _round: 0,
            extra={name: model.state_dict()[name].to("meta") for name in training.trainable},
        ),
    )
    folder.write_history([by_client(entry) for entry in last.history])
    seconds = folder.manifest().get("training_seconds", 0.0) + time.perf_counter() - started
    properties: dict[str, Any] = {"training_seconds": round(seconds, 3)}
    if private.ledger is not None:
        properties["privacy"] = spent(spec, private, last.history)
    folder.update(properties)
    return last


def _rounds(spec: Spec, report: StageCallback | None) -> Callable[[Progress], None]:
    scheduled, each = spec.training.rounds, spec.clients.participants
    extra = spec.build_algorithm().extra_rounds * spec.clients.count

    def progress(at: Progress) -> None:
        if report is not None:
            late = max(0, at.round - scheduled)
            before = min(at.round, scheduled) * each + late * at.participants
            report("training", before + at.done, scheduled * each + extra, "client rounds")

    return progress


def run_study(spec: Spec, server_folder: Path, options: Options) -> RunFolder:
    """Run a study with the clients of a running server, whose folder has their keys.

    Raises:
        RequestError: the study or a folder does not fit.
        WorkError: the server does not answer, or the study failed; the same call resumes.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite, spec.to_toml())
    if not options.overwrite and folder.complete():
        return folder
    name = hashlib.sha256(str(options.out.resolve()).encode()).hexdigest()[:16]
    with _open_transport(server_folder, f"run-{name}.txt") as transport:
        return coordinate(
            spec, transport, dataclasses.replace(options, keys=KeyFolder(server_folder))
        )


def check_study(spec: Spec, server_folder: Path, options: Options) -> str | None:
    """List which clients of a running server would take part in a study; train nothing.

    `options.log` gets the list; returns why the study would not start, None where it would. Raises
    as `run_study`.
    """
    with _open_transport(server_folder, "check.txt") as transport:
        return check_clients(
            spec, transport, dataclasses.replace(options, keys=KeyFolder(server_folder))
        )


@contextlib.contextmanager
def _open_transport(server_folder: Path, notes: str) -> Iterator[GridTransport]:
    """The transport to the clients of a running server."""
    endpoint = local_endpoint(server_folder)
    configure_flower(server_folder / "flower")
    return_freed_memory()
    with private_files(), opened_run(endpoint, server_folder / "flower" / notes) as grid:
        yield GridTransport(grid)
