"""What a server may request of a client's own images and machine, by key of the spec.

A spec comes from the server. Each of its keys has one of these decisions, which docs/deploy.md
shows as a table; a key without one fails a test.

| decision | what a client with its own images does |
|---|---|
| refused | refuses the study where the key selects something |
| unused | ignores it: `client.toml` decides |
| done | follows it, within the stated limit |
| server | is not concerned |
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from certifl.data import Column
from certifl.deploy.client.settings import Settings
from certifl.deploy.transport.schemas import Rejected
from certifl.errors import ModelError
from certifl.models import MODELS, build
from certifl.spec import Spec

_MOST_CLIENTS = 100_000
_MOST_RADII = 200
_LARGEST_NETWORK = 4 << 30


@dataclass(frozen=True)
class Decision:
    """What a client does with a key of the spec.

    Attributes:
        what: refused, unused, done or server. why: in words, with its limit.
    """

    what: str
    why: str


_TRAINS = Decision("done", "how it trains; it costs only time")
_SERVER = Decision("server", "the server's part of a round")
_NOISE = Decision("done", "counted by the client's own ledger; see privacy.md")
_VOTES = Decision("done", "how it certifies; it costs only time")

DECISIONS: dict[str, Decision] = {
    "name": Decision("done", "shown to people, without control characters"),
    "seed": Decision("done", "random draws, and which of its test images it certifies"),
    "data.name": Decision("unused", 'its own `data`; refused as "name[column]"'),
    "data.train_images": Decision("unused", "it trains on all its training images"),
    "data.test_images": Decision("unused", "`certification.images` of all its test images"),
    "data.test_split": Decision("refused", "its own test images, as `data` has them"),
    "data.resize": Decision("refused", "unless `resize` of `client.toml` is the same"),
    "data.crop": Decision("refused", "unless `crop` of `client.toml` is the same"),
    "data.window": Decision("refused", "unless `window` of `client.toml` is the same"),
    "data.label_column": Decision("refused", "`label_column` of `client.toml` alone"),
    "clients.count": Decision("done", f"at most {_MOST_CLIENTS:,}"),
    "clients.split": Decision("unused", 'its images are its own; refused as "column"'),
    "clients.options": Decision("unused", "as `clients.split`"),
    "clients.unseen": Decision("refused", "a client that is not to train does not join"),
    "clients.participation": Decision("done", "it answers only rounds that it is drawn for"),
    "clients.min_clients": _SERVER,
    "model.name": Decision("done", "one of certifl's, or one in `networks` of `client.toml`"),
    "model.options": Decision("done", f"networks of at most {_LARGEST_NETWORK >> 30} GiB"),
    "model.weights": Decision("refused", "a server names no file of this machine"),
    "model.weights_sha256": Decision("refused", "as `model.weights`"),
    "algorithm": Decision("done", "one of certifl's"),
    "objective": Decision("done", "one of certifl's"),
    "training.rounds": Decision("done", "each of so many rounds is answered once"),
    "training.local_epochs": _TRAINS,
    "training.batch_size": _TRAINS,
    "training.lr": _TRAINS,
    "training.momentum": _TRAINS,
    "training.weight_decay": _TRAINS,
    "training.decay_every": _TRAINS,
    "training.decay_factor": _TRAINS,
    "training.momentum_between_rounds": _TRAINS,
    "training.flip": _TRAINS,
    "training.crop": _TRAINS,
    "training.precision": _TRAINS,
    "training.memory_format": _TRAINS,
    "aggregation.rule": _SERVER,
    "aggregation.clip": _SERVER,
    "aggregation.trim": _SERVER,
    "aggregation.malicious": _SERVER,
    "aggregation.keep": _SERVER,
    "privacy.kind": Decision("done", '"example" alone where the client has a `max_epsilon`'),
    "privacy.noise_multiplier": _NOISE,
    "privacy.target_epsilon": _NOISE,
    "privacy.max_norm": _NOISE,
    "privacy.delta": _NOISE,
    "privacy.noise_key": Decision("refused", '"seed": anyone could compute the noise'),
    "augmentation.federated": _TRAINS,
    "augmentation.personalized": _TRAINS,
    "certification.perturbation": Decision("done", "or the client's own, if the study allows it"),
    "certification.images": Decision("done", "a few images make a curve that discloses each"),
    "certification.estimator": _VOTES,
    "certification.n0": _VOTES,
    "certification.n": _VOTES,
    "certification.alpha": _VOTES,
    "certification.radii": Decision("done", f"at most {_MOST_RADII}: a finer grid is as rows"),
    "certification.label_aware": _VOTES,
    "certification.reach": _VOTES,
    "certification.keep": _VOTES,
    "certification.precision": Decision("done", 'all but "int8": its scales depend on images'),
    "certification.own": Decision("done", "as `certification.perturbation` and `radii`"),
}


def check_study(spec: Spec, settings: Settings) -> None:
    """Refuse a study that requests what is the client's own choice, or too much.

    Raises:
        Rejected: it does; the reason names the key.
    """
    if spec.clients.count > _MOST_CLIENTS:
        raise Rejected(f"clients.count is more than {_MOST_CLIENTS:,}")
    if spec.certification.precision == "int8":
        raise Rejected(
            'certification.precision = "int8" stands in the record with the ranges of activations '
            'on its training images: choose "auto", "float32" or "bfloat16"'
        )
    if spec.clients.unseen:
        raise Rejected("clients.unseen: a client that is not to train does not join")
    _check_selection(spec, settings)
    if not settings.dealt:
        _check_grid(spec, settings)


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


def _check_grid(spec: Spec, settings: Settings) -> None:
    radii = spec.certification.settings(settings.client).radii
    if radii is not None and len(radii) > _MOST_RADII:
        raise Rejected(
            f"certification.radii are more than {_MOST_RADII}, which would disclose single images"
        )


def check_network_size(spec: Spec, channels: int, classes: int) -> None:
    """Refuse one of certifl's networks that would not fit into the machine.

    Its shapes are determined without memory. The client's own networks are its own choice.

    Raises:
        Rejected: it is too large, or cannot be built.
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
