"""Which client holds which images, as a record that can be stored and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from certifl.errors import InputError
from certifl.rng import numpy_generator

if TYPE_CHECKING:
    from torch import Tensor

Labels: TypeAlias = "np.ndarray | Tensor | Sequence[int]"


@dataclass(frozen=True, eq=False)
class ClientIndices:
    """One client's images: positions in the training and in the test split; else InputError.

    Args:
        train: int64, ascending, unique.
        test: int64, ascending, unique.
    """

    train: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            made = np.array(getattr(self, name), dtype=np.int64)
            if made.ndim != 1 or (made.size and made[0] < 0) or (np.diff(made) <= 0).any():
                raise InputError(
                    f"The {name} indices of a client must be one ascending list of different "
                    "positions, counted from 0. The manifest was changed; make a new partition."
                )
            made.setflags(write=False)
            object.__setattr__(self, name, made)


@dataclass(frozen=True, eq=False)
class Partition:
    """A split of a data set over clients.

    Args:
        clients: one entry for each client, by number.
        split: name of the splitter, a key of SPLITS.
        options: the splitter's own settings.
        seed: the seed it was drawn with.
        label_checksum: `label_checksum` of the labels it was made for.
        names: what the clients are called, where the split knows it: the values of a column.
    """

    clients: tuple[ClientIndices, ...]
    split: str
    options: Mapping[str, Any]
    seed: int
    label_checksum: str
    names: tuple[str, ...] = ()

    def to_manifest(self) -> dict[str, Any]:
        """The partition as plain lists, numbers and strings, for JSON."""
        return {
            "split": self.split,
            "options": dict(self.options),
            "seed": self.seed,
            "label_checksum": self.label_checksum,
            **({"names": list(self.names)} if self.names else {}),
            "clients": [
                {"train": client.train.tolist(), "test": client.test.tolist()}
                for client in self.clients
            ],
        }

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any]) -> Partition:
        """The partition of a manifest; InputError for a missing or wrong entry."""
        try:
            clients = tuple(
                ClientIndices(np.array(client["train"]), np.array(client["test"]))
                for client in manifest["clients"]
            )
            return Partition(
                clients,
                str(manifest["split"]),
                dict(manifest["options"]),
                int(manifest["seed"]),
                str(manifest["label_checksum"]),
                tuple(map(str, manifest.get("names", ()))),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"The partition's manifest is not complete ({type(error).__name__}: {error}). "
                "It was changed or cut off; make the partition again."
            ) from error


def label_checksum(train_labels: Labels, test_labels: Labels) -> str:
    """SHA-256 over the numbers of images and the labels (n,) of both splits, in order."""
    train, test = as_labels(train_labels), as_labels(test_labels)
    digest = hashlib.sha256(f"{train.size} {test.size}\n".encode())
    digest.update(train.astype("<i8").tobytes())
    digest.update(test.astype("<i8").tobytes())
    return digest.hexdigest()


def check(partition: Partition, train_labels: Labels, test_labels: Labels) -> None:
    """Refuse a partition of other labels, or that gives an image twice (InputError)."""
    if label_checksum(train_labels, test_labels) != partition.label_checksum:
        raise InputError(
            "The partition was made for other labels than the data set has. The data set was "
            "changed or is another one: load the one the partition was made for, or make the "
            "partition again in a new run."
        )
    for name, total in (("train", len(train_labels)), ("test", len(test_labels))):
        indices = np.concatenate([getattr(client, name) for client in partition.clients])
        if indices.size and indices.max() >= total:
            raise InputError(
                f"The partition names {name} image {indices.max()}, but there are only {total}. "
                "The manifest was changed; make the partition again."
            )
        if np.unique(indices).size != indices.size:
            raise InputError(
                f"The partition gives a {name} image to two clients. The manifest was changed; "
                "make the partition again."
            )


def choose(indices: np.ndarray, count: int | None, seed: int, client: int) -> np.ndarray:
    """The test images (int64, ascending) of one client that are certified: a fixed part.

    Depends on nothing but the arguments. A larger count of the same seed contains a smaller one,
    so a study can be extended without losing certificates.

    Args:
        indices: the client's test images. seed, client: the study's, and its number.
        count: how many (InputError below 1); None, or more than there are, takes all.
    """
    own = np.sort(np.asarray(indices, dtype=np.int64))
    if count is None or count >= own.size:
        return own
    if count < 1:
        raise InputError(
            f"The number of certified test images must be at least 1, got {count}. "
            "Leave it out to certify all."
        )
    order = numpy_generator(seed, "certified test images", client).permutation(own.size)
    return np.sort(own[order[:count]])


def as_labels(labels: Labels) -> np.ndarray:
    """Labels as int64 (n,); InputError if they are not integers from 0 in one dimension."""
    made = np.asarray(labels)
    if made.ndim != 1 or made.dtype.kind not in "iu" or (made.size and made.min() < 0):
        raise InputError(
            f"Labels must be integers from 0 up in one dimension, got {made.dtype} {made.shape}."
        )
    return made.astype(np.int64)


def labels_for(
    train_labels: Labels, test_labels: Labels, clients: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both splits' labels; InputError if unusable, or too few for that many clients."""
    train, test = as_labels(train_labels), as_labels(test_labels)
    require_count("The number of clients", clients)
    if clients > min(train.size, test.size):
        raise InputError(
            f"{clients} clients cannot each have an image of {train.size} training and "
            f"{test.size} test images. Take fewer clients or more images."
        )
    return train, test


def require_count(name: str, value: int) -> None:
    """Refuse what is not an integer from 1 up; `name` opens the message."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}.")
