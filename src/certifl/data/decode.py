"""From image files to uint8 pixels: one rule for all sources, applied by a pool of threads.

Convention: 8-bit grey stays one channel. Everything else (RGB, palettes, CMYK, ...) becomes RGB.
An alpha channel is dropped, a recorded camera orientation is applied, and of an animation the
first frame is taken. Greyscale with more than 8 bits is refused, because there is no one right way
to bring it to [0, 255]. If one image of a set is RGB, the grey ones get three equal channels.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from certifl.data.splits import SMALLEST_SIDE, to_float
from certifl.errors import InputError
from certifl.outside import read_bytes

__all__ = [
    "IMAGE_SUFFIXES",
    "NamedImage",
    "changes_of",
    "decode_all",
    "read_image",
    "size_text",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
_DEEP_GREY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_IMAGE_BYTES = 1 << 28
_PIXELS, _SMALL = 1 << 25, 1 << 16
_BATCH = 2048
_GROUP = 64

NamedImage = tuple[Callable[[], str], "bytes | Path"]
"""How an error would name the image, and its encoded bytes or its file."""


def size_text(shape: tuple[int, ...]) -> str:
    """The size of pixels (h, w) or (c, h, w), in words."""
    return f"{shape[-2]} x {shape[-1]} (height x width)"


def decode_all(items: Iterable[NamedImage]) -> np.ndarray:
    """Decode images of one size, in order, to uint8 (n, c, h, w).

    Raises:
        InputError: an image cannot be decoded, differs in size from the first, is smaller than
            8 x 8, or has more than 8 bits of grey; the message names the image.
    """
    Image.init()  # registers the formats once: doing so from several threads would race
    done: list[np.ndarray] = []
    first: tuple[str, tuple[int, ...]] | None = None
    most = _PIXELS
    with ThreadPoolExecutor(_workers()) as pool:
        for batch in _chunks(iter(items), _BATCH):
            groups = [batch[i : i + _GROUP] for i in range(0, len(batch), _GROUP)]
            if first is None:
                first = (batch[0][0](), _decode_group(batch[:1], _PIXELS)[0].shape)
                # All have one size, and what is larger need not be decoded to be refused.
                most = max(first[1][0] * first[1][1], _SMALL)
            work = partial(_decode_group, most=most)
            decoded = [image for group in pool.map(work, groups) for image in group]
            _require_one_size(batch, decoded, first)
            done.append(_stack(decoded))
    if not done:
        raise InputError("There is no image to decode. Check that the files are not empty.")
    return _join(done)


def read_image(
    path: str | Path, in_channels: int, image_size: tuple[int, int], resize: bool = False
) -> torch.Tensor:
    """One image file as float32 (1, c, h, w) in [0, 1], ready for a model.

    Grey becomes three equal channels where the model wants RGB; RGB becomes grey by the luma
    0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) where the model wants one channel.

    Args:
        path: a PNG, JPEG, BMP, WebP, GIF or TIFF file.
        in_channels: 1 or 3.
        image_size: height and width in pixels.
        resize: resample an image of another size (bilinear, antialiased). A certificate then
            speaks of the resampled image, not of the file.

    Raises:
        InputError: no such file, no image, more than 8 bits of grey, or another size.
    """
    if in_channels not in (1, 3):
        raise InputError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}.")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"There is no image file {file}. Check the path.")
    image = _open(lambda: str(file), file)
    image = image.convert("RGB" if in_channels == 3 else "L")
    height, width = image_size
    if image.size != (width, height):
        if not resize:
            raise InputError(
                f"{file} is {size_text((image.height, image.width))}, but the model takes images "
                f"of {size_text(image_size)}. A certificate holds for exactly the pixels that the "
                "model is given, so nothing is resized unasked: resize the image yourself, or ask "
                "for it with --resize (from Python: resize=True)."
            )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return to_float(torch.from_numpy(_stack([np.asarray(image)])))


def changes_of(path: str | Path, in_channels: int, image_size: tuple[int, int]) -> str:
    """How `read_image` changes a file's pixels for the model, in words; "" = not at all."""
    file = Path(path)
    image = _open(lambda: str(file), file)
    height, width = image_size
    told = []
    if (len(image.getbands()) == 1) != (in_channels == 1):
        told.append("converted to grey" if in_channels == 1 else "grey repeated in three channels")
    if image.size != (width, height):
        told.append(f"resized from {size_text((image.height, image.width))}")
    return ", ".join(told)


