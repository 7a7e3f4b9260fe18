"""The clients that a study begins with: who came, who matches, and why others do not.

Nothing is trained here. `conduct` goes on with the clients that were assembled.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from certifl.deploy.crowd import UNKNOWN, Crowd
from certifl.deploy.line import Line
from certifl.deploy.matching import agreed, difference, lines, properties
from certifl.deploy.remote import Patience
from certifl.deploy.schemas import Joined
from certifl.deploy.settings import check_share
from certifl.errors import CertiflError, InputError, RequestError, WorkError, one_line
from certifl.federated.faults import needed
from certifl.models import build, fingerprint
from certifl.spec import Spec

__all__ = [
    "Options",
    "Reference",
    "Report",
    "assemble",
    "check_start",
    "crowd_of",
    "known_sizes",
    "survey",
]

_log = logging.getLogger(__name__)

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
class Reference:
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


def survey(spec: Spec, line: Line, options: Options) -> str | None:
    """Ask who is there and who fits, and train nothing; why the study would not start, or None.

    Every client's properties are reported by `options.told`.

    Raises:
        RequestError: the options do not go with the study.
    """
    check_start(spec, options)
    reference = Reference(None, spec)
    # The same id each time, so that clients keep one folder of all checks of a study.
    id = hashlib.sha256(f"check {spec.hash()}".encode()).hexdigest()[:32]
    try:
        assemble(crowd_of(spec, line, options, id, reference), reference, options)
    except CertiflError as error:
        return str(error)
    return None


def check_start(spec: Spec, options: Options) -> None:
    """Refuse a number of clients to start with that cannot be meant.

    Raises:
        RequestError: it is such a number.
    """
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


def crowd_of(spec: Spec, line: Line, options: Options, id: str, reference: Reference) -> Crowd:
    """Whoever comes, asked what it has for a study of this id."""
    study = {
        "id": id,
        "spec": spec.to_toml(),
        "hash": spec.hash(),
        "own_perturbation": options.own_perturbation,
    }
    return Crowd(line, study, reference.problem, options.keys)


def assemble(crowd: Crowd, reference: Reference, options: Options) -> None:
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


def known_sizes(deployment: Mapping[str, Any]) -> dict[int, int]:
    """Training images by client, as a run folder remembers them."""
    return {int(client): size for client, size in deployment.get("train_images", {}).items()}
