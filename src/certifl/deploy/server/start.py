"""The clients that a study starts with: which are connected and match, and why others do not.

Nothing is trained here; `coordinate` continues with the clients that were assembled.
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
from certifl.deploy.messages import GridTransport
from certifl.deploy.schemas import Joined
from certifl.deploy.server.remote_runner import MISMATCHED, UNKNOWN, ClientRegistry, Timeouts
from certifl.errors import CertiflError, InputError, RequestError, WorkError, one_line
from certifl.federated.faults import required_clients
from certifl.models import build, fingerprint
from certifl.progress import StageCallback
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How a federation is run; nothing here changes what is trained.

    Attributes:
        out: the run folder. overwrite: replace an existing run.
        share: the most that clients are asked for, a name in `settings.SHARES`.
        own_perturbation: clients may certify a perturbation of their own.
        timeouts: how long is waited. piece: seconds of certification per request.
        keys: public keys by client; a node must then have the key of its client.
        min_clients: how many clients are enough to start; None = all of them. Once the study
            has begun, `clients.min_clients` of the spec alone says how many a round needs.
        report: called with progress. log: called with lines about the clients.
        command: how the run was started, for the record.

    Raises:
        InputError: share is not such a name.
    """

    out: Path
    overwrite: bool = False
    share: str = "curve"
    own_perturbation: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    piece: float = 60.0
    keys: Mapping[int, bytes] = field(default_factory=dict)
    report: StageCallback | None = None
    command: str = ""
    min_clients: int | None = None
    log: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        check_share(self.share)  # here, not after days of training


@dataclass
class Reference:
    """What all clients must agree on: what most of them have, or what the run folder says.

    Attributes:
        properties: of the images; None until they are determined. spec: of the study.
        train, tests: training images by client, and test images where they are reported, as they
            were when it first took part.
        model: the initial network. model_fingerprint: of this network.
    """

    properties: dict[str, Any] | None
    spec: Spec
    train: dict[int, int] = field(default_factory=dict)
    tests: dict[int, int] = field(default_factory=dict)
    model: nn.Module | None = None
    model_fingerprint: str = ""

    def build(self, properties: Mapping[str, Any]) -> None:
        """Build the initial network, once."""
        if self.model is not None:
            return
        spec, (height, width) = self.spec, properties["image_size"]
        channels, classes = int(properties["in_channels"]), len(properties["class_names"])
        size = (int(height), int(width))
        try:
            self.model = build(
                spec.model.name, channels, classes, spec.seed, spec.model.options, size
            ).eval()
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise InputError(
                f"The network {spec.model.name!r} cannot be built for {channels} channels, "
                f"{height} x {width} pixels and {classes} classes, which is what most clients "
                f"have: {one_line(error)}. Check their images, or choose another network."
            ) from error
        self.model_fingerprint = fingerprint(self.model)

    def release(self) -> None:
        """Free the initial weights: the first round is stored, and has its own."""
        if self.model is not None:
            self.model.to("meta")

    def problem(self, joined: Joined) -> str | None:
        """Why a client does not match; None where it does, or nothing is determined yet.

        What a client that matches says of its images holds for the whole study.
        """
        if joined.client >= self.spec.clients.count:
            return f"the study has {self.spec.clients.count} clients, counted from 0"
        before = self.train.get(joined.client, joined.train_images)
        if before != joined.train_images:
            return (
                f"it has {joined.train_images} training images, and had {before} when it first "
                "joined: the number must not change within a study"
            )
        if self.properties is None:
            return None
        differs = difference(shared_properties(joined), self.properties)
        if differs is not None:
            return differs
        self.build(self.properties)
        if joined.initial_model != self.model_fingerprint:
            return (
                "its initial network differs from the server's: it must have the same code and "
                "the same version of torch"
            )
        self.train.setdefault(joined.client, joined.train_images)
        if joined.test_images is not None:
            self.tests.setdefault(joined.client, joined.test_images)
        return None


def check_clients(spec: Spec, transport: GridTransport, options: Options) -> str | None:
    """List clients to `options.log`; why the study would not start, or None. Trains nothing."""
    check_start(spec, options)
    reference = Reference(None, spec)
    # The same id each time, so that clients have one folder for all checks of a study.
    id = hashlib.sha256(f"check {spec.hash()}".encode()).hexdigest()[:32]
    try:
        assemble(new_registry(spec, transport, options, id, reference), reference, options)
    except CertiflError as error:
        return str(error)
    return None


