"""Votes: the predictions of the base classifier on noisy copies, counted per image and class.

Votes come in chunks of 100. Chunk k of an image is drawn from its own stream, a function of
(seed, purpose, image content, k), so the votes of an image do not depend on the other images, on
how chunks are packed into batches, or on where an interruption fell. Batches are always filled to
the same number of rows, because a network's rounding may differ between batch shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.certification.network import Network
from certifl.perturbations.base import Perturbation
from certifl.streams import vote_generator

__all__ = ["CHUNK", "Request", "VoteCounter"]

CHUNK = 100


@dataclass(frozen=True)
class Request:
    """Votes wanted: numbers `start` to `stop` of one image's votes of one purpose.

    Attributes:
        slot: the row of the result that counts them.
        image: the row of the images.
        key: `streams.image_key` of that image.
        purpose: "selection", "estimation", "attack" or "predict".
        start: first vote, counted from 0 over the image's votes of this purpose.
        stop: one past the last vote.
    """

    slot: int
    image: int
    key: int
    purpose: str
    start: int
    stop: int


class VoteCounter:
    """Counts votes of one network under one perturbation.

    Args:
        network: the prepared base classifier.
        perturbation: draws parameters and applies them.
        seed: the study's seed.
    """

    def __init__(self, network: Network, perturbation: Perturbation, seed: int) -> None:
        self.network = network
        self.perturbation = perturbation
        self.seed = seed

    def count(
        self, images: Tensor, requests: Sequence[Request], slots: int, centre: Tensor | None = None
    ) -> np.ndarray:
        """Votes per slot and class, (slots, classes) int64.

        Args:
            images: (m, c, h, w) float32 on the network's device.
            requests: which votes of which images.
            slots: number of rows of the result.
            centre: (slots, *params_shape) added to the drawn parameters: the votes are then those
                of g_delta, the smoothed classifier at a shifted parameter.
        """
        network = self.network
        totals = torch.zeros(slots * network.classes, dtype=torch.int64, device=network.device)
        with torch.inference_mode():
            for rows, slot, params in _batches(self._chunks(images, requests), network.batch_size):
                shifted = params if centre is None else params + centre[slot]
                classes = self._votes(images, rows, shifted)[: len(slot)]
                ones = torch.ones_like(classes)
                totals.scatter_add_(0, slot * network.classes + classes, ones)
        return totals.view(slots, network.classes).cpu().numpy()

    def _votes(self, images: Tensor, rows: Tensor, params: Tensor) -> Tensor:
        """Predicted classes; the batch is filled with copies of its last row."""
        missing = self.network.batch_size - len(rows)
        if missing:
            rows = torch.cat([rows, rows[-1:].expand(missing)])
            params = torch.cat([params, params[-1:].expand(missing, *params.shape[1:])])
        noisy = self.perturbation.apply(images[rows], params)
        return self.network.call(noisy).argmax(dim=1)

    def _chunks(self, images: Tensor, requests: Sequence[Request]) -> Iterator[_Votes]:
        device = self.network.device
        channels, height, width = images.shape[1:]
        for request in requests:
            for chunk in range(request.start // CHUNK, -(-request.stop // CHUNK)):
                first = chunk * CHUNK
                generator = vote_generator(
                    self.seed, request.purpose, request.key, chunk, device=device
                )
                # Always the whole chunk, so that its votes do not depend on the part wanted.
                params = self.perturbation.sample(CHUNK, (channels, height, width), generator)
                wanted = params[max(request.start - first, 0) : request.stop - first]
                yield _Votes(request.image, request.slot, wanted)


@dataclass(frozen=True)
class _Votes:
    image: int
    slot: int
    params: Tensor


def _batches(chunks: Iterator[_Votes], batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pack chunks of many images into batches of (image rows, slots, parameters)."""
    waiting: list[_Votes] = []
    size = 0
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk.params)
        while size >= batch_size:
            taken, waiting = _split(waiting, batch_size)
            size -= batch_size
            yield _packed(taken)
    if waiting:
        yield _packed(waiting)


def _split(chunks: list[_Votes], votes: int) -> tuple[list[_Votes], list[_Votes]]:
    taken: list[_Votes] = []
    for position, chunk in enumerate(chunks):
        length = len(chunk.params)
        if length > votes:
            taken.append(_Votes(chunk.image, chunk.slot, chunk.params[:votes]))
            rest = _Votes(chunk.image, chunk.slot, chunk.params[votes:])
            return taken, [rest, *chunks[position + 1 :]]
        taken.append(chunk)
        votes -= length
        if votes == 0:
            return taken, chunks[position + 1 :]
    return taken, []


def _packed(chunks: list[_Votes]) -> tuple[Tensor, Tensor, Tensor]:
    params = torch.cat([chunk.params for chunk in chunks])
    lengths = [len(chunk.params) for chunk in chunks]
    rows = np.repeat([chunk.image for chunk in chunks], lengths)
    slots = np.repeat([chunk.slot for chunk in chunks], lengths)
    device = params.device
    return torch.as_tensor(rows, device=device), torch.as_tensor(slots, device=device), params
