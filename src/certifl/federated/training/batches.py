"""The stream of training batches of one client in one round, drawn on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from certifl import rng as streams
from certifl.errors import InputError
from certifl.federated.states import ClientData

Positions = Callable[[torch.device], Iterator[torch.Tensor]]
"""Positions (m,) of the images of each batch of one epoch, on a device."""


class Augmentation(Protocol):
    """What training needs of a perturbation: draw parameters, apply them (`perturbations`)."""

    def sample(
        self, n: int, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> torch.Tensor:
        """Parameters for n images, on the generator's device."""
        ...

    def apply(self, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """The images (m, c, h, w) in [0, 1], each with its own parameters."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step, and the perturbation to train against.

    Attributes:
        images: float32 (m, c, h, w) in [0, 1], not perturbed yet.
        labels: int64 (m,).
        augmentation: the perturbation; None = none.
        noise: the generator its parameters are drawn from, one sample after the other.
    """

    images: torch.Tensor
    labels: torch.Tensor
    augmentation: Augmentation | None
    noise: torch.Generator

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Batch:
        """Some of its images; the parts draw from one generator, one after the other."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])

    def again(self) -> Batch:
        """The same batch a second time: what is drawn for one is drawn for the other."""
        return replace(self, noise=self.noise.clone_state())

    @torch.no_grad()
    def params(self) -> torch.Tensor | None:
        """Fresh parameters, one per image; None without a perturbation."""
        if self.augmentation is None:
            return None
        channels, height, width = self.images.shape[1:]
        shape = (channels, height, width)
        return self.augmentation.sample(len(self.images), shape, self.noise)

    def applied(self, params: torch.Tensor | None) -> torch.Tensor:
        """The images under these parameters, in memory of their own; gradients flow through both.

        The batch may be looked at again, and a network may write into what it is given.
        """
        if self.augmentation is None or params is None:
            return self.images.clone()
        made = self.augmentation.apply(self.images, params)
        return made.clone() if made is self.images else made

    @torch.no_grad()
    def draw(self) -> torch.Tensor:
        """The images under fresh parameters: one noisy copy of each."""
        return self.applied(self.params())


def batch_bounds(images: int, batch_size: int) -> list[tuple[int, int]]:
    """Where the batches of an epoch begin and end; the last may be smaller.

    A single image left over joins the batch before it (unless batches are of one image anyway),
    because BatchNorm cannot normalize a batch of one. This holds for every network, so that two
    architectures see the same batches.
    """
    starts = list(range(0, images, batch_size))
    if batch_size > 1 and len(starts) > 1 and images - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], images], strict=True))


class BatchStream:
    """Shuffled batches; their generators go on from epoch to epoch within the round.

    Three streams, derived from (seed, purpose, client, round), so that switching one on or off
    leaves the others as they are: "shuffle" (one permutation per epoch), "flip-crop", and
    "augmentation" (one sample of the perturbation per image and step). `stream` names a set of
    its own, for an algorithm that passes over the images twice in a round. Where `positions` are
    given (privacy draws its own batches, which may be empty), nothing is shuffled.
    """

    def __init__(
        self,
        data: ClientData,
        *,
        batch_size: int,
        augmentation: Augmentation | None,
        flip: bool,
        crop: int,
        seed: int,
        round: int,
        stream: str = "",
        positions: Positions | None = None,
    ) -> None:
        self.client = data.client
        self._positions = self._shuffled if positions is None else positions
        self._images = data.images
        self._labels = data.labels
        self._bounds = batch_bounds(len(data), batch_size)
        self._augmentation = augmentation
        self._flip = flip
        self._crop = crop
        self._shuffle, self._geometry, self._noise = (
            streams.generator(
                seed, stream + purpose, data.client, round, device=data.images.device
            )
            for purpose in ("shuffle", "flip-crop", "augmentation")
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._bounds)

    def epoch(self) -> Iterator[Batch]:
        """One pass: batches of images in [0, 1] (before the perturbation) and their labels."""
        for chosen in self._positions(self._images.device):
            images = self._prepared(self._images[chosen])
            yield Batch(images, self._labels[chosen], self._augmentation, self._noise)

    def _shuffled(self, device: torch.device) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(self._labels), generator=self._shuffle, device=device)
        for start, stop in self._bounds:
            yield order[start:stop]

    @torch.no_grad()
    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        if self._flip:
            images = _random_flip(images, self._geometry)
        if self._crop:
            images = _random_crop(images, self._crop, self._geometry)
        return images.to(torch.float32).div_(255)


def _random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    coins = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return torch.where(coins < 0.5, images.flip(-1), images)


def _random_crop(images: torch.Tensor, margin: int, generator: torch.Generator) -> torch.Tensor:
    n, _, height, width = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (margin, margin, margin, margin))
    shifts = torch.randint(2 * margin + 1, (2, n, 1), generator=generator, device=device)
    rows = shifts[0] + torch.arange(height, device=device)
    columns = shifts[1] + torch.arange(width, device=device)
    which = torch.arange(n, device=device)
    cut = padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


# Which perturbation augments which client: one for all, or each client's own.
#
# "Different clients could target robustness against different transformations or, in the extreme
# case, some clients could disregard robustness entirely and simply target accuracy" (the paper,
# section 4.2). Nothing else of a client's training depends on the choice: random streams are named
# by client, round and purpose, so order and draws are those it would have if all trained alike.


_A = TypeVar("_A", bound=Augmentation)


@dataclass(frozen=True)
class PerClient:
    """Every client's own augmentation.

    Attributes:
        choices: by client, from client 0; None = that client trains on images as they are.
    """

    choices: tuple[Augmentation | None, ...]

    def of(self, client: int) -> Augmentation | None:
        """What augments one client's training.

        Raises:
            InputError: there is no such client.
        """
        if not 0 <= client < len(self.choices):
            raise InputError(
                f"Augmentations were chosen for {len(self.choices)} clients, counted from 0; "
                f"client {client} is none of them."
            )
        return self.choices[client]


def augmentation_of(choice: Augmentation | PerClient | None, client: int) -> Augmentation | None:
    """What augments one client's training, where that may be its own or the same for all."""
    return choice.of(client) if isinstance(choice, PerClient) else choice


def combine_augmentations(choices: Sequence[_A | None]) -> _A | PerClient | None:
    """The one augmentation that all clients have, or each client's own."""
    first = choices[0]
    return first if all(choice == first for choice in choices) else PerClient(tuple(choices))