def check_start(spec: Spec, options: Options) -> None:
    """Refuse an impossible minimum of clients, and what only one machine can do (RequestError)."""
    if spec.certification.precision == "int8":
        raise RequestError(
            'certification.precision = "int8" is for runs on one machine: its ranges would tell '
            'the server of training images. Choose "auto", "float32" or "bfloat16".'
        )
    count, minimum = spec.clients.count, options.min_clients
    if spec.clients.unseen:
        raise RequestError(
            "clients.unseen is for studies on one machine: here a client that is not to train "
            "does not join, and certifies the global model on its own with `certifl certify`. "
            "Remove the key, and count the clients that join."
        )
    if spec.model.weights is not None:
        raise RequestError(
            "model.weights names a file of this machine, which clients do not have. Remove the "
            "key: studies over a network begin with weights drawn from the seed."
        )
    if minimum is not None and not 1 <= minimum <= count:
        raise RequestError(
            f"--min-clients {minimum} does not fit the {count} clients of the study: give a "
            f"number from 1 to {count}."
        )
    if count == 1 and minimum is None:
        raise RequestError(
            "The study has one client (clients.count = 1), which is not a federation. If that is "
            "intended, give --min-clients 1."
        )
    if minimum is not None and minimum < count and spec.privacy.kind == "example":
        raise RequestError(
            '--min-clients cannot be used with privacy.kind = "example": how much noise a client '
            "adds depends on the number of images of every client, so all must be connected."
        )


def new_registry(
    spec: Spec, transport: GridTransport, options: Options, id: str, reference: Reference
) -> ClientRegistry:
    """A registry that asks every node that connects to join the study of this id."""
    study = {
        "id": id,
        "spec": spec.to_toml(),
        "hash": spec.hash(),
        "own_perturbation": options.own_perturbation,
    }
    return ClientRegistry(transport, study, reference.problem, options.keys)


def assemble(registry: ClientRegistry, reference: Reference, options: Options) -> None:
    """Wait for clients, log what each has, keep those that match; an error if too few do."""
    spec, resumed = reference.spec, reference.properties is not None
    everyone = set(range(spec.clients.count))
    registry.wait_for(everyone, options.timeouts.start, skip_refused=True)
    required = _required(spec, options, resumed)
    joined = {client: entry.joined for client, entry in registry.connected.items()}
    if reference.properties is None:
        reference.properties = reference_properties(joined, spec, required)
    registry.drop_mismatched()
    for line in listing(spec, joined, registry.refused):
        (options.log or _log.info)(line)
    if joined and reference.properties is None:
        raise RequestError(_no_majority(joined))
    if len(registry.connected) < required:
        raise _too_few(registry, everyone, required, options)


def _required(spec: Spec, options: Options, resumed: bool) -> int:
    """How many clients the study needs to start, or to resume."""
    if resumed and spec.privacy.kind != "example":
        return required_clients(spec.clients.participants, spec.clients.min_clients)
    return spec.clients.count if options.min_clients is None else options.min_clients


def _no_majority(joined: Mapping[int, Joined]) -> str:
    first, *others = sorted(joined)
    expected = shared_properties(joined[first])
    differing = [(c, difference(shared_properties(joined[c]), expected)) for c in others]
    differences = [
        f"compared with client {first}, of client {c}: {why}" for c, why in differing if why
    ]
    return (
        "The study does not start: the clients' images do not match, and no group of clients is "
        f"the majority. {'; '.join(differences)}. Correct them, then repeat the command."
    )


def _too_few(
    registry: ClientRegistry, everyone: set[int], required: int, options: Options
) -> CertiflError:
    """Too few clients joined, or too few of them match."""
    missing, connected = everyone - registry.connected.keys(), len(registry.connected)
    if MISMATCHED in registry.kinds.values():
        matching = f"those that match: --min-clients {connected}" if connected else "others"
        return RequestError(
            f"The study does not start: {connected} of {len(everyone)} clients match, and "
            f"{required} are needed. {_absent(registry, missing)}. Correct what does not match, "
            f"or start with {matching}."
        )
    return WorkError(
        f"Too few clients joined within {options.timeouts.start:g} seconds: "
        f"{connected} of {len(everyone)}, and at least {required} are needed. "
        f"{_absent(registry, missing)}. Start them with `certifl deploy client`, then repeat the "
        "command; with --min-clients a study starts with fewer."
    )


def _absent(registry: ClientRegistry, missing: set[int]) -> str:
    reasons = []
    for client in sorted(missing | (registry.refused.keys() - registry.connected.keys())):
        why = registry.refused.get(client)
        who = f"client {client}" if client != UNKNOWN else "a node"
        reasons.append(f"{who} is not connected" if why is None else f"{who} was refused, {why}")
    return "; ".join(reasons)


def record(folder: RunFolder, entries: Mapping[str, Any]) -> None:
    """Add entries to what the run's manifest says of the deployment."""
    before = folder.manifest().get("deployment", {})
    folder.update({"deployment": {**before, **entries}})


