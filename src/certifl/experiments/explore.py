"""A few test images of a run, taken through the deformations for readers of the report.

`explorer.json` in the run folder holds:
```
format, key       of the file; what its numbers depend on
spec_hash         of the run
votes             at each step, of one smoothed classifier
skipped           null, or why nothing was explored
images            in the order they were chosen:
    client, index, label, tile      tile: [height, width] of one picture in the strips
    walks         one or two, of the perturbation that the client certifies:
        name, words, forward, backward
        values    signed length of the parameter at every step, in the family's unit
        lengths   its norm, to hold against a certified radius
        winners   at every step, the classes with most votes: [[class, votes], ...]
        strip     PNG, the deformed pictures side by side, base64
```
Format 3, of 0.1.0, also held planes of shifts in both directions; the report leaves them out.

The first images are chosen without looking at results, so runs on the same test images show the
same ones side by side.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from certifl.certification import Certificates
from certifl.certification.sampling import (
    CHUNK,
    STEPS,
    Sweep,
    SweepVotes,
    VoteCounter,
    sweep_along,
    sweeps_of,
)
from certifl.data import to_float
from certifl.errors import StoreError
from certifl.progress import StageCallback
from certifl.runs.atomic import read_json, write_json
from certifl.study.opened_run import OpenRun

FORMAT = 4

_MOST_IMAGES, _SHARED_IMAGES = 8, 6
_MOST_VOTES = 500
_SHARE = 0.05
# Small networks vote so fast that a larger share is a matter of seconds.
_SMALL_NETWORK, _SHARE_OF_SMALL, _VOTES_OF_SMALL = 1_000_000, 0.2, 25_000
_SECONDS_BETWEEN_SAVES = 5.0
_log = logging.getLogger(__name__)


def explore_run(
    path: Path,
    data_dir: Path | None = None,
    device: str = "auto",
    report: StageCallback | None = None,
    code: Path | None = None,
) -> tuple[int, int]:
    """Explore a finished run, whatever it costs; what was explored before is reused.

    Args:
        path, data_dir, code: as `OpenRun`.
        device: "auto" or a torch device. report: called with progress.

    Returns:
        As `explore`.

    Raises:
        StoreMismatch: not a finished run, or other data or models than were certified.
    """
    run = OpenRun(path, data_dir, code)
    run.require_finished()
    with run.folder.locked():
        return explore(run, device, report, limited=False)


def explore(
    run: OpenRun, device: str, report: StageCallback | None = None, limited: bool = True
) -> tuple[int, int]:
    """Take a few certified test images through the deformations, and write the results.

    Args:
        run: certified. device: "auto" or a torch device. report: called with progress.
        limited: whether to keep to a small share of the run's votes; where even one image would
            take more, the reason is written instead.

    Returns:
        How many images can be explored now, and the votes at each step. Images that were explored
        under the same conditions are kept.
    """
    certificates = run.certificates
    sweeps = max(len(sweeps_of(p)) for p in run.perturbations if p is not None)
    weights = sum(p.numel() for p in run.architecture.parameters())
    per_image = sweeps * STEPS[sweeps]
    budget = _budget(certificates, weights) if limited else None
    images, votes = _size(per_image, budget)
    metadata = {
        "format": FORMAT,
        "spec_hash": run.folder.manifest().get("spec_hash"),
        "votes": votes,
    }
    if images == 0:
        reason = (
            f"One image would have taken {per_image * CHUNK:,} votes, more than this run has to "
            f"spare ({budget:,}). `certifl explore` takes them all the same."
        )
        write_json(run.folder.explorer, {**metadata, "key": "", "images": [], "skipped": reason})
        return 0, votes
    key = _key(certificates, votes, device)
    record = {**metadata, "key": key, "skipped": None, "images": _before(run, key)}
    rows = _chosen(certificates, images)
    _explore_missing(run, device, record, rows, report)
    return len(rows), votes


def _key(certificates: Certificates, votes: int, device: str) -> str:
    """A name of everything that pictures and votes depend on."""
    metadata = certificates.conditions
    names = ("model_fingerprint", "data_fingerprint", "precision", "seed")
    same = {name: metadata.get(name) for name in (*names, "description", "perturbations")}
    text = json.dumps([FORMAT, same, votes, torch.__version__, device], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _explore_missing(
    run: OpenRun,
    device: str,
    record: Mapping[str, Any],
    rows: Sequence[int],
    report: StageCallback | None,
) -> None:
    """Explore the images that are missing; the file is whole after every save."""
    known = {(image["client"], image["index"]): image for image in record["images"]}
    certificates, path = run.certificates, run.folder.explorer
    saved, images = time.monotonic(), []
    for done, row in enumerate(rows, start=1):
        name = (int(certificates.client[row]), int(certificates.index[row]))
        images.append(known.get(name) or _image(run, row, device, record["votes"]))
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES or done == len(rows):
            write_json(path, {**record, "images": images})
            saved = time.monotonic()
        if report is not None:
            report("exploring", done, len(rows), "images")


def _budget(certificates: Certificates, weights: int) -> int:
    """Votes to spare: a twentieth of the run's, or a few seconds of a small network's."""
    cast = int(certificates.votes.sum()) + int(certificates.selection_counts.sum())
    small = min(_VOTES_OF_SMALL, _SHARE_OF_SMALL * cast) if weights < _SMALL_NETWORK else 0
    return int(max(_SHARE * cast, small))


def _size(per_image: int, budget: int | None) -> tuple[int, int]:
    """How many images, and votes at each step: many images first, then many votes."""
    if budget is None:
        return _MOST_IMAGES, 3 * CHUNK
    images = min(_MOST_IMAGES, budget // (per_image * CHUNK))
    chunks = budget // (per_image * CHUNK * max(1, images))
    return images, min(_MOST_VOTES, max(1, chunks) * CHUNK)


def _chosen(certificates: Certificates, count: int) -> list[int]:
    """Rows to explore: clients and classes in turn, then what tells most of this run."""
    clients = np.unique(certificates.client)
    chosen: list[int] = []
    labels: set[int] = set()
    shared = min(count, _SHARED_IMAGES, len(certificates))
    for turn in range(shared):
        client = clients[turn * len(clients) // shared % len(clients)]
        own = np.flatnonzero(certificates.client == client)
        free = [int(row) for row in own[np.argsort(certificates.index[own])] if row not in chosen]
        free = free or [r for r in range(len(certificates)) if r not in chosen]
        row = next((r for r in free if int(certificates.label[r]) not in labels), free[0])
        labels.add(int(certificates.label[row]))
        chosen.append(row)
    right, certified = certificates.correct, ~certificates.abstained
    for kind in (certified & ~right, certificates.abstained, right):
        candidates = np.flatnonzero(kind)
        if len(chosen) < count and len(candidates) and not kind[chosen].any():
            chosen.append(int(candidates[certificates.radius[candidates].argmax()]))
    return chosen


def _before(run: OpenRun, key: str) -> list[dict[str, Any]]:
    """Images that an earlier start explored under the same conditions."""
    path = run.folder.explorer
    if not path.is_file():
        return []
    try:
        stored = read_json(path)
    except StoreError as error:
        _log.warning("Images are explored again: %s", error)
        return []
    same = isinstance(stored, dict) and stored.get("format") == FORMAT and stored.get("key") == key
    return list(stored["images"]) if same else []


# One test image on its sweeps, as the record of an exploration holds it: pictures and votes.

_WINNERS = 5
_LARGEST_TILE = 64


def _image(run: OpenRun, row: int, device: str, votes: int) -> dict[str, Any]:
    """The image of one certificate on all sweeps of its client's perturbation."""
    certificates = run.certificates
    client = int(certificates.client[row])
    perturbation = run.perturbations[client]
    assert perturbation is not None, "a client with certificates certifies something"
    sweeps = sweeps_of(perturbation, certificates.interval is not None)
    network = run.network(client, device)
    counter = VoteCounter(network, perturbation, run.spec.seed)
    shown = certificates.index[[row, _other(certificates, row)]]
    image, other = to_float(run.dataset.test.take(shown).images).to(network.device)
    steps = STEPS[len(sweeps)]
    walked = [sweep_along(counter, sweep, image, other, steps, votes) for sweep in sweeps]
    height, width = _tile(walked[0].frames[0]).shape[1:]
    return {
        "client": client,
        "index": int(certificates.index[row]),
        "label": int(certificates.label[row]),
        "tile": [height, width],
        "walks": [_seen(*one) for one in zip(sweeps, walked, strict=True)],
    }


