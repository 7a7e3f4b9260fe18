"""Results by class and by client: which images are certified, and which disease is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from certifl.certification.certificates import Certificates
from certifl.report.results import Row, RunResults
from certifl.report.summary import Share, gains, image_numbers, shares_over_seeds
from certifl.smoothing.bounds import Ints


@dataclass(frozen=True)
class Group:
    """Some images of a row: those of one class, or of one client.

    Attributes:
        number: of the class or client. name: for people.
        images: certified test images, over all seeds.
        acr: average certified radius, mean over these images and then over seeds.
        accuracy: certified accuracy at each radius asked for, with 95 % limits.
        abstained: share without a certificate; None where it was not shared.
        votes: estimation votes per image.
    """

    number: int
    name: str
    images: int
    acr: float
    accuracy: tuple[Share, ...]
    abstained: Share | None
    votes: float


def by_class(row: Row, radii: Sequence[float]) -> list[Group]:
    """One group for each class that some test image of a row has.

    Classes are those of the labels: what a client with this disease can expect. Images of all
    clients count once each.

    Args:
        row: one or several seeds whose single images are known.
        radii: in the stored unit.
    """
    names = row.runs[0].data.get("class_names")

    def name(label: int) -> str:
        known = isinstance(names, list) and label < len(names)
        return str(names[label]) if known and isinstance(names, list) else str(label)

    return _groups(row, radii, lambda certificates: certificates.label, name)


def by_client(row: Row, radii: Sequence[float]) -> list[Group]:
    """One group for each client of a row that has certificates."""
    name = row.runs[0].client_name
    return _groups(row, radii, lambda certificates: certificates.client, name)


def _groups(
    row: Row,
    radii: Sequence[float],
    key: Callable[[Certificates], Ints],
    name: Callable[[int], str],
) -> list[Group]:
    numbers = np.unique(np.concatenate([key(run.certificates) for run in row.runs]))
    return [_group(row, radii, key, int(number), name(int(number))) for number in numbers]


def _group(
    row: Row, radii: Sequence[float], key: Callable[[Certificates], Ints], number: int, name: str
) -> Group:
    inside = [(run, key(run.certificates) == number) for run in row.runs]
    inside = [(run, own) for run, own in inside if own.any()]
    images = [image_numbers(run)[own] for run, own in inside]
    return Group(
        number,
        name,
        sum(len(own) for own in images),
        float(np.mean([gains(run)[own].mean() for run, own in inside])),
        tuple(
            shares_over_seeds([_certified(run, radius)[own] for run, own in inside], images)
            for radius in radii
        ),
        None
        if row.curves_only
        else shares_over_seeds([run.certificates.abstained[own] for run, own in inside], images),
        float(np.mean(np.concatenate([run.certificates.votes[own] for run, own in inside]))),
    )


def _certified(run: RunResults, radius: float) -> np.ndarray:
    return run.certificates.correct & (run.certificates.radius >= radius)
