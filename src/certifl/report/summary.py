"""Summaries of a run's certificates: curves per client, radii, shares, votes, with intervals.

There are two averages, named wherever they are shown. Curves and average certified radii count
every CLIENT once, as the paper does; certified accuracies in tables count every IMAGE once, so
that they have an exact binomial interval. With equally many images per client the two agree. A row
of several seeds has the mean over its seeds, each seed counted once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from certifl.certification.certificates import Certificates
from certifl.certification.estimators import largest_radius as largest_recorded
from certifl.certification.settings import GRID_POINTS
from certifl.errors import InputError
from certifl.report.intervals import Sample, interval_over_seeds, too_few
from certifl.report.results import Row, RunResults, flat
from certifl.report.wording import RadiusScale, family_words, scales, sigma_text
from certifl.safe_io import parse_toml
from certifl.smoothing import curves
from certifl.smoothing.bounds import Floats, Ints, clopper_pearson_lower, clopper_pearson_upper
from certifl.smoothing.laws import LAWS

_CLIENT_STEP = 2**40

CONFIDENCE = 0.95
_FINE_ENOUGH = 20
_MOST_STEPS = 5
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Share:
    """A share of the certified images, with its 95 % limits among all images like these."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Votes:
    """Votes of a row.

    Attributes:
        spent: all votes. per_image: mean votes that bound the probabilities of an image.
        fixed: votes with n0 + n on every image; None where n is not recorded.
    """

    spent: int
    fixed: int | None
    per_image: float

    @property
    def saved(self) -> float | None:
        """Share of the votes of a fixed n that were saved by stopping early."""
        return None if not self.fixed else 1.0 - self.spent / self.fixed


def gains(run: RunResults) -> Floats:
    """(m,) radius where correct, 0 elsewhere: the average certified radius is their mean."""
    certificates = run.certificates
    return np.where(certificates.correct, certificates.radius, 0.0)


def client_acr(row: Row) -> Floats:
    """(clients,) average certified radius of every client on its own test images.

    Over several seeds the mean of those in which the client has certificates.
    """
    return _by_client(row, lambda own: own.average_certified_radius())


def client_curves(row: Row, radii: Sequence[float] | Floats) -> Floats:
    """(clients, radii) certified accuracy of every client on its own test images.

    One grid serves all runs of a page, so it may pass what the votes of one could certify.
    """
    grid = np.asarray(radii, np.float64)
    return _by_client(row, lambda own: curves.certified_accuracy(own.correct, own.radius, grid))


def _by_client(row: Row, value: Callable[[Certificates], Any]) -> Floats:
    """(clients, ...) mean over seeds of a value of each client's certificates."""
    by_client: dict[int, list[Any]] = {client: [] for client in row.clients.tolist()}
    for run in row.runs:
        for client in run.clients.tolist():
            by_client[client].append(value(run.certificates.of_client(client)))
    return np.stack([np.mean(values, axis=0) for values in by_client.values()])


def mean_acr(row: Row) -> float:
    """Mean over clients of the average certified radius, and over seeds."""
    return float(np.mean([client_acr(run).mean() for run in row.runs]))


def spread(row: Row) -> tuple[int, int, float]:
    """The clients with the largest and the smallest average certified radius, and the gap.

    Over several seeds the gap is the mean of the seeds' own: averaging each client first would
    make clients more alike than they are.
    """
    radii = client_acr(row)
    # The last of the smallest: where all are equal, two clients are named.
    best, worst = int(radii.argmax()), len(radii) - 1 - int(radii[::-1].argmin())
    gap = float(np.mean([np.ptp(client_acr(run)) for run in row.runs]))
    return int(row.clients[best]), int(row.clients[worst]), gap


def share(count: int, images: int) -> Share:
    """A share with exact two-sided 95 % limits (Clopper and Pearson, 2.5 % at each end)."""
    level = (1.0 - CONFIDENCE) / 2.0
    low = float(clopper_pearson_lower(count, images, level))
    high = float(clopper_pearson_upper(count, images, level))
    return Share(count / images, low, high)


def shares_over_seeds(hits: Sequence[NDArray[np.bool_]], images: Sequence[Ints]) -> Share:
    """Mean over seeds of a share of images, with an interval over images and seeds.

    Args:
        hits, images: of each seed, (its images,): whether each counts, and their numbers.
    """
    if len(hits) == 1:
        return share(int(hits[0].sum()), len(hits[0]))
    value = float(np.mean([own.mean() for own in hits]))
    if any(too_few([len(own)]) for own in hits):
        return Share(value, 0.0, 1.0)
    samples = [Sample.of([own], [numbers]) for own, numbers in zip(hits, images, strict=True)]
    low, high = interval_over_seeds(samples, 1.0 - CONFIDENCE, 1.0)
    return Share(value, max(0.0, float(low[0])), min(1.0, float(high[0])))


def certified_at(run: RunResults, radius: float) -> NDArray[np.bool_]:
    """(m,) whether each image is certified correct with at least this radius."""
    return run.certificates.correct & (run.certificates.radius >= radius)


