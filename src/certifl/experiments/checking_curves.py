"""What can be checked of a federation whose clients told curves and kept their certificates.

A curve says how many of a client's test images are certified correct at each radius of the study's
grid, and their average certified radius. Whether these numbers follow from votes only the client
can check, where the votes are; here it can be seen whether they are possible at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from certifl.errors import StoreError
from certifl.outside import MALFORMED
from certifl.spec import Spec
from certifl.store.atomic import read_json
from certifl.store.runs import RunFolder
from certifl.work.curves import possible_averages

__all__ = ["curves_of", "impossible", "kept_words", "shared_rows"]

_ROUNDING = 1e-9


def curves_of(folder: RunFolder) -> dict[int, Mapping[str, Any]]:
    """The told curves, by client.

    Raises:
        StoreError: the file is damaged.
    """
    held = read_json(folder.curves)
    try:
        return {int(client): dict(curve) for client, curve in held["clients"].items()}
    except MALFORMED as error:
        raise StoreError(f"{folder.curves} is damaged: {error!r}.") from error


def impossible(client: int, curve: Mapping[str, Any], spec: Spec) -> list[str]:
    """Why no certificates can come to this curve; nothing if some can."""
    try:
        radii, counts = [float(r) for r in curve["radii"]], [int(c) for c in curve["correct"]]
        images, acr = int(curve["images"]), float(curve["acr"])
    except MALFORMED as error:
        return [f"client {client}: its curve is damaged ({error!r})"]
    if len(radii) != len(counts) or not radii:
        return [f"client {client}: its curve has {len(counts)} counts for {len(radii)} radii"]
    found = []
    if any(after > before for before, after in itertools.pairwise([images, *counts])):
        found.append(f"client {client}: its counts must fall from at most all {images} images")
    asked = spec.certification.images
    if asked is not None and images > asked:
        found.append(f"client {client}: {images} images, but the spec certifies {asked}")
    low, high = possible_averages(np.array(radii), np.array(counts), images)
    if not low - _ROUNDING <= acr <= high + _ROUNDING:
        found.append(
            f"client {client}: an average certified radius of {acr:.6g} does not go with its "
            f"curve, which allows {low:.6g} to {high:.6g}"
        )
    return found


def shared_rows(folder: RunFolder) -> list[Path]:
    """Certificates that single clients told in full, where others did not."""
    return sorted(folder.votes(0).parent.glob("rows-*.parquet"))


def kept_words(place: Path, curves: int) -> str:
    """What of such a run is not verified, why, and where it can be."""
    told = "told curves" if curves else "told nothing of them"
    checked = ""
    if curves:
        checked = (
            f" Checked here: {curves} curves agree with the spec and are possible (counts that "
            "fall on its grid, averages that go with them), which does not make them true."
        )
    return (
        f"{place} holds no certificates to verify: its clients certified on their own machines, "
        f"{told} and kept votes and radii of their images.{checked} Every client can verify its "
        "own: `certifl verify studies/ID/certificates.parquet` in its folder."
    )
