"""A mixture of global and local models: clients are pulled towards the average."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import proximal_hook
from certifl.federated.states import ServerState
from certifl.federated.training.local_training import LocalTraining
from certifl.federated.training.schedule import Schedule
from certifl.federated.training.steps import GradientHook


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
