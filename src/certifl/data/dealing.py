"""Dealing the images of each class to clients in given proportions."""

from __future__ import annotations

import numpy as np

__all__ = ["class_counts", "deal", "number_of_classes", "quotas", "shares", "shuffled_by_class"]


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
    zero stays zero. Who is rounded up is decided by what a client is still owed from the classes
    before, ties at random: rounding each class on its own would favour the same clients again and
    again, and leave others without a test image although there are enough.

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


def deal(
    labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Give client i counts[k, i] random images of each class k; every image goes to one client.

    Returns:
        for each client its images, int64, ascending.
    """
    hands: list[list[np.ndarray]] = [[] for _ in range(counts.shape[1])]
    for members, row in zip(
        shuffled_by_class(labels, counts.shape[0], generator), counts, strict=True
    ):
        for hand, part in zip(hands, np.split(members, np.cumsum(row)[:-1]), strict=True):
            hand.append(part)
    return [np.sort(np.concatenate(hand)) for hand in hands]
