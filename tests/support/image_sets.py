"""Data sets on disk, in the layouts that are read."""

import gzip
import io
import json
import struct
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from certifl.data import load
from certifl.data.decode import decode_all
from certifl.errors import InputError


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(pixels):
    return encoded(Image.fromarray(pixels))


def cannot_load(says, *given, error=InputError, **options):
    with pytest.raises(error, match=says):
        load(*given, **options)


def decoded(*contents):
    """The pixels of images that errors call "image 0" and so on."""
    return decode_all((partial("image {}".format, i), one) for i, one in enumerate(contents))


def pixels_for(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_table(file, images, columns, features=None):
    """A parquet file as the hub writes it: an image column, other columns, feature metadata."""
    values = [{"bytes": png(image), "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(values, kind), **columns})
    if features:
        text = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **features}}})
        table = table.replace_schema_metadata({"huggingface": text})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_set(
    folder, shape=(9, 12), count=12, test="test", features=None, columns=None, classes=3
):
    for split, seed in (("train", 0), (test, 1)):
        labels = {"label": np.arange(count) % classes}
        write_table(
            folder / f"{split}-00000-of-00001.parquet",
            pixels_for(count, shape, seed),
            labels if columns is None else columns,
            features,
        )


def write_idx(folder, split, end, count):
    folder.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if end else open
    with opened(folder / f"{split}-images-idx3-ubyte{end}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, count, 9, 8) + pixels_for(count, (9, 8)).tobytes())
    with opened(folder / f"{split}-labels-idx1-ubyte{end}", "wb") as file:
        file.write(struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count)))