def accuracy_share(row: Row, radius: float) -> Share:
    """Certified accuracy at a radius over all images of all clients."""
    hits = [certified_at(run, radius) for run in row.runs]
    return shares_over_seeds(hits, [image_numbers(run) for run in row.runs])


def abstained_share(row: Row) -> Share:
    """Share of all images without a certificate."""
    hits = [run.certificates.abstained for run in row.runs]
    return shares_over_seeds(hits, [image_numbers(run) for run in row.runs])


def client_share(row: Row, client: int) -> Share | None:
    """A client's certified accuracy at radius 0; None where it has no certificates."""
    own = [(run, run.certificates.client == client) for run in row.runs]
    own = [(run, at) for run, at in own if at.any()]
    if not own:
        return None
    hits = [run.certificates.correct[at] for run, at in own]
    return shares_over_seeds(hits, [image_numbers(run)[at] for run, at in own])


def plain_rows(rows: Sequence[Row]) -> list[tuple[str, int, int, int]]:
    """(label, client, images, correct) of every client that certifies nothing."""
    return [
        (run.label, client, int((run.plain.client == client).sum()), int(hits.sum()))
        for run in flat(rows)
        if run.plain is not None
        for client in run.plain.clients
        for hits in [run.plain.correct[run.plain.client == client]]
    ]


def image_numbers(run: RunResults) -> NDArray[Any]:
    """(m,) equal numbers in two runs of one data set are the same image.

    The index in the data, whichever client holds it; where two clients of a run have images of
    the same index, each has its own data, and the client is part of the number.
    """
    certificates = run.certificates
    index = certificates.index.astype(np.int64)
    if len(np.unique(index)) == len(index):
        return index
    return (certificates.client.astype(np.int64) + 1) * _CLIENT_STEP + index


def vote_cost(row: Row) -> Votes:
    """Votes cast, and what a fixed number of votes on every image would have cost.

    Of several seeds the sum, and votes per image over all of their images.
    """
    estimation, selection, fixed, images = 0, 0, [], 0
    for run in row.runs:
        certificates, metadata = run.certificates, run.conditions
        own = int(certificates.counts.sum())
        if metadata.get("n") and metadata.get("n0") and own:
            fixed.append(len(certificates) * (int(metadata["n"]) + int(metadata["n0"])))
        estimation += own
        selection += int(certificates.selection_counts.sum())
        images += len(certificates)
    known = sum(fixed) if len(fixed) == len(row.runs) else None
    return Votes(estimation + selection, known, estimation / images)


def largest_radius(rows: Sequence[Row]) -> float:
    """The end of the radius axis: what unanimous votes give, or the largest radius stored."""
    runs = flat(rows)
    ends = [float(run.certificates.radius.max()) for run in runs]
    for run in runs:
        radius = unanimous_radius(run.conditions)
        ends += [] if radius is None else [radius]
    end = max(ends)
    return end if end > 0 else float(runs[0].conditions["sigma"])


def possible_radius(rows: Sequence[Row]) -> float:
    """The largest radius that an image of some rows could have: the scale of intervals.

    A scan certifies beyond what unanimous votes of a fixed number give, up to where it looks.
    """
    ends = [largest_radius(rows)]
    for run in flat(rows):
        if run.conditions.get("estimator") == "scan":
            with contextlib.suppress(InputError):  # a record that does not say where it looked
                ends.append(largest_recorded(run.conditions))
    return max(ends)


def unanimous_radius(metadata: Mapping[str, Any]) -> float | None:
    """The radius of unanimous votes; None where the certificates do not say enough."""
    law = LAWS.get(str(metadata.get("law")))
    sigma, n, alpha = (metadata.get(name) for name in ("sigma", "n", "alpha"))
    if law is None or not (sigma and n and alpha):
        return None
    return law.largest_radius(float(sigma), int(n), float(alpha))


def first_unit(rows: Sequence[Row]) -> RadiusScale:
    """The unit that is read first: degrees for angles."""
    return scales(rows[0].conditions, largest_radius(rows))[0]


def noise_words(*rows: Row) -> str:
    """The perturbation of some rows and its sigma, or each sigma where these differ."""
    sigmas = dict.fromkeys(sigma_text(row.conditions) for row in rows)
    return f"{family_words(rows[0].conditions)}, σ = {' or '.join(sigmas)}"


def group_words(*rows: Row) -> str:
    """The perturbation, and which clients these are where some took no part in training."""
    noise = noise_words(*rows)
    group = rows[0].runs[0].group
    return f"{noise}, {group}" if group else noise


def radius_grid(rows: Sequence[Row]) -> Floats:
    """Radii for curves, in the stored unit, from 0 up: those that voting aimed at.

    The runs name them, if they are enough for a curve; otherwise the even grid that is the default
    of certification. Between two of them a certificate may be smaller than more votes would have
    made it.
    """
    runs = flat(rows)
    named = [run.conditions.get("radii") for run in runs]
    if all(isinstance(radii, list) and len(radii) >= _FINE_ENOUGH for radii in named):
        return np.unique(np.concatenate([[0.0], *[np.asarray(r, float) for r in named]]))
    return curves.even_grid(largest_radius(runs), GRID_POINTS)


