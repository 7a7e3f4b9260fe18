"""A small synthetic data set in the layout of flwrlabs/fed-isic2019: dermoscopy from six centers.

    python examples/fed_isic2019.py DATA
    certifl run examples/fed_isic2019.toml --data-dir DATA

The layout is that of the real one (parquet, columns image, center and label; JPEG of different
sizes, 224 to 337 pixels wide); the pictures are synthetic: a lesion whose color is its class, in
the light of its center's lamp. With the real data set only the folder differs.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CENTERS, CLASSES = 6, 8
_FEATURES = {
    "image": {"_type": "Image"},
    "center": {"_type": "Value", "dtype": "int64"},
    "label": {"_type": "ClassLabel", "names": [str(number) for number in range(CLASSES)]},
}


def lesion(rng: np.random.Generator, center: int, label: int) -> bytes:
    """A JPEG: skin, a disc in the color of its class, the brightness of its center's lamp."""
    height = 224
    width = int(rng.integers(224, 338))
    y, x = np.mgrid[:height, :width]
    down, across = rng.uniform(-10, 10, 2)
    inside = (y - height / 2 - down) ** 2 + (x - width / 2 - across) ** 2 < rng.uniform(
        40, 70
    ) ** 2
    color = 60 + 120 * np.array([label & 1, label >> 1 & 1, label >> 2 & 1])
    picture = np.where(inside[..., None], color, (205, 170, 150)) * (0.75 + 0.05 * center)
    picture = picture + rng.normal(0, 6, (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def write(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Write both splits, with so many images of each center; return the data set's folder."""
    root = folder / "fed-isic2019"
    root.mkdir(parents=True, exist_ok=True)
    for split, each in (("train", train), ("test", test)):
        rng = np.random.default_rng([seed, each, len(split)])
        center = rng.permutation(np.repeat(np.arange(CENTERS), each))
        label = rng.permutation(np.arange(len(center)) % CLASSES)
        pairs = zip(center.tolist(), label.tolist(), strict=True)
        images = [{"bytes": lesion(rng, *pair), "path": None} for pair in pairs]
        table = pa.table({"image": images, "center": center, "label": label})
        about = json.dumps({"info": {"features": _FEATURES}})
        table = table.replace_schema_metadata({"huggingface": about})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return root


def main(arguments: list[str] | None = None) -> None:
    """Write the data set into DATA/fed-isic2019."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DATA")
    parser.add_argument("--train", type=int, default=40, help="training images of each center")
    parser.add_argument("--test", type=int, default=10, help="test images of each center")
    chosen = parser.parse_args(arguments)
    print(write(chosen.folder, chosen.train, chosen.test))


if __name__ == "__main__":
    main()
