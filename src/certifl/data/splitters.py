"""Splitting a data set over clients: training and test images together, in the same proportions.

Every splitter but `Column`, which follows a column of the data set, gives every image of both
splits to exactly one client, is a function of the labels, the number of clients and the seed, and
never leaves a client without training or test images: it raises an error that says what to change.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from certifl.data import SPLITS
from certifl.data.partition import (
    ClientIndices,
    Labels,
    Partition,
    label_checksum,
    labels_for,
    require_count,
)
from certifl.errors import InputError
from certifl.rng import numpy_generator

Parts = tuple[list[np.ndarray], list[np.ndarray]]
"""Positions of every client's training images, and of its test images."""


@dataclass(frozen=True)
class Splitter(ABC):
    """Options that split labels over clients; a splitter fills in `assign`."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        SPLITS.check_component(self)

    def split(
        self, train_labels: Labels, test_labels: Labels, clients: int, seed: int
    ) -> Partition:
        """Split both splits over `clients` clients; no image is given twice.

        Args:
            train_labels, test_labels: (n,) classes, in the order of the data set.
            clients: how many (InputError where there are too few images).
            seed: of what is drawn; equal arguments give equal partitions.
        """
        train, test = labels_for(train_labels, test_labels, clients)
        parts = self.assign(train, test, clients, seed)
        for which, images in zip(("training", "test"), parts, strict=True):
            if empty := sum(part.size == 0 for part in images):
                raise InputError(
                    f"The split {self.name!r} leaves {empty} of {clients} clients without "
                    f"{which} images. Take fewer clients, more images, or a less skewed split."
                )
        indices = tuple(
            ClientIndices(np.sort(own), np.sort(tested))
            for own, tested in zip(*parts, strict=True)
        )
        return Partition(indices, self.name, asdict(self), seed, label_checksum(train, test))

    @abstractmethod
    def assign(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Parts:
        """Positions of every client's images, in any order; see `split`."""

    def _stream(self, seed: int, *ids: int | str) -> np.random.Generator:
        return numpy_generator(seed, "partition", self.name, *ids)

    def _counts(
        self,
        proportions: np.ndarray,
        train: np.ndarray,
        test: np.ndarray,
        seed: int,
        attempt: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images of each class of each client, (classes, clients) for both splits."""
        draw, classes = self._stream(seed, "quotas", attempt), proportions.shape[0]
        of_train = quotas(class_counts(train, classes), proportions, draw)
        return of_train, quotas(class_counts(test, classes), proportions, draw)

    def _allocated(
        self, counts: tuple[np.ndarray, np.ndarray], train: np.ndarray, test: np.ndarray, seed: int
    ) -> Parts:
        return (
            allocate(train, counts[0], self._stream(seed, "train")),
            allocate(test, counts[1], self._stream(seed, "test")),
        )


@dataclass(frozen=True)
class Uniform(Splitter):
    """At random, whatever the labels: sizes differ by at most one image, as in the paper."""

    name: ClassVar[str] = "uniform"

    def assign(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Parts:
        """Cut a random order of each split into equal parts."""
        parts = [
            np.array_split(self._stream(seed, which).permutation(labels.size), clients)
            for which, labels in (("train", train), ("test", test))
        ]
        return parts[0], parts[1]


@dataclass(frozen=True)
class Balanced(Splitter):
    """Every client gets the same number of images of every class, to the nearest image.

    Of each class and in total, numbers differ by at most one image.
    """

    name: ClassVar[str] = "balanced"

    def assign(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Parts:
        """Allocate each class in equal parts."""
        proportions = np.full((number_of_classes(train, test), clients), 1 / clients)
        return self._allocated(self._counts(proportions, train, test, seed), train, test, seed)


@dataclass(frozen=True)
class Dirichlet(Splitter):
    """Label skew: class k goes to the clients in proportions p_k ~ Dirichlet(alpha, ..., alpha).

    Training and test images follow the same drawn proportions. A small alpha gives clients with
    few classes, a large one the balanced split. A draw that leaves a client with fewer images than
    asked for is repeated, but only `retries` times.

    Args:
        alpha: concentration, > 0.
        min_train: least number of training images of a client.
        min_test: least number of test images of a client.
        retries: draws before the split is refused.

    Source: Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks (2019).
    """

    alpha: float = 0.5
    min_train: int = 10
    min_test: int = 2
    retries: int = 1000
    name: ClassVar[str] = "dirichlet"

    def assign(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Parts:
        """Draw proportions until every client has enough images, then allocate."""
        classes = number_of_classes(train, test)
        draw = self._stream(seed, "proportions")
        for attempt in range(self.retries):
            proportions = draw.dirichlet(np.full(clients, self.alpha), size=classes)
            counts = self._counts(proportions, train, test, seed, attempt)
            smallest = [int(count.sum(axis=0).min()) for count in counts]
            if smallest[0] >= self.min_train and smallest[1] >= self.min_test:
                return self._allocated(counts, train, test, seed)
        raise InputError(
            f"In {self.retries} draws of Dirichlet({self.alpha:g}) over {clients} clients, one "
            f"always had fewer than {self.min_train} training or {self.min_test} test images (of "
            f"{train.size} and {test.size} in all). Raise alpha, take fewer clients, or lower "
            "min_train or min_test."
        )


@dataclass(frozen=True)
class Shards(Splitter):
    """Label skew: training images sorted by label, cut into shards; each client gets a few.

    The test images of a class go to the clients in proportion to its training images there, so a
    client is tested on the classes it trains on.

    Args:
        shards_per_client: shards of a client; it bounds how many classes most clients see.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data (2017).
    """

    shards_per_client: int = 2
    name: ClassVar[str] = "shards"

    def assign(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Parts:
        """Give each client random shards, then test images of the same classes."""
        total = clients * self.shards_per_client
        if total > train.size:
            raise InputError(
                f"{clients} clients with {self.shards_per_client} shards each need {total} "
                f"shards, but there are {train.size} training images. Take fewer clients or a "
                "smaller shards_per_client."
            )
        classes = number_of_classes(train, test)
        draw = self._stream(seed, "train")
        shards = np.array_split(np.concatenate(shuffled_by_class(train, classes, draw)), total)
        order = draw.permutation(total).reshape(clients, self.shards_per_client)
        trains = [np.concatenate([shards[number] for number in row]) for row in order]
        counted = np.stack([class_counts(train[own], classes) for own in trains], axis=1)
        counts = quotas(class_counts(test, classes), shares(counted), self._stream(seed, "quotas"))
        return trains, allocate(test, counts, self._stream(seed, "test"))


@dataclass(frozen=True)
class Quantity(Splitter):
    """Size skew: sizes follow the power law rank^(-exponent), labels are alike everywhere.

    Which client has which rank is drawn. Training and test images follow the same sizes, and every
    client has each class in the same proportion, to the nearest image.

    Args:
        exponent: 0 gives equal sizes; 1 makes the second client half as large as the first.
    """

    exponent: float = 1.0
    name: ClassVar[str] = "quantity"

    def assign(self, train: np.ndarray, test: np.ndarray, clients: int, seed: int) -> Parts:
        """Allocate each class by the drawn sizes."""
        weights = (1.0 + self._stream(seed, "ranks").permutation(clients)) ** -self.exponent
        proportions = np.tile(weights / weights.sum(), (number_of_classes(train, test), 1))
        return self._allocated(self._counts(proportions, train, test, seed), train, test, seed)


def assign_images(
    splitter: Splitter | Column,
    labels: tuple[Labels, Labels],
    columns: tuple[np.ndarray | None, ...],
    clients: int,
    seed: int,
) -> Partition:
    """Split a data set over clients: by its labels, or by the column that the splitter names.

    Args:
        splitter, clients, seed: as in `Splitter.split`.
        labels, columns: of the training and of the test images; no column was kept = None.
    """
    if not isinstance(splitter, Column):
        return splitter.split(*labels, clients, seed)
    train, test = columns
    if train is None or test is None:
        raise InputError(
            f"The data set was read without its column {splitter.column!r}; load it with "
            f"keep_column={splitter.column!r}."
        )
    checksum = label_checksum(*labels)
    return dataclasses.replace(splitter.split(train, test, clients, seed), label_checksum=checksum)


def number_of_classes(train: np.ndarray, test: np.ndarray) -> int:
    """One more than the largest label of both splits."""
    return int(max(train.max(), test.max())) + 1


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Number of images of each class, (classes,)."""
    return np.bincount(labels, minlength=classes)


def quotas(
    totals: np.ndarray, proportions: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Whole numbers (classes, clients) of images near totals[k] * proportions[k, i], none lost.

    Each entry is its exact share rounded up or down, each row sums to totals[k], and a share of
    zero stays zero. A client that is still owed images from earlier classes is rounded up first,
    ties at random: rounding each class alone would favor the same clients repeatedly, and leave
    others without a test image although there are enough.
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


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts (classes, clients) as proportions; a class that nobody holds is shared equally."""
    counts = np.where(counts.sum(axis=1, keepdims=True) == 0, 1, counts)
    return counts / counts.sum(axis=1, keepdims=True)


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
        """Give every chosen value's images to the client of that number, which the value names.

        Args:
            train, test: (n,), the column's values in both splits. seed: recorded only.
            clients: how many take part (InputError where too few values have enough images).
        """
        require_count("The number of clients", clients)
        chosen = self._chosen(train, test, clients)
        chosen_images = tuple(
            ClientIndices(np.flatnonzero(train == v), np.flatnonzero(test == v)) for v in chosen
        )
        names = tuple(str(value) for value in chosen)
        return Partition(chosen_images, self.name, asdict(self), seed, "", names)

    def _chosen(self, train: np.ndarray, test: np.ndarray, clients: int) -> np.ndarray:
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
