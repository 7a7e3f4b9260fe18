"""Certification as waves of votes over many images.

The state of a certification is nothing but counts: selection votes and estimation votes per image.
Each wave asks for the next votes of as many unfinished images as fill a set of batches, so images
that stop early leave no hole in a batch. Certificates are a pure function of the final counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from certifl.certification import scan
from certifl.certification.certificates import ABSTAINED, UNLABELLED, Certificates
from certifl.certification.counts import Votes
from certifl.certification.sampling import Request, VoteCounter, votes_per_turn
from certifl.certification.settings import Settings
from certifl.errors import InputError
from certifl.perturbations.base import Perturbation
from certifl.progress import ProgressCallback
from certifl.rng import image_key
from certifl.smoothing.bounds import BOUNDS
from certifl.smoothing.sequential import finished

# A wave fills this many batches, and no image takes more votes of it than its turn gives: often
# enough for progress and checkpoints, rare enough that fetching the counts costs nothing.
_BATCHES_PER_WAVE = 32


def expected_votes(images: int, settings: Settings) -> int:
    """The most votes that certifying so many images can take."""
    return images * (settings.n0 + settings.n)


def count_all(
    counter: VoteCounter,
    images: Tensor,
    labels: np.ndarray | None,
    settings: Settings,
    votes: Votes,
    after_wave: Callable[[Votes], None] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Cast votes, in place, until every image is done; `after_wave` may save them on the way."""
    keys = [image_key(image) for image in images]
    while not votes.done.all():
        advance(counter, images, keys, labels, settings, votes)
        if after_wave is not None:
            after_wave(votes)
        if progress is not None:
            progress(_spent(votes, settings), expected_votes(len(keys), settings))


def _spent(votes: Votes, settings: Settings) -> int:
    # A finished image counts in full: the bar then measures the work that is left.
    return int(np.where(votes.done, settings.n0 + settings.n, _cast(votes)).sum())


def advance(
    counter: VoteCounter,
    images: Tensor,
    keys: list[int],
    labels: np.ndarray | None,
    settings: Settings,
    votes: Votes,
) -> None:
    """Cast one wave of votes, in place, and close the images that need no more."""
    started = time.perf_counter()
    wave = _BATCHES_PER_WAVE * counter.network.batch_size
    before = _cast(votes)
    if settings.estimator == "scan":
        scan.cast(counter, images, keys, labels, settings, votes, wave)
    else:
        _count(counter, images, keys, settings, votes, wave)
    added = _cast(votes) - before
    votes.seconds += added * ((time.perf_counter() - started) / max(1, int(added.sum())))
    if settings.estimator != "scan":
        _look(votes, labels, settings, counter.perturbation)


def _cast(votes: Votes) -> np.ndarray:
    return votes.selection.sum(axis=1) + votes.estimation.sum(axis=1)


def _count(
    counter: VoteCounter,
    images: Tensor,
    keys: list[int],
    settings: Settings,
    votes: Votes,
    wave: int,
) -> None:
    turn = votes_per_turn(counter.network.batch_size)
    requests = _requests(votes, keys, settings, wave, turn)
    m = len(keys)
    counts = counter.count(images, requests, slots=2 * m)
    votes.selection += counts[:m]
    votes.estimation += counts[m:]


def _requests(
    votes: Votes, keys: list[int], settings: Settings, wave: int, turn: int
) -> list[Request]:
    """The next votes of as many unfinished images, in order, as fill a wave; `turn` of each."""
    m, looks = len(keys), settings.looks
    requests: list[Request] = []
    asked = 0
    for row in np.flatnonzero(~votes.done):
        if asked >= wave:
            break
        chosen, have = int(votes.selection[row].sum()), int(votes.estimation[row].sum())
        # Selection votes may be cast in the wave of the first estimation votes: the class is
        # chosen from the former alone, so the latter stay fresh.
        if chosen < settings.n0:
            stop = min(settings.n0, chosen + turn)
            requests.append(Request(int(row), int(row), keys[row], "selection", chosen, stop))
            asked += stop - chosen
        stop = min(looks[votes.looks[row]], have + turn)
        if stop > have:
            requests.append(Request(m + int(row), int(row), keys[row], "estimation", have, stop))
            asked += stop - have
    return requests


