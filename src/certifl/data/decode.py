"""From image files to uint8 pixels: one rule for all sources, applied by a pool of threads.

Convention: 8-bit gray stays one channel. Everything else (RGB, palettes, CMYK, ...) becomes RGB.
An alpha channel is dropped and a recorded camera orientation is applied. If one image of a set is
RGB, the gray ones get three equal channels. Whatever would lose part of an image is refused: more
than 8 bits per channel, because there is no unique way to convert them to [0, 255] (a study may
name one for gray images, `Preparation.window`), and files with several frames or pages, because
only one of them can be the image. (The second image that cameras put into a JPEG is a preview of
the first, which alone is read.) Of DICOM files only pixels are read.
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from certifl.data.dataset import SMALLEST_SIDE, to_float
from certifl.data.preparation import AS_THEY_ARE, WINDOW_OF_8_BITS, Preparation
from certifl.errors import InputError, first_line
from certifl.safe_io import read_bytes

_DICOM, _DICOM_AT = b"DICM", 128
_GRAY = {"MONOCHROME1": True, "MONOCHROME2": False}
"""Kinds of gray images, and whether their lowest value is white."""
_ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "DICOM": (".dcm", ".dicom"),
}
IMAGE_SUFFIXES = tuple(ending for endings in _ENDINGS.values() for ending in endings)
_FORMATS = tuple(name for name in _ENDINGS if name != "DICOM")  # those that Pillow reads
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_DEEP_STORAGE = re.compile(r";(1[0-9]|32|64)[A-Z]+$")
"""How Pillow names more than 8 bits per channel: RGB;16B, but not BGR;16, which is 5 + 6 + 5."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 258, 262, 277, 339  # of TIFF
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2  # values of these tags
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
ONE_SIZE = (
    "All images of a data set must have one size: give data.resize, such as 64, and to keep their "
    'shapes data.crop, "center" or "pad"; or resize them beforehand.'
)
_GIVE_WINDOW = (
    "Give the intensities that become black and white, data.window = [low, high], or convert the "
    "images to 8 bits first."
)
_IMAGE_BYTES = 1 << 28
_PIXELS, _SMALL = 1 << 25, 1 << 16
_TRANSPARENT = "certifl_transparent"
_BATCH = 2048
_GROUP = 64

_log = logging.getLogger(__name__)

NamedImage = tuple[Callable[[], str], "bytes | Path"]
"""How an error would name the image, and its encoded bytes or its file."""


def size_text(shape: tuple[int, ...]) -> str:
    """The size of pixels (h, w) or (c, h, w), in words."""
    return f"{shape[-2]} x {shape[-1]} (height x width)"


def decode_all(items: Iterable[NamedImage], prepare: Preparation = AS_THEY_ARE) -> np.ndarray:
    """Decode images in order to uint8 (n, c, h, w), all of one size after their preparation.

    InputError names an image that cannot be decoded, differs in size from the first, is smaller
    than 8 x 8, or has several frames or (without a window) more than 8 bits per channel.
    """
    Image.init()  # registers the formats once: doing so from several threads would race
    done: list[np.ndarray] = []
    clear: list[Callable[[], str]] = []
    first: tuple[str, tuple[int, ...]] | None = None
    most, remaining = _PIXELS, iter(items)
    with ThreadPoolExecutor(_workers()) as pool:
        while batch := list(islice(remaining, _BATCH)):
            groups = [batch[i : i + _GROUP] for i in range(0, len(batch), _GROUP)]
            if first is None:
                shape = _decode_group(batch[:1], _PIXELS, prepare)[0][0].shape
                first = (batch[0][0](), shape)
                if not prepare.described:
                    # All have one size, and what is larger need not be decoded to be refused.
                    most = max(shape[0] * shape[1], _SMALL)
            work = partial(_decode_group, most=most, prepare=prepare)
            opened = [image for group in pool.map(work, groups) for image in group]
            decoded = [pixels for pixels, _ in opened]
            clear += [name for (name, _), (_, see) in zip(batch, opened, strict=True) if see]
            _require_one_size(batch, decoded, first)
            done.append(_stack(decoded))
    if not done:
        raise InputError("There is no image to decode. Check that the files are not empty.")
    if clear:
        _log.warning(
            "%s has transparent pixels%s: transparency is dropped, and the colors that the file "
            "stores below it are read.",
            clear[0](),
            f", as {len(clear) - 1} more images have" if len(clear) > 1 else "",
        )
    return _join(done)


def read_image(
    path: str | Path,
    in_channels: int,
    image_size: tuple[int, int],
    resize: bool = False,
    prepare: Preparation = AS_THEY_ARE,
) -> torch.Tensor:
    """One image file as float32 (1, c, h, w) in [0, 1], ready for a model.

    Gray becomes three equal channels where the model wants RGB; RGB becomes gray by the luma
    0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) where the model wants one channel.

    Args:
        path: an image file, of any format that data sets may have.
        in_channels, image_size: 1 or 3; height and width in pixels.
        resize: resample an image of another size (bilinear, antialiased). A certificate then
            speaks of the resampled image, not of the file.
        prepare: what is done first, as to the images that the model was trained on.

    Raises:
        InputError: no such file, no image, more than 8 bits per channel, several frames, or
            another size.
    """
    if in_channels not in (1, 3):
        raise InputError(f"in_channels must be 1 (gray) or 3 (RGB), got {in_channels}.")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"There is no image file {file}. Check the path.")
    image = _open(lambda: str(file), file, prepare=prepare)
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


