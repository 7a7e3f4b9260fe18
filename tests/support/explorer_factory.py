"""Records of explored images as runs hold them, with made-up votes and pictures."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from certifl.certification.certificates import Certificates
from certifl.certification.metadata import of_client

STEPS, SIZE, VOTES = 31, 8, 100
TURN, ACROSS, DOWN = (
    dict(zip(("name", "words", "forward", "backward"), way, strict=True))
    for way in (
        ("turn", "turned about its center", "counter-clockwise", "clockwise"),
        ("across", "shifted across", "to the left", "to the right"),
        ("down", "shifted up and down", "up", "down"),
    )
)


def write_explorer(
    folder: Path, rows: list[int], way: Mapping[str, str] | None = None, **facts: Any
) -> Path:
    """An explorer.json beside the certificates of a made-up run; see `experiments.explore`.

    Args:
        way: what happens to every image; None = what its client's perturbation does.
    """
    certificates = Certificates.load(folder / "certificates.parquet")
    manifest = json.loads((folder / "run.json").read_text())
    record = {
        "format": 4,
        "key": "k",
        "spec_hash": manifest["spec_hash"],
        "votes": VOTES,
        "skipped": None,
        "images": [_image(certificates, row, way) for row in rows],
        **facts,
    }
    path = folder / "explorer.json"
    path.write_text(json.dumps(record))
    return path


def _image(certificates: Certificates, row: int, way: Mapping[str, str] | None) -> dict[str, Any]:
    """The class holds up to the certified radius and half of it again, then it is another one."""
    conditions = of_client(certificates.conditions, int(certificates.client[row]))
    sigma, half = float(conditions["sigma"]), STEPS // 2
    values = np.arange(-half, half + 1) * (2 * sigma / half)
    label, predicted = int(certificates.label[row]), int(certificates.predicted[row])
    kept = predicted if predicted >= 0 else label
    other = (kept + 1) % certificates.counts.shape[1]
    far = np.abs(values) > 1.5 * certificates.radius[row]
    shift = conditions["family"] == "translation"
    ways = (way,) if way is not None else (ACROSS, DOWN) if shift else (TURN,)
    winners = [[[other if out else kept, 80], [kept if out else other, 20]] for out in far]
    return {
        "client": int(certificates.client[row]),
        "index": int(certificates.index[row]),
        "label": label,
        "tile": [SIZE, SIZE],
        "walks": [
            {
                **one,
                "values": values.tolist(),
                "lengths": np.abs(values).tolist(),
                "winners": winners,
                "strip": strip(range(STEPS)),
            }
            for one in ways
        ],
    }


def strip(greys: range) -> str:
    pixels = np.repeat(np.array(greys, np.uint8) * 8, SIZE)[None].repeat(SIZE, axis=0)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
