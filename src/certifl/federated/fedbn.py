"""FedBN: federated averaging of everything but the normalisation layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from certifl.federated.averaging import WEIGHTINGS
from certifl.federated.global_model import averaged
from certifl.federated.layers import NORMALIZATIONS, kept_back, norm_entries
from certifl.federated.records import check_choice
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update

if TYPE_CHECKING:
    from certifl.federated.client import LocalTraining

__all__ = ["FedBN"]


@dataclass(frozen=True)
class FedBN:
    """FedBN: every client keeps its own BatchNorm layers, all other weights are averaged.

    Affine weights, running statistics and counters of these layers stay with the client; in what
    it sends they are as they were broadcast, so nothing of them leaves and the server's never
    change. Without such layers this is federated averaging, bit for bit: networks with GroupNorm
    have none, `layers = "all"` keeps theirs at home instead.

    Deployed by client i: the global model with its own normalisation layers (the initial ones
    where it never trained).

    Attributes:
        layers: "batch" (BatchNorm, the source's) or "all" (every normalisation layer).
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Li, Jiang, Zhang, Kamp, Dou, FedBN: Federated Learning on Non-IID Features via Local
    Batch Normalization, 2021, Algorithm 1.
    """

    layers: str = "batch"
    weighting: str = "uniform"

    name: ClassVar[str] = "fedbn"
    deploys: ClassVar[str] = "the global model with its own normalisation layers"
    keeps_client_state: ClassVar[bool] = True
    extra_rounds: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_choice("layers", self.layers, NORMALIZATIONS)
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
        """Train the global model with the own layers in it; send all but these."""
        trained = training.passes(
            self.deployed(broadcast, client_state),
            data,
            broadcast.round,
            momentum=client_state.parts.get("momentum"),
        )
        private = norm_entries(training.network, self.layers)
        sent, own = kept_back(trained.state, broadcast.parts["model"], private)
        parts = {"layers": own} if own else {}
        update = Update(data.client, len(data), sent, trained.metrics)
        return update, ClientState({**parts, **trained.kept})

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The average of the models that arrived; the old model where none did."""
        return averaged(server_state, updates, self.weighting)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The global model with the client's own layers."""
        return {**server_state.parts["model"], **client_state.parts.get("layers", {})}
