"""Which images take part: a fixed random part of a split, dealt out to the clients."""

from __future__ import annotations

import dataclasses

import numpy as np

from certifl.data import ClientIndices, Dataset, Partition, label_checksum
from certifl.errors import SpecError
from certifl.spec import Clients
from certifl.streams import numpy_generator

__all__ = ["partition_of", "random_part"]


def random_part(available: int, wanted: int | None, seed: int, which: str) -> np.ndarray:
    """Indices of a fixed random part of a split; a larger part contains every smaller one.

    Raises:
        SpecError: more images are wanted than there are.
    """
    if wanted is None:
        return np.arange(available)
    if wanted > available:
        raise SpecError(
            f"data.{which}_images: {wanted} are asked for, but there are only {available}. "
            f"Choose a number up to {available}, or leave the key out to take all."
        )
    return np.sort(numpy_generator(seed, "part", which).permutation(available)[:wanted])


def partition_of(
    dataset: Dataset, clients: Clients, seed: int, train: np.ndarray, test: np.ndarray
) -> Partition:
    """Deal the chosen images out; the indices of the result refer to the whole data set."""
    train_labels, test_labels = dataset.train.labels.numpy(), dataset.test.labels.numpy()
    dealt = clients.splitter().split(train_labels[train], test_labels[test], clients.count, seed)
    whole = tuple(ClientIndices(train[c.train], test[c.test]) for c in dealt.clients)
    labels = label_checksum(train_labels, test_labels)
    return dataclasses.replace(dealt, clients=whole, label_checksum=labels)