def selected_radii(rows: Sequence[Row], scale: RadiusScale) -> list[tuple[str, float]]:
    """A few round radii for tables: (text in the shown unit, radius in the stored unit).

    They start at 0 and end at the largest round radius that some correct image reaches.
    """
    reached = scale.shown(max(float(gains(run).max()) for run in flat(rows)))
    chosen = [(scale.threshold(0.0), 0.0)]
    if reached <= 0:
        return chosen
    # The smallest step of 1, 2, 2.5, 5 times a power of ten that needs no more radii.
    smallest = reached / _MOST_STEPS
    power = 10.0 ** math.floor(math.log10(smallest))
    step = next(nice * power for nice in _NICE if nice * power >= smallest * (1 - 1e-12))
    for multiple in range(1, math.floor(reached / step) + 1):
        shown = multiple * step
        chosen.append((scale.threshold(shown), scale.stored(shown)))
    return chosen


# Training history: measures recorded each round, mean over clients with its band.

_FIRST = ("loss", "accuracy")
_NO_MEASURES = ("client", "seconds", "private_steps")
_CLIENTS_SHOWN = 5


class MeasureCurve(NamedTuple):
    """One measure over the rounds.

    Attributes:
        rounds: (r,) the rounds, counted from 1.
        mean, low, high: (r,) over the clients that recorded the measure in that round.
    """

    rounds: Floats
    mean: Floats
    low: Floats
    high: Floats


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Names of all recorded measures: loss and accuracy first, the others by name."""
    names = {
        str(name)
        for run in flat(rows)
        for entry in run.history
        for measures in _clients(entry)
        for name, value in measures.items()
        if _number(value) is not None
    }
    return [n for n in _FIRST if n in names] + sorted(names.difference(_FIRST))


def measure_curves(row: Row, measure: str) -> MeasureCurve | None:
    """One measure, over the clients of all seeds; None where it was never recorded."""
    by_round: dict[float, list[float]] = {}
    for run in row.runs:
        for position, entry in enumerate(run.history):
            numbers = [_number(measures.get(measure)) for measures in _clients(entry)]
            number = float(entry.get("round", position)) + 1.0
            by_round.setdefault(number, []).extend(n for n in numbers if n is not None)
    rows = [(n, float(np.mean(v)), min(v), max(v)) for n, v in sorted(by_round.items()) if v]
    if not rows:
        return None
    return MeasureCurve(*np.array(rows, np.float64).T)


def _participants_are_secret(run: RunResults) -> bool:
    """Whether the bound on privacy assumes that nobody knows who took part in which round."""
    privacy = run.manifest.get("privacy")
    if not isinstance(privacy, Mapping) or privacy.get("kind") != "client":
        return False
    try:
        return parse_toml(run.spec).get("clients", {}).get("participation", 1.0) != 1.0
    except (InputError, AttributeError):
        return True


def left_out_words(run: RunResults) -> str | None:
    """Which clients failed and were left out of rounds, in a sentence; None where none did."""
    faults = [
        (int(fault["client"]), entry.get("round", position), str(fault["reason"]))
        for position, entry in enumerate(run.history)
        for fault in entry.get("left_out", ())
    ]
    if not faults:
        return None
    if _participants_are_secret(run):
        rounds = len({number for _, number, _ in faults})
        return (
            f"in {rounds} of {len(run.history)} rounds clients failed and were left out. Which "
            "ones, and why, is in history.jsonl alone: privacy of clients assumes that nobody "
            "knows who took part."
        )
    worked = sum(len(_clients(entry)) for entry in run.history) + len(faults)
    rounds = len({number for _, number, _ in faults})
    first = {client: reason for client, _, reason in reversed(faults)}
    times = {client: sum(c == client for c, _, _ in faults) for client in sorted(first)}
    named = [
        f"client {client} ({count} times; first: {first[client]})"
        if count > 1
        else f"client {client} (once: {first[client]})"
        for client, count in list(times.items())[:_CLIENTS_SHOWN]
    ]
    more = len(times) - len(named)
    also = f"; and {more} more" if more else ""
    return (
        f"{len(faults)} of {worked} rounds of clients failed and were left out, in "
        f"{rounds} of {len(run.history)} rounds: {'; '.join(named)}{also}."
    )


def _clients(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The clients' measures of one round, from a list of rows or from a mapping by client."""
    rows = entry.get("clients")
    if isinstance(rows, Mapping):
        rows = list(rows.values())
    if not isinstance(rows, list):
        return []
    return [
        {name: value for name, value in row.items() if name not in _NO_MEASURES}
        for row in rows
        if isinstance(row, Mapping)
    ]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond every float
        return None
