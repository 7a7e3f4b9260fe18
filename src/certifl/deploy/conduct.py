"""A whole study with its clients elsewhere: rounds, certificates, one run folder.

The run folder is the one of a study in one place: the same spec, checkpoints and history. So the
server can be stopped at any moment, and the same call goes on from the last committed round.
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from certifl.deploy.crowd import Crowd
from certifl.deploy.gathering import Asked, gather
from certifl.deploy.line import Line
from certifl.deploy.remote import Away, Patience, Remote
from certifl.deploy.settings import check_share
from certifl.errors import WorkError
from certifl.federated import LocalTraining, train
from certifl.federated.base import needed_by_clients
from certifl.federated.engine import Progress
from certifl.federated.faults import needed
from certifl.models import build, fingerprint
from certifl.spec import Spec
from certifl.store.checkpoints import Checkpoints, StoredRound
from certifl.store.runs import FINISHED, RUNNING, RunFolder
from certifl.work.machine import machine_facts, versions
from certifl.work.parts import study_facts
from certifl.work.private import Protection, protection, spent, training_key
from certifl.work.training import by_client, local_training, participation

__all__ = ["Options", "conduct"]

_log = logging.getLogger(__name__)
_SHAPES = ("in_channels", "image_size", "class_names")

Report = Callable[[str, int, int, str], None]
"""Called with (what is under way, done, all, unit)."""


@dataclass(frozen=True)
class Options:
    """How a federation is conducted; nothing here changes what is trained.

    Attributes:
        out: the run folder. overwrite: replace a run that is there.
        share: the most that clients are asked for, a name in `settings.SHARES`.
        own_perturbation: clients may certify a perturbation of their own.
        patience: how long is waited. piece: seconds of certification per order.
        keys: public keys by client; a node must then have its client's key.
        report: told about progress. command: how the run was started, for the record.

    Raises:
        InputError: share is no such name.
    """

    out: Path
    overwrite: bool = False
    share: str = "curve"
    own_perturbation: bool = False
    patience: Patience = field(default_factory=Patience)
    piece: float = 60.0
    keys: Mapping[int, bytes] = field(default_factory=dict)
    report: Report | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_share(self.share)  # here, not after days of training


@dataclass
class _Reference:
    """What all clients must agree on: the first one's word, or what the run folder knows."""

    facts: dict[str, Any] | None
    clients: int
    spec: Spec
    model: nn.Module | None = None
    named: str = ""

    def build(self, facts: Mapping[str, Any]) -> None:
        """The initial network, once."""
        if self.model is None:
            self.model = _built(self.spec, facts)
            self.named = fingerprint(self.model)

    def release(self) -> None:
        """Let go of the initial weights: the first round is stored, and has its own."""
        if self.model is not None:
            self.model.to("meta")

    def problem(self, told: Mapping[str, Any]) -> str | None:
        """Why a client's facts do not fit, or None."""
        if not 0 <= int(told["client"]) < self.clients:
            return f"the study has {self.clients} clients, counted from 0"
        try:
            shapes = {name: told[name] for name in _SHAPES}
            dealt = {name: told[name] for name in ("name", "fingerprint") if name in told}
            facts, model = {**shapes, **dealt}, str(told["initial_model"])
            self.build(facts if self.facts is None else self.facts)
        except (KeyError, TypeError, ValueError) as error:
            return f"what it says of its images cannot be used ({type(error).__name__})"
        for name in facts if self.facts is None else self.facts:
            if self.facts is not None and facts.get(name) != self.facts[name]:
                return f"its {name} is {facts.get(name)!r}, others have {self.facts[name]!r}"
        if model != self.named:
            return (
                "its initial network differs from the server's: it must have the same code and "
                "the same version of torch"
            )
        self.facts = facts
        return None


def _built(spec: Spec, facts: Mapping[str, Any]) -> nn.Module:
    height, width = facts["image_size"]
    classes = len(facts["class_names"])
    return build(
        spec.model.name,
        int(facts["in_channels"]),
        classes,
        spec.seed,
        spec.model.options,
        (int(height), int(width)),
    ).eval()