def _other(certificates: Certificates, row: int) -> int:
    """Another image of the same client, of another class where it has one."""
    client, label = certificates.client, certificates.label
    others = np.flatnonzero(client == client[row])
    others = others[others != row]
    if len(others) == 0:
        return (row + 1) % len(client)
    foreign = others[label[others] != label[row]]
    return int(foreign[0] if len(foreign) else others[0])


def _seen(walk: Sweep, walked: SweepVotes) -> dict[str, Any]:
    order = np.argsort(-walked.counts, axis=1, kind="stable")[:, :_WINNERS]
    return {
        "name": walk.name,
        "words": walk.words,
        "forward": walk.forward,
        "backward": walk.backward,
        "values": walked.values.tolist(),
        "lengths": walked.lengths.tolist(),
        "winners": [
            [[int(c), int(row[c])] for c in best if row[c] > 0]
            for row, best in zip(walked.counts, order, strict=True)
        ],
        "strip": base64.b64encode(_strip(walked.frames)).decode(),
    }


def _tile(frame: Tensor) -> Tensor:
    """A picture as it is shown: large ones are made smaller."""
    largest = max(frame.shape[1:])
    if largest <= _LARGEST_TILE:
        return frame
    height, width = (max(1, round(size * _LARGEST_TILE / largest)) for size in frame.shape[1:])
    return nn.functional.interpolate(frame[None], (height, width), mode="area")[0]


def _strip(frames: Tensor) -> bytes:
    """The pictures of a walk side by side, as PNG; of other than 1 or 3 channels the first."""
    tiles = torch.cat([_tile(frame) for frame in frames], dim=2)
    shown = tiles if len(tiles) == 3 else tiles[:1].expand(3, -1, -1)
    pixels = (shown * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if len(tiles) != 3:
        picture = picture.convert("L")
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()
