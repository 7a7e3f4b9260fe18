"""A client's own decisions: its settings, the images they name, what a server may request.

`client.toml` overrides the server's requests. What a client does with each key of a spec, which
comes from the server, is in a table of docs/deploy.md; a key that it lacks fails a test.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from certifl.data import Column, Dataset, ImageSplit, choose, load
from certifl.data.preparation import Preparation, preparation_of
from certifl.deploy.schemas import Rejected
from certifl.errors import CertiflError, InputError, ModelError, SpecError
from certifl.federated.states import ClientData
from certifl.models import MODELS, build, fingerprint
from certifl.path_checks import check_client_settings, quotes_missing
from certifl.perturbations import describe as describe_perturbation
from certifl.perturbations import from_description as perturbation_from
from certifl.safe_io import SPEC_BYTES, parse_toml, read_text
from certifl.spec import Spec, with_settings
from certifl.spec.sections import Section
from certifl.study.setup import open_data

SHARES = {
    "none": "the server learns only that the client has finished",
    "curve": "numbers of certified images at fixed radii, and the average certified radius",
    "rows": "every test image's certificate: class, radius, votes, label, position",
}
"""Disclosure levels of a client's certificates, lowest first."""


class Settings(Section):
    """A client's own settings.

    Attributes:
        client: its number in the study, from 0.
        data: its images: a folder with train and test parts, or a data set's name.
        dealt: `data` is a data set that every client has; the study's split allocates its images.
            For trying a federation out.
        data_dir: folder of named data sets.
        label_column: which column of its images is the label, where they are a table; a server
            cannot choose it.
        resize, crop, window: what is done to every image, as in a spec's `data`; a study that
            names one of them is refused unless it is the same here.
        classes: the names of all classes of the study, in order. They are sent to the server;
            names found in the images never are.
        share: highest disclosure level of its certificates, a name in `SHARES`.
        perturbation: certify this instead of the study's, where the study allows it.
        networks: its own networks, as module:function, that a study may name; no other module is
            loaded at a server's request.
        max_epsilon: privacy budget of its images, over all studies; a study in which it adds no
            noise is refused then. None = what each study planned.
        delta: at which epsilon is counted; None = each study's.
        device: "auto" or a torch device. threads: of torch; 0 = as torch chooses.
    """

    client: Annotated[int, Field(ge=0)]
    data: str = ""
    dealt: bool = False
    data_dir: str | None = None
    label_column: str | None = None
    resize: int | list[int] | None = None
    crop: Literal["center", "pad"] | None = None
    window: list[float] | None = None
    classes: list[str] | None = None
    share: Literal["none", "curve", "rows"] = "curve"
    perturbation: Any = None
    networks: list[str] = Field(default_factory=list)
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _known_preparation(self) -> Settings:
        try:
            self.preparation()
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def preparation(self) -> Preparation:
        """What is done to every image."""
        return preparation_of(self.resize, self.crop, self.window)

    @field_validator("perturbation")
    @classmethod
    def _known_perturbation(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError('must be a table such as { family = "rotation", sigma = "18deg" }')
        try:
            return describe_perturbation(perturbation_from(value))
        except CertiflError as error:
            raise ValueError(str(error)) from error


def check_share(name: str) -> None:
    """Refuse a name that is not in `SHARES` (InputError)."""
    if name not in SHARES:
        raise InputError(f"share must be one of {', '.join(SHARES)}; got {name!r}.")


def lower_level(one: str, other: str) -> str:
    """The lower of two disclosure levels."""
    order = list(SHARES)
    return order[min(order.index(one), order.index(other))]


def load_settings(path: Path) -> Settings:
    """Read a client's settings; SpecError for a missing file, a wrong key or value."""
    check_client_settings(path)
    text = ""
    try:
        text = read_text(path, SPEC_BYTES)
        values = parse_toml(text)
    except (OSError, InputError) as error:
        raise SpecError(
            f"{path} cannot be read as TOML: {error}.{quotes_missing(text)}"
        ) from error
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        allowed = ", ".join(Settings.model_fields)
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"no such key; allowed here: {allowed}"
        raise SpecError(f"{path}: {key}: {reason}.") from error


# The client's images, as a study sees them.


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
    """A client's images for a study; DataUnavailable, or InputError if they do not fit it."""
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


# What a server may request.

_MOST_CLIENTS = 100_000
_MOST_RADII = 200
_LARGEST_NETWORK = 4 << 30


def check_study(spec: Spec, settings: Settings) -> None:
    """Refuse a study that requests the client's own choice, or too much (Rejected)."""
    if spec.clients.count > _MOST_CLIENTS:
        raise Rejected(f"clients.count is more than {_MOST_CLIENTS:,}")
    if spec.certification.precision == "int8":
        raise Rejected(
            'certification.precision = "int8" is recorded with the ranges of activations '
            'on its training images: choose "auto", "float32" or "bfloat16"'
        )
    if spec.clients.unseen:
        raise Rejected("clients.unseen: a client that does not train does not join")
    _check_selection(spec, settings)
    radii = None if settings.dealt else spec.certification.settings(settings.client).radii
    if radii is not None and len(radii) > _MOST_RADII:
        raise Rejected(
            f"certification.radii are more than {_MOST_RADII}, which would disclose single images"
        )


def _check_selection(spec: Spec, settings: Settings) -> None:
    """Which images a client uses is chosen in its `client.toml` only."""
    column = spec.data.label_column
    if column is not None and not (settings.dealt and column == settings.label_column):
        raise Rejected(
            "data.label_column asks for a column of its images: which column is the label is the "
            "client's choice alone, label_column in client.toml. Leave the key out of the spec"
            + ("" if not settings.dealt else ", or let all clients choose the same column")
        )
    _check_preparation(spec, settings)
    if settings.dealt:
        return
    if spec.data.test_split is not None:
        raise Rejected(
            "data.test_split asks for a split of its images: which images are for testing is the "
            "client's choice alone. Leave the key out of the spec"
        )
    if "[" in spec.data.name:
        raise Rejected("data.name asks for a column of its images: name the data set alone")
    if isinstance(spec.clients.splitter(), Column):
        raise Rejected(
            'clients.split = "column" asks for a column of its images, which are its own already: '
            "leave the key out of the spec"
        )


def _check_preparation(spec: Spec, settings: Settings) -> None:
    """A client prepares its images as its `client.toml` says; a study that differs is refused."""
    asked, own = spec.data.preparation().described, settings.preparation().described
    if settings.dealt and not own:
        return
    for name in (*asked, *own):
        if (name in asked or settings.dealt) and asked.get(name) != own.get(name):
            raise Rejected(
                f"data.{name} of the study is {_as_toml(asked.get(name))}, but this client "
                f"prepares its images with {name} = {_as_toml(own.get(name))}: both must be the "
                f"same. Write {name} into client.toml, or leave data.{name} out of the spec"
            )


def _as_toml(value: object) -> str:
    return "nothing" if value is None else json.dumps(value)


def check_network_size(spec: Spec, channels: int, classes: int) -> None:
    """Refuse one of certifl's networks that would not fit into the machine (Rejected).

    Its shapes are determined without memory. The client's own networks are its own choice.
    """
    name = spec.model.name
    if name not in MODELS:
        return
    try:
        with torch.device("meta"):
            model = build(name, channels, classes, spec.seed, spec.model.options)
    except ModelError as error:
        raise Rejected("the study's network cannot be built with model.options") from error
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    if size > _LARGEST_NETWORK:
        raise Rejected(f"the study's network takes more than {_LARGEST_NETWORK >> 30} GiB")
