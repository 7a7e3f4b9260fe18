"""What an algorithm is: a frozen record of hyper-parameters; state goes in and comes out.

The client half (`client_round`) and the server half (`init`, `aggregate`) are apart, so the same
object runs in one process and over a network. Nothing here is ever mutated: a client round copies
what it starts from, the server builds a new state, and whoever drives the rounds keeps the states.

State is made of named parts, each a plain dict of CPU tensors, so that it can be stored as
safetensors and sent as arrays without knowing which algorithm it belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, runtime_checkable

import torch

from certifl.errors import InputError, SpecError

if TYPE_CHECKING:
    from certifl.federated.client import LocalTraining

__all__ = [
    "Algorithm",
    "ClientData",
    "ClientState",
    "ModelState",
    "Parts",
    "ServerState",
    "Update",
    "check_choice",
    "check_flag",
    "check_number",
    "describe",
    "named_record",
    "needed_by_clients",
]

ModelState = dict[str, torch.Tensor]
Parts = dict[str, ModelState]


@dataclass(frozen=True)
class ServerState:
    """What the server holds after `round` finished rounds, and broadcasts before the next one.

    Attributes:
        round: finished rounds, from 0.
        parts: named dicts of CPU tensors; the global model, where there is one, is "model".
    """

    round: int
    parts: Parts


@dataclass(frozen=True)
class ClientState:
    """What one client keeps between rounds; no parts at all is a client that has not trained.

    Attributes:
        parts: named dicts of CPU tensors, such as "model" or "momentum".
    """

    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one client sends to the server after a round.

    Attributes:
        client: who sends it.
        weight: number of training images behind it.
        model: the trained model; None where the client keeps it to itself.
        metrics: numbers about this client's round (loss and accuracy on its training stream).
        extra: further named parts that an algorithm sends (control variates, for instance).
    """

    client: int
    weight: float
    model: ModelState | None
    metrics: dict[str, float]
    extra: Parts = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's training images.

    Attributes:
        client: number of the client; its random streams are derived from it.
        images: uint8, (n, c, h, w).
        labels: int64, (n,).

    Raises:
        InputError: images of another type or shape, or not as many labels as images.
    """

    client: int
    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise InputError(
                f"Client {self.client}: images must be uint8 of shape (n, c, h, w), got "
                f"{self.images.dtype} of shape {tuple(self.images.shape)}."
            )
        if self.labels.shape != self.images.shape[:1]:
            raise InputError(
                f"Client {self.client}: {len(self.images)} images need as many labels, got "
                f"labels of shape {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ClientData:
        """The same data on another device (the very same tensors where they are there already)."""
        return ClientData(self.client, self.images.to(device), self.labels.to(device))


class Algorithm(Protocol):
    """A way of training together, as a frozen record of its hyper-parameters.

    Every method is pure: arguments are never mutated, results depend on the arguments alone.

    Attributes:
        name: its key in `ALGORITHMS`.
        deploys: which model client i uses at test time, in words, for reports.
        keeps_client_state: whether clients own a model between rounds, so that deployed models
            differ from client to client. (Momentum buffers that a client keeps do not count.)
        extra_rounds: rounds without communication after the schedule's; every client takes part.
    """

    name: ClassVar[str]
    deploys: ClassVar[str]
    keeps_client_state: ClassVar[bool]
    extra_rounds: ClassVar[int]

    def init(self, model_state: ModelState) -> ServerState:
        """The server's state before the first round, from the initial model."""
        ...

    def client_round(
        self,
        broadcast: ServerState,
        client_state: ClientState,
        data: ClientData,
        training: LocalTraining,
    ) -> tuple[Update, ClientState]:
        """One client's round: what it sends, and what it keeps.

        Args:
            broadcast: the server's state; its `round` counts from 0.
            client_state: what this client kept from the last round it took part in.
            data: the client's images.
            training: the schedule's passes over them.

        Raises:
            TrainingDiverged: the loss or the weights stopped being finite.
        """
        ...

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The server's next state from the updates, which arrive in client order.

        Updates are consumed one at a time, so memory does not grow with the number of clients.
        An update without a model contributes nothing, and a round in which no model arrives
        leaves the parts as they are.

        Args:
            server_state: the one that was broadcast.
            updates: of the clients that took part.

        Raises:
            InputError: a client sent other keys or shapes than the first one; it is named.
        """
        ...

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The model that the client holding `client_state` uses at test time.

        Args:
            server_state: after the last round.
            client_state: what the client keeps; no parts where it never trained.

        Returns:
            All entries of the network's state, on the CPU.
        """
        ...


