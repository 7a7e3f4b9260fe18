"""Runs that certify translations, with explored planes whose pictures are the library's own."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from certifl.certification.certificates import Certificates
from certifl.certification.sweeps import plane_of
from certifl.perturbations import Translation
from explorer_factory import write_explorer
from report_factory import make_certificates, make_manifest, write_run

__all__ = ["LOOKS", "SIGMA", "TRANSLATION", "picture", "pixels_at", "plane_runs", "write_planes"]

SIGMA, VOTES, SIZE = 0.2, 100, 8
TRANSLATION = {
    "family": "translation",
    "sigma": SIGMA,
    "law": "gaussian",
    "norm": "l2",
    "unit": "half-widths",
    "threat": "The image is shifted.",
}
ACROSS = {
    "name": "across",
    "words": "shifted across",
    "forward": "to the left",
    "backward": "to the right",
}
DOWN = {"name": "down", "words": "shifted up and down", "forward": "up", "backward": "down"}
LOOKS = (("zeros", "centre"), ("border", "deformrs"), ("reflection", "centre"))
"""Padding and geometry of the explored images, in turn."""


def picture() -> NDArray[np.uint8]:
    """(8, 8, 3), no two pixels alike, the same in no two channels."""
    values = np.random.default_rng(5).permutation(SIZE * SIZE * 3).astype(np.uint8)
    return values.reshape(SIZE, SIZE, 3)


def pixels_at(number: int, point: int) -> NDArray[np.float64]:
    """(8, 8, 3) the picture of image `number` at a point of the plane, by the library."""
    padding, geometry = LOOKS[number % len(LOOKS)]
    perturbation = Translation(SIGMA, padding=padding, geometry=geometry)
    plane = plane_of(perturbation)
    assert plane is not None
    image = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255.0
    shifted = perturbation.apply(image, plane.deltas[point : point + 1])
    return (shifted[0].permute(1, 2, 0) * 255.0).double().numpy()


def plane_runs(place: Path, rows: tuple[int, ...] = (0, 12, 24)) -> list[Path]:
    """Three regimes: two with planes, one that was explored along the axes alone."""
    folders = []
    for number, (regime, quality) in enumerate(
        (("local", 0.75), ("fedavg", 0.95), ("ditto", 0.9))
    ):
        certificates = make_certificates(quality, 3, 12, TRANSLATION, seed=number)
        folder = place / regime
        manifest = make_manifest(regime, regime.capitalize(), 3, 36)
        folders.append(write_run(folder, certificates, manifest))
        write_planes(folders[-1], rows, planes=regime != "ditto")
    return folders


def write_planes(folder: Path, rows: tuple[int, ...], planes: bool = True) -> Path:
    """Two walks for each image, and the plane between them."""
    path = write_explorer(folder, list(rows), ACROSS)
    record = json.loads(path.read_text())
    certificates = Certificates.load(folder / "certificates.parquet")
    for number, (image, row) in enumerate(zip(record["images"], rows, strict=True)):
        image["walks"].append({**image["walks"][0], **DOWN})
        if planes:
            image["plane"] = _plane(certificates, row, *LOOKS[number % len(LOOKS)])
    if planes:
        record |= {"format": 3, "plane_votes": VOTES}
    path.write_text(json.dumps(record))
    return path


def _plane(certificates: Certificates, row: int, padding: str, geometry: str) -> dict[str, Any]:
    """The class holds up to the certified radius and half of it again, in all directions."""
    plane = plane_of(Translation(SIGMA))
    assert plane is not None
    lengths = plane.deltas.double().norm(dim=1).numpy()
    label, predicted = int(certificates.label[row]), int(certificates.predicted[row])
    kept = predicted if predicted >= 0 else label
    other = (kept + 1) % certificates.counts.shape[1]
    far = lengths > 1.5 * certificates.radius[row]
    content = io.BytesIO()
    Image.fromarray(picture()).save(content, "PNG")
    return {
        "values": plane.values.tolist(),
        "lengths": lengths.tolist(),
        "winners": [[[other if out else kept, 90], [kept if out else other, 10]] for out in far],
        "picture": base64.b64encode(content.getvalue()).decode(),
        "padding": padding,
        "geometry": geometry,
    }
