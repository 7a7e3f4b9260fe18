"""The scan estimator, for families of one uniform parameter: an interval instead of a radius.

Vote v of an image is cast at a parameter that depends on (seed, image content, v) alone. Classes
are kept in the order of the votes, for a scan is read from where they changed.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certifl.certification.certificates import Certificates
from certifl.certification.counts import CHUNK, Request, Votes
from certifl.certification.estimators import Estimator, Metadata, Noise, least_that
from certifl.certification.metadata import differs
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import GRID_POINTS, Settings
from certifl.errors import InputError
from certifl.perturbations import PERTURBATIONS
from certifl.rng import vote_generator
from certifl.smoothing.bounds import Bools, Floats
from certifl.smoothing.scan import BETS, SHARES, Reading, Scan, passes_of, read_scan
from certifl.smoothing.sequential import grid_steps

# Images read at once; a reading holds a few numbers per image, rival and cell.
_BLOCK = 16
_ROUNDING = 1e-12  # of a reach that is derived from the ends of a scan


@dataclass(frozen=True)
class ScanEstimator(Estimator):
    """Votes along the whole axis, read after each pass: see `smoothing.scan`.

    One level, alpha, covers whatever pass an image stopped after.

    Attributes:
        stored: the scan that a record says, instead of the one that the settings give.
    """

    stored: Scan | None = None

    bounds = "scan"
    stops_early = True

    @cached_property
    def scan(self) -> Scan:
        """Where votes are cast; raises InputError as `scan_of`."""
        return scan_of(self.noise, self.settings) if self.stored is None else self.stored

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """Votes after each pass."""
        return tuple(self.scan.totals.tolist())

    def largest_radius(self) -> float:
        """The shorter side of the scan, as a radius is the shorter side of an interval."""
        return min(-self.scan.ends[0], self.scan.ends[1])

    def decides(self) -> bool:
        """Whether votes that all agree certify the class at 0."""
        agreed = np.zeros((1, self.looks[-1]), np.uint8)
        chosen = np.zeros(1, np.int64)
        return bool(read_scan(self.scan, agreed, chosen, self.settings.alpha).certified[0])

    def least_votes(self) -> int:
        """A number of votes from which on the class at 0 is certified where all agree.

        Which strata stand for a window depends on how the axis is cut, so a few smaller numbers
        may do as well. k agreeing pairs less 2 strata, the most that a window's run is off, are
        enough; a window of k pairs takes k + 1 strata.
        """
        scan, alpha = self.scan, self.settings.alpha
        pairs = least_that(lambda k: 2.0 / alpha < float(SHARES @ np.exp(BETS * (k - 2.0))))
        return 2 * math.ceil((pairs + 1) * scan.width / (2.0 * scan.sigma))

    def purposes(self, votes: Votes) -> tuple[str, ...]:
        """Selection votes first, at delta = 0; the scan's own votes are others."""
        missing = bool((votes.selection.sum(axis=1) < self.settings.n0).any())
        return ("selection",) if missing else ("estimation",)

    def cast(
        self, counter: VoteCounter, images: Tensor, requests: Sequence[Request], votes: Votes
    ) -> None:
        """Cast the requested votes and add them, in place; scanning votes in their order."""
        selecting = [request for request in requests if request.purpose == "selection"]
        if selecting:
            super().cast(counter, images, selecting, votes)
        scanning = [request for request in requests if request.purpose == "estimation"]
        if not scanning:
            return
        numbers = [np.arange(request.start, request.stop) for request in scanning]
        rows = np.repeat([request.image for request in scanning], [len(n) for n in numbers])
        params = torch.cat(
            [parameters(self.scan, counter.seed, r.key, r.start, r.stop) for r in scanning]
        )
        classes = counter.classes(images, torch.from_numpy(rows), params)
        _append(votes, rows, np.concatenate(numbers), classes)

    def close(self, votes: Votes, labels: np.ndarray | None) -> None:
        """Where a pass is complete, read it and decide whether another could help."""
        pending = np.minimum(votes.looks, len(self.looks) - 1)
        due = ~votes.done & (votes.estimation.sum(axis=1) >= self.scan.totals[pending])
        for rows, reading in self._readings(votes, due, pending):
            votes.done[rows] = self._settled(reading)
        votes.looks[due] += 1
        votes.done |= votes.looks >= len(self.looks)
        # A wrong class counts nowhere, however far it is certified.
        votes.done[due] |= self.misclassified(votes, labels)[due]

    def finalize(self, votes: Votes) -> dict[str, np.ndarray]:
        """As `Estimator.finalize`; no single probability is bounded, so those bounds are NaN."""
        m = len(votes.done)
        interval, certified = np.zeros((m, 2)), np.zeros(m, np.bool_)
        for rows, reading in self._readings(votes, np.ones(m, np.bool_), votes.looks - 1):
            interval[rows], certified[rows] = reading.interval, reading.certified
        packed = np.empty(m, dtype=object)
        for row in range(m):  # one byte a vote, four beyond 256 classes
            assert votes.path is not None
            path = votes.path[row, : self.looks[votes.looks[row] - 1]]
            little = path.astype(path.dtype.newbyteorder("<"))
            packed[row] = zlib.compress(little.tobytes(), level=9)
        return {
            "certified": certified,
            "radius": _radius(interval),
            "interval": interval,
            "p_lower": np.full(m, np.nan),
            "p_upper": np.full(m, np.nan),
            "level": self.level(votes.looks - 1),
            "scan_votes": packed,
        }

    def _readings(
        self, votes: Votes, which: Bools, look: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Reading]]:
        """Readings of some images after the pass `look` of each, a few images at a time."""
        selected = votes.selected
        for at in np.unique(look[which]):
            same = np.flatnonzero(which & (look == at))
            for start in range(0, len(same), _BLOCK):
                rows = same[start : start + _BLOCK]
                assert votes.path is not None
                path = votes.path[rows, : self.looks[at]]
                yield rows, read_scan(self.scan, path, selected[rows], self.settings.alpha)

    def _settled(self, reading: Reading) -> Bools:
        """Where no more can be gained that would be reported: see `Settings.radii`."""
        if self.settings.radii is not None:
            grid = np.array(self.settings.radii)
            reached = grid_steps(_radius(reading.interval), grid)
            return grid_steps(_radius(reading.hope), grid) <= reached
        gap = np.abs(reading.hope) - np.abs(reading.interval)
        undecided = ~reading.certified & (reading.hope != 0).any(axis=1)
        return (gap <= self.scan.sigma / GRID_POINTS).all(axis=1) & ~undecided

    @property
    def metadata(self) -> dict[str, Any]:
        """Where votes were cast, and the requested reach."""
        return {"scan": describe_scan(self.scan), "reach": self.settings.reach}

    @classmethod
    def recorded(cls, settings: Settings, noise: Noise, metadata: Metadata) -> ScanEstimator:
        """As `Estimator.recorded`."""
        described, scan = metadata["scan"], scan_from(metadata)
        if not math.isfinite(scan.width / scan.sigma) or differs(described, describe_scan(scan)):
            raise InputError(f"its scan cannot be read: {described}")
        return cls(settings, noise, scan)

    @staticmethod
    def largest_recorded(metadata: Metadata) -> float:
        """The shorter side of the scan, as a radius is the shorter side of an interval."""
        low, high = scan_from(metadata).ends
        return min(-low, high)

    def record_problem(self, metadata: Metadata) -> str | None:
        """Where passes or range are not those that n, sigma and reach give.

        A longer scan has longer intervals. Records of old versions may leave out the reach.
        """
        scan, settings = self.scan, self.settings
        passes = passes_of(settings.n, scan.sigma, scan.width)
        if scan.passes != passes:
            return f"the passes {list(scan.passes)} are not those of its settings, {list(passes)}"
        exactly = "reach" in metadata
        reaches = [settings.reach] if exactly else [None, scan.high - scan.sigma]
        for reach in reaches:
            try:
                expected = scan_of(self.noise, dataclasses.replace(settings, reach=reach))
            except InputError:
                continue
            if expected == scan if exactly else _nearly_same(expected, scan):
                return None
        return (
            f"its scan from {scan.low:g} to {scan.high:g} is not the one that sigma, n and reach "
            "give"
        )

    def recorded_votes(
        self, certificates: Certificates, report: Callable[[Bools, str], None]
    ) -> tuple[Votes, Bools]:
        """As `Estimator.recorded_votes`, with the votes in their order."""
        if certificates.interval is None or certificates.scan_votes is None:
            raise InputError(
                "These certificates carry no votes of a scan; verify the .parquet file."
            )
        m, classes = certificates.counts.shape
        votes, readable = Votes.of(certificates), np.ones(m, np.bool_)
        width = int(certificates.votes.max(initial=0))
        votes.path = np.zeros((m, width), np.uint8 if classes <= 256 else np.int32)
        for row, counts in enumerate(certificates.counts):
            try:
                path = unpacked(certificates.scan_votes[row], classes, int(counts.sum()))
                if not np.array_equal(np.bincount(path, minlength=classes), counts):
                    raise ValueError("they are not those that were counted")
                votes.path[row, : len(path)] = path
            except ValueError as error:
                readable[row] = False
                report(np.arange(m) == row, f"its votes cannot be read: {error}")
        return votes.rows(readable), readable

    def stopped_early(self, votes: Votes, radius: Floats, tolerance: float) -> Bools:
        """As `Estimator.stopped_early`; passes are read exactly, so nothing is tolerated."""
        early = np.zeros(len(votes.done), np.bool_)
        before_last = votes.looks < len(self.looks)
        for rows, reading in self._readings(votes, before_last, votes.looks - 1):
            early[rows] = ~self._settled(reading)
        return early