def conduct(spec: Spec, line: Line, options: Options) -> RunFolder:
    """Train and certify with clients elsewhere; goes on where an earlier call was stopped.

    Raises:
        RequestError: the folder holds something else. StoreError: it cannot be written.
        TooFewClients, TrainingDiverged: training cannot go on; finished rounds are kept.
        WorkError: too few clients came, or one did not certify; the same command goes on.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite, spec.to_toml())
    if not options.overwrite and folder.complete():
        return folder
    with folder.locked():
        folder.begin(spec.to_toml(), spec.hash(), options.overwrite)
        known = folder.manifest()
        id = known.get("deployment", {}).get("id") or uuid.uuid4().hex
        folder.update({"deployment": {**known.get("deployment", {}), "id": id}})
        reference = _Reference(known.get("deployment", {}).get("facts"), spec.clients.count, spec)
        crowd = _assembled(spec, line, options, id, reference)
        assert reference.model is not None
        assert reference.facts is not None
        sizes = _sizes(folder, crowd, spec)
        _describe(folder, spec, reference, options)
        last = _train(folder, spec, reference, crowd, sizes, options)
        asked = Asked(options.share, options.piece, options.patience, options.report)
        gather(folder, spec, crowd, last, asked)
        folder.update({"status": FINISHED, "finished": _now()})
    return folder


def _assembled(spec: Spec, line: Line, options: Options, id: str, reference: _Reference) -> Crowd:
    """The clients that have come; enough for a round."""
    study = {
        "id": id,
        "spec": spec.to_toml(),
        "hash": spec.hash(),
        "own_perturbation": options.own_perturbation,
    }
    crowd = Crowd(line, study, reference.problem, options.keys)
    everyone = set(range(spec.clients.count))
    missing = crowd.wait_for(everyone, options.patience.start)
    enough = needed(spec.clients.participants, spec.clients.min_clients)
    if spec.privacy.kind == "example":
        enough = len(everyone)  # how much noise each adds follows from what it tells
    if len(everyone - missing) < enough:
        raise WorkError(
            f"Too few clients came within {options.patience.start:g} seconds: "
            f"{len(everyone - missing)} of {len(everyone)}, and at least {enough} are needed. "
            f"{_absent(crowd, missing)}. Start them with `certifl deploy client`, then repeat the "
            "command."
        )
    return crowd


def _absent(crowd: Crowd, missing: set[int]) -> str:
    told = []
    for client in sorted(missing | (crowd.refused.keys() - crowd.members.keys())):
        why = crowd.refused.get(client)
        who = f"client {client}" if client >= 0 else "a node"
        told.append(f"{who} is not there" if why is None else f"{who} was not taken, {why}")
    return "; ".join(told)


def _sizes(folder: RunFolder, crowd: Crowd, spec: Spec) -> list[int]:
    """Training images of every client as told when it first came; 1 where it never has."""
    known = dict(folder.manifest()["deployment"].get("train_images", {}))
    for client, member in crowd.members.items():
        known.setdefault(str(client), int(member.facts.get("train_images", 1)))
    folder.update({"deployment": {**folder.manifest()["deployment"], "train_images": known}})
    return [max(1, known.get(str(client), 1)) for client in range(spec.clients.count)]


def _describe(folder: RunFolder, spec: Spec, reference: _Reference, options: Options) -> None:
    known, facts = folder.manifest(), reference.facts or {}
    sizes = known["deployment"]["train_images"]
    folder.update(
        {
            **study_facts(spec),
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
            "machine": machine_facts("cpu"),
            "versions": versions(),
            "command": known.get("command") or options.command,
            "created": known.get("created") or _now(),
        }
    )


def _train(
    folder: RunFolder,
    spec: Spec,
    reference: _Reference,
    crowd: Crowd,
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
        ),
    )
    folder.write_history([by_client(entry) for entry in last.history])
    seconds = folder.manifest().get("training_seconds", 0.0) + time.perf_counter() - started
    facts: dict[str, Any] = {"training_seconds": round(seconds, 3)}
    if private.ledger is not None:
        facts["privacy"] = spent(spec, private, last.history)
    folder.update(facts)
    return last


def _rounds(spec: Spec, report: Report | None) -> Callable[[Progress], None]:
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
