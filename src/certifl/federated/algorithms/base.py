"""The interface of algorithms: frozen records of hyper-parameters, with explicit state.

The client half (`client_round`) and the server half (`init`, `aggregate`) are apart, so the same
object runs in one process and over a network. Nothing here is ever mutated: a client round copies
what it starts from, the server builds a new state, and the caller keeps the states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.averaging import average_models
from certifl.federated.local_training import LocalTraining
from certifl.federated.schedule import Schedule
from certifl.federated.states import (
    ClientData,
    ClientState,
    ModelState,
    Parts,
    ServerState,
    Update,
)
from certifl.federated.steps import GradientHook, Step


class Algorithm(Protocol):
    """A way of training together, as a frozen record of its hyper-parameters.

    Every method is pure: arguments are never mutated, results depend on the arguments alone.

    Attributes:
        name: its key in `ALGORITHMS`.
        deploys: which model client i uses at test time, in words, for reports.
        keeps_client_state: whether clients own a model between rounds, so that deployed models
            differ from client to client. (Momentum buffers that a client keeps do not count.)
        extra_rounds: rounds without communication after the schedule's; every client takes part.
        client_needs: the server's parts that clients read; None = all of them.
    """

    name: ClassVar[str]
    deploys: ClassVar[str]
    keeps_client_state: ClassVar[bool]
    extra_rounds: ClassVar[int]

    @property
    def client_needs(self) -> tuple[str, ...] | None:
        """See the class."""
        ...

    def init(self, model_state: ModelState) -> ServerState:
        """The server's state before the first round, from the initial model."""
        ...

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """Names of the parts that a client's update of a round (from 0) has.

        Extra rounds come after the scheduled ones.
        """
        ...

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """One client's round: its update, and its next state.

        Args:
            broadcast: the server's state; its `round` counts from 0.
            state: this client's state after the last round it took part in.
            data: the client's images. training: trains the schedule's epochs (TrainingDiverged).
        """
        ...

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The server's next state from the updates, which arrive in client order.

        Updates are consumed one at a time, so memory does not grow with the number of clients.
        An update without a model contributes nothing, and a round in which no model arrives
        leaves the parts as they are. InputError names a client that sent other keys or shapes.
        """
        ...

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The model (all entries, on the CPU) that a client uses at test time.

        Args:
            server_state: after the last round.
            client_state: what the client keeps; no parts where it never trained.
        """
        ...


class GlobalModel:
    """Base of algorithms that average a global model; a subclass says only what differs.

    A client trains the model that it would deploy, and sends the result. The server averages what
    arrives. Every client deploys the global model, or its own where it has a `personal_part`.

    Attributes:
        personal_part: the part of a client's state in which it keeps the model that it trains and
            deploys; "" = it keeps none.
        sent: names of the parts that clients send.
        weighting: of the average: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a parameter outside the range that the algorithm's row in `ALGORITHMS` allows.
    """

    name: ClassVar[str]
    deploys: ClassVar[str] = "the global model of the last round"
    keeps_client_state: ClassVar[bool] = False
    extra_rounds: ClassVar[int] = 0
    client_needs: ClassVar[tuple[str, ...] | None] = None
    personal_part: ClassVar[str] = ""
    sent: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        ALGORITHMS.check_component(self)

    def init(self, model_state: ModelState) -> ServerState:
        """The global model is the initial one."""
        return ServerState(0, {"model": model_state})

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """The same parts in every round: `sent`."""
        return self.sent

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the model that the client would deploy; send it, keep it as `personal_part`."""
        trained = training.train_epochs(
            self.deployed(broadcast, state),
            data,
            broadcast.round,
            momentum=state.parts.get("momentum"),
            hook=self.hook(broadcast, training),
            step=self.step(),
            weight_decay=self.weight_decay(training.schedule),
        )
        sent = "model" in self.sends(broadcast.round, training.schedule.rounds)
        update = Update(data.client, len(data), trained.state if sent else None, trained.metrics)
        own = {self.personal_part: trained.state} if self.personal_part else {}
        return update, ClientState({**own, **trained.momentum_part})

    def hook(self, broadcast: ServerState, training: LocalTraining) -> GradientHook | None:
        """Changes gradients before each local step; None = no change."""
        return None

    def step(self) -> Step | None:
        """What is done with each batch; None = a plain step of SGD."""
        return None

    def weight_decay(self, schedule: Schedule) -> float:
        """Of the local steps."""
        return schedule.weight_decay

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The average of the models that arrived; the old model where none did."""
        average = average_models(updates, getattr(self, "weighting", "uniform"))
        parts = server_state.parts if average is None else {"model": average}
        return ServerState(server_state.round + 1, parts)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The client's own model where it has one; else the global model."""
        return client_state.parts.get(self.personal_part, server_state.parts["model"])


def needed_by_clients(algorithm: Algorithm, parts: Parts) -> Parts:
    """The server's parts that clients need."""
    needs = algorithm.client_needs
    return parts if needs is None else {part: parts[part] for part in needs if part in parts}
