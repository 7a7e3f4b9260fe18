"""The training schedule: rounds, epochs and learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.errors import SpecError
from certifl.registry import check_choice, check_number


def participants(share: float, clients: int) -> int:
    """How many of the clients take part in a round, at least one."""
    return max(1, round(share * clients))


def check_arithmetic(precision: str, memory_format: str) -> None:
    """Refuse arithmetic without gradients of single images (SpecError)."""
    if precision != "float32":
        raise SpecError(
            'privacy.kind = "example" clips the gradient of every image: it needs '
            'training.precision = "float32".'
        )
    if memory_format == "channels-last":
        raise SpecError(
            'privacy.kind = "example" computes the gradient of every image by itself: it needs '
            'training.memory_format = "contiguous".'
        )


@dataclass(frozen=True)
class Schedule:
    """Rounds, local epochs and SGD, with step decay over ALL epochs; SpecError for other values.

    The optimizer's state is never sent. `momentum_between_rounds` says whether a client keeps its
    momentum buffers between rounds; the paper's published code keeps them.

    Attributes:
        rounds: communication rounds; 0 = the initial model is deployed.
        local_epochs: epochs over the client's images in each round.
        batch_size: images in a step. The last batch of an epoch may be smaller, but a single
            remaining image joins the batch before it: BatchNorm cannot normalize one image.
        lr: learning rate of the first epoch.
        momentum: of SGD, 0 = none.
        weight_decay: of SGD, coefficient of ||theta||^2 / 2 inside the client's loss L_i.
        decay_every: epochs between decays of the learning rate, counted over the whole training
            (round * local_epochs + epoch), None = no decay.
        decay_factor: multiplies the learning rate at each decay.
        momentum_between_rounds: "reset" (every round starts with empty buffers), or "keep" (every
            client keeps its own from one of its rounds to the next).
        flip: mirror each image left to right with probability 1/2.
        crop: pixels of zero padding of a random crop of the image's own size, 0 = none.
    """

    rounds: int
    local_epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_every: int | None = None
    decay_factor: float = 0.1
    momentum_between_rounds: str = "reset"
    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        check_number("rounds", self.rounds, "a whole number of at least 0", low=0, whole=True)
        for key in ("local_epochs", "batch_size"):
            check_number(key, getattr(self, key), "a whole number, at least 1", low=1, whole=True)
        check_number("lr", self.lr, "a number above 0", low=0, open_low=True)
        check_number("momentum", self.momentum, "a number from 0 up to 1", low=0, high=1)
        check_number("weight_decay", self.weight_decay, "a number of at least 0", low=0)
        if self.decay_every is not None:
            allowed = "a whole number of epochs, at least 1"
            check_number("decay_every", self.decay_every, allowed, low=1, whole=True)
        check_number(
            "decay_factor", self.decay_factor, "above 0, up to 1", low=0, high=1, open_low=True
        )
        check_number("crop", self.crop, "a whole number of pixels, at least 0", low=0, whole=True)
        check_choice("momentum_between_rounds", self.momentum_between_rounds, ("reset", "keep"))

    @property
    def epochs(self) -> int:
        """Local epochs of the whole training."""
        return self.rounds * self.local_epochs

    @property
    def keeps_momentum(self) -> bool:
        """Whether clients carry momentum buffers from round to round."""
        return self.momentum > 0 and self.momentum_between_rounds == "keep"

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0 over the whole training."""
        decays = 0 if self.decay_every is None else epoch // self.decay_every
        return self.lr * self.decay_factor**decays