def scan_of(noise: Noise, settings: Settings) -> Scan:
    """Where the votes of these settings are cast, fixed before the first; else InputError."""
    scan_range = getattr(noise, "scan_range", None)
    if scan_range is None:
        known = " and ".join(n for n, kind in PERTURBATIONS.items() if hasattr(kind, "scan_range"))
        raise InputError(
            f"The scan certificate is for families of one uniform parameter, {known}; "
            f"{noise.family} is none. Choose another estimator, such as 'sequential'."
        )
    low, high, periodic = scan_range(settings.reach)
    passes = passes_of(settings.n, noise.sigma, high - low)
    return Scan(noise.sigma, low, high, periodic, passes)


def describe_scan(scan: Scan) -> dict[str, Any]:
    """The scan as metadata; `scan_from` reads it."""
    return {
        "low": scan.low,
        "high": scan.high,
        "periodic": scan.periodic,
        "passes": list(scan.passes),
    }


def scan_from(conditions: Mapping[str, Any]) -> Scan:
    """The scan of certificates, from their metadata; InputError if they describe none."""
    try:
        described = conditions["scan"]
        ends = float(conditions["sigma"]), float(described["low"]), float(described["high"])
        passes = tuple(int(strata) for strata in described["passes"])
        return Scan(*ends, periodic=bool(described["periodic"]), passes=passes)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"These certificates do not say how they were scanned: {error}"
        ) from error


