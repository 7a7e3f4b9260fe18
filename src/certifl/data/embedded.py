"""The data set that comes with the installation: scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from certifl.data.readers import RawSplit
from certifl.streams import numpy_generator

__all__ = ["DIGITS_TEST_IMAGES", "read_digits"]

DIGITS_TEST_IMAGES = 400
_SPLIT_SEED = 0


def read_digits() -> tuple[RawSplit, RawSplit]:
    """1797 grey images of 8 x 8 pixels, split once and for all into 1397 and 400.

    The original intensities v in {0, ..., 16} become floor((255 v + 8) / 16), that is 255 v / 16
    rounded to the nearest integer, halves up. The split is stratified: each class gives test
    images in proportion to its size, to the nearest image, chosen by a fixed stream.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository (1998), test part, as bundled with scikit-learn.
    """
    from sklearn.datasets import (
        load_digits,
    )  # slow to import, and needed once: the cache has it then

    values, target = load_digits(return_X_y=True)
    whole = np.asarray(values).astype(np.int64).reshape(-1, 1, 8, 8)
    images = ((whole * 255 + 8) // 16).astype(np.uint8)
    labels = np.asarray(target).astype(np.int64)
    names = tuple(str(digit) for digit in range(10))
    is_test = _stratified(labels, DIGITS_TEST_IMAGES)
    return (
        RawSplit(images[~is_test], labels[~is_test], names),
        RawSplit(images[is_test], labels[is_test], names),
    )


def _stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Mark `count` images, of each class its share rounded by largest remainder."""
    sizes = np.bincount(labels)
    share = sizes * count / labels.size
    taken = np.floor(share).astype(np.int64)
    largest_first = np.argsort(taken - share, kind="stable")
    taken[largest_first[: count - taken.sum()]] += 1
    marked = np.zeros(labels.size, dtype=bool)
    for label, quota in enumerate(taken):
        members = np.flatnonzero(labels == label)
        order = numpy_generator(_SPLIT_SEED, "digits split", label).permutation(members.size)
        marked[members[order[:quota]]] = True
    return marked