def _look(
    votes: Votes, labels: np.ndarray | None, settings: Settings, perturbation: Perturbation
) -> None:
    """Where an image has reached its next look, decide whether more votes could help."""
    looks = np.array(settings.looks)
    chosen = votes.selection.sum(axis=1) >= settings.n0
    pending = np.minimum(votes.looks, len(looks) - 1)
    ready = ~votes.done & chosen & (votes.estimation.sum(axis=1) >= looks[pending])
    rows = np.flatnonzero(ready)
    top, runner = _tops(votes)
    grid = settings.grid(perturbation)
    votes.done[rows] = finished(
        top[rows],
        runner[rows],
        look=votes.looks[rows],
        looks=settings.looks,
        levels=settings.levels,
        grid=grid,
        law=perturbation.law,
        sigma=perturbation.sigma,
        bounds_rule=BOUNDS[settings.bounds],
        wrong=_wrong(votes, labels, settings)[rows],
        give_up=settings.give_up(grid),
    )
    votes.looks[rows] += 1


def _tops(votes: Votes) -> tuple[np.ndarray, np.ndarray]:
    """Estimation votes of the selected class, and the most of any other class."""
    rows = np.arange(len(votes.done))
    selected = votes.selection.argmax(axis=1)
    top = votes.estimation[rows, selected]
    others = votes.estimation.copy()
    others[rows, selected] = -1
    return top, others.max(axis=1)


def _wrong(votes: Votes, labels: np.ndarray | None, settings: Settings) -> np.ndarray:
    if labels is None or not settings.label_aware:
        return np.zeros(len(votes.done), np.bool_)
    return votes.selection.argmax(axis=1) != labels


def conclude(
    votes: Votes,
    settings: Settings,
    perturbation: Perturbation,
    labels: np.ndarray | None = None,
    index: np.ndarray | None = None,
    client: int = 0,
    conditions: Mapping[str, Any] | None = None,
) -> Certificates:
    """The certificates that follow from the votes.

    The level of an image is that of its last look; levels were fixed before the first vote and sum
    to at most alpha, so by the union bound each certificate is wrong with probability at most
    alpha, whatever made the votes stop.
    """
    if not votes.done.all():
        raise InputError("Some images still need votes; certificates follow from finished counts.")
    m = len(votes.done)
    claims = scan.claims if settings.estimator == "scan" else _claims
    columns = claims(votes, settings, perturbation)
    certified, selected = columns.pop("certified"), votes.selection.argmax(axis=1)
    return Certificates(
        client=np.full(m, client, np.int64),
        index=np.arange(m) if index is None else np.asarray(index, np.int64),
        label=np.full(m, UNLABELLED, np.int64) if labels is None else labels.astype(np.int64),
        predicted=np.where(certified, selected, ABSTAINED).astype(np.int64),
        counts=votes.estimation,
        selection_counts=votes.selection,
        looks=votes.looks,
        seconds=votes.seconds,
        conditions=dict(conditions or {}),
        **columns,
    )


def _claims(votes: Votes, settings: Settings, perturbation: Perturbation) -> dict[str, Any]:
    """What finished counts certify, as columns of `Certificates`, and which rows are certified."""
    looks, levels = np.array(settings.looks), np.array(settings.levels)
    last = votes.looks - 1
    top, runner = _tops(votes)
    p_lower, p_upper = BOUNDS[settings.bounds](top, runner, looks[last], levels[last])
    radius = perturbation.law.radius(perturbation.sigma, p_lower, p_upper)
    certified = np.asarray(p_lower > p_upper)
    return {
        "certified": certified,
        "radius": np.where(certified, radius, 0.0),
        "p_lower": np.asarray(p_lower, np.float64),
        "p_upper": np.asarray(p_upper, np.float64),
        "level": levels[last],
    }
