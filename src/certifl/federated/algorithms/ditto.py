"""Ditto: a personal model beside federated averaging, kept near the global one."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import proximal_hook
from certifl.federated.states import ClientData, ClientState, ServerState, Update
from certifl.federated.training.local_training import LocalTraining


@dataclass(frozen=True)
class Ditto(GlobalModel):
    """Ditto: clients take part in federated averaging and each trains a model v_i of its own.

      v_i <- v_i - gamma (grad L_i(v_i) + mu (v_i - theta_bar)),

    with theta_bar the global model as broadcast at the beginning of the round. The global model
    is that of federated averaging, bit for bit, whatever mu is. Both trainings take the schedule's
    passes over the same batches, so a round costs twice the work. The bracket is the gradient
    handed to SGD, so momentum applies to all of it; the pull is stable for
    lr mu < 2 (1 + momentum). BatchNorm's running statistics of v_i are its own.

    Deployed by client i: its own v_i (the global model where it never trained).

    Attributes:
        mu: lambda of the source, from 0: how strongly v_i is pulled to the global model; 0 = local
            training, bit for bit.
        weighting: of the global average: "uniform" (1/n) or "size" (by number of training images).

    Source: Li, Hu, Beirami, Smith, Ditto: Fair and Robust Federated Learning Through
    Personalization, 2021, Algorithm 1.
    """

    mu: float
    weighting: str = "uniform"

    name = "ditto"
    deploys = "its own model, kept near the global model"
    keeps_client_state = True
    personal_part = "model"

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the global model and send it; train the own model and keep it."""
        start, kept = broadcast.parts["model"], state.parts
        shared = training.train_epochs(start, data, broadcast.round, momentum=kept.get("momentum"))
        own = training.train_epochs(
            kept.get("model", start),
            data,
            broadcast.round,
            momentum=kept.get("own_momentum"),
            hook=proximal_hook(training.on_device(start), self.mu),
        )
        metrics = {**own.metrics, **{f"global_{k}": v for k, v in shared.metrics.items()}}
        parts = {"model": own.state, **shared.momentum_part}
        if own.momentum:
            parts["own_momentum"] = own.momentum
        return Update(data.client, len(data), shared.state, metrics), ClientState(parts)
