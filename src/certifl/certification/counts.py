"""Certification in batches of votes over many images; its state is counts, and nothing else.

Each batch takes the next votes of as many unfinished images as fill a set of calls, so images that
stop early leave no gap. Certificates are a pure function of the final counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.certification.certificates import ABSTAINED, UNLABELED, Certificates
from certifl.certification.settings import Settings
from certifl.errors import InputError
from certifl.progress import ProgressCallback
from certifl.rng import image_key
from certifl.smoothing.bounds import two_sided_sign_test

if TYPE_CHECKING:
    from torch import Tensor

    from certifl.certification.estimators import Estimator
    from certifl.certification.sampling import VoteCounter


CHUNK = 100  # votes that are drawn together; where they are cut changes none of them
# Calls of the network in a batch, of which no image takes more than its quota: often enough for
# progress and checkpoints, rare enough that fetching the counts costs nothing.
_CALLS_PER_BATCH = 32
_VOTES_PER_IMAGE = 3200
_CALLS_PER_IMAGE = 4


@dataclass(frozen=True)
class Request:
    """Requested votes: numbers `start` to `stop` of one image's votes of one purpose.

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
        done: (m,) no more votes are needed.
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


def votes_per_image(batch_size: int) -> int:
    """The most votes of one image in a batch of requests: whole chunks, enough for some calls.

    With fewer, a last image alone would leave most of a large call empty. The votes do not depend
    on where they are cut.
    """
    chunks = -(-_CALLS_PER_IMAGE * batch_size // CHUNK)
    return max(_VOTES_PER_IMAGE, chunks * CHUNK)


def expected_votes(images: int, settings: Settings) -> int:
    """The most votes that certifying so many images can take."""
    return images * (settings.n0 + settings.n)


def count_all(
    counter: VoteCounter,
    images: Tensor,
    labels: np.ndarray | None,
    estimator: Estimator,
    votes: Votes,
    after_batch: Callable[[Votes], None] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Cast votes, in place, until every image is done; `after_batch` may save them on the way."""
    keys = [image_key(image) for image in images]
    at_most = expected_votes(1, estimator.settings)
    while not votes.done.all():
        advance(counter, images, keys, labels, estimator, votes)
        if after_batch is not None:
            after_batch(votes)
        if progress is not None:
            # A finished image counts in full: the bar measures the work still to come.
            progress(int(np.where(votes.done, at_most, votes.cast).sum()), at_most * len(keys))


def advance(
    counter: VoteCounter,
    images: Tensor,
    keys: list[int],
    labels: np.ndarray | None,
    estimator: Estimator,
    votes: Votes,
) -> None:
    """Cast one batch of votes, in place, and close the images that need no more."""
    started, before = time.perf_counter(), votes.cast
    size = counter.network.batch_size
    requests = estimator.next_requests(votes, keys, _CALLS_PER_BATCH * size, votes_per_image(size))
    estimator.cast(counter, images, requests, votes)
    added = votes.cast - before
    votes.seconds += added * ((time.perf_counter() - started) / max(1, int(added.sum())))
    estimator.close(votes, labels)


def finalize(
    votes: Votes,
    estimator: Estimator,
    labels: np.ndarray | None = None,
    index: np.ndarray | None = None,
    client: int = 0,
    conditions: Mapping[str, Any] | None = None,
) -> Certificates:
    """The certificates that follow from the votes, with the estimator's guarantee."""
    if not votes.done.all():
        raise InputError("Some images still need votes; certificates follow from finished counts.")
    m = len(votes.done)
    columns = estimator.finalize(votes)
    certified = columns.pop("certified")
    return Certificates(
        client=np.full(m, client, np.int64),
        index=np.arange(m) if index is None else np.asarray(index, np.int64),
        label=np.full(m, UNLABELED, np.int64) if labels is None else labels.astype(np.int64),
        predicted=np.where(certified, votes.selected, ABSTAINED).astype(np.int64),
        counts=votes.estimation,
        selection_counts=votes.selection,
        looks=votes.looks,
        seconds=votes.seconds,
        conditions=dict(conditions or {}),
        **columns,
    )


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