# Which clients match before a study starts, and how the others differ.
#
# Clients of a study need images of one size, with equally many channels, and the same classes in
# the same order. The reference is the spec's data set, or else the majority of clients, never the
# first one to connect.


SHAPES = ("in_channels", "image_size", "class_names")
_SHARED = ("name", "fingerprint")
_NAMES_SHOWN = 10

Properties = dict[str, Any]


def shared_properties(joined: Joined) -> Properties:
    """What must match: shapes, classes, and the data set where all clients have it."""
    properties: Properties = {name: getattr(joined, name) for name in SHAPES}
    shared = {name: getattr(joined, name) for name in _SHARED}
    return properties | {name: value for name, value in shared.items() if value is not None}


def reference_properties(
    joined: Mapping[int, Joined], spec: Spec, required: int
) -> Properties | None:
    """The properties that a study starts with; None where no group of clients is the majority.

    `joined` is what each client reported; fewer clients than `required` do not win because the
    spec names their data.
    """
    groups = _groups(joined)
    if not groups:
        return None
    named = [group for group in groups if len(group) >= required and _of_spec(group[0], spec)]
    if len(named) == 1:
        return _common(named[0])
    largest = max(map(len, groups))
    most = [group for group in groups if len(group) == largest]
    return _common(most[0]) if len(most) == 1 else None


def _groups(joined: Mapping[int, Joined]) -> list[list[Joined]]:
    """Groups of matching clients; one with its own images matches any data set of their shape."""
    groups: list[list[Joined]] = []
    shared_last = sorted(joined.items(), key=lambda item: (item[1].name is None, item[0]))
    for _, one in shared_last:
        for group in groups:
            if difference(shared_properties(one), shared_properties(group[0])) is None:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _common(group: Sequence[Joined]) -> Properties:
    """A group's properties; a data set's name only where all of them have that data set."""
    properties = shared_properties(group[0])
    if all(one.name is not None for one in group):
        return properties
    return {name: properties[name] for name in SHAPES}


def _of_spec(one: Joined, spec: Spec) -> bool:
    """Whether a client's images are like those of the data set that the spec names."""
    if one.name is not None:
        return one.name == spec.data.name
    if spec.data.name not in EMBEDDED:
        return False  # its shape is unknown until it is read
    data = load(spec.data.name)
    shape = (data.in_channels, list(data.image_size), list(data.class_names))
    return shape == (one.in_channels, one.image_size, one.class_names)


def difference(actual: Properties, expected: Properties) -> str | None:
    """The first property in which a client differs, in words; None where it matches."""
    for name in SHAPES:
        if actual[name] != expected[name]:
            return _words(name, actual[name], expected[name])
    for name in _SHARED:
        if name in actual and name in expected and actual[name] != expected[name]:
            return _words(name, actual[name], expected[name])
    return None


def _words(name: str, actual: object, expected: object) -> str:
    if name == "class_names" and isinstance(actual, list) and isinstance(expected, list):
        listed = "[" + ", ".join(f'"{one_line(c, 40)}"' for c in expected[:_NAMES_SHOWN])
        more = ", ...]" if len(expected) > _NAMES_SHOWN else "]"
        return (
            f"its classes are {_classes(actual)}, others have {_classes(expected)}; if it has "
            f"images of some of these alone, write classes = {listed}{more} into its client.toml"
        )
    shown = {"in_channels": "number of channels", "image_size": "image size"}.get(name, name)
    return f"its {shown} is {one_line(actual, 80)}, others have {one_line(expected, 80)}"


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, 40) for name in names[:_NAMES_SHOWN])
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} ({shown}{more})"


def listing(spec: Spec, joined: Mapping[int, Joined], others: Mapping[int, str]) -> Iterable[str]:
    """Every client of a study: what it reported, or (`others`) why it does not take part."""
    yield f"Study {spec.name!r} (spec {spec.hash()[:8]}), {spec.clients.count} clients:"
    for client in sorted({*range(spec.clients.count), *joined, *others}):
        who = f"client {client}" if client >= 0 else "a node"
        if client in joined:
            yield f"  {who}: {_described(joined[client])}"
        if client in others:
            yield f"  {who} does not take part: {others[client]}"
        elif client not in joined:
            yield f"  {who} is not connected"


def _described(one: Joined) -> str:
    versions = ", ".join(f"{one_line(k, 20)} {one_line(v, 40)}" for k, v in one.versions.items())
    height, width = one.image_size
    channels = "1 channel" if one.in_channels == 1 else f"{one.in_channels} channels"
    return (
        f"{versions or 'version not reported'}; {channels}, {height} x {width}; classes: "
        f"{_classes(one.class_names)}; {one.train_images} training images"
    )
