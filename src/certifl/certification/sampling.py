"""Votes: the predictions of the base classifier on noisy copies, counted per image and class.

Votes come in chunks of 100. Chunk k of an image is drawn from its own stream, a function of
(seed, purpose, image content, k), so the votes of an image do not depend on the other images, on
how chunks are packed into batches, or on where an interruption fell. Batches are always filled to
the same number of rows, because a network's rounding may differ between batch shapes. Where the
memory is too small for them, votes are cast again, from the start of the call, in batches of half
the size: counting is a pure function, so nothing is lost and nothing is counted twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from certifl.certification.counts import CHUNK, Request
from certifl.certification.network import BEYOND, Network
from certifl.errors import ModelError, RandomSourceBroken, first_line
from certifl.perturbations.base import Perturbation, Sweep, family_sweeps
from certifl.rng import generator, image_key, vote_generator
from certifl.smoothing.bounds import Ints
from certifl.torch_env import (
    exact_convolutions,
    keep_freed_memory,
    one_thread,
    out_of_memory,
    without_autocast,
)

_log = logging.getLogger(__name__)
_Counted = TypeVar("_Counted")
_LEVELS = 255.0
_Chunk = tuple[int, int, Tensor]  # row of the images, slot, parameters


@contextlib.contextmanager
def voting(network: Network) -> Iterator[None]:
    """Held to one way of adding up, so that the same votes are cast at every run."""
    with (
        torch.inference_mode(),
        without_autocast(network.device),
        exact_convolutions(network.device),
        one_thread(network.threads == 1),
    ):
        yield


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
        self._not_a_number = torch.zeros((), dtype=torch.bool, device=network.device)
        if network.device.type == "cpu":
            keep_freed_memory()

    def count(
        self, images: Tensor, requests: Sequence[Request], slots: int, center: Tensor | None = None
    ) -> np.ndarray:
        """Votes per slot and class, (slots, classes) int64.

        Args:
            images: (m, c, h, w) float32 on the network's device.
            requests: which votes of which images.
            slots: number of rows of the result.
            center: (slots, *params_shape) added to the drawn parameters: the votes are then those
                of g_delta, the smoothed classifier at a shifted parameter.
        """

        def counted() -> np.ndarray:
            classes = self.network.classes
            totals = torch.zeros(slots * classes, dtype=torch.int64, device=self.network.device)
            for slot, _, voted in self._cast(images, requests, center):
                totals.scatter_add_(0, slot * classes + voted, torch.ones_like(voted))
            return totals.view(slots, classes).cpu().numpy()

        return self._within_memory(counted)

    def count_each(self, images: Tensor, purpose: str, votes: int) -> np.ndarray:
        """The first votes of each image for a purpose, (m, classes) int64; see `count`."""
        requests = [
            Request(row, row, image_key(image), purpose, 0, votes)
            for row, image in enumerate(images)
        ]
        return self.count(images, requests, slots=len(images))

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
        center: Tensor | None = None,
    ) -> Tensor:
        """Direction of the noise whose votes disagree with the expected class, per slot.

        The sum over votes of phi (1[other class] - share of other classes), a multiple of the
        covariance of noise and disagreement. For Gaussian noise its expectation is a multiple of
        the gradient along which the expected class loses most probability (Stein's lemma).

        Args:
            images, requests, center: as in `count`; drawn parameters are counted without `centre`.
            expected: (slots,) int64, a class per slot, on the network's device.

        Returns:
            (slots, *params_shape) float32 on the network's device.
        """

        def summed() -> Tensor:
            shape = self.perturbation.params_shape(_chw(images))
            disagreeing = images.new_zeros((len(expected), *shape))
            drawn, count = torch.zeros_like(disagreeing), disagreeing.new_zeros((len(expected), 2))
            for slot, params, voted in self._cast(images, requests, center):
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
                with voting(self.network):
                    done = work()
                self._require_numbers()
                return done
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
        self, images: Tensor, requests: Sequence[Request], center: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of votes: the slots they belong to, the drawn parameters, the classes voted."""
        chunks = self._chunks(images, requests)
        for rows, slot, params in _batches(chunks, self.network.batch_size):
            shifted = params if center is None else params + center[slot]
            yield slot, params, self._votes(images, rows, shifted)[: len(slot)]

    def _votes(self, images: Tensor, rows: Tensor, params: Tensor) -> Tensor:
        """Predicted classes; the batch is filled with copies of its last row."""
        missing = self.network.batch_size - len(rows)
        if missing:
            rows = torch.cat([rows, rows[-1:].expand(missing)])
            params = torch.cat([params, params[-1:].expand(missing, *params.shape[1:])])
        if rows.device.type == "cpu" and bool((rows == rows[0]).all()):
            chosen = images[int(rows[0])][None]  # one image alone is not copied
        else:
            chosen = images[rows]
        noisy = self.perturbation.apply(chosen, params)
        logits = self.network.logits(noisy)
        self._not_a_number |= logits.isnan().any()  # looked at once all votes are cast
        return logits.argmax(dim=1)

    def _require_numbers(self) -> None:
        """Refuse votes of logits that are not numbers: `argmax` takes NaN for the largest."""
        if self._not_a_number:
            raise ModelError(f"The model answers with NaN on noisy images. {BEYOND}")

    def _chunks(self, images: Tensor, requests: Sequence[Request]) -> Iterator[_Chunk]:
        device, shape = self.network.device, _chw(images)
        for request in requests:
            for chunk in range(request.start // CHUNK, -(-request.stop // CHUNK)):
                first = chunk * CHUNK
                generator = vote_generator(
                    self.seed, request.purpose, request.key, chunk, device=device
                )
                # Always the whole chunk, so that its votes do not depend on the part requested.
                params = self.perturbation.sample(CHUNK, shape, generator)
                requested = params[max(request.start - first, 0) : request.stop - first]
                yield request.image, request.slot, requested


def _chw(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width


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


def _batches(chunks: Iterator[_Chunk], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pack chunks of many images into batches of (image rows, slots, parameters)."""
    batch: list[_Chunk] = []
    missing = size
    for image, slot, params in chunks:
        rest = params
        while len(rest):
            part, rest = rest[:missing], rest[missing:]
            batch.append((image, slot, part))
            missing -= len(part)
            if missing == 0:
                yield _packed(batch)
                batch, missing = [], size
    if batch:
        yield _packed(batch)


def _packed(chunks: list[_Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    params = torch.cat([chunk[2] for chunk in chunks])
    lengths = [len(chunk[2]) for chunk in chunks]
    of_chunks = np.array([chunk[:2] for chunk in chunks], np.int64)
    host = torch.from_numpy(np.repeat(of_chunks, lengths, axis=0).T.copy())
    if params.device.type == "cuda":
        host = host.pin_memory()  # a copy from other memory would wait for the work under way
    rows, slots = host.to(params.device, non_blocking=True)
    return rows, slots, params


def predict_plain(network: Network, images: Tensor) -> Ints:
    """The network's class (m,) of every image (m, c, h, w), in batches of the shape of votes."""
    answers = []
    for part in images.to(network.device).split(network.batch_size):
        # Every call has the same number of rows, as in voting; what fills it up is not looked at.
        filled = part[torch.arange(network.batch_size, device=part.device) % len(part)]
        with voting(network):
            logits = network.call(filled)[: len(part)]
        if bool(logits.isnan().any()):
            raise ModelError("The model answers with NaN on an image: it has no class for it.")
        answers.append(logits.argmax(dim=1).cpu().numpy())
    return np.concatenate(answers).astype(np.int64)


# Votes along sweeps of parameters.


def lengths(deltas: Tensor, norm: str, axes: int) -> Tensor:
    """Norms over the last `axes` axes, float64."""
    flat = deltas.double().flatten(-axes)
    return flat.abs().sum(-1) if norm == "l1" else flat.square().sum(-1).sqrt()


STEPS = {1: 31, 2: 21}
"""Parameters of each sweep, by the number of sweeps; odd, so that 0 is one of them."""

# Ends in multiples of sigma: radii of uniform distributions end at sigma, Gaussian ones seldom
# reach three; an exponential one with 99 % of the votes reaches four.
_SIGMAS = {"uniform": 2.0, "gaussian": 3.0, "exponential": 5.0}
_SIGMAS_OF_INTERVALS = 4.0


@dataclass(frozen=True, eq=False)
class SweepVotes:
    """Votes and images along a sweep of v steps.

    Attributes:
        values: (v,) signed lengths along the sweep, 0 for the unchanged image.
        lengths: (v,) norms of the parameters, to compare with a radius.
        counts: (v, classes) votes of g_delta, on the same noise at every step.
        frames: (v, c, h, w) float32 the image deformed by delta alone, clipped to [0, 1].
    """

    values: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    frames: Tensor


def sweeps_of(perturbation: Perturbation, intervals: bool = False) -> tuple[Sweep, ...]:
    """The sweeps of a family, as far out as its certificates (or intervals of a scan) reach."""
    sigmas = _SIGMAS_OF_INTERVALS if intervals else _SIGMAS[perturbation.law.name]
    return family_sweeps(perturbation, sigmas * perturbation.sigma)


def sweep_along(
    counter: VoteCounter, sweep: Sweep, image: Tensor, other: Tensor, steps: int, votes: int
) -> SweepVotes:
    """Cast votes of the network at every step of a sweep.

    Args:
        counter: the prepared network, the perturbation and the seed.
        image: (c, h, w) float32 on the network's device.
        other: another image of the same shape, for the sweep that ends there.
        steps: parameters of the sweep, odd. votes: at each of them.
    """
    perturbation = counter.perturbation
    values, deltas = _deltas(sweep, perturbation, image, other, steps, counter.seed)
    batch, key = image[None], image_key(image)
    requests: Sequence[Request] = [
        Request(step, 0, key, "explore", 0, votes) for step in range(len(deltas))
    ]
    counts = counter.count(batch, requests, len(deltas), deltas)
    axes = deltas.ndim - 1
    return SweepVotes(
        values=values,
        lengths=lengths(deltas, perturbation.norm, axes).cpu().numpy(),
        counts=counts,
        frames=perturbation.apply(batch, deltas).clamp(0.0, 1.0).cpu(),
    )


def _deltas(
    sweep: Sweep, perturbation: Perturbation, image: Tensor, other: Tensor, steps: int, seed: int
) -> tuple[np.ndarray, Tensor]:
    """Signed lengths (v,) and parameters (v, *params_shape) on the image's device."""
    channels, height, width = image.shape
    shape = perturbation.params_shape((channels, height, width))
    if sweep.reach is None:
        line = (other - image).cpu().double()
        ends = float(line.norm())
    elif sweep.axis is not None:
        line = torch.zeros(math.prod(shape), dtype=torch.float64, device="cpu")
        line[sweep.axis], ends = 1.0, sweep.reach
    else:
        stream = generator(seed, "explore", image_key(image), sweep.name)
        line = torch.randn(shape, generator=stream, dtype=torch.float64, device="cpu")
        ends = sweep.reach
    line = line.reshape(shape) / line.norm().clamp(min=1e-12)
    half = steps // 2
    numbers = np.arange(steps) / (steps - 1) if not sweep.backward else np.arange(-half, half + 1)
    values = numbers * (ends if not sweep.backward else ends / half)
    deltas = (torch.from_numpy(values).reshape(-1, *(1 for _ in shape)) * line).float()
    if getattr(perturbation, "exact", False):
        deltas = (deltas * _LEVELS).trunc() / _LEVELS  # noise on the grid of 8-bit intensities
    return values, deltas.to(image.device)


# The self-test of the random source, in milliseconds, before the first vote of a process.
#
# Certificates assume independent draws from the distribution. Votes of a broken generator, a
# driver that replays its numbers or a perturbation that forgets to draw look like any others. So
# streams are tested once: they repeat, they differ, and moments are those of the distribution. The
# streams are fixed, so the result is the same at every start.


Source = Callable[[int, str, int, int, torch.device], torch.Generator]
"""Called with (seed, purpose, image key, chunk, device), as `rng.vote_generator`."""

_SEED, _IMAGE = 20_230_206, 1_618_033_988
# A correct source is further off than this in one of 5e8 statistics.
_STANDARD_ERRORS = 6.0
# law -> (mean, variance, fourth central moment), in units of sigma, sigma^2 and sigma^4
_MOMENTS = {
    "gaussian": (0.0, 1.0, 3.0),
    "uniform": (0.0, 1.0 / 3.0, 1.0 / 5.0),
    "exponential": (1.0, 1.0, 9.0),
}
# Noise on the grid of 8-bit intensities differs from the law by at most half a level a draw.
_LEVEL = 1.0 / _LEVELS

_passed: set[tuple[Any, ...]] = set()


def check_random_source_once(
    perturbation: Perturbation, image_shape: tuple[int, ...], device: torch.device
) -> None:
    """`check_random_source`, once per process for each device, perturbation and image shape."""
    case = (str(device), repr(perturbation), tuple(image_shape))
    if case not in _passed:
        check_random_source(perturbation, image_shape, device)
        _passed.add(case)


def check_random_source(
    perturbation: Perturbation,
    image_shape: tuple[int, ...],
    device: torch.device,
    source: Source = vote_generator,
) -> None:
    """Refuse to vote where draws do not repeat, do not differ, or do not follow the distribution.

    RandomSourceBroken where a stream is not repeated by the same seed; where two chunks, the two
    stages or two images share a stream; where mean, variance or the correlation of two chunks is
    more than six standard errors from those of the distribution. `source` gives the generator of a
    chunk of votes.
    """
    channels, height, width = image_shape
    # A chunk draws as many numbers as the images have pixels; some hundred thousand are enough.
    sets = min(CHUNK, max(2, 100_000 // (2 * channels * height * width)))

    def drawn(purpose: str, image: int, chunk: int) -> Tensor:
        draws = perturbation.sample(
            sets, (channels, height, width), source(_SEED, purpose, image, chunk, device)
        )
        return draws.flatten()

    first, second = drawn("estimation", _IMAGE, 0), drawn("estimation", _IMAGE, 1)
    if not torch.equal(first, drawn("estimation", _IMAGE, 0)):
        raise _broken("the same seed gives other numbers when it is used again", device)
    others = {
        "two chunks of one image": second,
        "selection and estimation": drawn("selection", _IMAGE, 0),
        "two images": drawn("estimation", _IMAGE + 1, 0),
    }
    for pair, other in others.items():
        if torch.equal(first, other):
            raise _broken(f"{pair} draw the same numbers", device)
    _check_moments(perturbation, first.double(), second.double(), device)


def _check_moments(
    perturbation: Perturbation, first: Tensor, second: Tensor, device: torch.device
) -> None:
    """Mean, variance and correlation of two chunks against the distribution."""
    if perturbation.law.name not in _MOMENTS:
        return  # a custom distribution, whose moments are unknown here
    mean, variance, fourth = (
        unit * perturbation.sigma**power
        for unit, power in zip(_MOMENTS[perturbation.law.name], (1, 2, 4), strict=True)
    )
    first, second = first - mean, second - mean
    both, pairs = torch.cat([first, second]), len(first)
    slack = _LEVEL if getattr(perturbation, "exact", False) else 0.0
    statistics = {
        "mean": (float(both.mean()), 0.0, math.sqrt(variance / (2 * pairs)), 0.0),
        "variance": (
            float(both.square().mean()),
            variance,
            math.sqrt((fourth - variance**2) / (2 * pairs)),
            slack * (math.sqrt(variance) + slack),
        ),
        "covariance of two chunks": (
            float((first * second).mean()),
            0.0,
            variance / math.sqrt(pairs),
            slack**2,
        ),
    }
    for name, (value, expected, error, rounding) in statistics.items():
        # float32 draws are off by 6e-8 of themselves, which is far below any standard error here.
        if not abs(value - expected) <= _STANDARD_ERRORS * error + rounding:
            raise _broken(
                f"the {name} of {2 * pairs} draws of {perturbation.family} is {value:.4g}, "
                f"{abs(value - expected) / error:.1f} standard errors from {expected:.4g}",
                device,
            )


def _broken(what: str, device: torch.device) -> RandomSourceBroken:
    return RandomSourceBroken(
        f"The random source on {device} cannot be trusted: {what}. Certificates would not hold, "
        "so nothing was certified. Try device='cpu'; check the installation of torch and, if the "
        "perturbation is your own, its sample()."
    )
