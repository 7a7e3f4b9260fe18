"""Federated averaging: one global model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from certifl.federated.averaging import WEIGHTINGS
from certifl.federated.global_model import averaged, trained_and_sent
from certifl.federated.records import check_choice
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update

if TYPE_CHECKING:
    from certifl.federated.client import LocalTraining

__all__ = ["FedAvg"]


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging: theta_bar = sum_i w_i theta_i after each round of local SGD.

    Every participant starts from the broadcast model, trains on its own loss (Eq. 4 with
    lambda = 1) and sends the result; the server averages (Eq. 4 with lambda = 0). BatchNorm's
    running statistics are averaged with the weights, its step counters are not (`averaging`).
    Momentum does not travel; a client keeps its buffers where the schedule says "keep".

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        weighting: "uniform" (w_i = 1/n, the paper's) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data, 2017; the paper, section 3.3, "Federated Training".
    """

    weighting: str = "uniform"

    name: ClassVar[str] = "fedavg"
    deploys: ClassVar[str] = "the global model, the average of the last round"
    keeps_client_state: ClassVar[bool] = False
    extra_rounds: ClassVar[int] = 0

    def __post_init__(self) -> None:
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
        """Train from the global model, send the result."""
        return trained_and_sent(broadcast, client_state, data, training)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The average of the models that arrived; the old model where none did."""
        return averaged(server_state, updates, self.weighting)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The global model."""
        del client_state
        return server_state.parts["model"]
