"""Federated averaging: one global model."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel


@dataclass(frozen=True)
class FedAvg(GlobalModel):
    """Federated averaging: theta_bar = sum_i w_i theta_i after each round of local SGD.

    Every participant starts from the broadcast model, trains on its own loss (Eq. 4 with
    lambda = 1) and sends the result; the server averages (Eq. 4 with lambda = 0). BatchNorm's
    running statistics are averaged with the weights, its step counters are not (`averaging`).
    Momentum does not travel; a client keeps its buffers where the schedule says "keep".

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        weighting: "uniform" (w_i = 1/n, the paper's) or "size" (by number of training images).

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data, 2017; the paper, section 3.3, "Federated Training".
    """

    weighting: str = "uniform"

    name = "fedavg"
    deploys = "the global model, the average of the last round"
