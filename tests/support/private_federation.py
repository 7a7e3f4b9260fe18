"""A network small enough to try privacy on: 55 weights, nothing beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl import rng as streams
from certifl.federated import (
    Algorithm,
    FedAvg,
    LocalTraining,
    ModelState,
    Schedule,
    deployed_model,
    describe,
    from_description,
    server_state,
    train,
)
from certifl.federated.privacy import Budget, plan_clients, plan_examples
from certifl.runs.checkpoints import Checkpoints, StoredRound
from tiny_federation import CLASSES, clients

SCHEDULE = Schedule(rounds=3, local_epochs=2, batch_size=8, lr=0.05, momentum=0.9)
KEY = b"not known to anybody"
BUDGET = Budget(max_norm=0.5, delta=1e-3, noise_multiplier=1.2)


_OPTIONS = {
    "mixture": {"personalization": 0.4},
    "fedprox": {"mu": 0.1},
    "ditto": {"mu": 0.2},
    "flix": {"personalization": 0.3},
    "l2gd": {"personalization": 0.5},
    "fedbn": {"layers": "all"},
}


def algorithm_of(name: str) -> Algorithm:
    """An algorithm by its name, with options that let it be trained with privacy."""
    return from_description({"name": name, **_OPTIONS.get(name, {})})


class PlainNet(nn.Module):
    """No normalization: every image's gradient is its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, stride=2)
        self.head = nn.Linear(4, CLASSES)
        drawn = streams.generator(seed, "plain network")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.convolution(images)).mean((2, 3)))


def example_training(
    algorithm: Algorithm, folder: Path, *, budget: Budget = BUDGET, **options: Any
) -> StoredRound:
    """Three clients with example-level privacy; `options` of `train` and of the schedule."""
    schedule = replace(SCHEDULE, **options.pop("schedule", {}))
    data, model = clients(3), PlainNet()
    level, ledger = plan_examples(
        budget, describe(algorithm), schedule, [len(one) for one in data], options.pop("key", KEY)
    )
    training = LocalTraining(model, schedule, seed=5, privacy=level)
    return train(algorithm, model, data, training, Checkpoints(folder), ledger=ledger, **options)


def client_training(
    algorithm: Algorithm,
    folder: Path,
    *,
    budget: Budget = BUDGET,
    rate: float = 0.6,
    **options: Any,
) -> StoredRound:
    """Three clients with client-level privacy."""
    data, model = clients(3), PlainNet()
    level, ledger = plan_clients(
        budget, describe(algorithm), SCHEDULE.rounds, len(data), rate, options.pop("key", KEY)
    )
    training = LocalTraining(model, SCHEDULE, seed=5)
    return train(
        algorithm, model, data, training, Checkpoints(folder), ledger=ledger, rule=level, **options
    )


def plain_training(folder: Path, **schedule: Any) -> StoredRound:
    """The same three clients without privacy."""
    model, plan = PlainNet(), replace(SCHEDULE, **schedule)
    training = LocalTraining(model, plan, seed=5)
    return train(FedAvg(), model, clients(3), training, Checkpoints(folder))


def models(algorithm: Algorithm, stored: StoredRound) -> dict[str, ModelState]:
    """The server's model and everybody's deployed one."""
    deployed = {str(i): deployed_model(algorithm, stored, i) for i in range(3)}
    return {"server": server_state(stored).parts["model"], **deployed}
