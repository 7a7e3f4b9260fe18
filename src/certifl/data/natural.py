"""Splitting a data set as it came to be: every value of one of its columns is a client."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from certifl.data.manifest import ClientIndices, Partition, require_count
from certifl.errors import InputError

__all__ = ["Column"]

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
        if not (isinstance(self.column, str) and self.column):
            raise InputError(f"column must be the name of a column, got {self.column!r}.")
        for option in ("min_train", "min_test"):
            require_count(option, getattr(self, option))

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
        hands = tuple(
            ClientIndices(np.flatnonzero(train == v), np.flatnonzero(test == v)) for v in chosen
        )
        names = tuple(str(value) for value in chosen)
        return Partition(hands, self.name, asdict(self), seed, "", names)

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
