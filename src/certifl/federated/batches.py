"""Training batches of one client in one round, prepared on the device."""

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
    """A perturbation as training uses it: sample parameters and apply them."""

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
        noise: generator of the parameters.
    """

    images: torch.Tensor
    labels: torch.Tensor
    augmentation: Augmentation | None
    noise: torch.Generator

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Batch:
        """Some of its images; parts share one generator."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])

    def again(self) -> Batch:
        """The same batch with a copy of the generator: both draw the same parameters."""
        return replace(self, noise=self.noise.clone_state())

    @torch.no_grad()
    def params(self) -> torch.Tensor | None:
        """Fresh parameters, one per image; None without a perturbation."""
        if self.augmentation is None:
            return None
        channels, height, width = self.images.shape[1:]
        return self.augmentation.sample(len(self), (channels, height, width), self.noise)

    def applied(self, params: torch.Tensor | None) -> torch.Tensor:
        """The images under these parameters, never `images` itself; differentiable in both.

        A copy, since a network may modify its input in place and the batch is used again.
        """
        if self.augmentation is None or params is None:
            return self.images.clone()
        images = self.augmentation.apply(self.images, params)
        return images.clone() if images is self.images else images

    @torch.no_grad()
    def draw(self) -> torch.Tensor:
        """The images under fresh parameters: one noisy copy of each."""
        return self.applied(self.params())


def batch_bounds(images: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the batches of an epoch; the last may be smaller.

    A single remaining image joins the batch before it (unless batch_size = 1), because BatchNorm
    cannot normalize a batch of one; for every network, so that all see the same batches.
    """
    starts = list(range(0, images, batch_size))
    if batch_size > 1 and len(starts) > 1 and images - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], images], strict=True))


class BatchStream:
    """Shuffled batches of a round's epochs.

    Three generators, derived from (seed, purpose, client, round), so that switching one on or off
    does not change the others: "shuffle" (one permutation per epoch), "flip-crop", and
    "augmentation" (one sample of the perturbation per image and step). The prefix `stream` gives a
    second training in the same round its own. With `positions` (privacy draws its own batches,
    which may be empty), nothing is shuffled.
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
        """One epoch: batches of images in [0, 1] (before the perturbation) and their labels."""
        for chosen in self._positions(self._images.device):
            images = self._prepared(self._images[chosen])
            yield Batch(images, self._labels[chosen], self._augmentation, self._noise)

    def _shuffled(self, device: torch.device) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(self._labels), generator=self._shuffle, device=device)
        yield from (order[start:stop] for start, stop in self._bounds)

    @torch.no_grad()
    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        if self._flip:
            coins = torch.rand(
                len(images), 1, 1, 1, generator=self._geometry, device=images.device
            )
            images = torch.where(coins < 0.5, images.flip(-1), images)
        if self._crop:
            images = _random_crop(images, self._crop, self._geometry)
        return images.to(torch.float32).div_(255)


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


# Augmentation: one for all clients, or one per client.
#
# "Different clients could target robustness against different transformations or, in the extreme
# case, some clients could disregard robustness entirely and simply target accuracy" (the paper,
# section 4.2). Nothing else in a client's training depends on the choice.

_A = TypeVar("_A", bound=Augmentation)


@dataclass(frozen=True)
class PerClient:
    """One augmentation per client.

    Attributes:
        choices: by client, from client 0; None = no augmentation.
    """

    choices: tuple[Augmentation | None, ...]

    def of(self, client: int) -> Augmentation | None:
        """The augmentation of one client; `InputError` if there is no such client."""
        if not 0 <= client < len(self.choices):
            raise InputError(
                f"Augmentations are given for {len(self.choices)} clients, counted from 0; "
                f"client {client} has none."
            )
        return self.choices[client]


def augmentation_of(choice: Augmentation | PerClient | None, client: int) -> Augmentation | None:
    """The augmentation of one client, from one for all or one per client."""
    return choice.of(client) if isinstance(choice, PerClient) else choice


def combine_augmentations(choices: Sequence[_A | None]) -> _A | PerClient | None:
    """One augmentation if all clients have the same, else `PerClient`."""
    first = choices[0]
    return first if all(choice == first for choice in choices) else PerClient(tuple(choices))
