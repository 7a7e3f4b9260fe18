"""A whole study with its clients elsewhere: rounds, certificates, one run folder.

The run folder is the one of a study in one place: the same spec, checkpoints and history. So the
server can be stopped at any moment, and the same call goes on from the last committed round.
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from certifl.deploy.server.clients import ClientRegistry
from certifl.deploy.server.collect import Asked, gather
from certifl.deploy.server.remote_runner import Away, Remote
from certifl.deploy.server.start import (
    Options,
    Reference,
    assemble,
    check_start,
    crowd_of,
    known_sizes,
)
from certifl.deploy.transport.flower_processes import private_files
from certifl.deploy.transport.transport import Transport
from certifl.federated.algorithms.base import needed_by_clients
from certifl.federated.privacy import ExampleLedger
from certifl.federated.rounds import Progress
from certifl.federated.trainer import train
from certifl.federated.training.local_training import LocalTraining
from certifl.progress import StageCallback
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import FINISHED, RUNNING, RunFolder
from certifl.spec import Spec
from certifl.study.environment import machine_metadata, versions
from certifl.study.opened_run import study_metadata
from certifl.study.privacy import Protection, protection, spent, training_key
from certifl.study.setup import by_client, local_training, participation

_log = logging.getLogger(__name__)
_FINE_TUNING = 1000
"""An extra round may have so many times the steps of one of the schedule."""


def conduct(spec: Spec, line: Transport, options: Options) -> RunFolder:
    """Train and certify with clients elsewhere; goes on where an earlier call was stopped.

    Raises:
        RequestError: the folder holds something else, or clients do not match.
        StoreError: it cannot be written.
        TooFewClients, TrainingDiverged: training cannot go on; finished rounds are kept.
        WorkError: too few clients came, or one did not certify; the same command goes on.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite, spec.to_toml())
    if not options.overwrite and folder.complete():
        return folder
    check_start(spec, options)
    with private_files(), folder.locked():
        folder.begin(spec.to_toml(), spec.hash(), options.overwrite)
        known = folder.manifest().get("deployment", {})
        id = known.get("id") or uuid.uuid4().hex
        folder.update({"deployment": {**known, "id": id}})
        reference = Reference(known.get("facts"), spec, known_sizes(known))
        crowd = crowd_of(spec, line, options, id, reference)
        assemble(crowd, reference, options)
        assert reference.model is not None
        assert reference.facts is not None
        sizes = _sizes(folder, crowd, spec, reference)
        _describe(folder, spec, reference, options)
        last = _train(folder, spec, reference, crowd, sizes, options)
        asked = Asked(options.share, options.piece, options.patience, options.report)
        gather(folder, spec, crowd, last, asked)
        folder.update({"status": FINISHED, "finished": _now()})
    return folder


def _sizes(
    folder: RunFolder, crowd: ClientRegistry, spec: Spec, reference: Reference
) -> list[int]:
    """Training images of every client as it said when it first came; 1 where it never has."""
    known, deployment = reference.sizes, folder.manifest()["deployment"]
    tests = dict(deployment.get("test_images", {}))
    for client, member in crowd.members.items():
        known.setdefault(client, member.joined.train_images)
        if member.joined.test_images is not None:
            tests.setdefault(str(client), member.joined.test_images)
    stored = {"train_images": {str(c): size for c, size in known.items()}, "test_images": tests}
    folder.update({"deployment": {**deployment, **stored}})
    return [max(1, known.get(client, 1)) for client in range(spec.clients.count)]


def _describe(folder: RunFolder, spec: Spec, reference: Reference, options: Options) -> None:
    known, facts = folder.manifest(), reference.facts or {}
    sizes = known["deployment"]["train_images"]
    folder.update(
        {
            **study_metadata(spec),
            "status": RUNNING,
            "deployment": {**known["deployment"], "facts": facts, "share": options.share},
            "data": {
                "name": facts.get("name", spec.data.name),
                "fingerprint": facts.get("fingerprint", "known to the clients alone"),
                "in_channels": facts["in_channels"],
                "image_size": facts["image_size"],
                "num_classes": len(facts["class_names"]),
                "class_names": facts["class_names"],
                "train_images": sum(sizes.values()),
                "test_images": known.get("data", {}).get("test_images", 0),
            },
            "machine": machine_metadata("cpu"),
            "versions": versions(),
            "command": known.get("command") or options.command,
            "created": known.get("created") or _now(),
        }
    )


def _train(
    folder: RunFolder,
    spec: Spec,
    reference: Reference,
    crowd: ClientRegistry,
    sizes: list[int],
    options: Options,
) -> StoredRound:
    started, model, algorithm = time.perf_counter(), reference.model, spec.build_algorithm()
    assert model is not None
    private: Protection = protection(spec, model, sizes, training_key(spec, folder.path))
    # Nothing is trained here: without a device it takes no memory, and says what is trained.
    training: LocalTraining = local_training(spec, model, "meta", private)
    last = train(
        algorithm,
        model,
        Away(spec.clients.count),
        training,
        Checkpoints(folder.training),
        progress=_rounds(spec, options.report),
        participation=participation(spec, spec.clients.count),
        rule=private.client or spec.aggregation.build(),
        min_clients=spec.clients.min_clients,
        ledger=private.ledger,
        runner=Remote(
            crowd,
            options.patience,
            needed=functools.partial(needed_by_clients, algorithm),
            begins=reference.release,
            sends=lambda round: algorithm.sends(round, spec.training.rounds),
            steps=functools.partial(_most_steps, private.ledger),
            extra={name: model.state_dict()[name].to("meta") for name in training.trainable},
        ),
    )
    folder.write_history([by_client(entry) for entry in last.history])
    seconds = folder.manifest().get("training_seconds", 0.0) + time.perf_counter() - started
    facts: dict[str, Any] = {"training_seconds": round(seconds, 3)}
    if private.ledger is not None:
        facts["privacy"] = spent(spec, private, last.history)
    folder.update(facts)
    return last


def _most_steps(ledger: object, client: int, round: int) -> int:
    """The most private steps that a client's answer to a round can have taken."""
    if not isinstance(ledger, ExampleLedger):
        return 0
    planned = ledger.planned[client]
    return planned if round < ledger.rounds else _FINE_TUNING * max(1, planned)


def _rounds(spec: Spec, report: StageCallback | None) -> Callable[[Progress], None]:
    scheduled, each = spec.training.rounds, spec.clients.participants
    extra = spec.build_algorithm().extra_rounds * spec.clients.count

    def told(now: Progress) -> None:
        if report is not None:
            late = max(0, now.round - scheduled)
            before = min(now.round, scheduled) * each + late * now.participants
            report("training", before + now.done, scheduled * each + extra, "client rounds")

    return told


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
