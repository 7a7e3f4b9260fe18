"""Allocating the images of each class to clients in given proportions."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from certifl.data import SPLITS
from certifl.data.partition import ClientIndices, Partition, require_count
from certifl.errors import InputError


def number_of_classes(train: np.ndarray, test: np.ndarray) -> int:
    """One more than the largest label of both splits."""
    return int(max(train.max(), test.max())) + 1


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Number of images of each class, (classes,)."""
    return np.bincount(labels, minlength=classes)


def quotas(
    totals: np.ndarray, proportions: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Whole numbers of images near totals[k] * proportions[k, i], none lost.

    Each entry is its exact share rounded up or down, each row sums to totals[k], and a share of
    zero stays zero. A client that is still owed images from earlier classes is rounded up first,
    ties at random: rounding each class alone would favor the same clients repeatedly, and leave
    others without a test image although there are enough.

    Args:
        totals: images of each class, (classes,).
        proportions: of class k to client i, (classes, clients); rows sum to 1.
        generator: breaks ties.

    Returns:
        int64, (classes, clients).
    """
    counts = np.zeros(proportions.shape, dtype=np.int64)
    owed = np.zeros(proportions.shape[1])
    for row, total, share in zip(counts, totals, proportions, strict=True):
        exact = np.round(total * share, 9)  # so that 0.1 * 60 counts as the whole number it is
        row[:] = np.floor(exact)
        owed += exact - row
        open_to_more = np.flatnonzero(exact > row)
        ties = generator.permutation(open_to_more.size)
        by_need = open_to_more[np.lexsort((ties, -np.round(owed[open_to_more], 9)))]
        raised = by_need[: total - row.sum()]
        row[raised] += 1
        owed[raised] -= 1
    return counts


def shares(held: np.ndarray) -> np.ndarray:
    """Counts (classes, clients) as proportions; a class that nobody holds is shared equally."""
    held = np.where(held.sum(axis=1, keepdims=True) == 0, 1, held)
    return held / held.sum(axis=1, keepdims=True)


def shuffled_by_class(
    labels: np.ndarray, classes: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """For each class its images in random order."""
    return [generator.permutation(np.flatnonzero(labels == k)) for k in range(classes)]


def allocate(
    labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Give client i counts[k, i] random images of each class k; every image goes to one client.

    Returns:
        for each client its images, int64, ascending.
    """
    images_of: list[list[np.ndarray]] = [[] for _ in range(counts.shape[1])]
    for members, row in zip(
        shuffled_by_class(labels, counts.shape[0], generator), counts, strict=True
    ):
        for parts, part in zip(images_of, np.split(members, np.cumsum(row)[:-1]), strict=True):
            parts.append(part)
    return [np.sort(np.concatenate(parts)) for parts in images_of]


# Splitting a data set as it came to be: every value of one of its columns is a client.


_MOST_LISTED = 20


@dataclass(frozen=True)
class Column:
    """A natural federation: the images of a writer, a hospital, a camera are one client's.

    A value can be a client if it has enough images in both splits, and a client is tested on the
    test images of its own value. Where there are more such values than clients, those with the
    most training images take part (of equal ones the first in order) and the images of all others
    are left out. Clients are numbered in the order of their values: integers by size, texts as
    texts. Nothing is drawn: the seed does not matter.

    Args:
        column: its name in the data set's table.
        min_train: least number of training images of a client.
        min_test: least number of test images of a client.

    Raises:
        InputError: no name, or a number below 1.
    """

    column: str
    min_train: int = 1
    min_test: int = 1
    name: ClassVar[str] = "column"

    def __post_init__(self) -> None:
        SPLITS.check_component(self)

    def split(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Partition:
        """Give every chosen value's images to the client of that number.

        Args:
            train, test: (n,), the column's values in both splits.
            clients: how many take part.
            seed: recorded only.

        Returns:
            The partition, with the values as names; it knows no labels yet.

        Raises:
            InputError: too few values have enough images.
        """
        require_count("The number of clients", clients)
        chosen = self._chosen(train, test, clients)
        chosen_images = tuple(
            ClientIndices(np.flatnonzero(train == v), np.flatnonzero(test == v)) for v in chosen
        )
        names = tuple(str(value) for value in chosen)
        return Partition(chosen_images, self.name, asdict(self), seed, "", names)

    def _chosen(self, train: np.ndarray, test: np.ndarray, clients: int) -> np.ndarray:
        """The values that are clients, in order."""
        values, of_train = np.unique(train, return_counts=True)
        tested = Counter(test.tolist())
        of_test = np.array([tested[value] for value in values.tolist()])
        fitting = np.flatnonzero((of_train >= self.min_train) & (of_test >= self.min_test))
        if clients > fitting.size:
            there = [
                f"{values[i]} ({of_train[i]} and {of_test[i]})"
                for i in np.argsort(-of_train, kind="stable")[:_MOST_LISTED]
            ]
            more = f" and {values.size - _MOST_LISTED} more" if values.size > _MOST_LISTED else ""
            raise InputError(
                f"{clients} clients were asked for, but the column {self.column!r} has "
                f"{fitting.size} values with at least {self.min_train} training and "
                f"{self.min_test} test images. Its values, with their training and test images: "
                f"{', '.join(there)}{more}. Set clients.count to {max(1, fitting.size)} or less."
            )
        largest = fitting[np.argsort(-of_train[fitting], kind="stable")[:clients]]
        return values[np.sort(largest)]