def _open(name: Callable[[], str], source: bytes | Path, most: int = _PIXELS) -> Image.Image:
    """Decode to mode L or RGB by the module's convention, if it has at most so many pixels."""
    try:
        content = source if isinstance(source, bytes) else read_bytes(source, _IMAGE_BYTES)
        image = _small(io.BytesIO(content), most)
        image.load()
    except _DAMAGED as error:
        reason = "it is no image in a format known here" if _unknown(error) else str(error)
        raise InputError(
            f"Cannot decode {name()}: {reason}. Readable are {', '.join(_FORMATS)}; "
            "remove or replace the file."
        ) from error
    if image.mode in _DEEP_GREY:
        raise InputError(
            f"{name()} has more than 8 bits of grey (mode {image.mode}), which has no one right "
            "conversion. Convert the images to 8 bits first."
        )
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "PA"):  # by way of RGBA, since palettes may carry transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _small(content: io.BytesIO, most: int) -> Image.Image:
    """An image whose size is read, but not yet its pixels; one too large to be honest is refused.

    A few kilobytes can declare any number of pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        image = Image.open(content, formats=_FORMATS)
    if image.width * image.height > most:
        raise InputError(f"it is {size_text((image.height, image.width))}, too large to be read")
    return image


def _unknown(error: Exception) -> bool:
    return isinstance(error, UnidentifiedImageError)  # its own text shows a memory address


def _decode_group(group: list[NamedImage], most: int) -> list[np.ndarray]:
    return [np.asarray(_open(name, source, most)) for name, source in group]


def _require_one_size(
    batch: list[NamedImage], decoded: list[np.ndarray], first: tuple[str, tuple[int, ...]]
) -> None:
    first_name, shape = first
    for (name, _), image in zip(batch, decoded, strict=True):
        if image.shape[:2] != shape[:2]:
            raise InputError(
                f"{name()} is {size_text(image.shape[:2])}, but {first_name} is "
                f"{size_text(shape[:2])}. All images of a data set must have one size: crop or "
                "resize them beforehand."
            )
    if min(shape[:2]) < SMALLEST_SIDE:
        raise InputError(
            f"{first_name} is {size_text(shape[:2])}; images must be at least "
            f"{SMALLEST_SIDE} x {SMALLEST_SIDE} pixels. Enlarge them beforehand."
        )


def _stack(images: list[np.ndarray]) -> np.ndarray:
    """Images (h, w) and (h, w, 3) as (n, 1, h, w), or as (n, 3, h, w) if one of them is RGB."""
    channels = 3 if any(image.ndim == 3 for image in images) else 1
    height, width = images[0].shape[:2]
    out = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for row, image in zip(out, images, strict=True):
        row[:] = image.transpose(2, 0, 1) if image.ndim == 3 else image
    return out


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate, giving each part back its memory as soon as it is copied."""
    channels = max(part.shape[1] for part in parts)
    total = sum(len(part) for part in parts)
    out = np.empty((total, channels, *parts[0].shape[2:]), dtype=np.uint8)
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        out[start : start + len(part)] = part  # one channel broadcasts to three
        start += len(part)
    return out


def _workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def _chunks(items: Iterator[NamedImage], size: int) -> Iterator[list[NamedImage]]:
    while chunk := list(islice(items, size)):
        yield chunk
