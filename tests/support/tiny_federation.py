"""A federation small enough for tests: a network with BatchNorm and dropout, random images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl import rng as streams
from certifl.federated import (
    Algorithm,
    ClientData,
    FedAvg,
    LocalTraining,
    ModelState,
    Progress,
    Schedule,
    train,
)
from certifl.runs.checkpoints import Checkpoints, StoredRound

CLASSES = 3
_DECAY = {"weight_decay": 1e-3, "decay_every": 2, "decay_factor": 0.5}
SCHEDULE = Schedule(rounds=3, local_epochs=2, batch_size=8, lr=0.05, momentum=0.9, **_DECAY)


@dataclass(frozen=True)
class Noise:
    sigma: float = 0.1

    def sample(self, n, image_shape, generator):
        noise = torch.randn(n, *image_shape, generator=generator, device=generator.device)
        return noise * self.sigma

    def apply(self, images, params):
        return images + params


class TinyNet(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4, CLASSES)
        drawn = streams.generator(seed, "tiny network")
        with torch.no_grad():
            for parameter in (*self.convolution.parameters(), *self.head.parameters()):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.convolution(images)))
        return self.head(self.dropout(features.mean((2, 3))))


def client_data(client: int, images: int = 20) -> ClientData:
    drawn = streams.generator(7, "tiny data", client)
    pixels = torch.randint(256, (images, 1, 8, 8), generator=drawn, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (images,), generator=drawn)
    pixels[:, 0, 0] = (labels[:, None] * 100).to(torch.uint8)  # something to learn
    return ClientData(client, pixels, labels)


def clients(count: int = 3) -> list[ClientData]:
    return [client_data(client, images=14 + 3 * client) for client in range(count)]


def training(**changes: Any) -> LocalTraining:
    model = changes.pop("model", None)
    augmentation = changes.pop("augmentation", Noise())
    return LocalTraining(
        TinyNet() if model is None else model,
        replace(SCHEDULE, **changes),
        seed=5,
        augmentation=augmentation,
        finetuning_augmentation=Noise(0.3),
    )


def federate(
    folder: Path,
    algorithm: Algorithm | None = None,
    data: Sequence[ClientData] | None = None,
    local: LocalTraining | None = None,
    *,
    count: int = 3,
    rounds: int = SCHEDULE.rounds,
    **options: Any,
) -> StoredRound:
    """The tiny network, trained by a federation into a folder: FedAvg unless told otherwise."""
    return train(
        FedAvg() if algorithm is None else algorithm,
        TinyNet(),
        clients(count) if data is None else data,
        training(rounds=rounds) if local is None else local,
        Checkpoints(folder),
        **options,
    )


def in_pieces(
    every: int, work: Callable[[Callable[[Progress], None]], StoredRound]
) -> tuple[StoredRound, int]:
    """Work that is stopped at every so many reports of progress until it ends; number of stops."""
    seen = stops = 0

    def stop(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen % every == 0:
            raise KeyboardInterrupt

    while True:
        try:
            return work(stop), stops
        except KeyboardInterrupt:
            stops += 1


def assert_same(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Equal keys, dtypes and bytes, at any depth."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, Mapping):
            assert_same(value, right[key])
        else:
            assert value.dtype == right[key].dtype, key
            assert value.shape == right[key].shape, key
            assert _bytes(value) == _bytes(right[key]), key


def differ(left: ModelState, right: ModelState) -> bool:
    return any(not torch.equal(left[name], right[name]) for name in left)


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without the clock, which no resume can repeat."""
    return [
        {
            **{key: value for key, value in entry.items() if key != "seconds"},
            "clients": [
                {k: v for k, v in row.items() if k != "seconds"} for row in entry["clients"]
            ],
        }
        for entry in history
    ]
