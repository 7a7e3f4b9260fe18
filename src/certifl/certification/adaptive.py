"""Certification in batches of votes over many images.

The state of a certification is nothing but counts: selection votes and estimation votes per image.
Each batch takes the next votes of as many unfinished images as fill a set of calls, so images that
stop early leave no gap. Certificates are a pure function of the final counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from certifl.certification.certificates import ABSTAINED, UNLABELLED, Certificates
from certifl.certification.counts import Votes
from certifl.certification.estimators import Estimator
from certifl.certification.sampling import VoteCounter, votes_per_image
from certifl.certification.settings import Settings
from certifl.errors import InputError
from certifl.progress import ProgressCallback
from certifl.rng import image_key

# Calls of the network in a batch, of which no image takes more than its quota: often enough for
# progress and checkpoints, rare enough that fetching the counts costs nothing.
_CALLS_PER_BATCH = 32


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
        label=np.full(m, UNLABELLED, np.int64) if labels is None else labels.astype(np.int64),
        predicted=np.where(certified, votes.selected, ABSTAINED).astype(np.int64),
        counts=votes.estimation,
        selection_counts=votes.selection,
        looks=votes.looks,
        seconds=votes.seconds,
        conditions=dict(conditions or {}),
        **columns,
    )
