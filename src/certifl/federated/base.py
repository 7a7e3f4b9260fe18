"""What an algorithm is: a frozen record of hyper-parameters; state goes in and comes out.

The client half (`client_round`) and the server half (`init`, `aggregate`) are apart, so the same
object runs in one process and over a network. Nothing here is ever mutated: a client round copies
what it starts from, the server builds a new state, and whoever drives the rounds keeps the states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from certifl.federated.client import LocalTraining
from certifl.federated.states import (
    ClientData,
    ClientState,
    ModelState,
    Parts,
    ServerState,
    Update,
)

__all__ = ["Algorithm", "describe", "needed_by_clients", "sent_by_clients"]


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


@runtime_checkable
class _Telling(Protocol):
    """An algorithm whose clients do not send just a model in every round."""

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """Names of the parts in an update of a round; `scheduled` rounds have a schedule."""
        ...


def sent_by_clients(algorithm: object, round: int, scheduled: int) -> tuple[str, ...]:
    """Which parts a client's update of a round has: "model", unless the algorithm says otherwise.

    Args:
        algorithm: may have a method `sends`.
        round: counted from 0.
        scheduled: rounds of the schedule; extra ones come after them.
    """
    return algorithm.sends(round, scheduled) if isinstance(algorithm, _Telling) else ("model",)


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
