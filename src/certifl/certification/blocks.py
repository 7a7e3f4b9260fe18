"""Images and labels as they were given, block by block: arrays, iterables, loaders, data sets."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from certifl.certification.checks import check_exact, check_images
from certifl.errors import InputError
from certifl.perturbations.base import Perturbation

Images = Tensor | np.ndarray | Iterable[Any] | Dataset[Any]
ImageLabels = (
    Tensor | np.ndarray | Sequence[int] | Iterable[Tensor | np.ndarray | Sequence[int]] | None
)
_ROWS = 256
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def checked_blocks(
    images: Images, labels: ImageLabels, perturbation: Perturbation
) -> Iterator[tuple[Tensor, Any]]:
    """Checked images and their labels as they were given, block by block.

    Args:
        images: one array (m, c, h, w); an iterable of such, or of pairs (images, labels), such as
            a `DataLoader` gives; or a map-style data set of images or pairs.
        labels: in the same form; None where there are none, or images come with theirs.
        perturbation: whose `exact` mode images are checked for.

    Raises:
        InputError: images that cannot be used, blocks of different shapes, or not as many blocks
            of labels as of images.
    """
    shape = None
    for number, (block, given) in enumerate(_pairs(images, labels)):
        if block is None or (given is None and labels is not None):
            raise InputError(
                "There must be as many blocks of labels as of images, but there is only one of "
                f"both for block {number}."
            )
        values = check_images(block)
        check_exact(values, perturbation)
        if shape is not None and values.shape[1:] != shape:
            raise InputError(
                f"All images must have one shape; block {number} has {tuple(values.shape[1:])}, "
                f"those before it {tuple(shape)}."
            )
        shape = values.shape[1:]
        yield values, given


def _pairs(images: Images, labels: ImageLabels) -> Iterator[tuple[Any, Any]]:
    """Blocks of images and of labels, as they were given.

    Raises:
        InputError: images or labels come in no blocks, as far as that is seen without reading.
    """
    if isinstance(images, (Tensor, np.ndarray)):
        yield images, labels
        return
    source = _iterable(images)
    if labels is not None and not isinstance(labels, Iterable):
        raise InputError(f"labels must be numbers of classes, one per image; got {labels!r:.80}.")
    for block, given in itertools.zip_longest(source, () if labels is None else labels):
        if _is_pair(block):
            if labels is not None:
                raise InputError(
                    "images come with their labels, as pairs, so labels= must be left out; or "
                    "give images=(x for x, _ in loader)."
                )
            yield block[0], block[1]
            continue
        if isinstance(given, (int, float, np.number)) or getattr(given, "ndim", 1) == 0:
            raise InputError(
                "images come in blocks, so labels must, too: a block of labels for each block of "
                "images, such as labels=y.split([len(x) for x in blocks]) for one tensor y."
            )
        yield block, given


def _iterable(images: Any) -> Iterable[Any]:
    """Blocks, where images are no single array.

    Raises:
        InputError: they are none.
    """
    if isinstance(images, DataLoader):
        _refuse_shuffling(images)
        return images
    if isinstance(images, Dataset) and not isinstance(images, IterableDataset):
        return _of_dataset(images)
    if not isinstance(images, Iterable) or isinstance(images, (str, Mapping)):
        raise InputError(
            f"images must be a tensor or an array (m, c, h, w), an iterable of such or of pairs "
            f"(images, labels), a DataLoader or a map-style data set; got {images!r:.80}."
        )
    if isinstance(images, (tuple, list)):  # at hand, so refused before the first vote
        for block in images:
            if getattr(block, "ndim", 4) != 4:
                check_images(block)
    return images


def _refuse_shuffling(loader: DataLoader[Any]) -> None:
    inner = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(loader.sampler, _SHUFFLING) or isinstance(inner, _SHUFFLING):
        raise InputError(
            "The loader shuffles, so that rows of the certificates would name other images at "
            "every call. Make it with shuffle=False."
        )


def _of_dataset(data: Any) -> Iterator[Any]:
    """Blocks of a map-style data set of images (c, h, w) or pairs (image, label)."""
    for start in range(0, len(data), _ROWS):
        items = [data[row] for row in range(start, min(start + _ROWS, len(data)))]
        pairs = [one for one in items if isinstance(one, (tuple, list)) and len(one) == 2]
        if pairs and len(pairs) == len(items):
            labels = np.array([_label(y) for _, y in pairs])
            yield _stacked([image for image, _ in pairs]), labels
        else:
            yield _stacked(items)


def _label(value: Any) -> int:
    """A label of a pair as a number; one number in a tensor or an array is one."""
    try:
        return operator.index(np.asarray(value).item())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The data set gives {value!r:.40} as a label: labels must be whole numbers, the "
            "classes of the model."
        ) from error


def _stacked(images: Sequence[Any]) -> Tensor:
    if not all(isinstance(image, (Tensor, np.ndarray)) for image in images):
        found = next(type(i).__name__ for i in images if not isinstance(i, (Tensor, np.ndarray)))
        raise InputError(
            f"The data set gives images as {found}: they must be tensors or arrays (c, h, w) in "
            "[0, 1], alone or as pairs (image, label). Give it a transform such as ToTensor()."
        )
    try:
        return torch.stack([torch.as_tensor(image) for image in images])
    except RuntimeError as error:
        raise InputError(f"The images of the data set differ in shape: {error}.") from error


def _is_pair(block: Any) -> bool:
    """Whether a block is (images, labels), as a loader gives it."""
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        return False
    images, labels = block
    return getattr(images, "ndim", 0) == 4 and np.ndim(labels) in (1, 2)
