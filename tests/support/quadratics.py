"""Clients whose losses are parabolas: what an algorithm converges to is known in closed form.

Client i has the loss L_i(theta) = a_i/2 (theta - b_i)^2 for one number theta: all its images have
the intensity b_i, and all its labels are a_i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from certifl.federated import (
    Algorithm,
    ClientData,
    ClientState,
    LocalTraining,
    Schedule,
    ServerState,
    state_of,
    total_rounds,
)

CURVATURES = (1, 2, 4)
BYTES = (0, 102, 255)
CENTERS = tuple(byte / 255 for byte in BYTES)
# All weights of the clients equal, the mean loss is least here.
BEST = sum(a * b for a, b in zip(CURVATURES, CENTERS, strict=True)) / sum(CURVATURES)


class Point(nn.Module):
    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.theta - images.to(torch.float64).mean((1, 2, 3))[:, None]


@dataclass(frozen=True)
class Parabola:
    name: ClassVar[str] = "parabola"

    def __call__(self, model, batch):
        away = model(batch.draw())
        loss = (batch.labels * away[:, 0].square() / 2).mean()
        return loss, torch.cat([away, away], 1)


def parabolas(count: int = len(CURVATURES)) -> list[ClientData]:
    return [
        ClientData(
            client,
            torch.full((4, 1, 1, 1), BYTES[client], dtype=torch.uint8),
            torch.full((4,), CURVATURES[client]),
        )
        for client in range(count)
    ]


def training(rounds: int, steps: int = 1, lr: float = 0.05, **options: float) -> LocalTraining:
    """Full gradients: a batch is all images of a client, and a round takes `steps` of them."""
    schedule = Schedule(rounds, steps, batch_size=4, lr=lr, **options)
    return LocalTraining(Point(), schedule, seed=1, objective=Parabola())


def run(
    algorithm: Algorithm, local: LocalTraining, start: float = 0.5, skip: Sequence[int] = ()
) -> tuple[ServerState, list[ClientState]]:
    """All rounds of the three clients; those in `skip` never take part."""
    data = parabolas()
    server = algorithm.init(state_of(Point(start)))
    states = [ClientState() for _ in data]
    for _ in range(total_rounds(algorithm, local)):
        updates = []
        for client, one in enumerate(data):
            if client not in skip:
                update, states[client] = algorithm.client_round(server, states[client], one, local)
                updates.append(update)
        server = algorithm.aggregate(server, updates)
    return server, states


def value(state: dict[str, torch.Tensor]) -> float:
    return state["theta"].item()
