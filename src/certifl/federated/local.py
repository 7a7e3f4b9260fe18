"""Training alone: every client on its own images, without communication."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update

if TYPE_CHECKING:
    from certifl.federated.client import LocalTraining

__all__ = ["Local"]


@dataclass(frozen=True)
class Local:
    """Local training: each client minimises its own loss L_i(theta_i), Eq. (4) with lambda = 1.

    All clients begin with the same initial model. Rounds only cut the training into the same
    pieces as in the other algorithms; nothing is sent.

    Deployed by client i: its own model theta_i (the initial model where it never trained).

    Source: the paper, section 3.3, "Local Training".
    """

    name: ClassVar[str] = "local"
    deploys: ClassVar[str] = "its own model, trained on its own images alone"
    keeps_client_state: ClassVar[bool] = True
    extra_rounds: ClassVar[int] = 0

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """Nothing: models stay where they are."""
        del round, scheduled
        return ()

    def init(self, model_state: ModelState) -> ServerState:
        """The server only remembers the initial model."""
        return ServerState(0, {"model": model_state})

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
        trained = training.passes(start, data, broadcast.round, momentum=momentum)
        update = Update(data.client, len(data), None, trained.metrics)
        return update, ClientState({"model": trained.state, **trained.kept})

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Nothing arrives: only the round is counted."""
        for _ in updates:
            pass
        return ServerState(server_state.round + 1, server_state.parts)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The client's own model."""
        return client_state.parts.get("model", server_state.parts["model"])
