"""Whole-pixel shifts: exact certificates of the base classifier by trying all of them.

There are only (2 K + 1)^2 shifts by whole pixels within K pixels either way, so nothing has to be
estimated: no noise, no votes, no alpha. The promise is about f itself, not about its smoothed
version, and about whole pixels alone; shifts by fractions of a pixel are not covered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from certifl.certification.guards import Model, check_images, check_labels
from certifl.certification.network import Network, prepare
from certifl.convolutions import exact_convolutions
from certifl.errors import InputError
from certifl.threads import one_thread

__all__ = ["ShiftCertificates", "certify_shifts"]

_PADDINGS = ("zeros", "border")
_THREAT = (
    "Shifts of the image by whole pixels, with {} beyond its border, whose length is at most the "
    "radius. The certificate is exact and is one of the base classifier, not of a smoothed one; "
    "shifts by fractions of a pixel are not covered."
)


@dataclass(frozen=True, eq=False)
class ShiftCertificates:
    """What every whole-pixel shift of m images does to the base classifier's answer.

    Guarantee: f answers `predicted` at each shift (across, down) in whole pixels with
    max(|across|, |down|) <= radius, and at each with a Euclidean length <= euclidean. It is exact.

    Attributes:
        predicted: (m,) f of the image itself.
        label: (m,) true class, -1 where unknown.
        radius: (m,) whole pixels, at most `largest`.
        euclidean: (m,) pixels: the length of the longest shift such that neither it nor any
            shorter one changes the answer, of shifts shorter than largest + 1.
        breaking: (m, 2) a shortest shift (across, down) in the box that changes the answer; right
            and down are positive. (0, 0) where there is none.
        largest: shifts up to this many pixels either way were tried.
        threat: what is covered and what is not.
    """

    predicted: NDArray[np.int64]
    label: NDArray[np.int64]
    radius: NDArray[np.int64]
    euclidean: NDArray[np.float64]
    breaking: NDArray[np.int64]
    largest: int
    threat: str

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(m,) where f's answer is the label; false where unlabelled."""
        return cast("NDArray[np.bool_]", self.predicted == self.label)

    def certified_accuracy(self, pixels: int) -> float:
        """Share of images that are correct at all shifts by up to `pixels` either way."""
        return float((self.correct & (self.radius >= pixels)).mean())


def certify_shifts(
    model: Model,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    largest: int = 3,
    padding: str = "zeros",
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
) -> ShiftCertificates:
    """The largest whole-pixel shifts at which the base classifier keeps its answer; exact.

    Costs at most (2 largest + 1)^2 predictions per image; an image whose answer has changed is
    tried only as far as shorter shifts may still be found.

    Args:
        model, images, labels, precision, device, batch_size: as in `certifl.certify`.
        largest: pixels either way, at least 1 and less than the shorter side of the image.
        padding: beyond the image: "zeros", or "border" for its nearest pixel.

    Returns:
        A row for each image, in their order. No probability is involved: every shift within the
        radius was tried.

    Raises:
        InputError: images, labels or options that cannot be used.
        ModelError: a model that is no function of one image, see `guards`.
    """
    values = check_images(images)
    _check_options(values, largest, padding)
    network = prepare(model, values, device, precision, batch_size)
    known = check_labels(labels, len(values), network.classes)
    values = values.to(network.device)
    m = len(values)
    nowhere = np.zeros((m, 2), np.int64)
    predicted = _classes(network, values, np.arange(m), nowhere, padding)
    # Squared length of the shortest shift so far that changes the answer.
    shortest, breaking = np.full(m, np.iinfo(np.int64).max), nowhere.copy()
    radius = np.full(m, largest)
    for ring in range(1, largest + 1):
        rows = np.flatnonzero(shortest > ring**2)
        for shift in _ring(ring):
            rows = rows[shortest[rows] > shift @ shift]
            if len(rows) == 0:
                continue
            classes = _classes(network, values, rows, shift[None], padding)
            broken = rows[classes != predicted[rows]]
            shortest[broken], breaking[broken] = shift @ shift, shift
            radius[broken] = np.minimum(radius[broken], ring - 1)
    return ShiftCertificates(
        predicted=predicted,
        label=np.full(m, -1, np.int64) if known is None else known,
        radius=radius,
        euclidean=np.array([_longest_below(min(int(s), (largest + 1) ** 2)) for s in shortest]),
        breaking=breaking,
        largest=largest,
        threat=_THREAT.format("zeros" if padding == "zeros" else "its nearest pixels"),
    )


def _check_options(images: Tensor, largest: int, padding: str) -> None:
    side = min(images.shape[-2:])
    if isinstance(largest, bool) or not isinstance(largest, int) or not 1 <= largest < side:
        raise InputError(
            f"largest must be a whole number of pixels from 1 to {side - 1} for these images; "
            f"got {largest!r}."
        )
    if padding not in _PADDINGS:
        raise InputError(f"padding must be one of {', '.join(_PADDINGS)}; got {padding!r}.")


def _ring(size: int) -> Iterator[np.ndarray]:
    """All shifts whose larger component is `size`, shortest first."""
    line = np.arange(-size, size + 1)
    every = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    ring = every[np.abs(every).max(axis=1) == size]
    yield from ring[np.argsort((ring**2).sum(axis=1), kind="stable")]


def _longest_below(square: int) -> float:
    """The length of the longest whole-pixel vector whose squared length is below `square`."""
    sums = (
        across**2 + down**2
        for across in range(math.isqrt(square) + 1)
        for down in range(math.isqrt(square) + 1)
    )
    return math.sqrt(max(s for s in sums if s < square))


def _classes(
    network: Network, images: Tensor, rows: np.ndarray, shifts: np.ndarray, padding: str
) -> np.ndarray:
    """Answers on shifted images; batches are filled, as rounding may differ between shapes."""
    size, classes = network.batch_size, []
    offsets = np.broadcast_to(shifts, (len(rows), 2))
    with (
        torch.inference_mode(),
        exact_convolutions(network.device),
        one_thread(network.threads == 1),
    ):
        for start in range(0, len(rows), size):
            row, offset = rows[start : start + size], offsets[start : start + size]
            missing = size - len(row)
            row = np.concatenate([row, np.repeat(row[-1:], missing)])
            offset = np.concatenate([offset, np.repeat(offset[-1:], missing, axis=0)])
            batch = _shifted(images[torch.as_tensor(row, device=images.device)], offset, padding)
            classes.append(network.call(batch).argmax(dim=1)[: size - missing].cpu().numpy())
    return np.concatenate(classes)


def _shifted(images: Tensor, shifts: np.ndarray, padding: str) -> Tensor:
    """Image i moved by shifts[i] = (across, down) whole pixels."""
    moved = torch.as_tensor(np.array(shifts), device=images.device)
    height, width = images.shape[-2:]
    columns = torch.arange(width, device=images.device) - moved[:, :1]
    rows = torch.arange(height, device=images.device) - moved[:, 1:]
    picked = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    at_rows, at_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    out = images[picked, channels, at_rows[:, None, :, None], at_columns[:, None, None, :]]
    if padding == "border":
        return out
    inside = ((rows >= 0) & (rows < height))[:, None, :, None]
    return out * (inside & ((columns >= 0) & (columns < width))[:, None, None, :])
