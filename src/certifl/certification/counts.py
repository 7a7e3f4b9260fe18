"""The state of a certification: the votes cast so far, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Votes", "fresh"]


@dataclass
class Votes:
    """The votes cast so far on m images: all that must survive an interruption.

    Attributes:
        selection: (m, classes) votes that choose the class.
        estimation: (m, classes) votes that bound its probability.
        looks: (m,) looks taken.
        done: (m,) no more votes are wanted.
        seconds: (m,) computing time attributed to the image.
        path: (m, v) scan only: the class of every estimation vote, in order; v is as far as any
            image has come.
    """

    selection: np.ndarray
    estimation: np.ndarray
    looks: np.ndarray
    done: np.ndarray
    seconds: np.ndarray
    path: np.ndarray | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a checkpoint."""
        held = {name: a for name, a in vars(self).items() if a is not None}
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in held.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Votes:
        """From named tensors of a checkpoint."""
        return Votes(**{name: value.numpy() for name, value in tensors.items()})


def fresh(images: int, classes: int) -> Votes:
    """No votes yet."""
    nothing = np.zeros((images, classes), np.int64)
    return Votes(
        selection=nothing,
        estimation=nothing.copy(),
        looks=np.zeros(images, np.int64),
        done=np.zeros(images, np.bool_),
        seconds=np.zeros(images, np.float64),
    )
