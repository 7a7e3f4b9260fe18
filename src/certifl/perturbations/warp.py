"""One bilinear sampler for all deformations.

Convention: a pixel is named by its index, column x to the right and row y downwards; its center is
at the whole number. The output at p takes the input at p + nu_phi(p) (the paper, Eq. (3) and 3.2).
Coordinates stay in pixels from end to end, so zero displacement is the identity to the last bit;
normalized coordinates, as in `torch.nn.functional.grid_sample`, are not exact for most sizes.

Two geometries say where pixels lie:

- "centre": the right one. Column j is at j, the center of the image at (w - 1) / 2.
- "deformrs": as in code published for this study, which builds corner coordinates linspace(-1, 1)
  and samples them as if they were pixel centers. Column j is then read at j w / (w - 1) - 1/2: the
  identity blurs the image and darkens its border. Only for comparing with published curves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from certifl.errors import InputError

# The sampler counts positions in float32, which is exact up to here; so is 32-bit indexing.
_MOST_PIXELS = 1 << 24
# Intensities sampled at a time on a CPU: temporaries then stay in its caches and are not handed
# back to the system after each use, which was measured to cost more than the work itself.
_SLICE = 1 << 18


@dataclass(frozen=True)
class Grid:
    """Coordinates of the pixels of one image, in pixels.

    Attributes:
        columns: (w,), where column j is read when nothing moves.
        rows: (h, 1), where row i is read when nothing moves.
        x: (w,), column relative to the image center, to the right.
        y: (h, 1), row relative to the image center, downwards.
        half_width: w / 2, one unit of horizontal displacement.
        half_height: h / 2, one unit of vertical displacement.
    """

    columns: Tensor
    rows: Tensor
    x: Tensor
    y: Tensor
    half_width: float
    half_height: float


def grid_of(images: Tensor, geometry: str) -> Grid:
    """The grid of a batch of images (m, c, h, w), in their type and on their device."""
    height, width = images.shape[-2:]
    columns, x = _axis(width, images, geometry)
    rows, y = _axis(height, images, geometry)
    return Grid(columns, rows[:, None], x, y[:, None], width / 2, height / 2)


def _axis(size: int, like: Tensor, geometry: str) -> tuple[Tensor, Tensor]:
    """(position when nothing moves, position relative to the center) of each index of an axis."""
    index = torch.arange(size, dtype=like.dtype, device=like.device)
    if geometry == "centre":
        return index, index - (size - 1) / 2
    stretched = index * (size / max(size - 1, 1))
    return stretched - 0.5, stretched - size / 2


def warp(images: Tensor, x: Tensor, y: Tensor, padding: str = "zeros") -> Tensor:
    """Read every image at the positions (x, y), bilinearly.

    At whole positions the result is that pixel exactly. Positions may be arbitrarily large; a
    position that is not a number gives a pixel that is not a number.

    Args:
        images: (m, c, h, w), float32 or float64.
        x: columns in pixels, broadcastable to (m, h, w); 3-D.
        y: rows in pixels, likewise. Axes of length 1 are kept small, which saves time.
        padding: outside the image: "zeros", "border" (nearest pixel) or "reflection" (mirrored at
            the outer edges of the border pixels).

    Returns:
        (m, c, h, w), contiguous; one image or one set of positions is broadcast.

    Raises:
        InputError: images of more than 2**24 pixels.
    """
    height, width = images.shape[-2:]
    if (height + 3) * (width + 3) > _MOST_PIXELS:
        raise InputError(f"A {height} x {width} image is too large to deform; resize it first.")
    m = max(images.shape[0], x.shape[0], y.shape[0])
    step = max(1, _SLICE // images[0].numel()) if images.device.type == "cpu" else m
    if m <= step:
        return _sampled(images, x, y, padding)
    out = images.new_empty((m, *images.shape[1:]))
    for first in range(0, m, step):
        part = [t if t.shape[0] == 1 else t[first : first + step] for t in (images, x, y)]
        out[first : first + step] = _sampled(part[0], part[1], part[2], padding)
    return out


def _sampled(images: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
    """`warp` of a batch that is taken whole."""
    channels, height, width = images.shape[1:]
    m = max(images.shape[0], x.shape[0], y.shape[0])
    stride = width + 3
    left, across = _cell(x, width, padding)
    top, down = _cell(y, height, padding)
    # One empty pixel before and two behind each axis: every cell then has its four corners.
    canvas = F.pad(images, (1, 2, 1, 2))
    corner = (top * stride + (stride + 1) + left).expand(m, height, width)
    start = _flat_positions(corner, canvas, m)
    flat, across, down = canvas.flatten(), across[:, None], down[:, None]

    def corner_at(offset: int) -> Tensor:
        return flat[offset:].index_select(0, start).view(m, channels, height, width)

    upper = corner_at(0).lerp_(corner_at(1), across)
    lower = corner_at(stride).lerp_(corner_at(stride + 1), across)
    return upper.lerp_(lower, down)


def _cell(position: Tensor, size: int, padding: str) -> tuple[Tensor, Tensor]:
    """Index of the cell a position lies in, and how far into the cell it is (0 to 1).

    Positions are first brought to within one pixel of the image: beyond it nothing changes any
    more, and numbers of any magnitude become safe to convert.
    """
    if padding == "reflection":
        folded = torch.remainder(position + 0.5, 2 * size)
        position = size - (folded - size).abs() - 0.5
    low, high = (-1, size) if padding == "zeros" else (0, size - 1)
    inside = position.clamp(low, high)
    whole = inside.floor()
    return whole, inside.sub_(whole)


def _flat_positions(corner: Tensor, canvas: Tensor, m: int) -> Tensor:
    """Positions in the flattened canvas of the upper left corners of all cells.

    Args:
        corner: (m, h, w), position within one channel of one image, as float.
        canvas: (m or 1, c, h + 3, w + 3).
        m: images that come out.
    """
    count, channels, height, width = canvas.shape
    area = height * width
    kind = torch.int32 if canvas.numel() < (1 << 31) else torch.int64
    # The clamp matters for positions that are not a number alone: it keeps them within memory.
    within = corner.reshape(m, 1, -1).to(kind).clamp_(0, area - width - 2)
    plane = torch.arange(count * channels, dtype=kind, device=canvas.device).mul_(area)
    return (within + plane.view(count, channels, 1)).flatten()
