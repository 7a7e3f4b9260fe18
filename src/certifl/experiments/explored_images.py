"""One test image on its walks, as the record of an exploration holds it: pictures and votes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from certifl.certification import Certificates
from certifl.certification.network import Network, prepare
from certifl.certification.planes import Plane, plane_of, vote_on
from certifl.certification.votes import CHUNK, VoteCounter
from certifl.certification.walks import STEPS, Walk, Walked, walk_along, walks_of
from certifl.data import Dataset, to_float
from certifl.errors import StoreMismatch
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.spec import Spec

__all__ = ["Bench"]

_WINNERS = 5
_LARGEST_TILE = 64


@dataclass(frozen=True, eq=False)
class Bench:
    """What it takes to explore the certified images of a run.

    Attributes:
        spec: of the run. dataset: its images. certificates: of all its clients.
        deployed: the model a client uses at test time. device: where it votes.
        votes: at each step. planes: whether shifts are sampled in both directions at once too.
    """

    spec: Spec
    dataset: Dataset
    certificates: Certificates
    deployed: Callable[[int], nn.Module]
    device: str
    votes: int
    planes: bool = True
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
        plane = plane_of(perturbation) if self.planes else None
        return {
            "client": client,
            "index": int(self.certificates.index[row]),
            "label": int(self.certificates.label[row]),
            "tile": [height, width],
            "walks": [_seen(*one) for one in zip(walks, walked, strict=True)],
            "plane": None if plane is None else _sampled(counter, plane, image),
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
        if name not in self._networks:
            probe = to_float(self.dataset.test.images[:1])
            self._networks.clear()
            self._networks[name] = prepare(model, probe, self.device, facts["precision"])
        return self._networks[name]


def _seen(walk: Walk, walked: Walked) -> dict[str, Any]:
    return {
        "name": walk.name,
        "words": walk.words,
        "forward": walk.forward,
        "backward": walk.backward,
        "values": walked.values.tolist(),
        "lengths": walked.lengths.tolist(),
        "winners": _winners(walked.counts, _WINNERS),
        "strip": base64.b64encode(_strip(walked.frames)).decode(),
    }


def _sampled(counter: VoteCounter, plane: Plane, image: Tensor) -> dict[str, Any]:
    """The plane as its record: where it was sampled, what won there, the image as it is."""
    voted, perturbation = vote_on(counter, plane, image, CHUNK), counter.perturbation
    return {
        "values": plane.values.tolist(),
        "lengths": voted.lengths.tolist(),
        "winners": _winners(voted.counts, 2),
        "picture": base64.b64encode(_strip(image[None].cpu())).decode(),
        "padding": getattr(perturbation, "padding", "zeros"),
        "geometry": getattr(perturbation, "geometry", "centre"),
    }


def _winners(counts: NDArray[np.int64], most: int) -> list[list[list[int]]]:
    """The classes with most votes at every step, with their votes."""
    order = np.argsort(-counts, axis=1, kind="stable")[:, :most]
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
