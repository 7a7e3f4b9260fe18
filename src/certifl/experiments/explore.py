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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from certifl.certification import Certificates
from certifl.certification.network import Network, prepare
from certifl.certification.quantization import recorded
from certifl.certification.sampling import CHUNK, VoteCounter
from certifl.certification.sweeps import (
    STEPS,
    Walk,
    Walked,
    walk_along,
    walks_of,
)
from certifl.data import Dataset, to_float
from certifl.errors import StoreError, StoreMismatch
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.runs.atomic import read_json, write_json
from certifl.runs.folder import RunFolder
from certifl.spec import Spec
from certifl.study.opened_run import (
    data_folder,
    deployed,
    finished_run,
    last_round,
    load_data,
    run_model,
    run_spec,
)

FORMAT = 4
Report = Callable[[str, int, int, str], None]

_MOST_IMAGES, _SHARED_IMAGES = 8, 6
_MOST_VOTES = 500
_SHARE = 0.05
# Small networks vote so fast that a larger share is a matter of seconds.
_SMALL_NETWORK, _SHARE_OF_SMALL, _VOTES_OF_SMALL = 1_000_000, 0.2, 25_000
_SECONDS_BETWEEN_SAVES = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explored:
    """What exploring a run came to.

    Attributes:
        images: that can be explored now.
        votes: at each step.
        skipped: why there are none; empty where there are.
    """

    images: int
    votes: int
    skipped: str = ""


def explore_run(
    place: Path,
    data_dir: Path | None = None,
    device: str = "auto",
    report: Report | None = None,
    code: Path | None = None,
) -> Explored:
    """Explore a finished run, whatever it costs; what was explored before is kept.

    Args:
        place: the run folder.
        data_dir: folder of data sets. device: "auto" or a torch device.
        report: told about progress.
        code: the folder that holds a run's own network, which its user trusts.

    Raises:
        StoreMismatch: no finished run, or other data or models than were certified.
    """
    folder = finished_run(place)
    spec, certificates = run_spec(folder), folder.load_certificates()
    dataset = load_data(spec, data_folder(folder, data_dir))
    if dataset.fingerprint != certificates.conditions["data_fingerprint"]:
        raise StoreMismatch(
            f"The data set {spec.data.name!r} holds other images than were certified in {place}. "
            "Give --data-dir with the data it was made with."
        )
    model, last = run_model(folder, spec, code), last_round(folder, spec)
    with folder.locked():
        return explore(
            folder,
            spec,
            dataset,
            lambda client: deployed(last, spec, model, client),
            device=device,
            report=report,
            limited=False,
        )


def explore(
    folder: RunFolder,
    spec: Spec,
    dataset: Dataset,
    deployed: Callable[[int], nn.Module],
    device: str,
    report: Report | None = None,
    limited: bool = True,
) -> Explored:
    """Take a few certified test images through the deformations, and write what was seen.

    Args:
        deployed: the model a client uses at test time.
        limited: whether to keep to a small share of the run's votes; where even one image would
            take more, the reason is written instead.

    Returns:
        What can be explored now. Images that were explored for the same question are kept.
    """
    certificates = folder.load_certificates()
    walks = max(len(walks_of(p)) for p in spec.perturbations() if p is not None)
    weights = sum(p.numel() for p in deployed(int(certificates.client[0])).parameters())
    per_image = walks * STEPS[walks]
    budget = _budget(certificates, weights) if limited else None
    images, votes = _size(per_image, budget)
    facts = {
        "format": FORMAT,
        "spec_hash": folder.manifest().get("spec_hash"),
        "votes": votes,
    }
    if images == 0:
        reason = (
            f"One image would have taken {per_image * CHUNK:,} votes, more than this run has to "
            f"spare ({budget:,}). `certifl explore` takes them all the same."
        )
        write_json(folder.explorer, {**facts, "key": "", "images": [], "skipped": reason})
        return Explored(0, votes, reason)
    key = _key(certificates, votes, device)
    record = {**facts, "key": key, "skipped": None, "images": _before(folder, key)}
    bench = Explorer(spec, dataset, certificates, deployed, device, votes)
    rows = _chosen(certificates, images)
    _go(folder, bench, record, rows, report)
    return Explored(len(rows), votes)


