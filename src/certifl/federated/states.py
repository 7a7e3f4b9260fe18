"""What moves between server and clients, and the images a client trains on.

State is made of named parts, each a plain dict of CPU tensors, so that it can be stored as
safetensors and sent as arrays without knowing which algorithm it belongs to. Nothing here is ever
mutated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from certifl.errors import InputError

ModelState = dict[str, torch.Tensor]
Parts = dict[str, ModelState]


@dataclass(frozen=True)
class ServerState:
    """What the server holds after `round` finished rounds, and broadcasts before the next one.

    Attributes:
        round: finished rounds, from 0.
        parts: named dicts of CPU tensors; the global model, where there is one, is "model".
    """

    round: int
    parts: Parts


@dataclass(frozen=True)
class ClientState:
    """What one client keeps between rounds; no parts at all is a client that has not trained.

    Attributes:
        parts: named dicts of CPU tensors, such as "model" or "momentum".
    """

    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one client sends to the server after a round.

    Attributes:
        client: who sends it.
        weight: number of training images behind it.
        model: the trained model; None where the client keeps it to itself.
        metrics: numbers about this client's round (loss and accuracy on its training stream).
        extra: further named parts that an algorithm sends (control variates, for instance).
    """

    client: int
    weight: float
    model: ModelState | None
    metrics: dict[str, float]
    extra: Parts = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's training images.

    Attributes:
        client: number of the client; its random streams are derived from it.
        images: uint8, (n, c, h, w).
        labels: int64, (n,).

    Raises:
        InputError: images of another type or shape, or not as many labels as images.
    """

    client: int
    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise InputError(
                f"Client {self.client}: images must be uint8 of shape (n, c, h, w), got "
                f"{self.images.dtype} of shape {tuple(self.images.shape)}."
            )
        if self.labels.shape != self.images.shape[:1]:
            raise InputError(
                f"Client {self.client}: {len(self.images)} images need as many labels, got "
                f"labels of shape {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ClientData:
        """The same data on another device (the very same tensors where they are there already)."""
        return ClientData(self.client, self.images.to(device), self.labels.to(device))
