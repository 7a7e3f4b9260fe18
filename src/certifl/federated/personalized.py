"""Personalisation: fine-tuning what any algorithm deploys, on each client's own images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from certifl.errors import SpecError
from certifl.federated.base import Algorithm, sent_by_clients
from certifl.federated.records import check_number
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update

if TYPE_CHECKING:
    from certifl.federated.client import LocalTraining

__all__ = ["Personalized"]


@dataclass(frozen=True)
class Personalized:
    """Personalised training: federated rounds of `base`, then each client fine-tunes alone.

    The rounds are exactly those of `base`: the same states, bit for bit. In ONE extra round after
    them without communication every client starts from the model that `base` would deploy to it
    and minimises its own loss (Eq. 4 with lambda = 1), with the personalisation's augmentation,
    which may be another than the federated one, or none. Momentum starts afresh.

    Deployed by client i: its fine-tuned model (what `base` deploys until it has one).

    Attributes:
        base: any other algorithm.
        epochs: passes of fine-tuning over the client's images.
        lr: learning rate of fine-tuning, constant; None = that of the schedule's last epoch.

    Raises:
        SpecError: a hyper-parameter outside its range, or a `base` that is personalised already.

    Source: Yu et al., Salvaging Federated Learning by Local Adaptation, 2020; the paper,
    section 3.3, "Personalized Training".
    """

    base: Algorithm
    epochs: int = 2
    lr: float | None = None

    name: ClassVar[str] = "personalized"
    deploys: ClassVar[str] = "its own fine-tuned copy of the model that the base deploys"
    keeps_client_state: ClassVar[bool] = True
    extra_rounds: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.base, Personalized):
            raise SpecError(
                "base = personalized is not allowed: fine-tune once, with more epochs."
            )
        check_number("epochs", self.epochs, "a whole number from 1", low=1, whole=True)
        if self.lr is not None:
            check_number("lr", self.lr, "a number above 0", low=0, open_low=True)
        # After the base's own extra rounds: they belong to what it deploys.
        object.__setattr__(self, "extra_rounds", self.base.extra_rounds + 1)

    @property
    def client_needs(self) -> tuple[str, ...] | None:
        """The base's."""
        return getattr(self.base, "client_needs", None)

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """The base's parts; the fine-tuned model stays with the client."""
        if round < scheduled + self.base.extra_rounds:
            return sent_by_clients(self.base, round, scheduled)
        return ()

    def init(self, model_state: ModelState) -> ServerState:
        """The base's beginning."""
        return self.base.init(model_state)

    def client_round(
        self,
        broadcast: ServerState,
        client_state: ClientState,
        data: ClientData,
        training: LocalTraining,
    ) -> tuple[Update, ClientState]:
        """The base's round, or after its last one, fine-tuning."""
        if broadcast.round < training.schedule.rounds + self.base.extra_rounds:
            return self.base.client_round(broadcast, client_state, data, training)
        start = self.base.deployed(broadcast, client_state)
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
