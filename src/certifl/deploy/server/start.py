"""The clients that a study begins with: who came, who matches, and why others do not.

Nothing is trained here. `conduct` goes on with the clients that were assembled.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from certifl.data import EMBEDDED, load
from certifl.deploy.client.settings import check_share
from certifl.deploy.server.clients import UNKNOWN, ClientRegistry
from certifl.deploy.server.remote_runner import Timeouts
from certifl.deploy.transport.schemas import Joined
from certifl.deploy.transport.transport import Transport
from certifl.errors import CertiflError, InputError, RequestError, WorkError, one_line
from certifl.federated.faults import needed
from certifl.models import build, fingerprint
from certifl.spec import Spec

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
    patience: Timeouts = field(default_factory=Timeouts)
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


def survey(spec: Spec, line: Transport, options: Options) -> str | None:
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
    if spec.certification.precision == "int8":
        raise RequestError(
            'certification.precision = "int8" is for runs on one machine: its ranges would tell '
            'the server of training images. Choose "auto", "float32" or "bfloat16".'
        )
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


def crowd_of(
    spec: Spec, line: Transport, options: Options, id: str, reference: Reference
) -> ClientRegistry:
    """Whoever comes, asked what it has for a study of this id."""
    study = {
        "id": id,
        "spec": spec.to_toml(),
        "hash": spec.hash(),
        "own_perturbation": options.own_perturbation,
    }
    return ClientRegistry(line, study, reference.problem, options.keys)


def assemble(crowd: ClientRegistry, reference: Reference, options: Options) -> None:
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


def _too_few(
    crowd: ClientRegistry, everyone: set[int], enough: int, options: Options
) -> CertiflError:
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


def _absent(crowd: ClientRegistry, missing: set[int]) -> str:
    told = []
    for client in sorted(missing | (crowd.refused.keys() - crowd.members.keys())):
        why = crowd.refused.get(client)
        who = f"client {client}" if client != UNKNOWN else "a node"
        told.append(f"{who} is not there" if why is None else f"{who} was not taken, {why}")
    return "; ".join(told)


def known_sizes(deployment: Mapping[str, Any]) -> dict[int, int]:
    """Training images by client, as a run folder remembers them."""
    return {int(client): size for client, size in deployment.get("train_images", {}).items()}


# Which clients fit together before a study begins, and what does not fit about the others.
#
# Clients of a study need images of one size, as many channels, and the same classes in the same
# order. What is right is what the spec's data set has or most clients have, never what the first
# one to arrive has.


SHAPES = ("in_channels", "image_size", "class_names")
_SHARED = ("name", "fingerprint")
_NAMES_SHOWN = 10

Facts = dict[str, Any]


def properties(joined: Joined) -> Facts:
    """What must agree: shapes, classes, and the data set where it is one that all have."""
    facts: Facts = {name: getattr(joined, name) for name in SHAPES}
    shared = {name: getattr(joined, name) for name in _SHARED}
    return facts | {name: value for name, value in shared.items() if value is not None}


def agreed(joined: Mapping[int, Joined], spec: Spec, enough: int) -> Facts | None:
    """The properties that a study begins with; None where no group of clients prevails.

    Args:
        joined: what each client said. spec: of the study.
        enough: so many clients are needed; fewer do not prevail because the spec names their data.
    """
    groups = _groups(joined)
    if not groups:
        return None
    named = [group for group in groups if len(group) >= enough and _of_spec(group[0], spec)]
    if len(named) == 1:
        return _common(named[0])
    largest = max(map(len, groups))
    most = [group for group in groups if len(group) == largest]
    return _common(most[0]) if len(most) == 1 else None


def _groups(joined: Mapping[int, Joined]) -> list[list[Joined]]:
    """Clients that fit together; one with images of its own fits any data set of its shape."""
    groups: list[list[Joined]] = []
    shared_last = sorted(joined.items(), key=lambda item: (item[1].name is None, item[0]))
    for _, one in shared_last:
        for group in groups:
            if difference(properties(one), properties(group[0])) is None:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _common(group: Sequence[Joined]) -> Facts:
    """A group's properties; a data set's name only where all of them have that data set."""
    facts = properties(group[0])
    if all(one.name is not None for one in group):
        return facts
    return {name: facts[name] for name in SHAPES}


def _of_spec(one: Joined, spec: Spec) -> bool:
    """Whether a client has images like those of the data set that the spec names."""
    if one.name is not None:
        return one.name == spec.data.name
    if spec.data.name not in EMBEDDED:
        return False  # its shape is not known without reading it
    data = load(spec.data.name)
    shape = (data.in_channels, list(data.image_size), list(data.class_names))
    return shape == (one.in_channels, one.image_size, one.class_names)


def difference(found: Facts, wanted: Facts) -> str | None:
    """The first property in which a client differs, in words; None where it fits."""
    for name in SHAPES:
        if found[name] != wanted[name]:
            return _words(name, found[name], wanted[name])
    for name in _SHARED:
        if name in found and name in wanted and found[name] != wanted[name]:
            return _words(name, found[name], wanted[name])
    return None


def _words(name: str, found: object, wanted: object) -> str:
    if name == "class_names" and isinstance(found, list) and isinstance(wanted, list):
        listed = "[" + ", ".join(f'"{one_line(c, 40)}"' for c in wanted[:_NAMES_SHOWN])
        more = ", ...]" if len(wanted) > _NAMES_SHOWN else "]"
        return (
            f"its classes are {_classes(found)}, others have {_classes(wanted)}; if it has images "
            f"of some of these alone, write classes = {listed}{more} into its client.toml"
        )
    shown = {"in_channels": "number of channels", "image_size": "image size"}.get(name, name)
    return f"its {shown} is {one_line(found, 80)}, others have {one_line(wanted, 80)}"


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, 40) for name in names[:_NAMES_SHOWN])
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} ({shown}{more})"


def lines(spec: Spec, joined: Mapping[int, Joined], others: Mapping[int, str]) -> Iterable[str]:
    """Every client of a study: what it has, or why it does not take part.

    Args:
        spec: of the study. joined: what clients said of themselves.
        others: why a client does not take part; -1 stands for a node of unknown number.
    """
    yield f"Study {spec.name!r} (spec {spec.hash()[:8]}), {spec.clients.count} clients:"
    for client in sorted({*range(spec.clients.count), *joined, *others}):
        who = f"client {client}" if client >= 0 else "a node"
        if client in joined:
            yield f"  {who}: {_described(joined[client])}"
        if client in others:
            yield f"  {who} does not take part: {others[client]}"
        elif client not in joined:
            yield f"  {who} is not there"


def _described(one: Joined) -> str:
    versions = ", ".join(f"{one_line(k, 20)} {one_line(v, 40)}" for k, v in one.versions.items())
    height, width = one.image_size
    channels = "1 channel" if one.in_channels == 1 else f"{one.in_channels} channels"
    return (
        f"{versions or 'version not said'}; {channels}, {height} x {width}; classes: "
        f"{_classes(one.class_names)}; {one.train_images} training images"
    )
