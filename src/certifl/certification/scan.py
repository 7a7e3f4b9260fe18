"""The scan certificate of one-parameter uniform families: casting its votes, reading them.

Vote v of an image is cast at a parameter that depends on (seed, image content, v) alone. Classes
are kept in the order of the votes, for a scan is read from where they changed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certifl.certification.counts import Votes
from certifl.certification.sampling import CHUNK, Request, VoteCounter, votes_per_turn
from certifl.certification.settings import (
    GRID_POINTS,
    Settings,
    check_reachable,
    least_that,
    too_few_votes,
)
from certifl.errors import InputError
from certifl.perturbations import PERTURBATIONS, Perturbation
from certifl.rng import vote_generator
from certifl.smoothing.laws import LAWS
from certifl.smoothing.scan import BETS, SHARES, Reading, read_scan
from certifl.smoothing.sequential import grid_steps
from certifl.smoothing.strata import Scan, passes_of

# Images read at once; a reading holds a few numbers per image, rival and cell.
_BLOCK = 16


def scan_of(perturbation: Perturbation, settings: Settings) -> Scan:
    """Where the votes of these settings are cast; fixed before the first of them.

    Raises:
        InputError: a family that is not of one parameter under the uniform law, or a sigma or
            reach that leaves nothing to scan.
    """
    scan_range = getattr(perturbation, "scan_range", None)
    if scan_range is None:
        known = " and ".join(n for n, kind in PERTURBATIONS.items() if hasattr(kind, "scan_range"))
        raise InputError(
            f"The scan certificate is for families of one uniform parameter, {known}; "
            f"{perturbation.family} is none. Choose another estimator, such as 'sequential'."
        )
    low, high, periodic = scan_range(settings.reach)
    passes = passes_of(settings.n, perturbation.sigma, high - low)
    return Scan(perturbation.sigma, low, high, periodic, passes)


def check_votes(perturbation: Perturbation, settings: Settings) -> None:
    """Refuse settings with which votes that all agree certify nothing, or none of the radii.

    Raises:
        InputError: as `Settings.grid`, and for "scan" as `scan_of`.
    """
    if settings.estimator != "scan":
        settings.grid(perturbation)
        return
    scan = scan_of(perturbation, settings)
    if not _decides(scan, settings.alpha):
        least = _sufficient_votes(scan, settings.alpha)
        raise too_few_votes(settings.n, settings.alpha, least)
    if settings.radii is not None:
        farthest = min(-scan.ends[0], scan.ends[1])
        check_reachable(settings.radii, farthest, perturbation.unit, settings.n)


def _decides(scan: Scan, alpha: float) -> bool:
    """Whether votes that all agree certify the class at 0."""
    agreed = np.zeros((1, int(scan.totals[-1])), np.uint8)
    return bool(read_scan(scan, agreed, np.zeros(1, np.int64), alpha).certified[0])


def _sufficient_votes(scan: Scan, alpha: float) -> int:
    """A number of votes from which on the class at 0 is certified where all agree.

    Which strata stand for a window depends on how the stretch is cut, so a few smaller numbers
    may do as well. k agreeing pairs less 2 strata, the most that a window's run is off, are
    enough; a window of k pairs takes k + 1 strata.
    """
    pairs = least_that(lambda k: 2.0 / alpha < float(SHARES @ np.exp(BETS * (k - 2.0))))
    return 2 * math.ceil((pairs + 1) * scan.width / (2.0 * scan.sigma))


def largest_radius(conditions: Mapping[str, Any]) -> float:
    """The largest radius that certificates of these conditions can have; infinity if unknown."""
    if "scan" in conditions:
        low, high = scan_from(conditions).ends
        return min(-low, high)
    law = LAWS.get(str(conditions.get("law")))
    if law is None or not {"sigma", "n", "alpha"} <= conditions.keys():
        return math.inf
    return law.largest_radius(conditions["sigma"], conditions["n"], conditions["alpha"])


def describe_scan(scan: Scan) -> dict[str, Any]:
    """The scan for the record; `scan_from` reads it."""
    return {
        "low": scan.low,
        "high": scan.high,
        "periodic": scan.periodic,
        "passes": list(scan.passes),
    }


def scan_from(conditions: Mapping[str, Any]) -> Scan:
    """The scan that certificates were made by, from their conditions.

    Raises:
        InputError: the conditions describe none.
    """
    try:
        facts = conditions["scan"]
        ends = float(conditions["sigma"]), float(facts["low"]), float(facts["high"])
        passes = tuple(int(strata) for strata in facts["passes"])
        return Scan(*ends, periodic=bool(facts["periodic"]), passes=passes)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"These certificates do not say how they were scanned: {error}"
        ) from error


def cast(
    counter: VoteCounter,
    images: Tensor,
    keys: list[int],
    labels: np.ndarray | None,
    settings: Settings,
    votes: Votes,
    wave: int,
) -> None:
    """Cast about `wave` votes, in place, and close the images whose interval is settled."""
    scan = scan_of(counter.perturbation, settings)
    missing = settings.n0 - votes.selection.sum(axis=1)
    if missing.any():
        _select(counter, images, keys, settings, votes, wave)
        return
    turns = list(_turns(votes, scan, wave, votes_per_turn(counter.network.batch_size)))
    rows = np.repeat([row for row, _, _ in turns], [stop - start for _, start, stop in turns])
    numbers = [np.arange(start, stop) for _, start, stop in turns]
    params = torch.cat(
        [parameters(scan, counter.seed, keys[row], start, stop) for row, start, stop in turns]
    )
    classes = counter.classes(images, torch.from_numpy(rows), params)
    _keep(votes, rows, np.concatenate(numbers), classes)
    _settle(votes, scan, labels, settings)


def parameters(scan: Scan, seed: int, key: int, start: int, stop: int) -> Tensor:
    """The parameters of the votes start to stop of one image: (stop - start, 1) float32."""
    drawn = _uniforms(seed, key, start, stop)
    t = scan.parameters(np.arange(start, stop), drawn)
    return torch.from_numpy(t).to(torch.float32)[:, None]


def _select(
    counter: VoteCounter,
    images: Tensor,
    keys: list[int],
    settings: Settings,
    votes: Votes,
    wave: int,
) -> None:
    """Votes of the law at delta = 0 that choose c_A; the scan's own votes are others."""
    requests: list[Request] = []
    asked, turn = 0, votes_per_turn(counter.network.batch_size)
    for row, have in enumerate(votes.selection.sum(axis=1)):
        if have < settings.n0 and asked < wave:
            stop = min(settings.n0, int(have) + turn)
            requests.append(Request(row, row, keys[row], "selection", int(have), stop))
            asked += stop - int(have)
    votes.selection += counter.count(images, requests, slots=len(keys))


