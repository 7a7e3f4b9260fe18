"""A client's own images, as a study sees them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from certifl.data import Dataset, ImageSplit, choose, load
from certifl.deploy.client.settings import Settings
from certifl.errors import InputError
from certifl.federated.states import ClientData
from certifl.models import fingerprint
from certifl.spec import Spec, with_settings
from certifl.study.setup import open_data


@dataclass(frozen=True)
class LocalData:
    """One client's images.

    Attributes:
        dataset: where they come from. train: those it trains on.
        test: positions of its test images in the data set.
        dealt: whether the data set is one that all clients have, allocated by the study.
        public_classes: names of the classes as the server gets them.
    """

    dataset: Dataset
    train: ClientData
    test: np.ndarray
    dealt: bool
    public_classes: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        """What the server must know of them: shapes, classes, number of training images.

        For a data set that all clients have also its name and fingerprint, to be compared.
        """
        properties: dict[str, Any] = {
            "in_channels": self.dataset.in_channels,
            "image_size": list(self.dataset.image_size),
            "class_names": list(self.public_classes),
            "train_images": len(self.train),
        }
        if self.dealt:
            properties |= {"name": self.dataset.name, "fingerprint": self.dataset.fingerprint}
        return properties

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the training images and labels."""
        return fingerprint({"images": self.train.images, "labels": self.train.labels})

    def tests(self, spec: Spec) -> np.ndarray:
        """Positions of the test images that are certified."""
        return choose(self.test, spec.certification.images, spec.seed, self.train.client)


def open_local_data(spec: Spec, settings: Settings) -> LocalData:
    """A client's images for a study.

    Raises:
        DataUnavailable: they are not available. InputError: they do not fit the study.
    """
    if not settings.data:
        raise InputError(
            "This client has no data: give its folder of images with --data, or write data into "
            "client.toml."
        )
    folder = None if settings.data_dir is None else Path(settings.data_dir)
    if settings.dealt:
        return _dealt(spec, settings, folder)
    whole = load(
        settings.data,
        folder,
        label_column=settings.label_column,
        resize=settings.resize,
        crop=settings.crop,
        window=settings.window,
    )
    dataset = whole if settings.classes is None else _renamed(whole, settings.classes)
    public = dataset.class_names if settings.classes else _anonymous(dataset.class_names)
    train = ClientData(settings.client, dataset.train.images, dataset.train.labels)
    return LocalData(dataset, train, np.arange(len(dataset.test)), False, public)


def _anonymous(names: tuple[str, ...]) -> tuple[str, ...]:
    """Anonymous names: they disclose the number of classes, and whether clients have the same.

    The names in the images' files or folders may be anything, a patient's name if the wrong
    column was chosen. So they are not sent unless `classes` in client.toml lists them.
    """
    numbers = tuple(str(number) for number in range(len(names)))
    if names == numbers:
        return numbers
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]
    return tuple(f"class {number} ({digest})" for number in numbers)


def _dealt(spec: Spec, settings: Settings, folder: Path | None) -> LocalData:
    """The images of a common data set that the study allocates to this client."""
    if settings.client >= spec.clients.count:
        raise InputError(
            f"The study allocates images to {spec.clients.count} clients, counted from 0; there "
            f"is no client {settings.client}."
        )
    values = spec.model_dump(exclude_none=True)
    data = {k: v for k, v in values["data"].items() if k != "label_column"}
    data |= {"name": settings.data}
    if settings.label_column is not None:
        data["label_column"] = settings.label_column
    here = with_settings({**values, "data": data})
    dataset, partition = open_data(here, folder)
    own = partition.clients[settings.client]
    part = dataset.train.take(own.train)
    train = ClientData(settings.client, part.images, part.labels)
    return LocalData(dataset, train, own.test, True, dataset.class_names)


def _renamed(dataset: Dataset, classes: list[str]) -> Dataset:
    """The data set with labels counted along a longer list of classes."""
    unknown = [name for name in dataset.class_names if name not in classes]
    if unknown or len(set(classes)) != len(classes):
        problem = f"does not name {unknown[0]!r}" if unknown else "names a class twice"
        raise InputError(f"classes in client.toml {problem}: list every class of the study once.")
    position = torch.tensor([classes.index(name) for name in dataset.class_names])

    def renumbered(split: ImageSplit) -> ImageSplit:
        return dataclasses.replace(split, labels=position[split.labels])

    return dataclasses.replace(
        dataset,
        train=renumbered(dataset.train),
        test=renumbered(dataset.test),
        class_names=tuple(classes),
    )
