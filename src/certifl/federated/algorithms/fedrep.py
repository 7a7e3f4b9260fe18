"""FedRep: a shared representation, and a head of its own for every client."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import head_keys, withhold
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.training.local_training import GradientHook, LocalTraining


@dataclass(frozen=True)
class FedRep(GlobalModel):
    """FedRep: a representation that all clients train, and a head of its own for each.

    In a round every client first trains its head with the representation frozen, then the
    representation with its head frozen, and sends the representation.

    The head is trained for `head_epochs` at the round's learning rate, with fresh momentum and its
    own random streams; the representation for the schedule's epochs. In what a client sends the
    head is as it was broadcast, so that nothing of it leaves. BatchNorm's running statistics
    of the representation follow both trainings and are averaged.

    Without a head (`head = ""`) this is federated averaging, bit for bit.

    Deployed by client i: the shared representation with its own head (the initial one where it
    never trained).

    Attributes:
        head: name of the part of the network that is personal, such as "head"; None = its last
            layer with weights; "" = nothing.
        head_epochs: of the head in each round, from 1.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range; in a round, a `head` that the
            network does not have.

    Source: Collins, Hassani, Mokhtari, Shakkottai, Exploiting Shared Representations for
    Personalized Federated Learning, 2021, Algorithm 1.
    """

    head: str | None = None
    head_epochs: int = 1
    weighting: str = "uniform"

    name = "fedrep"
    deploys = "the shared representation with its own head"
    keeps_client_state = True

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the head, then the representation; send the representation, keep the head."""
        head = head_keys(training.network, self.head)
        if head:
            trained = training.train_epochs(
                self.deployed(broadcast, state),
                data,
                broadcast.round,
                hook=_freeze(training.trainable, but=head),
                stream="head-",
                epochs=self.head_epochs,
            )
            # All of it, since BatchNorm's running statistics have moved too.
            state = ClientState({**state.parts, "head": trained.state})
        update, kept = super().client_round(broadcast, state, data, training)
        return withhold(update, kept, broadcast, head, "head")

    def hook(self, broadcast: ServerState, training: LocalTraining) -> GradientHook | None:
        """Freezes the head while the representation is trained."""
        return _freeze(head_keys(training.network, self.head), but=())

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The shared representation with the client's own head."""
        return {**server_state.parts["model"], **client_state.parts.get("head", {})}


def _freeze(names: Collection[str], but: Collection[str]) -> GradientHook | None:
    """A hook that removes the gradients of these weights."""
    frozen = frozenset(names).difference(but)
    if not frozen:
        return None

    def hook(parameters: Mapping[str, nn.Parameter]) -> None:
        for name in frozen & parameters.keys():
            parameters[name].grad = None

    return hook