def _turns(votes: Votes, scan: Scan, wave: int, turn: int) -> Iterator[tuple[int, int, int]]:
    """(row, first vote, one past the last) of as many unfinished images as fill a wave."""
    asked = 0
    for row in np.flatnonzero(~votes.done):
        if asked >= wave:
            return
        have = int(votes.estimation[row].sum())
        stop = min(int(scan.totals[votes.looks[row]]), have + turn)
        yield int(row), have, stop
        asked += stop - have


def _uniforms(seed: int, key: int, start: int, stop: int) -> np.ndarray:
    """Draws from [0, 1) of the votes start to stop of an image; float64, always on the CPU."""
    first = start // CHUNK
    chunks = [
        torch.rand(CHUNK, dtype=torch.float64, generator=vote_generator(seed, "scan", key, chunk))
        for chunk in range(first, -(-stop // CHUNK))
    ]
    return torch.cat(chunks).numpy()[start - first * CHUNK : stop - first * CHUNK]


def _keep(votes: Votes, rows: np.ndarray, numbers: np.ndarray, classes: np.ndarray) -> None:
    """Write votes where they belong; the table of votes grows as far as any image has come."""
    m, count = votes.estimation.shape
    if votes.path is None:
        votes.path = np.zeros((m, 0), np.uint8 if count <= 256 else np.int32)
    wider = int(numbers.max()) + 1 - votes.path.shape[1]
    if wider > 0:
        votes.path = np.pad(votes.path, ((0, 0), (0, wider)))
    votes.path[rows, numbers] = classes
    np.add.at(votes.estimation, (rows, classes), 1)


def _settle(votes: Votes, scan: Scan, labels: np.ndarray | None, settings: Settings) -> None:
    """Where a pass is complete, read it and decide whether another could help."""
    cast_so_far = votes.estimation.sum(axis=1)
    pending = np.minimum(votes.looks, len(scan.passes) - 1)
    ready = ~votes.done & (cast_so_far >= scan.totals[pending])
    for rows, reading in _readings(votes, scan, settings, ready, pending):
        votes.done[rows] = _enough(reading, scan, settings)
    votes.looks[ready] += 1
    votes.done |= votes.looks >= len(scan.passes)
    if labels is not None and settings.label_aware:
        # A wrong class counts nowhere, however far it is certified.
        votes.done[ready] |= (votes.selection.argmax(axis=1) != labels)[ready]


def _readings(
    votes: Votes, scan: Scan, settings: Settings, which: np.ndarray, look: np.ndarray
) -> Iterator[tuple[np.ndarray, Reading]]:
    """Readings of some images after the pass `look` of each, a few images at a time."""
    chosen = votes.selection.argmax(axis=1)
    for at in np.unique(look[which]):
        same = np.flatnonzero(which & (look == at))
        for start in range(0, len(same), _BLOCK):
            rows = same[start : start + _BLOCK]
            assert votes.path is not None
            path = votes.path[rows, : scan.totals[at]]
            yield rows, read_scan(scan, path, chosen[rows], settings.alpha)


def _enough(reading: Reading, scan: Scan, settings: Settings) -> np.ndarray:
    """Where no more can be gained that would be reported: see `Settings.radii`."""
    if settings.radii is not None:
        grid = np.array(settings.radii)
        return grid_steps(_radius(reading.hope), grid) <= grid_steps(
            _radius(reading.interval), grid
        )
    gap = np.abs(reading.hope) - np.abs(reading.interval)
    undecided = ~reading.certified & (reading.hope != 0).any(axis=1)
    return (gap <= scan.sigma / GRID_POINTS).all(axis=1) & ~undecided


def _radius(interval: np.ndarray) -> np.ndarray:
    """The shorter side."""
    return np.minimum(-interval[:, 0], interval[:, 1]) + 0.0


def claims(votes: Votes, settings: Settings, perturbation: Perturbation) -> dict[str, Any]:
    """What finished votes certify, as columns of `Certificates`, and which rows are certified.

    One level, alpha, covers whatever pass an image stopped after: see `smoothing.scan`.
    """
    scan, m = scan_of(perturbation, settings), len(votes.done)
    interval, certified = np.zeros((m, 2)), np.zeros(m, np.bool_)
    everyone = np.ones(m, np.bool_)
    packed = np.empty(m, dtype=object)
    for rows, reading in _readings(votes, scan, settings, everyone, votes.looks - 1):
        interval[rows], certified[rows] = reading.interval, reading.certified
    for row in range(m):
        assert votes.path is not None
        packed[row] = _packed(votes.path[row, : scan.totals[votes.looks[row] - 1]])
    unknown = np.full(m, np.nan)  # a scan bounds differences along the axis, no one probability
    return {
        "certified": certified,
        "radius": _radius(interval),
        "interval": interval,
        "p_lower": unknown,
        "p_upper": unknown.copy(),
        "level": np.full(m, settings.alpha),
        "scan_votes": packed,
    }


def _packed(path: np.ndarray) -> bytes:
    """Votes in order as one byte each (four beyond 256 classes), then compressed (zlib)."""
    return zlib.compress(path.astype(path.dtype.newbyteorder("<")).tobytes(), level=9)


def unpacked(packed: bytes, classes: int, most: int | None = None) -> np.ndarray:
    """Votes in order, from `Certificates.scan_votes`.

    Args:
        packed: as stored. classes: of the classifier.
        most: votes at most, so that a few bytes cannot fill the memory.

    Raises:
        ValueError: not what was written.
    """
    kind = np.dtype(np.uint8 if classes <= 256 else "<i4")
    limit = 0 if most is None else most * kind.itemsize + 1  # 0 = no limit
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(packed, limit)
    except (zlib.error, TypeError) as error:
        raise ValueError(str(error)) from error
    if limit and len(raw) == limit:
        raise ValueError("there are more of them than were counted")
    if not stream.eof:
        raise ValueError("they end too early")
    path = np.frombuffer(raw, kind)
    if len(path) and not 0 <= path.min() <= path.max() < classes:
        raise ValueError("a vote for a class there is not")
    return path


def read_votes(scan: Scan, path: np.ndarray, chosen: int, alpha: float) -> Reading:
    """What one image's stored votes certify; one row.

    Raises:
        InputError: votes that end within a pass.
    """
    return read_scan(scan, path[None], np.array([chosen]), alpha)


def settled(reading: Reading, scan: Scan, settings: Settings) -> bool:
    """Whether one image's votes could stop here, wherever its passes end."""
    return bool(_enough(reading, scan, settings)[0])
