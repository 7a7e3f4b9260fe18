"""Runs whose clients told curves and kept their certificates to themselves.

A curve is, at every radius of a grid, how many of a client's test images are certified correct,
and their average certified radius. Rows that come to just this are made from it, so that the page
is the one of a run in one place: at the grid's radii, where curves are drawn, and for the average,
they say what was told; between two radii they say nothing that was not implied.

Who abstained, which image is which, and what votes were cast is not told and not shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.certification.certificates import ABSTAINED, Certificates
from certifl.errors import StoreError, StoreMismatch
from certifl.outside import MALFORMED
from certifl.store.atomic import read_json

__all__ = ["CURVES", "TOLD", "implied", "told_certificates"]

CURVES, TOLD = "curves.json", "told"
_MOST_IMAGES = 10**7

Floats = NDArray[np.float64]


def told_certificates(place: Path) -> Certificates:
    """Rows that come to what the clients told.

    Raises:
        StoreMismatch: no client told anything. StoreError: the file is damaged.
    """
    held = read_json(place / CURVES)
    try:
        clients = {int(client): curve for client, curve in held["clients"].items()}
        if not clients:
            raise StoreMismatch(
                f"In {place} every client keeps its certificates to itself: there is nothing to "
                "report. Their own folders hold them."
            )
        parts = [implied(client, clients[client]) for client in sorted(clients)]
        return Certificates.concatenate(parts)
    except MALFORMED as error:
        if isinstance(error, StoreMismatch):
            raise
        raise StoreError(f"{place / CURVES} is damaged: {error!r}.") from error


def implied(client: int, curve: Mapping[str, Any]) -> Certificates:
    """One client's rows; `curve` holds radii, correct, images, acr and conditions."""
    grid = np.asarray(curve["radii"], np.float64)
    counts = np.asarray(curve["correct"], np.int64)
    images, acr = int(curve["images"]), float(curve["acr"])
    _check(grid, counts, images, acr)
    in_step = counts - np.append(counts[1:], 0)
    reach = _within(grid, in_step, images * acr)
    right = len(reach)
    radius = np.zeros(images)
    radius[:right] = reach
    predicted = np.full(images, ABSTAINED, np.int64)
    predicted[:right] = 0
    none, nothing = np.zeros(images, np.int64), np.full(images, np.nan)
    made = Certificates(
        client=np.full(images, client, np.int64),
        index=np.arange(images),
        label=none,
        predicted=predicted,
        radius=radius,
        p_lower=nothing,
        p_upper=nothing,
        counts=np.zeros((images, 1), np.int64),
        selection_counts=np.zeros((images, 1), np.int64),
        looks=none,
        level=nothing,
        seconds=np.zeros(images),
    )
    conditions = {**curve["conditions"], TOLD: "curve"}
    return dataclasses.replace(made, conditions=conditions)


def _check(grid: Floats, counts: NDArray[np.int64], images: int, acr: float) -> None:
    """Refuse numbers that no certificates come to, before memory is taken for them.

    Raises:
        ValueError: they are such numbers.
    """
    if grid.ndim != 1 or grid.shape != counts.shape or not len(grid):
        raise ValueError(f"{counts.size} counts for {grid.size} radii")
    falling = counts[0] <= images and counts[-1] >= 0 and bool((np.diff(counts) <= 0).all())
    rising = bool(np.isfinite(grid).all()) and grid[0] >= 0 and bool((np.diff(grid) >= 0).all())
    if not (1 <= images <= _MOST_IMAGES and falling and rising):
        raise ValueError("counts must fall from at most all images, at radii that rise")
    if not (np.isfinite(acr) and acr >= 0):
        raise ValueError(f"an average certified radius of {acr}")


def _within(grid: Floats, in_step: NDArray[np.int64], total: float) -> Floats:
    """A radius for every image that is certified correct, in its step of the grid.

    All lie at the same part of their steps, such that they sum to `total`; images at the last
    radius of the grid lie there, or as far beyond it as the sum demands.
    """
    low = np.repeat(grid, in_step)
    if not len(low):
        return low
    room = np.repeat(np.append(np.diff(grid), 0.0), in_step)
    rest = max(0.0, total - float(low.sum()))
    inside = float(room.sum())
    if inside > 0:
        part = min(rest / inside, 1.0 - 1e-9)
        low = low + part * room
        rest -= part * inside
    last = int(in_step[-1])
    if rest > 1e-12 and last:
        low[-last:] += rest / last
    return low
