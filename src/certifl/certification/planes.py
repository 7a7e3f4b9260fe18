"""Planes of parameters: an even grid over both shifts of a translation, votes at each point.

A walk (see `walks`) shows one direction; shifts go in all of them. What is sampled is g_delta, as
on a walk: votes of the network on ONE interpolation of the original image with delta + noise.
Between two points nothing was asked. A certificate needs no points: it speaks of every parameter
up to its radius, which is a disc of this plane.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.certification.reach import lengths
from certifl.certification.votes import Request, VoteCounter
from certifl.certification.walks import walks_of
from certifl.perturbations import Perturbation
from certifl.streams import image_key

__all__ = ["SIDE", "Plane", "Voted", "plane_of", "vote_on"]

SIDE = 13
"""Points along either axis: odd, so that the image as it is lies in the middle."""


@dataclass(frozen=True)
class Plane:
    """An even grid of SIDE x SIDE parameters around 0.

    Attributes:
        reach: largest value on either axis, in the family's unit.
    """

    reach: float

    @property
    def values(self) -> np.ndarray:
        """(SIDE,) values on either axis, from -reach to reach; 0 is exactly among them."""
        half = SIDE // 2
        return np.arange(-half, half + 1) * (self.reach / half)

    @property
    def deltas(self) -> Tensor:
        """(SIDE * SIDE, 2) float32, row by row: the first parameter changes fastest."""
        down, across = np.meshgrid(self.values, self.values, indexing="ij")
        both = np.stack([across.ravel(), down.ravel()], axis=1)
        return torch.as_tensor(both, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Voted:
    """What was voted on a plane.

    Attributes:
        lengths: (SIDE * SIDE,) norms of the parameters, to hold against a radius.
        counts: (SIDE * SIDE, classes) votes of g_delta, on the same noise at every point.
    """

    lengths: np.ndarray
    counts: np.ndarray


def plane_of(perturbation: Perturbation) -> Plane | None:
    """The plane that the two walks of a translation span; None for every other family."""
    if perturbation.family != "translation":
        return None
    reach = walks_of(perturbation)[0].reach
    return None if reach is None else Plane(reach)


def vote_on(counter: VoteCounter, plane: Plane, image: Tensor, votes: int) -> Voted:
    """Let the network vote at every point of a plane.

    Args:
        counter: the prepared network, the perturbation and the seed.
        image: (c, h, w) float32 on the network's device.
        votes: at each point.
    """
    deltas, key = plane.deltas.to(image.device), image_key(image)
    requests = [Request(point, 0, key, "explore", 0, votes) for point in range(len(deltas))]
    counts = counter.count(image[None], requests, len(deltas), deltas)
    norms = lengths(deltas, counter.perturbation.norm, 1).cpu().numpy()
    return Voted(lengths=norms, counts=counts)
