"""The state of a certification: the votes cast so far, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from certifl.smoothing.bounds import two_sided_sign_test

if TYPE_CHECKING:
    from certifl.certification.certificates import Certificates

UNLABELLED = -1


@dataclass(frozen=True)
class Request:
    """Votes wanted: numbers `start` to `stop` of one image's votes of one purpose.

    Attributes:
        slot: the row of the result that counts them.
        image: the row of the images.
        key: `rng.image_key` of that image.
        purpose: "selection", "estimation", "attack", "predict" or "explore".
        start: first vote, counted from 0 over the image's votes of this purpose.
        stop: one past the last vote.
    """

    slot: int
    image: int
    key: int
    purpose: str
    start: int
    stop: int


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

    @property
    def selected(self) -> np.ndarray:
        """(m,) the class that the selection votes choose."""
        return self.selection.argmax(axis=1)

    @property
    def cast(self) -> np.ndarray:
        """(m,) votes cast so far."""
        return self.selection.sum(axis=1) + self.estimation.sum(axis=1)

    def rows(self, mask: np.ndarray) -> Votes:
        """The votes of some images."""
        return Votes(**{name: values[mask] for name, values in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """As named arrays, for a checkpoint; `Votes(**arrays)` reads them."""
        return {name: values for name, values in vars(self).items() if values is not None}

    @staticmethod
    def of(certificates: Certificates) -> Votes:
        """The finished votes of certificates; the order of a scan's votes is not among them."""
        return Votes(
            selection=certificates.selection_counts,
            estimation=certificates.counts,
            looks=certificates.looks,
            done=np.ones(len(certificates), np.bool_),
            seconds=certificates.seconds,
        )


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


def next_requests(
    votes: Votes,
    keys: Sequence[int],
    n0: int,
    looks: Sequence[int],
    size: int,
    quota: int,
    purposes: Sequence[str],
) -> list[Request]:
    """The next votes of as many unfinished images, in order, as make a batch.

    Args:
        votes: cast so far. keys: `rng.image_key` of each image.
        n0: selection votes of an image. looks: estimation votes at which its counts are looked at.
        size: votes of the batch, about. quota: the most of one image and purpose.
        purposes: "selection", "estimation" or both.
    """
    requests: list[Request] = []
    requested = 0
    for row in map(int, np.flatnonzero(~votes.done)):
        if requested >= size:
            break
        ends = {"selection": n0, "estimation": looks[votes.looks[row]]}
        counts = {"selection": votes.selection, "estimation": votes.estimation}
        for purpose in purposes:
            start = int(counts[purpose][row].sum())
            stop = min(int(ends[purpose]), start + quota)
            if stop > start:
                requests.append(Request(row, row, keys[row], purpose, start, stop))
                requested += stop - start
    return requests


# A class against its closest rival, from the votes of both.


def sign_test_against(
    counts: np.ndarray, predicted: np.ndarray, in_favor: bool = False
) -> np.ndarray:
    """P-values of "no other class is more likely than the predicted one", (m,).

    One-sided sign tests of the predicted class against the most voted other one, times the number
    of other classes, because that one was picked from the same votes.

    Args:
        counts: (m, classes). predicted: (m,).
        in_favor: of the opposite instead, "some other class is at least as likely". (Every other
            class must then lose, and the closest shows it least: no factor is needed.)
    """
    top, rival = top_and_runner_up(counts, predicted)
    ahead, behind = (top, rival) if in_favor else (rival, top)
    tail = np.asarray(two_sided_sign_test(ahead, behind)) / 2.0
    factor = 1 if in_favor else counts.shape[1] - 1
    return np.where(ahead > behind, np.minimum(1.0, tail * factor), 1.0)


def top_and_runner_up(counts: np.ndarray, selected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Votes of the selected class, and the most of any other class; (m,) each."""
    rows = np.arange(len(counts))
    others = counts.copy()
    others[rows, selected] = 0
    return counts[rows, selected], others.max(axis=1)


def vote_margins(counts: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Votes of the predicted class minus those of the closest other one, as a share, (m,)."""
    top, rival = top_and_runner_up(counts, predicted)
    return (top - rival) / np.maximum(counts.sum(axis=1), 1)
