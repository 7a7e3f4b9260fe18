"""Votes: the predictions of the base classifier on noisy copies, counted per image and class.

Votes come in chunks of 100. Chunk k of an image is drawn from its own stream, a function of
(seed, purpose, image content, k), so the votes of an image do not depend on the other images, on
how chunks are packed into batches, or on where an interruption fell. Batches are always filled to
the same number of rows, because a network's rounding may differ between batch shapes. Where the
memory is too small for them, votes are cast again, from the start of the call, in batches of half
the size: counting is a pure function, so nothing is lost and nothing is counted twice.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from certifl.certification.counts import Request
from certifl.certification.network import Network
from certifl.errors import first_line
from certifl.perturbations.base import Perturbation
from certifl.rng import vote_generator
from certifl.torch_env import exact_convolutions, keep_freed_memory, one_thread, out_of_memory

CHUNK = 100
_log = logging.getLogger(__name__)

_VOTES_PER_IMAGE = 3200
_CALLS_PER_IMAGE = 4
_Counted = TypeVar("_Counted")


def votes_per_image(batch_size: int) -> int:
    """The most votes of one image in a batch of requests: whole chunks, enough for some calls.

    With fewer, a last image alone would leave most of a large call empty. The votes do not depend
    on where they are cut.
    """
    chunks = -(-_CALLS_PER_IMAGE * batch_size // CHUNK)
    return max(_VOTES_PER_IMAGE, chunks * CHUNK)


class VoteCounter:
    """Counts votes of one network under one perturbation.

    Attributes:
        network: the prepared base classifier; its `batch_size` is the one in use, which is halved
            when memory runs out.
        perturbation: draws parameters and applies them.
        seed: the study's seed.
    """

    def __init__(self, network: Network, perturbation: Perturbation, seed: int) -> None:
        self.network = network
        self.perturbation = perturbation
        self.seed = seed
        if network.device.type == "cpu":
            keep_freed_memory()

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

        def counted() -> np.ndarray:
            classes = self.network.classes
            totals = torch.zeros(slots * classes, dtype=torch.int64, device=self.network.device)
            for slot, _, voted in self._cast(images, requests, centre):
                totals.scatter_add_(0, slot * classes + voted, torch.ones_like(voted))
            return totals.view(slots, classes).cpu().numpy()

        return self._within_memory(counted)

    def classes(self, images: Tensor, rows: Tensor, params: Tensor) -> np.ndarray:
        """The votes of given noisy copies one by one, (k,) int64.

        Args:
            images: as in `count`.
            rows: (k,) which image. params: (k, *params_shape), whole parameters.
        """

        def voted() -> np.ndarray:
            size, device = self.network.batch_size, self.network.device
            parts = [
                self._votes(images, row, param)[: len(row)]
                for row, param in zip(
                    rows.to(device).split(size), params.to(device).split(size), strict=True
                )
            ]
            return torch.cat(parts).cpu().numpy()

        return self._within_memory(voted)

    def disagreement(
        self,
        images: Tensor,
        requests: Sequence[Request],
        expected: Tensor,
        centre: Tensor | None = None,
    ) -> Tensor:
        """Direction of the noise whose votes disagree with the expected class, per slot.

        The sum over votes of phi (1[other class] - share of other classes), a multiple of the
        covariance of noise and disagreement. For Gaussian noise its expectation is a multiple of
        the gradient along which the expected class loses most probability (Stein's lemma).

        Args:
            images, requests, centre: as in `count`; drawn parameters are counted without `centre`.
            expected: (slots,) int64, a class per slot, on the network's device.

        Returns:
            (slots, *params_shape) float32 on the network's device.
        """

        def summed() -> Tensor:
            shape = self.perturbation.params_shape(_chw(images))
            disagreeing = torch.zeros((len(expected), *shape), device=self.network.device)
            drawn, count = torch.zeros_like(disagreeing), disagreeing.new_zeros((len(expected), 2))
            for slot, params, voted in self._cast(images, requests, centre):
                other = (voted != expected[slot]).to(params.dtype)
                _add_rows(drawn, slot, params)
                _add_rows(disagreeing, slot, params * _like(other, params))
                _add_rows(count, slot, torch.stack([other, torch.ones_like(other)], dim=1))
            share = count[:, 0] / count[:, 1].clamp(min=1)
            return disagreeing - drawn * _like(share, drawn)

        return self._within_memory(summed)

    def _within_memory(self, work: Callable[[], _Counted]) -> _Counted:
        """Do the work, from its start again in half the batch size whenever memory runs out."""
        while True:
            try:
                # Held to one way of adding up, so that the same votes are cast at every run.
                with (
                    torch.inference_mode(),
                    exact_convolutions(self.network.device),
                    one_thread(self.network.threads == 1),
                ):
                    return work()
            except (RuntimeError, MemoryError) as error:
                size = self.network.batch_size
                if size == 1 or not out_of_memory(error):
                    raise
                reason = first_line(error)
            # Outside the handler: the error would keep the tensors of its frames alive.
            if self.network.device.type == "cuda":
                torch.cuda.empty_cache()
            _log.warning("Memory ran out at %d noisy images a batch: halved. (%s)", size, reason)
            self.network = dataclasses.replace(self.network, batch_size=size // 2)

    def _cast(
        self, images: Tensor, requests: Sequence[Request], centre: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of votes: the slots they belong to, the drawn parameters, the classes voted."""
        chunks = self._chunks(images, requests)
        for rows, slot, params in _batches(chunks, self.network.batch_size):
            shifted = params if centre is None else params + centre[slot]
            yield slot, params, self._votes(images, rows, shifted)[: len(slot)]

    def _votes(self, images: Tensor, rows: Tensor, params: Tensor) -> Tensor:
        """Predicted classes; the batch is filled with copies of its last row."""
        missing = self.network.batch_size - len(rows)
        if missing:
            rows = torch.cat([rows, rows[-1:].expand(missing)])
            params = torch.cat([params, params[-1:].expand(missing, *params.shape[1:])])
        noisy = self.perturbation.apply(_chosen(images, rows), params)
        return self.network.call(noisy).argmax(dim=1)

    def _chunks(self, images: Tensor, requests: Sequence[Request]) -> Iterator[_Votes]:
        device, shape = self.network.device, _chw(images)
        for request in requests:
            for chunk in range(request.start // CHUNK, -(-request.stop // CHUNK)):
                first = chunk * CHUNK
                generator = vote_generator(
                    self.seed, request.purpose, request.key, chunk, device=device
                )
                # Always the whole chunk, so that its votes do not depend on the part wanted.
                params = self.perturbation.sample(CHUNK, shape, generator)
                wanted = params[max(request.start - first, 0) : request.stop - first]
                yield _Votes(request.image, request.slot, wanted)


def _chw(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width


def _chosen(images: Tensor, rows: Tensor) -> Tensor:
    """The images of these rows; one alone where all rows are its: it is then not copied."""
    if rows.device.type == "cpu" and bool((rows == rows[0]).all()):
        return images[int(rows[0])][None]
    return images[rows]


def _like(values: Tensor, params: Tensor) -> Tensor:
    """One value per row, shaped to multiply parameters."""
    return values.reshape(-1, *(1 for _ in params.shape[1:]))


def _add_rows(totals: Tensor, slot: Tensor, rows: Tensor) -> None:
    """totals[slot[i]] += rows[i] for all i, in an order of adding that is the same every time."""
    if totals.device.type == "cuda":
        # `index_add_` adds there in whatever order its threads come; this sorts by slot first.
        totals.index_put_((slot,), rows, accumulate=True)
    else:
        totals.index_add_(0, slot, rows)


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
    of_chunks = np.array([[chunk.image, chunk.slot] for chunk in chunks], np.int64)
    rows, slots = _on_device(np.repeat(of_chunks, lengths, axis=0).T.copy(), params.device)
    return rows, slots, params


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Values copied to the device, without waiting there for the work that is under way."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()  # a copy from other memory would wait
    return host.to(device, non_blocking=True)