def _key(certificates: Certificates, votes: int, device: str) -> str:
    """A name of everything that pictures and votes depend on."""
    facts = certificates.conditions
    names = ("model_fingerprint", "data_fingerprint", "precision", "seed")
    same = {name: facts.get(name) for name in (*names, "description", "perturbations")}
    text = json.dumps([FORMAT, same, votes, torch.__version__, device], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _go(
    folder: RunFolder,
    bench: Explorer,
    record: Mapping[str, Any],
    rows: Sequence[int],
    report: Report | None,
) -> None:
    """Explore what is missing; the file is whole after every save."""
    held = {(image["client"], image["index"]): image for image in record["images"]}
    client, index = bench.certificates.client, bench.certificates.index
    saved, images = time.monotonic(), []
    for done, row in enumerate(rows, start=1):
        images.append(held.get((int(client[row]), int(index[row]))) or bench.image(row))
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES or done == len(rows):
            write_json(folder.explorer, {**record, "images": images})
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
    for place in range(shared):
        client = clients[place * len(clients) // shared % len(clients)]
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


def _before(folder: RunFolder, key: str) -> list[dict[str, Any]]:
    """Images that an earlier start explored for the same question."""
    if not folder.explorer.is_file():
        return []
    try:
        held = read_json(folder.explorer)
    except StoreError as error:
        _log.warning("Images are explored again: %s", error)
        return []
    same = isinstance(held, dict) and held.get("format") == FORMAT and held.get("key") == key
    return list(held["images"]) if same else []


# One test image on its walks, as the record of an exploration holds it: pictures and votes.


_WINNERS = 5
_LARGEST_TILE = 64


@dataclass(frozen=True, eq=False)
class Explorer:
    """What it takes to explore the certified images of a run.

    Attributes:
        spec: of the run. dataset: its images. certificates: of all its clients.
        deployed: the model a client uses at test time. device: where it votes.
        votes: at each step.
    """

    spec: Spec
    dataset: Dataset
    certificates: Certificates
    deployed: Callable[[int], nn.Module]
    device: str
    votes: int
    _networks: dict[str, Network] = field(default_factory=dict, repr=False)

    def image(self, row: int) -> dict[str, Any]:
        """The image of one certificate on all walks of its client's perturbation."""
        client = int(self.certificates.client[row])
        perturbation = self.spec.perturbations()[client]
        assert perturbation is not None, "a client with certificates certifies something"
        walks = walks_of(perturbation, self.certificates.interval is not None)
        return self._on(walks, perturbation, client, row)

    def _on(
        self, walks: tuple[Walk, ...], perturbation: Perturbation, client: int, row: int
    ) -> dict[str, Any]:
        network = self._network(client)
        counter = VoteCounter(network, perturbation, self.spec.seed)
        image, other = (self._picture(r).to(network.device) for r in (row, self._other(row)))
        steps = STEPS[len(walks)]
        walked = [walk_along(counter, walk, image, other, steps, self.votes) for walk in walks]
        height, width = _tile(walked[0].frames[0]).shape[1:]
        return {
            "client": client,
            "index": int(self.certificates.index[row]),
            "label": int(self.certificates.label[row]),
            "tile": [height, width],
            "walks": [_seen(*one) for one in zip(walks, walked, strict=True)],
        }

    def _picture(self, row: int) -> Tensor:
        index = self.certificates.index[row : row + 1]
        return to_float(self.dataset.test.take(index).images)[0]

    def _other(self, row: int) -> int:
        """Another picture of the same client, of another class where it has one."""
        client, label = self.certificates.client, self.certificates.label
        others = np.flatnonzero(client == client[row])
        others = others[others != row]
        if len(others) == 0:
            return (row + 1) % len(self.certificates)
        foreign = others[label[others] != label[row]]
        return int(foreign[0] if len(foreign) else others[0])

    def _network(self, client: int) -> Network:
        """The network as it was certified; clients of one global model share it.

        Raises:
            StoreMismatch: it is another one.
        """
        facts, model = self.certificates.conditions, self.deployed(client)
        name = fingerprint(model)
        if name != facts["model_fingerprint"].get(str(client)):
            raise StoreMismatch(
                f"The stored model of client {client} is not the one that was certified; `certifl "
                "verify` says more. Compute the run again with --overwrite."
            )
        if facts["precision"] == "int8":
            name = f"{name}, {client}"  # each client has scales of its own
        if name not in self._networks:
            probe = to_float(self.dataset.test.images[:1])
            self._networks.clear()
            scales = recorded(facts, client)
            self._networks[name] = prepare(
                model, probe, self.device, facts["precision"], calibration=scales
            )
        return self._networks[name]


def _seen(walk: Walk, walked: Walked) -> dict[str, Any]:
    return {
        "name": walk.name,
        "words": walk.words,
        "forward": walk.forward,
        "backward": walk.backward,
        "values": walked.values.tolist(),
        "lengths": walked.lengths.tolist(),
        "winners": _winners(walked.counts),
        "strip": base64.b64encode(_strip(walked.frames)).decode(),
    }


def _winners(counts: NDArray[np.int64]) -> list[list[list[int]]]:
    """The classes with most votes at every step, with their votes."""
    order = np.argsort(-counts, axis=1, kind="stable")[:, :_WINNERS]
    return [
        [[int(c), int(row[c])] for c in best if row[c] > 0]
        for row, best in zip(counts, order, strict=True)
    ]


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
