"""FedProx: federated averaging whose clients are held near the global model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from certifl.federated.averaging import WEIGHTINGS
from certifl.federated.global_model import averaged, held_near, trained_and_sent
from certifl.federated.records import check_choice, check_number
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update

if TYPE_CHECKING:
    from certifl.federated.client import LocalTraining

__all__ = ["FedProx"]


@dataclass(frozen=True)
class FedProx:
    """FedProx: in its local steps every client minimises its loss and a proximal term.

      L_i(theta) + mu/2 ||theta - theta_bar||^2        (Eq. 2 of the source)

    with theta_bar the global model as broadcast, and the server averages. The proximal term keeps
    clients whose images differ from drifting apart within a round. Its gradient
    mu (theta - theta_bar) is added to that of the loss, so momentum applies to both. Parameters
    are held, BatchNorm's running statistics are not. The pull is stable for
    lr mu < 2 (1 + momentum).

    Clients take the schedule's passes where the source allows each its own inexactness gamma.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        mu: weight of the proximal term, from 0; 0 = federated averaging, bit for bit.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, Federated Optimization in Heterogeneous
    Networks, 2020, Algorithm 2 and Eq. (2).
    """

    mu: float
    weighting: str = "uniform"

    name: ClassVar[str] = "fedprox"
    deploys: ClassVar[str] = "the global model, the average of the last round"
    keeps_client_state: ClassVar[bool] = False
    extra_rounds: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_number("mu", self.mu, "a number from 0", low=0)
        check_choice("weighting", self.weighting, WEIGHTINGS)

    def init(self, model_state: ModelState) -> ServerState:
        """The global model is the initial one."""
        return ServerState(0, {"model": model_state})

    def client_round(
        self,
        broadcast: ServerState,
        client_state: ClientState,
        data: ClientData,
        training: LocalTraining,
    ) -> tuple[Update, ClientState]:
        """Train from the global model, held near it; send the result."""
        centre = training.on_device(broadcast.parts["model"])
        near = held_near(centre, self.mu)
        return trained_and_sent(broadcast, client_state, data, training, hook=near)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The average of the models that arrived; the old model where none did."""
        return averaged(server_state, updates, self.weighting)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The global model."""
        del client_state
        return server_state.parts["model"]
