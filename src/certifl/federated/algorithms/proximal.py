"""Algorithms whose local steps are pulled to the global model: FedProx, Ditto, the mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.local_training import LocalTraining, with_counted_steps
from certifl.federated.privacy.accounting import STEPS
from certifl.federated.schedule import Schedule
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.steps import (
    GradientHook,
    foreach_add,
    foreach_scale,
    foreach_sub,
    gradients_of,
)


def proximal_hook(center: ModelState, mu: float, loss_weight: float = 1.0) -> GradientHook | None:
    """The gradient of theta becomes loss_weight times itself plus mu (theta - center).

    Args:
        center: on the training device (`LocalTraining.on_device`).
        mu: weight of the proximal term mu/2 ||theta - center||^2; at 0 there is no hook.
        loss_weight: of the loss beside it.
    """
    if mu == 0:
        return None

    def pull(parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = gradients_of(parameters.values())
        if loss_weight != 1:
            foreach_scale(gradients, loss_weight)
        apart = foreach_sub(list(parameters.values()), [center[name] for name in parameters])
        foreach_add(gradients, apart, mu)

    return pull


@dataclass(frozen=True)
class FedProx(GlobalModel):
    """FedProx: in its local steps every client minimizes its loss and a proximal term.

      L_i(theta) + mu/2 ||theta - theta_bar||^2        (Eq. 2 of the source)

    with theta_bar the global model as broadcast, and the server averages. The proximal term keeps
    clients whose images differ from drifting apart within a round. Its gradient
    mu (theta - theta_bar) is added to that of the loss, so momentum applies to both. Parameters
    are pulled, BatchNorm's running statistics are not. The pull is stable for
    lr mu < 2 (1 + momentum).

    Clients take the schedule's passes where the source allows each its own inexactness gamma.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        mu: weight of the proximal term, from 0; 0 = federated averaging, bit for bit.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, Federated Optimization in Heterogeneous
    Networks, 2020, Algorithm 2 and Eq. (2).
    """

    mu: float
    weighting: str = "uniform"

    name = "fedprox"
    deploys = "the global model, the average of the last round"

    def hook(self, broadcast: ServerState, training: LocalTraining) -> GradientHook | None:
        """The gradient of the proximal term."""
        return proximal_hook(training.on_device(broadcast.parts["model"]), self.mu)


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
        of_global = {f"global_{k}": v for k, v in shared.metrics.items() if k != STEPS}
        metrics = with_counted_steps({**own.metrics, **of_global}, shared.metrics)
        parts = {"model": own.state, **shared.momentum_part}
        if own.momentum:
            parts["own_momentum"] = own.momentum
        return Update(data.client, len(data), shared.state, metrics), ClientState(parts)


@dataclass(frozen=True)
class Mixture(GlobalModel):
    """Mixture of models: every client keeps its own theta_i and is pulled towards the average.

    Each local step follows Eq. (5),

      theta_i <- theta_i - gamma (lambda grad L_i(theta_i) + 2 (1 - lambda)(theta_i - theta_bar)),

    with theta_bar = 1/n sum_i theta_i as broadcast, FIXED during the round's local steps. The
    bracket is the gradient handed to SGD, so momentum applies to all of it. Weight decay belongs
    to L_i (it adds decay/2 ||theta_i||^2 to it) and is scaled by lambda with it: lambda = 1 is
    local training, bit for bit. lambda also scales the step taken on the loss: a small lambda
    trains slowly as well as jointly. The pull alone is stable for gamma (1 - lambda) < 1.

    Parameters are pulled; BatchNorm's running statistics are not, each client keeps its own, and
    the average of them only travels along. With partial participation theta_bar is the average
    over those who took part.

    Deployed by client i: its own theta_i (the initial model where it never trained).

    Attributes:
        personalization: lambda in [0, 1]; 1 = local training, 0 = the pull alone.

    Source: Hanzely and Richtarik, Federated Learning of a Mixture of Global and Local Models,
    2020; the paper, Eq. (4) and (5).
    """

    personalization: float

    name = "mixture"
    deploys = "its own model, pulled towards the average of all"
    keeps_client_state = True
    personal_part = "model"

    def hook(self, broadcast: ServerState, training: LocalTraining) -> GradientHook | None:
        """Turns grad L_i into the bracket of Eq. (5); None at lambda = 1."""
        center = training.on_device(broadcast.parts["model"])
        return proximal_hook(center, 2 * (1 - self.personalization), self.personalization)

    def weight_decay(self, schedule: Schedule) -> float:
        """Scaled by lambda, as part of L_i."""
        return self.personalization * schedule.weight_decay
