"""Training alone: every client on its own images, without communication."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.states import ClientData, ClientState, ServerState, Update
from certifl.federated.training.local_training import LocalTraining


@dataclass(frozen=True)
class Local(GlobalModel):
    """Local training: each client minimises its own loss L_i(theta_i), Eq. (4) with lambda = 1.

    All clients begin with the same initial model. Rounds only cut the training into the same
    pieces as in the other algorithms; nothing is sent.

    Deployed by client i: its own model theta_i (the initial model where it never trained).

    Source: the paper, section 3.3, "Local Training".
    """

    name = "local"
    deploys = "its own model, trained on its own images alone"
    keeps_client_state = True
    deployed_part = "model"

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """Nothing."""
        del round, scheduled
        return ()

    def client_round(
        self,
        broadcast: ServerState,
        client_state: ClientState,
        data: ClientData,
        training: LocalTraining,
    ) -> tuple[Update, ClientState]:
        """Go on training where this client stopped."""
        start = client_state.parts.get("model", broadcast.parts["model"])
        momentum = client_state.parts.get("momentum")
        trained = training.train_epochs(start, data, broadcast.round, momentum=momentum)
        update = Update(data.client, len(data), None, trained.metrics)
        return update, ClientState({"model": trained.state, **trained.kept})
