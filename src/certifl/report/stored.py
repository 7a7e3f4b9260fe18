"""Stored results that a report is made of: whether they can be summarized, and shared curves.

Where clients share curves only, a curve says, at every radius of a grid, how many of a client's
test images are certified correct, and what their average certified radius is. The page is made
from certificates that reproduce exactly this: at the radii of the grid, where curves are drawn,
and on average, they state what was shared; between two radii, nothing that does not follow from
it. Abstentions, single images and votes were not shared and are not shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from certifl.certification.certificates import ABSTAINED, UNLABELED, Certificates
from certifl.certification.metadata import CURVES_ONLY, entries, masks
from certifl.errors import StoreError, StoreMismatch
from certifl.runs.folder import StoredRun
from certifl.safe_io import MALFORMED
from certifl.smoothing.bounds import Floats, Ints
from certifl.smoothing.curves import impossible_curve

_REQUIRED_METADATA = ("family", "sigma", "norm", "unit", "alpha")
_MOST_IMAGES = 10**7


def certificates_problem(certificates: Certificates) -> str | None:
    """Why these certificates cannot be summarized, or None."""
    try:
        described = [metadata for _, metadata in entries(certificates.conditions)]
    except (KeyError, TypeError, ValueError):
        return "its conditions do not say whose perturbation is which"
    missing = [n for n in _REQUIRED_METADATA if any(n not in one for one in described)]
    if missing:
        return f"its conditions do not name {', '.join(missing)}"
    if len(certificates) == 0:
        return "it contains no image"
    if not np.all(np.isfinite(certificates.radius) & (certificates.radius >= 0)):
        return "a radius is not a finite number of at least 0"
    if np.any(certificates.label == UNLABELED):
        return "some images have no label, so nothing can be called correct"
    images = np.stack([certificates.client, certificates.index], axis=1)
    if len(np.unique(images, axis=0)) != len(images):
        return "the same image of a client appears twice"
    if not all(math.isfinite(float(metadata["sigma"])) for metadata in described):
        return "its sigma is not a finite number"
    owners = np.sum(masks(certificates.conditions, certificates.client), axis=0)
    if np.any(owners != 1):
        return "it does not say which perturbation some client certified"
    return None


def round_problem(entry: Mapping[str, Any]) -> str:
    """Why the page cannot compute with a round; "" where it can."""
    if not isinstance(entry.get("round", 0), int):
        return "its round is not a number"
    clients, left_out = entry.get("clients", {}), entry.get("left_out", [])
    rows = list(clients.values()) if isinstance(clients, dict) else clients
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "its clients are not objects"
    if not isinstance(left_out, list) or not all(_is_fault(fault) for fault in left_out):
        return "it does not say which client was left out, and why"
    return ""


def _is_fault(fault: object) -> bool:
    return (
        isinstance(fault, dict)
        and isinstance(fault.get("client"), int)
        and isinstance(fault.get("reason"), str)
    )


def certificates_from_curves(run: StoredRun) -> Certificates:
    """Certificates that reproduce the curves of a run's clients.

    Raises:
        StoreMismatch: no client shared a curve. StoreError: the file is damaged.
    """
    curves = run.curves
    if not curves:
        raise StoreMismatch(
            f"In {run.path} every client keeps its certificates to itself: there is nothing to "
            "report. The clients' own folders contain them."
        )
    try:
        return Certificates.concatenate([rows_from_curve(c, curves[c]) for c in sorted(curves)])
    except MALFORMED as error:
        raise StoreError(f"{run.folder.curves} is damaged: {error!r}.") from error


def rows_from_curve(client: int, curve: Mapping[str, Any]) -> Certificates:
    """One client's rows; `curve` has radii, correct, images, acr and conditions."""
    grid = np.asarray(curve["radii"], np.float64)
    counts = np.asarray(curve["correct"], np.int64)
    images, acr = int(curve["images"]), float(curve["acr"])
    # Numbers that no certificates have are refused before memory is allocated for them.
    if grid.ndim != 1 or counts.ndim != 1 or images > _MOST_IMAGES:
        raise ValueError(f"{counts.size} counts for {grid.size} radii of {images} images")
    if not (np.isfinite(grid).all() and (np.diff(grid, prepend=0.0) >= 0).all()):
        raise ValueError("its radii must rise from 0 up")
    if problem := impossible_curve(grid.tolist(), counts.tolist(), images, acr):
        raise ValueError(problem)
    correct = _radii_within_steps(grid, counts - np.append(counts[1:], 0), images * acr)
    radius = np.zeros(images)
    radius[: len(correct)] = correct
    predicted = np.full(images, ABSTAINED, np.int64)
    predicted[: len(correct)] = 0
    zeros, unknown = np.zeros(images, np.int64), np.full(images, np.nan)
    return Certificates(
        client=np.full(images, client, np.int64),
        index=np.arange(images),
        label=zeros,
        predicted=predicted,
        radius=radius,
        p_lower=unknown,
        p_upper=unknown,
        counts=np.zeros((images, 1), np.int64),
        selection_counts=np.zeros((images, 1), np.int64),
        looks=zeros,
        level=unknown,
        seconds=np.zeros(images),
        conditions={**curve["conditions"], CURVES_ONLY: True},
    )


def _radii_within_steps(grid: Floats, in_step: Ints, total: float) -> Floats:
    """A radius for every image that is certified correct, within its step of the grid.

    All lie at the same fraction of their steps, such that they sum to `total`; images at the last
    radius of the grid lie there, or as far beyond it as the sum demands.
    """
    low = np.repeat(grid, in_step)
    if not len(low):
        return low
    room = np.repeat(np.append(np.diff(grid), 0.0), in_step)
    rest = max(0.0, total - float(low.sum()))
    inside = float(room.sum())
    if inside > 0:
        fraction = min(rest / inside, 1.0 - 1e-9)
        low = low + fraction * room
        rest -= fraction * inside
    last = int(in_step[-1])
    if rest > 1e-12 and last:
        low[-last:] += rest / last
    return low