def shape_of_file(path: str | Path) -> tuple[int, tuple[int, int]]:
    """Channels (1 or 3), height and width of an image file; raises as `read_image`."""
    image = _open(lambda: str(path), Path(path))
    return len(image.getbands()), (image.height, image.width)


def changes_of(
    path: str | Path,
    in_channels: int,
    image_size: tuple[int, int],
    prepare: Preparation = AS_THEY_ARE,
) -> str:
    """How `read_image` changes a file's pixels for the model, in words; "" = not at all."""
    image = _open(lambda: str(path), Path(path), prepare=prepare)
    height, width = image_size
    changes = [f"{name} = {value}" for name, value in prepare.described.items()]
    if image.info.get(_TRANSPARENT):
        changes.append("transparency dropped")
    if (len(image.getbands()) == 1) != (in_channels == 1):
        changes.append(
            "converted to gray" if in_channels == 1 else "gray repeated in three channels"
        )
    if image.size != (width, height):
        changes.append(f"resized from {size_text((image.height, image.width))}")
    return ", ".join(changes)


def _open(
    name: Callable[[], str],
    source: bytes | Path,
    most: int = _PIXELS,
    prepare: Preparation = AS_THEY_ARE,
) -> Image.Image:
    """Decode to mode L or RGB by the module's convention, up to `most` pixels, and prepare."""
    try:
        content = source if isinstance(source, bytes) else read_bytes(source, _IMAGE_BYTES)
        if content.startswith(_DICOM, _DICOM_AT):
            image, lost = _of_dicom(content, most, prepare)
        else:
            image = _small(io.BytesIO(content), most)
            lost = _would_lose(image, prepare.window is not None)
        if not lost:
            image.load()
            upright = ImageOps.exif_transpose(image)
            deep = image.mode in _DEEP_MODES
            image = _windowed(np.asarray(upright), image, prepare) if deep else upright
    except _DAMAGED as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text shows a memory address
        reason = "it is not an image in a supported format" if unknown else str(error)
        raise InputError(
            f"Cannot decode {name()}: {reason}. Readable are {', '.join(_ENDINGS)}; "
            "remove or replace the file."
        ) from error
    if lost:
        raise InputError(f"{name()} {lost}")
    image = _converted(image, name)  # one large image at a time: the one before is freed
    notes = image.info
    try:
        image = prepare.fitted(image)
    except InputError as error:
        raise InputError(
            f"Cannot prepare {name()}: {error}. Remove or replace the file."
        ) from error
    image.info.update(notes)
    return image


def _windowed(values: np.ndarray, opened: Image.Image, prepare: Preparation) -> Image.Image:
    """Gray intensities (h, w) of more than 8 bits as an image of 8, as the opened file means them.

    Of TIFF, Pillow reads 32 bits as if they had a sign, and more than 8 as if 0 were black.
    """
    unsigned = _tag(opened, _SAMPLE_FORMAT, (_UNSIGNED,)) == (_UNSIGNED,)
    if unsigned and _tag(opened, _BITS_PER_SAMPLE, ()) == (32,):
        values = values.view(np.uint32)
    gray = prepare.windowed(values)
    low_is_white = _tag(opened, _PHOTOMETRIC, None) == _WHITE_IS_ZERO
    return Image.fromarray(255 - gray if low_is_white else gray)


def _of_dicom(content: bytes, most: int, prepare: Preparation) -> tuple[Image.Image, str]:
    if prepare.window is None:
        return Image.new("L", (1, 1)), f"is a DICOM image, of no fixed range. {_GIVE_WINDOW}"
    intensities, low_is_white = _read_dicom(content, most)
    gray = prepare.windowed(intensities)
    return Image.fromarray(255 - gray if low_is_white else gray), ""


def _read_dicom(content: bytes, most: int) -> tuple[np.ndarray, bool]:
    """Rescaled intensities (h, w) of a DICOM image in float64, and whether low ones are white."""
    try:
        import pydicom
        from pydicom.filereader import read_dataset
        from pydicom.pixels.processing import apply_modality_lut
        from pydicom.uid import DeflatedExplicitVRLittleEndian
    except ImportError as error:
        raise InputError(
            "DICOM files are read by pydicom, which is not installed: install the extra "
            "`certifl[dicom]`"
        ) from error
    try:
        stream = io.BytesIO(content)
        stream.seek(_DICOM_AT + len(_DICOM))
        about = read_dataset(
            stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2
        )
        if about.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            # Reading it would unpack everything, however much that is.
            raise InputError("it is compressed as a whole; save it with compressed pixels or none")
        file = pydicom.dcmread(io.BytesIO(content))
        size = int(file.Rows) * int(file.Columns)
        kind, frames = str(file.PhotometricInterpretation), int(file.get("NumberOfFrames") or 1)
    except InputError:
        raise
    except Exception as error:  # pydicom raises many unrelated types for damaged files
        raise InputError(f"it is not a readable DICOM image ({first_line(error)})") from error
    if kind not in _GRAY or frames != 1:
        what = f"{frames} frames" if frames != 1 else f"colors of kind {kind}"
        raise InputError(f"it holds {what}; save the one image that is meant as gray DICOM or PNG")
    if size > most:
        raise InputError(f"it is {file.Rows} x {file.Columns}, too large to be read")
    try:
        values = np.asarray(apply_modality_lut(file.pixel_array, file), np.float64)
    except Exception as error:  # as above, and packages for compressed files that are missing
        raise InputError(f"its pixels cannot be read ({first_line(error)})") from error
    return values, _GRAY[kind]