@runtime_checkable
class _Sparing(Protocol):
    """An algorithm that says which of the server's parts its clients' halves look at.

    Attributes:
        client_needs: their names; None = all of them.
    """

    @property
    def client_needs(self) -> tuple[str, ...] | None: ...


def needed_by_clients(algorithm: object, parts: Parts) -> Parts:
    """What of the server's parts has to be sent to clients, and is enough for them.

    Args:
        algorithm: one that names no `client_needs` needs everything.
        parts: of the server's state.
    """
    needs = algorithm.client_needs if isinstance(algorithm, _Sparing) else None
    return parts if needs is None else {part: parts[part] for part in needs if part in parts}


def describe(algorithm: Algorithm) -> dict[str, Any]:
    """An algorithm as a plain table: its name, its hyper-parameters, nested where it wraps one.

    Hyper-parameters that are None are left out, so that the table can be written as TOML;
    `from_description` gives the equal algorithm back.
    """
    options: Any = algorithm  # a dataclass, which the protocol cannot say
    table: dict[str, Any] = {"name": algorithm.name}
    for option in fields(options):
        value = getattr(algorithm, option.name)
        if value is not None:
            table[option.name] = (
                describe(cast("Algorithm", value)) if is_dataclass(value) else value
            )
    return table


def named_record(
    kind: str, description: Mapping[str, Any] | str, records: Mapping[str, type[Any]]
) -> tuple[type[Any], dict[str, Any]]:
    """The record that a table names, and the table's hyper-parameters, which are all its own.

    Args:
        kind: what is described, for messages.
        description: a table with a "name", or a bare name.
        records: the records by name.

    Raises:
        SpecError: an unknown name or hyper-parameter, or a missing one.
    """
    table: dict[str, Any] = (
        {"name": description} if isinstance(description, str) else {**description}
    )
    name = table.pop("name", None)
    if not isinstance(name, str) or name not in records:
        raise SpecError(f"{kind} name = {name!r} is unknown: choose one of {', '.join(records)}.")
    options = {option.name: option for option in fields(records[name])}
    for key in table:
        if key not in options:
            allowed = ", ".join(options) or "no hyper-parameters"
            raise SpecError(f"{name} has no hyper-parameter {key!r}: it has {allowed}.")
    for key, option in options.items():
        needed = option.default is MISSING and option.default_factory is MISSING
        if needed and key not in table:
            raise SpecError(f"{name} needs the hyper-parameter {key!r}.")
    return records[name], table


def check_number(
    key: str,
    value: object,
    allowed: str,
    *,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
    open_high: bool = False,
    whole: bool = False,
) -> None:
    """Refuse a hyper-parameter that is not a number in its range; `allowed` says it in words."""
    kinds = (int,) if whole else (int, float)
    inside = (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and low <= value <= high
        and abs(value) != float("inf")
        and not (open_low and value == low)
        and not (open_high and value == high)
    )
    if not inside:
        raise SpecError(f"{key} = {value!r} is not allowed: it must be {allowed}.")


def check_flag(key: str, value: object) -> None:
    """Refuse a hyper-parameter that is neither true nor false."""
    if not isinstance(value, bool):
        raise SpecError(f"{key} = {value!r} is not allowed: it must be true or false.")


def check_choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a hyper-parameter that is none of the allowed words."""
    if value not in allowed:
        raise SpecError(
            f"{key} = {value!r} is not allowed: choose one of {', '.join(sorted(allowed))}."
        )
