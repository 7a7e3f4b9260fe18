"""Which algorithm is better, and whether the images show it: paired comparisons of ACR.

An algorithm may have been trained with several seeds. Two algorithms are compared within a seed,
image by image, on the test images that both runs of that seed certified. The estimate is the mean
over clients of the difference between two average certified radii (ACR), and its mean over the
seeds that both have. With one seed an interval covers another choice of test images, with several
also another training. `intervals` says how intervals are computed, docs/mathematics.md why.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from certifl.errors import StoreMismatch
from certifl.report import summary
from certifl.report.intervals import FEWEST_IMAGES, Sample, interval_over_seeds, too_few
from certifl.report.results import Row, RunResults, flat
from certifl.smoothing.bounds import Floats, Ints

_NO_SEED = "they have no seed in common"


@dataclass(frozen=True)
class Difference:
    """Average certified radius of one algorithm minus that of another, on the same images.

    Attributes:
        first, second: positions of the two.
        estimate: NaN where no difference is stated. low, high: infinite without an interval.
        images: how many were compared, over all seeds. seeds: how many trainings.
        why: why no difference is stated; empty where one is.
    """

    first: int
    second: int
    estimate: float
    low: float
    high: float
    images: int = 0
    seeds: int = 1
    why: str = ""

    @property
    def stated(self) -> bool:
        """Whether there are images enough to state a difference."""
        return not self.why

    @property
    def shown(self) -> bool:
        """Whether the images show a difference: the interval does not contain 0."""
        return self.low > 0.0 or self.high < 0.0

    def seen_from(self, run: int) -> Difference:
        """The same difference as `run` minus the other one."""
        if run == self.first:
            return self
        return dataclasses.replace(
            self,
            first=self.second,
            second=self.first,
            estimate=-self.estimate,
            low=-self.high,
            high=-self.low,
        )


Pairs = Mapping[tuple[int, int], Difference]


def difference(pairs: Pairs, run: int, other: int) -> Difference:
    """The difference of two positions as `run` minus `other`."""
    return pairs[min(run, other), max(run, other)].seen_from(run)


@dataclass(frozen=True)
class ClientComparison:
    """The algorithms on one client's test images.

    Attributes:
        client: its number. images: how many of its images were compared; the fewest of all pairs.
        acr: (algorithms,) its average certified radius; NaN without certificates.
        pairs: differences, keyed by positions (first < second).
    """

    client: int
    images: int
    acr: tuple[float, ...]
    pairs: Pairs


@dataclass(frozen=True)
class Comparison:
    """Algorithms compared two at a time, on the test images that both of them certified.

    Attributes:
        images: their number; the smallest of all pairs with a stated difference.
        whole: whether these are all images of every run, with all seeds.
        acr: (algorithms,) mean over clients and seeds of the average certified radius.
        pairs: differences of the mean over clients; all of them hold together with 95 %.
        clients: the same for every single client; all pairs of all clients hold together.
        paired: whether images were compared one by one. Where clients share curves only this is
            not possible: differences then have no intervals, and clients no recommendation.
    """

    images: int
    whole: bool
    acr: tuple[float, ...]
    pairs: Pairs
    clients: tuple[ClientComparison, ...]
    paired: bool = True


@dataclass(frozen=True)
class Standing:
    """The leader, and those that are not shown to be behind it.

    Attributes:
        best: position of the leader: the largest average certified radius among those that have
            a stated difference and that no other is shown to exceed.
        tied: the others without a shown difference to the leader.
        margin: to the next best; None where there is none.
        unknown: the others without a stated difference to the leader.
        behind: the others, which are shown to be behind the leader, best first.
    """

    best: int
    tied: tuple[int, ...]
    margin: Difference | None
    unknown: tuple[int, ...]
    behind: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _SharedImages:
    """Two algorithms on the images that both certified: clients and differences of each seed."""

    samples: tuple[tuple[Ints, Sample], ...]
    images: int
    whole: bool
    why: str


def compare(runs: Sequence[Row]) -> Comparison:
    """Compare average certified radii, image by image within each seed.

    Args:
        runs: in the order of the report; a row of `by_seed` is one algorithm.

    Returns:
        Differences with intervals at 95 % together: each of the p pairs is given 1 - 0.05 / p
        (Bonferroni), since the leader is chosen after looking; and each pair of each of the c
        clients 1 - 0.05 / (p c), since readers look for the clients that differ. With fewer than
        ten common images, or fewer than two of a client, no difference is stated.

    Raises:
        StoreMismatch: no two of several runs have a test image (where clients share curves only:
            a client) in common although their seeds agree, or two disagree about a label.
    """
    if len(runs) > 1 and any(run.curves_only for run in flat(runs)):
        return _of_curves(runs)
    positions = list(itertools.combinations(range(len(runs)), 2))
    by_pair = {(i, j): _shared_images(runs[i], runs[j]) for i, j in positions}
    if positions and not any(c.images or c.why == _NO_SEED for c in by_pair.values()):
        raise StoreMismatch(
            "The runs certified no test image in common, so they cannot be compared image by "
            "image. Report them separately, or run them with the same data, clients and seed."
        )
    scale = summary.possible_radius(runs)
    error = (1.0 - summary.CONFIDENCE) / max(1, len(positions))
    pairs = {at: _difference(at, shared, error, scale) for at, shared in by_pair.items()}
    stated = [pair.images for pair in pairs.values() if pair.stated]
    alone = len(runs[0].runs[0].certificates) if len(runs) == 1 else 0
    return Comparison(
        images=min(stated, default=alone),
        whole=all(shared.whole for shared in by_pair.values()),
        acr=tuple(summary.mean_acr(run) for run in runs),
        pairs=pairs,
        clients=_by_client(runs, by_pair, error, scale),
    )


def _shared_images(first: Row, second: Row) -> _SharedImages:
    ones, twos = ({run.seed: run for run in row.runs} for row in (first, second))
    common = [seed for seed in ones if seed in twos]
    if not common:
        return _SharedImages((), 0, False, _NO_SEED)
    paired = [paired_differences(ones[seed], twos[seed]) for seed in common]
    usable = [(c, s) for c, s in paired if len(c) and not too_few([len(v) for v in s.values])]
    sizes = [len(v) for _, sample in paired for v in sample.values]
    runs = [*first.runs, *second.runs]
    whole = len(ones) == len(twos) == len(usable) and 2 * sum(sizes) == sum(
        len(run.certificates) for run in runs
    )
    why = "" if usable else _too_few_words(sum(sizes), min(sizes, default=0))
    return _SharedImages(tuple(usable), sum(sizes), whole, why)


def _too_few_words(images: int, fewest: int) -> str:
    """Why no difference is stated on so many common images, `fewest` of some client."""
    least = f", {fewest} of some client" if images >= FEWEST_IMAGES else ""
    return (
        f"too few images in common ({images}{least}; at least {FEWEST_IMAGES} are needed, and two "
        "of every client)"
    )


def paired_differences(
    first: RunResults, second: RunResults, value: Callable[[RunResults], Floats] = summary.gains
) -> tuple[Ints, Sample]:
    """Clients, and differences on the images that two runs of one seed certified.

    Args:
        first, second: the difference is first minus second.
        value: of a run's images, in the order of its certificates.

    Raises:
        StoreMismatch: one image has two labels.
    """
    tables = []
    for certificates in (first.certificates, second.certificates):
        images = zip(certificates.client.tolist(), certificates.index.tolist(), strict=True)
        tables.append({image: row for row, image in enumerate(images)})
    common = sorted(set(tables[0]).intersection(tables[1]))
    one, two = (np.array([t[image] for image in common], np.int64) for t in tables)
    if np.any(first.certificates.label[one] != second.certificates.label[two]):
        raise StoreMismatch(
            "The runs give the same test image different labels: they were made from different "
            "data. Report them separately."
        )
    differences = np.asarray(value(first)[one] - value(second)[two], np.float64)
    numbers = summary.image_numbers(first)[one]
    owner = first.certificates.client[one]
    clients = np.intersect1d(first.clients, second.clients)  # of each, two images at least count
    values = [differences[owner == client] for client in clients]
    return clients, Sample.of(values, [numbers[owner == client] for client in clients])


def _difference(
    at: tuple[int, int],
    shared: _SharedImages,
    error: float,
    scale: float,
    client: int | None = None,
) -> Difference:
    """The difference of two algorithms, of one client where one is named."""
    samples = [sample for _, sample in shared.samples]
    why = shared.why
    if client is not None:
        samples = [
            Sample((sample.values[at],), (sample.images[at],))
            for clients, sample in shared.samples
            for at in np.flatnonzero(clients == client)
        ]
        sizes = [len(sample.values[0]) for sample in samples]
        samples = [s for s, size in zip(samples, sizes, strict=True) if not too_few([size])]
        why = why or ("" if samples else _too_few_words(sum(sizes), sum(sizes)))
    if why:
        return Difference(*at, np.nan, -np.inf, np.inf, shared.images, len(samples), why)
    low, high = interval_over_seeds(samples, error, scale)
    return Difference(
        *at,
        estimate=float(np.mean([sample.means[0] for sample in samples])),
        low=max(-scale, float(low[0])),
        high=min(scale, float(high[0])),
        images=sum(len(own) for sample in samples for own in sample.values),
        seeds=len(samples),
    )


def _by_client(
    runs: Sequence[Row],
    by_pair: Mapping[tuple[int, int], _SharedImages],
    error: float,
    scale: float,
) -> tuple[ClientComparison, ...]:
    """Every client that some pair has in common, or all clients of a single row."""
    common = [own for shared in by_pair.values() for own, _ in shared.samples]
    clients = sorted({int(client) for own in common for client in own})
    if len(runs) == 1:
        clients = runs[0].clients.tolist()
    radii = [
        dict(zip(run.clients.tolist(), summary.client_acr(run).tolist(), strict=True))
        for run in runs
    ]
    parts = []
    for client in clients:
        pairs = {
            at: _difference(at, shared, error / len(clients), scale, client)
            for at, shared in by_pair.items()
        }
        images = min((p.images for p in pairs.values() if p.stated), default=0)
        acr = tuple(own.get(client, np.nan) for own in radii)
        parts.append(ClientComparison(client, images, acr, pairs))
    return tuple(parts)


def _of_curves(runs: Sequence[Row]) -> Comparison:
    """Average radii where single images are not known: numbers without intervals.

    Rows made from curves must never be paired: which image is which was not shared.
    """
    shared = sorted(set.intersection(*(set(run.clients.tolist()) for run in runs)))
    if not shared:
        raise StoreMismatch(
            "The runs have no client in common, so they cannot be compared. Report them "
            "separately."
        )
    means = [float(summary.client_acr(run)[np.isin(run.clients, shared)].mean()) for run in runs]
    seeds = [{one.seed for one in run.runs} for run in runs]
    pairs = {}
    for i, j in itertools.combinations(range(len(runs)), 2):
        common = bool(seeds[i] & seeds[j])
        estimate, why = (means[i] - means[j], "") if common else (np.nan, _NO_SEED)
        pairs[i, j] = Difference(i, j, estimate, -np.inf, np.inf, why=why)
    return Comparison(
        images=0,
        whole=all(len(run.clients) == len(shared) for run in runs),
        acr=tuple(means),
        pairs=pairs,
        clients=(),
        paired=False,
    )


def own_interval(row: Row) -> tuple[float, float] | None:
    """95 % interval of an algorithm's average certified radius, the mean over clients and seeds.

    Returns:
        The two ends, limited to possible average radii; None where there are too few images.
    """
    samples = []
    for run in row.runs:
        own, numbers = summary.gains(run), summary.image_numbers(run)
        parts = [run.certificates.client == client for client in run.clients]
        samples.append(Sample.of([own[at] for at in parts], [numbers[at] for at in parts]))
    if any(too_few([len(own) for own in sample.values]) for sample in samples):
        return None
    scale = summary.possible_radius([row])
    low, high = interval_over_seeds(samples, 1.0 - summary.CONFIDENCE, scale)
    return max(0.0, float(low[0])), min(scale, float(high[0]))


def ranking(acr: Sequence[float], pairs: Pairs) -> list[int]:
    """Positions, the best first.

    By average certified radius, but none before another that is shown to be ahead of it, which
    radii of different images may hide; those without a stated difference come last.
    """

    def rank(i: int) -> tuple[bool, int, float, int]:
        own = [pair.seen_from(i) for at, pair in pairs.items() if i in at]
        beaten = sum(pair.high < 0.0 for pair in own)
        unknown = bool(own) and not any(pair.stated for pair in own)
        return unknown, beaten, np.inf if np.isnan(acr[i]) else -acr[i], i

    return sorted(range(len(acr)), key=rank)


def standing(acr: Sequence[float], pairs: Pairs) -> Standing:
    """The leader of some algorithms, those tied with it, and its margin over the next best."""
    best, *others = ranking(acr, pairs)
    to_others = {i: difference(pairs, best, i) for i in others}
    stated = [i for i in others if to_others[i].stated]
    return Standing(
        best,
        tied=tuple(i for i in stated if not to_others[i].shown),
        margin=to_others[stated[0]] if stated else None,
        unknown=tuple(i for i in others if not to_others[i].stated),
        behind=tuple(i for i in stated if to_others[i].shown),
    )
