"""The study at four sizes: what a figure's settings and regimes are as specs.

smoke: the whole chain in seconds, numbers without meaning. laptop: two cores, the structure of the
study with a small network and few images, for trying out. overnight: two cores for a night or two,
images and rounds enough to decide claims. paper: the study's own numbers. docs/figures.md explains
the choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from certifl.errors import InputError
from certifl.paper.figures import Regime, Setting
from certifl.spec import Spec, with_settings

AFFINE: Mapping[str, Any] = {"family": "affine", "sigma": 0.1}


@dataclass(frozen=True)
class Material:
    """The stand-in for one data set of the study.

    Attributes:
        name: as a spec names it.
        train_images: over all clients, whatever their number; None = all.
        n: votes that estimate.
        images: certified test images of a client, by the study's number of clients.
        n_of: instead of `n`, by family of the certified perturbation.
    """

    name: str
    train_images: int | None
    n: int
    images: Mapping[int, int]
    n_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """The study at one size.

    Attributes:
        name: for the command line. words: its purpose.
        model: the network. data: stand-ins for "cifar10" and "mnist".
        clients: number of clients by the study's number of clients.
        training, certification: sections of the spec, without perturbation, images and n.
        finetuning: epochs and learning rate of personalization.
        jobs: parallel runs on a CPU by default, a core each.
        settings: `key=value`, applied to every spec last.
    """

    name: str
    words: str
    model: str
    data: Mapping[str, Material]
    clients: Mapping[int, int]
    training: Mapping[str, Any]
    finetuning: Mapping[str, Any]
    certification: Mapping[str, Any]
    jobs: int = 1
    settings: tuple[str, ...] = ()

    def spec(self, setting: Setting, regime: Regime) -> Spec:
        """One curve as a spec; equal curves of two figures are equal specs."""
        material, clients = self.data[setting.data], self.clients[setting.clients]
        data: dict[str, Any] = {"name": material.name}
        if material.train_images is not None:
            data["train_images"] = material.train_images
        algorithm: dict[str, Any] = {"name": regime.algorithm}
        if regime.algorithm == "personalized":
            algorithm |= {"base": {"name": "fedavg"}, **self.finetuning}
        if regime.algorithm == "mixture":
            algorithm["personalization"] = regime.personalization
        training = dict(self.training)
        if regime.matched_steps and regime.personalization:
            training["lr"] /= regime.personalization
        return with_settings(
            {
                "name": self._name(setting, regime),
                "data": data,
                "clients": {"count": clients},
                "model": {"name": self.model},
                "algorithm": algorithm,
                "training": training,
                "augmentation": _augmentation(setting, regime),
                "certification": {
                    **self.certification,
                    "perturbation": setting.perturbation,
                    "images": material.images[setting.clients],
                    "n": material.n_of.get(setting.family, material.n),
                },
            },
            self.settings,
        )

    def _name(self, setting: Setting, regime: Regime) -> str:
        where = f"{self.data[setting.data].name}, {self.clients[setting.clients]} clients"
        steps = ", step / lambda" if regime.matched_steps else ""
        value = "" if regime.personalization is None else f" {regime.personalization}"
        how = f"{regime.algorithm}{value if regime.algorithm == 'mixture' else ''}{steps}"
        training = "" if regime.trained == "matching" else f", {regime.trained} training"
        return f"{where}, {setting.family} {setting.sigma}: {how}{training}"


def _augmentation(setting: Setting, regime: Regime) -> dict[str, Any]:
    choices = {"matching": setting.perturbation, "nominal": "none", "affine": dict(AFFINE)}
    federated = choices[regime.trained]
    if regime.algorithm == "personalized" and regime.trained != "matching":
        return {"federated": federated, "personalized": setting.perturbation}
    return {"federated": federated}


_PAPER_CLIENTS = {4: 4, 10: 10, 20: 20, 100: 100}

SMOKE = Scale(
    name="smoke",
    words="the whole chain in seconds, on handwritten digits; the numbers mean nothing",
    model="small_cnn",
    data=dict.fromkeys(
        ("cifar10", "mnist"), Material("digits", 240, 200, {4: 6, 10: 5, 20: 4, 100: 3})
    ),
    clients={4: 2, 10: 3, 20: 4, 100: 5},
    training={"rounds": 2, "local_epochs": 3, "batch_size": 8, "lr": 0.05, "decay_every": 0},
    finetuning={"epochs": 1, "lr": 0.01},
    certification={"estimator": "sequential", "n0": 10, "alpha": 0.01},
)

LAPTOP = Scale(
    name="laptop",
    words="two cores without a GPU: a small network, few images per client on purpose",
    model="small_cnn",
    data={
        "cifar10": Material("cifar10", 1500, 2000, {4: 40, 10: 20, 20: 10, 100: 3}),
        "mnist": Material("mnist", 500, 1000, {10: 15}),
    },
    clients=_PAPER_CLIENTS,
    training={
        "rounds": 20,
        "local_epochs": 2,
        "batch_size": 16,
        "lr": 0.05,
        "decay_every": 14,
        "decay_factor": 0.3,
    },
    finetuning={"epochs": 5, "lr": 0.01},
    certification={"estimator": "sequential", "n0": 100, "alpha": 0.001},
    jobs=4,
)

# Votes of Gaussian noise: the largest radius is 2.8 sigma; rotation's is 0.99 sigma with 2 000.
_MORE_VOTES = {"pixel": 3000, "translation": 3000}
VOTING = "int8"  # arithmetic of the votes at overnight scale

OVERNIGHT = Scale(
    name="overnight",
    words="two cores without a GPU, a night or two: enough images and rounds to decide claims",
    model="small_resnet",
    data={
        "cifar10": Material(
            "cifar10", 10_000, 2000, {4: 1000, 10: 400, 20: 200, 100: 20}, _MORE_VOTES
        ),
        "mnist": Material("mnist", 3000, 2000, {10: 200}, _MORE_VOTES),
    },
    clients=_PAPER_CLIENTS,
    training={
        "rounds": 48,
        "local_epochs": 2,
        "batch_size": 32,
        "lr": 0.02,
        "momentum": 0.9,
        "decay_every": 32,
        "decay_factor": 0.1,
        "momentum_between_rounds": "keep",
        "precision": "bfloat16",
    },
    finetuning={"epochs": 5, "lr": 0.002},
    certification={
        "estimator": "sequential",
        "n0": 100,
        "alpha": 0.001,
        "keep": "curve",
        "precision": VOTING,
    },
    jobs=2,
)

PAPER = Scale(
    name="paper",
    words="the study's own numbers: ResNet-18, all images, 100 000 votes an image; for GPUs",
    model="resnet18",
    data={
        "cifar10": Material("cifar10", None, 100_000, {4: 500, 10: 500, 20: 500, 100: 500}),
        "mnist": Material("mnist", None, 100_000, {10: 500}),
    },
    clients=_PAPER_CLIENTS,
    training={
        "rounds": 45,
        "local_epochs": 2,
        "batch_size": 64,
        "lr": 0.1,
        "momentum": 0.9,
        "decay_every": 30,
        "decay_factor": 0.1,
        "momentum_between_rounds": "keep",
    },
    finetuning={"epochs": 5, "lr": 0.01},
    certification={"estimator": "top-class", "n0": 100, "alpha": 0.001},
)

SCALES: Mapping[str, Scale] = {scale.name: scale for scale in (SMOKE, LAPTOP, OVERNIGHT, PAPER)}


def scale_named(name: str, settings: Sequence[str] = ()) -> Scale:
    """A scale by name, with `key=value` settings for all its specs.

    Raises:
        InputError: there is no such scale.
    """
    if name not in SCALES:
        raise InputError(f"There is no scale {name!r}. Choose one of {', '.join(SCALES)}.")
    return replace(SCALES[name], settings=tuple(settings))


# The quickstart study.

REGIMES: dict[str, dict[str, Any]] = {
    "local": {"name": "local"},
    "fedavg": {"name": "fedavg"},
    "personalized": {"name": "personalized", "base": {"name": "fedavg"}, "epochs": 4, "lr": 0.01},
    "mixture": {"name": "mixture", "personalization": 0.5},
}
"""The paper's four ways of training (3.3), in the order of its legends."""


def quickstart(seed: int = 0) -> dict[str, Spec]:
    """The main job on embedded data: digits, ten clients, rotation, all four regimes.

    Fifty training images per client, few as in the paper. One schedule for all; rotation by up to
    18 degrees (0.1 pi) as in the paper's Figure 1.
    """
    rotation = {"family": "rotation", "sigma": "0.1pi"}
    shared = {
        "seed": seed,
        "data": {"name": "digits", "train_images": 500},
        "clients": {"count": 10},
        "model": {"name": "small_cnn"},
        "training": {
            "rounds": 30,
            "local_epochs": 2,
            "batch_size": 16,
            "lr": 0.05,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "decay_every": 20,
            "decay_factor": 0.3,
        },
        "augmentation": {"federated": rotation},
        "certification": {"perturbation": rotation, "images": 40, "n": 10_000},
    }
    return {
        regime: with_settings({**shared, "name": f"quickstart {regime}", "algorithm": algorithm})
        for regime, algorithm in REGIMES.items()
    }
