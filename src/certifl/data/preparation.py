"""How images of any size and depth become those of a study: window, crop, resize, in this order.

What is done is named in the spec and in the client's settings, and is part of the data set's
fingerprint. Certificates are about the prepared images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("center", "pad")
LARGEST_SIDE = 4096
_MOST_PIXELS = 1 << 25  # of a padded image: a few bytes of file may ask for any number


@dataclass(frozen=True)
class Preparation:
    """What is done to every image before it is used, nothing by default; else InputError.

    Attributes:
        resize: (height, width) in pixels, bilinear and antialiased.
        crop: "center" cuts out the largest part of the aspect ratio of `resize` (a square without
            it) about the middle; "pad" adds black at both sides instead.
        window: (low, high) for gray images of more than 8 bits: stored intensities from low to
            high become 0 to 255, rounded to the nearest; those outside are clipped. Of DICOM,
            intensities are those after the file's rescale slope and intercept (Hounsfield units of
            a CT).
    """

    resize: tuple[int, int] | None = None
    crop: str | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _size(self.resize)
        _window(self.window)
        if self.crop is not None and self.crop not in CROPS:
            raise InputError(f"crop = {self.crop!r} is not allowed: choose center or pad.")

    @property
    def described(self) -> dict[str, Any]:
        """What is done, as JSON; empty where nothing is."""
        values = {"resize": self.resize, "crop": self.crop, "window": self.window}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    @property
    def choices(self) -> tuple[str, ...]:
        """As a cache is named by it."""
        return ("prepared", json.dumps(self.described)) if self.described else ()

    def windowed(self, intensities: np.ndarray) -> np.ndarray:
        """Gray intensities (h, w) as uint8; InputError without a window, or for NaN."""
        if self.window is None:
            raise InputError("there is no window")
        values = np.asarray(intensities, np.float64)
        if not np.isfinite(values).all():
            raise InputError("it holds intensities that are not numbers")
        low, high = self.window
        share = np.clip((values - low) / (high - low), 0.0, 1.0)
        return np.floor(255.0 * share + 0.5).astype(np.uint8)

    def fitted(self, image: Image.Image) -> Image.Image:
        """An 8-bit image cropped or padded, and resized; InputError if that makes it too large."""
        from PIL import Image

        if self.crop is not None:
            width, height = self._frame(image.width, image.height)
            if width * height > _MOST_PIXELS:
                raise InputError(
                    f"crop = {self.crop} would make it {height} x {width} (height x width), which "
                    "is too large"
                )
            left, top = int((image.width - width) / 2), int((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))  # beyond the image: black
        if self.resize is None:
            return image
        height, width = self.resize
        if image.size == (width, height):
            return image
        return image.resize((width, height), Image.Resampling.BILINEAR)

    def _frame(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the largest frame inside an image, or the smallest around it."""
        down, across = self.resize or (1, 1)
        choose = min if self.crop == "center" else max
        fitting = choose(width, max(1, round(height * across / down)))
        return fitting, choose(height, max(1, round(width * down / across)))

    def arrays(self, images: np.ndarray) -> np.ndarray:
        """The same for uint8 images (n, c, h, w) read at once; InputError with a window."""
        if self.window is not None:
            raise InputError(f"These images have 8 bits. {WINDOW_OF_8_BITS}")
        if not self.described or not len(images):
            return images
        from PIL import Image

        fitted = [
            np.asarray(self.fitted(Image.fromarray(np.ascontiguousarray(one))))
            for one in (images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1))
        ]
        stacked = np.stack(fitted)
        return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)


def preparation_of(
    resize: int | Sequence[int] | None, crop: str | None, window: Sequence[float] | None
) -> Preparation:
    """What a spec, a client's settings or a call names; InputError for values not allowed."""
    size = (resize, resize) if isinstance(resize, int) else resize
    return Preparation(_size(size), crop, _window(window))


WINDOW_OF_8_BITS = "data.window is for images of more than 8 bits: leave it out."


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) from a number of pixels or two of them."""
    if value is None:
        return None
    whole = isinstance(value, Sequence) and all(type(side) is int for side in value)
    if not whole or len(value) != 2 or not all(8 <= side <= LARGEST_SIDE for side in value):
        raise InputError(
            f"resize = {value!r} is not allowed: it must be a number of pixels from 8 to "
            f"{LARGEST_SIDE}, such as 64, or [height, width]."
        )
    return value[0], value[1]


def _window(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, Sequence) and all(
        isinstance(end, (int, float)) and not isinstance(end, bool) and math.isfinite(end)
        for end in value
    )
    if not numbers or len(value) != 2 or not value[0] < value[1]:
        raise InputError(
            f"window = {value!r} is not allowed: it must be [low, high], the stored intensities "
            "that become black and white, such as [0, 65535] or, of a CT, [-1000, 400]."
        )
    return float(value[0]), float(value[1])


AS_THEY_ARE = Preparation()
"""Nothing is done to the images."""
