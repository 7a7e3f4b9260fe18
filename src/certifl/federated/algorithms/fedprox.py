"""FedProx: federated averaging whose clients stay near the global model."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import proximal_hook
from certifl.federated.states import ServerState
from certifl.federated.training.local_training import GradientHook, LocalTraining


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
