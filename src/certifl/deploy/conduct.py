"""A whole study with its clients elsewhere: rounds, certificates, one run folder.

The run folder is the one of a study in one place: the same spec, checkpoints and history. So the
server can be stopped at any moment, and the same call goes on from the last committed round.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from certifl.deploy.crowd import UNKNOWN, Crowd
from certifl.deploy.gathering import Asked, gather
from certifl.deploy.line import Line
from certifl.deploy.matching import agreed, difference, lines, properties
from certifl.deploy.remote import Away, Patience, Remote
from certifl.deploy.running import private_files
from certifl.deploy.schemas import Joined
from certifl.deploy.settings import check_share
from certifl.errors import CertiflError, InputError, RequestError, WorkError, one_line
from certifl.federated import LocalTraining, train
from certifl.federated.base import needed_by_clients, sent_by_clients
from certifl.federated.engine import Progress
from certifl.federated.faults import needed
from certifl.federated.privacy import ExampleLedger
from certifl.models import build, fingerprint
from certifl.spec import Spec
from certifl.store.checkpoints import Checkpoints, StoredRound
from certifl.store.runs import FINISHED, RUNNING, RunFolder
from certifl.work.machine import machine_facts, versions
from certifl.work.parts import study_facts
from certifl.work.private import Protection, protection, spent, training_key
from certifl.work.training import by_client, local_training, participation

__all__ = ["Options", "conduct", "survey"]

_log = logging.getLogger(__name__)
_FINE_TUNING = 1000
"""An extra round may have so many times the steps of one of the schedule."""

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
        min_clients: so many clients are enough to start with; None = all of them. Once the study
            has begun, `clients.min_clients` of the spec alone says how many a round needs.
        report: told about progress. told: called with lines about who is there.
        command: how the run was started, for the record.

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
    min_clients: int | None = None
    told: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        check_share(self.share)  # here, not after days of training


@dataclass
class _Reference:
    """What all clients must agree on: what most of them have, or what the run folder knows.

    Attributes:
        facts: the properties; None until they are agreed. spec: of the study.
        sizes: training images by client, as they said when they first came.
        model: the initial network. named: its fingerprint.
    """

    facts: dict[str, Any] | None
    spec: Spec
    sizes: dict[int, int] = field(default_factory=dict)
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

    def problem(self, told: Joined) -> str | None:
        """Why a client does not fit; None where it does, or nothing is agreed yet."""
        if told.client >= self.spec.clients.count:
            return f"the study has {self.spec.clients.count} clients, counted from 0"
        before = self.sizes.get(told.client, told.train_images)
        if before != told.train_images:
            return (
                f"it has {told.train_images} training images, and had {before} when it first "
                "came: they stay the same within a study"
            )
        if self.facts is None:
            return None
        differs = difference(properties(told), self.facts)
        if differs is not None:
            return differs
        self.build(self.facts)
        if told.initial_model != self.named:
            return (
                "its initial network differs from the server's: it must have the same code and "
                "the same version of torch"
            )
        return None


def _built(spec: Spec, facts: Mapping[str, Any]) -> nn.Module:
    height, width = facts["image_size"]
    channels, classes = int(facts["in_channels"]), len(facts["class_names"])
    try:
        return build(
            spec.model.name,
            channels,
            classes,
            spec.seed,
            spec.model.options,
            (int(height), int(width)),
        ).eval()
    except (MemoryError, OverflowError, RuntimeError) as error:
        raise InputError(
            f"The network {spec.model.name!r} cannot be built for {channels} channels, "
            f"{height} x {width} pixels and {classes} classes, which is what most clients have: "
            f"{one_line(error)}. See to their images, or choose another network."
        ) from error


def conduct(spec: Spec, line: Line, options: Options) -> RunFolder:
    """Train and certify with clients elsewhere; goes on where an earlier call was stopped.

    Raises:
        RequestError: the folder holds something else, or clients do not match.
        StoreError: it cannot be written.
        TooFewClients, TrainingDiverged: training cannot go on; finished rounds are kept.
        WorkError: too few clients came, or one did not certify; the same command goes on.
    """
    folder = RunFolder(options.out)
    folder.check(spec.hash(), options.overwrite)
    if not options.overwrite and folder.complete():
        return folder
    _check_start(spec, options)
    with private_files(), folder.locked():
        folder.begin(spec.to_toml(), spec.hash(), options.overwrite)
        known = folder.manifest().get("deployment", {})
        id = known.get("id") or uuid.uuid4().hex
        folder.update({"deployment": {**known, "id": id}})
        reference = _Reference(known.get("facts"), spec, _known_sizes(known))
        crowd = _crowd(spec, line, options, id, reference)
        _assemble(crowd, reference, options)
        assert reference.model is not None
        assert reference.facts is not None
        sizes = _sizes(folder, crowd, spec, reference)
        _describe(folder, spec, reference, options)
        last = _train(folder, spec, reference, crowd, sizes, options)
        asked = Asked(options.share, options.piece, options.patience, options.report)
        gather(folder, spec, crowd, last, asked)
        folder.update({"status": FINISHED, "finished": _now()})
    return folder


def survey(spec: Spec, line: Line, options: Options) -> str | None:
    """Ask who is there and who fits, and train nothing; why the study would not start, or None.

    Every client's properties are reported by `options.told`.

    Raises:
        RequestError: the options do not go with the study.
    """
    _check_start(spec, options)
    reference = _Reference(None, spec)
    # The same id each time, so that clients keep one folder of all checks of a study.
    id = hashlib.sha256(f"check {spec.hash()}".encode()).hexdigest()[:32]
    try:
        _assemble(_crowd(spec, line, options, id, reference), reference, options)
    except CertiflError as error:
        return str(error)
    return None


def _check_start(spec: Spec, options: Options) -> None:
    """Refuse a number of clients to start with that cannot be meant."""
    count, asked = spec.clients.count, options.min_clients
    if asked is not None and not 1 <= asked <= count:
        raise RequestError(
            f"--min-clients {asked} does not go with the {count} clients of the study: give a "
            f"number from 1 to {count}."
        )
    if count == 1 and asked is None:
        raise RequestError(
            "The study has one client (clients.count = 1), which is no federation. If that is "
            "meant, give --min-clients 1."
        )
    if asked is not None and asked < count and spec.privacy.kind == "example":
        raise RequestError(
            '--min-clients does not go with privacy.kind = "example": how much noise each client '
            "adds follows from what all of them say of their images, so all must be there."
        )


def _crowd(spec: Spec, line: Line, options: Options, id: str, reference: _Reference) -> Crowd:
    study = {
        "id": id,
        "spec": spec.to_toml(),
        "hash": spec.hash(),
        "own_perturbation": options.own_perturbation,
    }
    return Crowd(line, study, reference.problem, options.keys)


def _assemble(crowd: Crowd, reference: _Reference, options: Options) -> None:
    """Wait for the clients, report what each has, and go on with those that fit.

    Raises:
        RequestError: too few fit, because others do not. WorkError: too few came.
    """
    spec, begun = reference.spec, reference.facts is not None
    everyone = set(range(spec.clients.count))
    crowd.wait_for(everyone, options.patience.start, heard=True)
    enough = _enough(spec, options, begun)
    came = {client: member.joined for client, member in crowd.members.items()}
    if reference.facts is None:
        reference.facts = agreed(came, spec, enough)
    crowd.sift()
    for text in lines(spec, came, crowd.refused):
        (options.told or _log.info)(text)
    if came and reference.facts is None:
        raise RequestError(_undecided(came))
    if len(crowd.members) < enough:
        raise _too_few(crowd, everyone, enough, options)


def _enough(spec: Spec, options: Options, begun: bool) -> int:
    """With how many clients the study starts, or is resumed."""
    if begun and spec.privacy.kind != "example":
        return needed(spec.clients.participants, spec.clients.min_clients)
    return spec.clients.count if options.min_clients is None else options.min_clients


def _undecided(came: Mapping[int, Joined]) -> str:
    first, *others = sorted(came)
    wanted = properties(came[first])
    differing = [(c, difference(properties(came[c]), wanted)) for c in others]
    told = [f"compared with client {first}, of client {c}: {why}" for c, why in differing if why]
    return (
        "The study does not start: the clients' images do not match, and no group of clients is "
        f"the largest. {'; '.join(told)}. Correct them, then repeat the command."
    )


def _too_few(crowd: Crowd, everyone: set[int], enough: int, options: Options) -> CertiflError:
    """Too few clients: of those that came, or of those that match."""
    missing, here = everyone - crowd.members.keys(), len(crowd.members)
    if crowd.mismatched:
        matching = f"those that match: --min-clients {here}" if here else "others"
        return RequestError(
            f"The study does not start: {here} of {len(everyone)} clients match, and {enough} "
            f"are needed. {_absent(crowd, missing)}. Correct what does not match, or start with "
            f"{matching}."
        )
    return WorkError(
        f"Too few clients came within {options.patience.start:g} seconds: "
        f"{here} of {len(everyone)}, and at least {enough} are needed. "
        f"{_absent(crowd, missing)}. Start them with `certifl deploy client`, then repeat the "
        "command; with --min-clients a study starts with fewer."
    )


def _absent(crowd: Crowd, missing: set[int]) -> str:
    told = []
    for client in sorted(missing | (crowd.refused.keys() - crowd.members.keys())):
        why = crowd.refused.get(client)
        who = f"client {client}" if client != UNKNOWN else "a node"
        told.append(f"{who} is not there" if why is None else f"{who} was not taken, {why}")
    return "; ".join(told)


def _known_sizes(deployment: Mapping[str, Any]) -> dict[int, int]:
    return {int(client): size for client, size in deployment.get("train_images", {}).items()}


def _sizes(folder: RunFolder, crowd: Crowd, spec: Spec, reference: _Reference) -> list[int]:
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
            sends=lambda round: sent_by_clients(algorithm, round, spec.training.rounds),
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