def _would_lose(image: Image.Image, windowed: bool = False) -> str:
    """What of an opened image decoding would lose, and what to do; "" = nothing."""
    depth = _depth(image)
    if windowed and not depth:
        return f"has 8 bits per channel. {WINDOW_OF_8_BITS}"
    if depth and not (windowed and image.mode in _DEEP_MODES):
        way = _GIVE_WINDOW if image.mode in _DEEP_MODES else "Convert the images to 8 bits first."
        return f"has more than 8 bits per channel ({depth}), which has no unique conversion. {way}"
    if not depth and _SIGNED in _tag(image, _SAMPLE_FORMAT, ()):
        return (
            "has intensities below 0, which would be read as bright ones. Add 128 to all of them."
        )
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return (
            "holds several frames or pages, and nothing says which of them is the image. Save the "
            "one that is meant in a separate file."
        )
    stored, read = _tag(image, _SAMPLES_PER_PIXEL, 1), len(image.getbands())
    if stored > read:
        return (
            f"has {stored} channels, of which {read} would be read. Save the channels that are "
            "meant as gray or RGB."
        )
    return ""


def _depth(image: Image.Image) -> str:
    """How an image stores more than 8 bits per channel, in Pillow's words; "" = it does not.

    The mode alone does not say it: Pillow cuts 16-bit color down to mode RGB while loading, so
    this looks at what is to be loaded.
    """
    if image.mode in _DEEP_MODES:
        return f"mode {image.mode}"
    for codec, _, _, options in getattr(image, "tile", ()):
        given = options if isinstance(options, tuple) else (options,)
        for one in given:
            if isinstance(one, str) and _DEEP_STORAGE.search(one):
                return f"stored as {one}"
            if codec.startswith("ppm") and isinstance(one, int) and one > 255:
                return f"levels up to {one}"
    bits = max(_tag(image, _BITS_PER_SAMPLE, (8,)))
    return f"{bits} bits" if bits > 8 else ""


def _tag(image: Image.Image, number: int, default: Any) -> Any:
    """A tag of a TIFF file; the default for every other format."""
    return default if image.format != "TIFF" else getattr(image, "tag_v2", {}).get(number, default)


def _converted(image: Image.Image, name: Callable[[], str]) -> Image.Image:
    """An 8-bit image as mode L or RGB; `info` notes whether transparency was dropped."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "1":
        return image.convert("L")
    try:
        if image.mode in ("L", "La", "LA"):
            return _without_alpha(image.convert("LA"), "L")
        if image.mode in ("P", "PA", "RGB", "RGBa", "RGBA"):  # palettes may carry transparency
            return _without_alpha(image.convert("RGBA"), "RGB")
        return image.convert("RGB")
    except ValueError as error:  # colors that Pillow cannot bring to RGB, such as CIE L*a*b*
        raise InputError(
            f"{name()} has colors of mode {image.mode}, which cannot be converted here. Save it "
            "as RGB."
        ) from error


def _without_alpha(image: Image.Image, mode: str) -> Image.Image:
    opaque = image.convert(mode)
    opaque.info[_TRANSPARENT] = image.getchannel("A").getextrema() != (255, 255)
    return opaque


def _small(content: io.BytesIO, most: int) -> Image.Image:
    """An image whose size is read; a few kilobytes that declare too many pixels are refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        image = Image.open(content, formats=_FORMATS)
    if image.width * image.height > most:
        raise InputError(f"it is {size_text((image.height, image.width))}, too large to be read")
    return image


def _decode_group(
    group: list[NamedImage], most: int, prepare: Preparation
) -> list[tuple[np.ndarray, bool]]:
    """Pixels of images, and whether transparency was dropped from each."""
    images = [_open(name, source, most, prepare) for name, source in group]
    return [(np.asarray(image), image.info.get(_TRANSPARENT, False)) for image in images]


def _require_one_size(
    batch: list[NamedImage], decoded: list[np.ndarray], first: tuple[str, tuple[int, ...]]
) -> None:
    first_name, shape = first
    for (name, _), image in zip(batch, decoded, strict=True):
        if image.shape[:2] != shape[:2]:
            raise InputError(
                f"{name()} is {size_text(image.shape[:2])}, but {first_name} is "
                f"{size_text(shape[:2])}. {ONE_SIZE}"
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