def _nearly_same(first: Scan, second: Scan) -> bool:
    ends = np.allclose(
        [first.low, first.high], [second.low, second.high], rtol=_ROUNDING, atol=0.0
    )
    return bool(ends) and (first.periodic, first.passes) == (second.periodic, second.passes)


def parameters(scan: Scan, seed: int, key: int, start: int, stop: int) -> Tensor:
    """The parameters of the votes start to stop of one image: (stop - start, 1) float32.

    Uniform numbers are drawn in float64, always on the CPU.
    """
    first = start // CHUNK
    chunks = [
        torch.rand(
            CHUNK,
            dtype=torch.float64,
            device="cpu",
            generator=vote_generator(seed, "scan", key, chunk),
        )
        for chunk in range(first, -(-stop // CHUNK))
    ]
    drawn = torch.cat(chunks).numpy()[start - first * CHUNK : stop - first * CHUNK]
    t = scan.parameters(np.arange(start, stop), drawn)
    return torch.from_numpy(t).to(torch.float32)[:, None]


def _append(votes: Votes, rows: np.ndarray, numbers: np.ndarray, classes: np.ndarray) -> None:
    """Write votes where they belong; the table of votes grows as far as any image has come."""
    m, count = votes.estimation.shape
    if votes.path is None:
        votes.path = np.zeros((m, 0), np.uint8 if count <= 256 else np.int32)
    wider = int(numbers.max()) + 1 - votes.path.shape[1]
    if wider > 0:
        votes.path = np.pad(votes.path, ((0, 0), (0, wider)))
    votes.path[rows, numbers] = classes
    np.add.at(votes.estimation, (rows, classes), 1)


def _radius(interval: np.ndarray) -> np.ndarray:
    """The shorter side."""
    return np.minimum(-interval[:, 0], interval[:, 1]) + 0.0


def unpacked(packed: bytes, classes: int, most: int | None = None) -> np.ndarray:
    """Votes in order, from `Certificates.scan_votes`; ValueError if not what was written.

    Args:
        packed: as stored. classes: of the classifier.
        most: votes at most, so that a few bytes cannot fill the memory.
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
        raise ValueError("a vote for a class that does not exist")
    return path
