"""Personalization: fine-tuning what any algorithm deploys, on each client's own images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.local_training import LocalTraining
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update


@dataclass(frozen=True)
class Personalized:
    """Personalized training: federated rounds of `base`, then each client fine-tunes alone.

    The rounds are exactly those of `base`: the same states, bit for bit. In ONE extra round after
    them without communication every client starts from the model that `base` would deploy to it
    and minimizes its own loss (Eq. 4 with lambda = 1), with the personalization's augmentation,
    which may be another than the federated one, or none. Momentum starts afresh.

    Deployed by client i: its fine-tuned model (what `base` deploys until it has one).

    Attributes:
        base: any other algorithm.
        epochs: of fine-tuning.
        lr: learning rate of fine-tuning, constant; None = that of the schedule's last epoch.

    Raises:
        SpecError: a hyper-parameter outside its range, or a `base` that is personalized already.

    Source: Yu et al., Salvaging Federated Learning by Local Adaptation, 2020; the paper,
    section 3.3, "Personalized Training".
    """

    base: Algorithm
    epochs: int = 2
    lr: float | None = None

    name = "personalized"
    deploys = "its own fine-tuned copy of the model that the base deploys"
    keeps_client_state = True
    extra_rounds = 1

    def __post_init__(self) -> None:
        ALGORITHMS.check_component(self)
        # After the base's own extra rounds: they belong to what it deploys.
        object.__setattr__(self, "extra_rounds", self.base.extra_rounds + 1)

    @property
    def client_needs(self) -> tuple[str, ...] | None:
        """The base's."""
        return self.base.client_needs

    def init(self, model_state: ModelState) -> ServerState:
        """The base's beginning."""
        return self.base.init(model_state)

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """The base's parts; the fine-tuned model stays with the client."""
        shared = round < scheduled + self.base.extra_rounds
        return self.base.sends(round, scheduled) if shared else ()

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """The base's round, or after its last one, fine-tuning."""
        if broadcast.round < training.schedule.rounds + self.base.extra_rounds:
            return self.base.client_round(broadcast, state, data, training)
        start = self.base.deployed(broadcast, state)
        tuned = training.finetune(start, data, broadcast.round, epochs=self.epochs, lr=self.lr)
        update = Update(data.client, len(data), None, tuned.metrics)
        return update, ClientState({"personalized": tuned.state})

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The base's aggregation; fine-tuned models are not sent: the last round adds nothing."""
        return self.base.aggregate(server_state, updates)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The fine-tuned model."""
        tuned = client_state.parts.get("personalized")
        return self.base.deployed(server_state, client_state) if tuned is None else tuned
