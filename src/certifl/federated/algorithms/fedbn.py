"""FedBN: federated averaging of everything but the normalization layers."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import norm_keys, withhold
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.training.local_training import LocalTraining


@dataclass(frozen=True)
class FedBN(GlobalModel):
    """FedBN: every client keeps its own BatchNorm layers, all other weights are averaged.

    Affine weights, running statistics and counters of these layers stay with the client; in what
    it sends they are as they were broadcast, so nothing of them leaves and the server's never
    change. Without such layers this is federated averaging, bit for bit: networks with GroupNorm
    have none, `layers = "all"` keeps theirs at home instead.

    Deployed by client i: the global model with its own normalization layers (the initial ones
    where it never trained).

    Attributes:
        layers: "batch" (BatchNorm, the source's) or "all" (every normalization layer).
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Source: Li, Jiang, Zhang, Kamp, Dou, FedBN: Federated Learning on Non-IID Features via Local
    Batch Normalization, 2021, Algorithm 1.
    """

    layers: str = "batch"
    weighting: str = "uniform"

    name = "fedbn"
    deploys = "the global model with its own normalization layers"
    keeps_client_state = True

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the global model with the own layers in it; send all but these."""
        update, kept = super().client_round(broadcast, state, data, training)
        private = norm_keys(training.network, self.layers)
        return withhold(update, kept, broadcast, private, "layers")

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The global model with the client's own layers."""
        return {**server_state.parts["model"], **client_state.parts.get("layers", {})}
