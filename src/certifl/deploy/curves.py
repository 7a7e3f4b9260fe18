"""What a client may tell of its certificates: a curve, rows, or nothing.

Radii and predictions of single images describe private images. The curve is, for every radius of a
grid that follows from the study alone, the number of test images that are certified correct at
it; with it goes the average certified radius.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from certifl.certification import Certificates
from certifl.certification.settings import Settings
from certifl.deploy.messages import Garbled
from certifl.errors import InputError
from certifl.federated.states import ModelState
from certifl.perturbations import Perturbation

__all__ = ["curve_of", "rows_from", "rows_of", "told_conditions"]

_TOLD = (
    "family",
    "sigma",
    "description",
    "law",
    "norm",
    "unit",
    "threat",
    "estimator",
    "bounds",
    "alpha",
    "n0",
    "n",
    "look_votes",
    "look_levels",
    "scan",
    "reach",
    "radii",
    "label_aware",
    "keep",
    "seed",
    "precision",
    "batch_norm_folded",
    "versions",
)
"""Facts that follow from the study, or from the software; nothing of data or models."""


def told_conditions(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of certificates as far as they are no secret of the client."""
    return {name: conditions[name] for name in _TOLD if name in conditions}


def curve_of(
    certificates: Certificates, perturbation: Perturbation, settings: Settings
) -> dict[str, Any]:
    """A client's curve: how many of its images are certified correct at each radius.

    Returns:
        radii, correct (counts), images, acr, and conditions (see `told_conditions`).
    """
    grid = settings.grid(perturbation)
    correct, radius = certificates.correct, certificates.radius
    counts = [int((correct & (radius >= r)).sum()) for r in grid]
    return {
        "radii": [float(r) for r in grid],
        "correct": counts,
        "images": len(certificates),
        "acr": certificates.average_certified_radius(),
        "conditions": told_conditions(certificates.conditions),
    }


def rows_of(certificates: Certificates) -> ModelState:
    """All rows, as a part of a message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        certificates.save(path)
        return {"parquet": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}


def rows_from(part: ModelState) -> Certificates:
    """Rows that a client sent.

    Raises:
        Garbled: they are no certificates.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        try:
            path.write_bytes(part["parquet"].numpy().tobytes())
            return Certificates.load(path)
        except (KeyError, InputError, TypeError, ValueError) as error:
            raise Garbled(f"its rows are no certificates ({error})") from error
