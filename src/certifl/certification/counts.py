"""The state of a certification: the votes cast so far, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certifl.smoothing.bounds import two_sided_sign_test


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


# A class against its closest rival, from the votes of both.


def sign_test_against(
    counts: np.ndarray, predicted: np.ndarray, in_favour: bool = False
) -> np.ndarray:
    """P-values of "no other class is more likely than the predicted one", (m,).

    One-sided sign tests of the predicted class against the most voted other one, times the number
    of other classes, because that one was picked from the same votes.

    Args:
        counts: (m, classes). predicted: (m,).
        in_favour: of the opposite instead, "some other class is at least as likely". (Every other
            class must then lose, the closest of them shows least: no factor is needed.)
    """
    top, rival = _tops(counts, predicted)
    ahead, behind = (top, rival) if in_favour else (rival, top)
    tail = np.asarray(two_sided_sign_test(ahead, behind)) / 2.0
    factor = 1 if in_favour else counts.shape[1] - 1
    return np.where(ahead > behind, np.minimum(1.0, tail * factor), 1.0)


def _tops(counts: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(counts))
    others = counts.copy()
    others[rows, predicted] = -1
    return counts[rows, predicted], others.max(axis=1)


def lead_of(counts: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Votes of the predicted class minus those of the closest other one, as a share, (m,)."""
    top, rival = _tops(counts, predicted)
    return (top - rival) / np.maximum(counts.sum(axis=1), 1)
