"""States and updates that move between server and clients, and a client's training images.

A state consists of named parts, each a dict of CPU tensors, so that it can be stored as
safetensors and sent as arrays whatever the algorithm. Nothing here is ever mutated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from certifl.errors import InputError

ModelState = dict[str, torch.Tensor]
Parts = dict[str, ModelState]


@dataclass(frozen=True)
class ServerState:
    """The server's state after `round` finished rounds, broadcast before the next one.

    Attributes:
        round: finished rounds, from 0.
        parts: named dicts of CPU tensors; the global model, where there is one, is "model".
    """

    round: int
    parts: Parts


@dataclass(frozen=True)
class ClientState:
    """What one client keeps between rounds; no parts before it has trained.

    Attributes:
        parts: named dicts of CPU tensors, such as "model" or "momentum".
    """

    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one client sends to the server after a round.

    Attributes:
        client: number of the client.
        weight: its number of training images.
        model: the trained model; None if it stays with the client.
        metrics: of this client's round (training loss and accuracy).
        extra: further named parts that an algorithm sends (control variates, for instance).
    """

    client: int
    weight: float
    model: ModelState | None
    metrics: dict[str, float]
    extra: Parts = field(default_factory=dict)

    @property
    def parts(self) -> Parts:
        """Everything that is sent: the model, where there is one, as "model", and the extra."""
        return self.extra if self.model is None else {"model": self.model, **self.extra}


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's training images; InputError for other types and shapes.

    Attributes:
        client: number of the client; its random streams are derived from it.
        images: uint8, (n, c, h, w).
        labels: int64, (n,).
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
        """The same data on another device."""
        return ClientData(self.client, self.images.to(device), self.labels.to(device))
