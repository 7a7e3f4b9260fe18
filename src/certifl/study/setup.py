"""What a study trains with: labels of algorithms, participation, local training, its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.objectives import OBJECTIVES
from certifl.federated.privacy.mechanisms import try_clipping
from certifl.federated.trainer import Participation, RandomShare
from certifl.federated.training.batches import PerClient, combine_augmentations
from certifl.federated.training.local_training import LocalTraining, check_batches, check_images
from certifl.perturbations import Perturbation
from certifl.spec import Spec
from certifl.study.privacy import Protection, private_label


def label_of(spec: Spec) -> str:
    """The regime's name for people, with what sets it apart from others of its kind.

    That is lambda, the objective where it is not the paper's, privacy, and what augmented training
    where it is not the perturbation certified: "Mixture, λ = 0.1, MACER", "FedAvg (nominal)",
    "Personalized (affine start)".
    """
    if spec.training.rounds == 0:
        return "Given weights"
    algorithm, certified = spec.algorithm, combine_augmentations(spec.perturbations())
    name = ALGORITHMS.rows[algorithm["name"]].label
    base = algorithm.get("base", {"name": "fedavg"})["name"]
    if base != "fedavg":
        name = f"{name} {ALGORITHMS.rows[base].label}"
    if "personalization" in algorithm:
        name = f"{name}, λ = {algorithm['personalization']:g}"
    if "mu" in algorithm:
        name = f"{name}, μ = {algorithm['mu']:g}"
    if spec.objective["name"] != "augmented":
        name = f"{name}, {OBJECTIVES.rows[spec.objective['name']].label}"
    name = ", ".join([name, *_conditions(spec)])
    if spec.privacy.kind != "none":
        name = f"{name}, {private_label(spec)}"
    trained, tuned = spec.augmentations()
    if trained == certified:
        return name
    if trained is None or isinstance(trained, PerClient):
        word = "nominal"
    else:
        alone = None if isinstance(certified, PerClient) else certified
        same = alone is not None and alone.family == trained.family
        word = f"trained with σ = {_sigma(trained)}" if same else trained.family
    return f"{name} ({word} start)" if tuned != trained else f"{name} ({word})"


def _sigma(perturbation: Perturbation) -> str:
    if perturbation.unit == "radians":
        return f"{math.degrees(perturbation.sigma):.3g}°"
    return f"{perturbation.sigma:.3g}"


def _conditions(spec: Spec) -> list[str]:
    """Robust aggregation and partial participation, where they are asked for."""
    rule, clip, share = spec.aggregation.rule, spec.aggregation.clip, spec.clients.participation
    words = [] if rule == "mean" else [rule.replace("-", " ")]
    if clip is not None:
        words.append(f"clipped at {clip:g}")
    return [*words, f"{100 * share:.3g} % a round"] if share < 1 else words


# A study's training: what every client's half is made of, and how its rounds are recorded.


def local_training(
    spec: Spec, model: nn.Module, device: str, private: Protection
) -> LocalTraining:
    """A client's half of a study's training, the same for every client."""
    federated, personal = spec.augmentations()
    return LocalTraining(
        model,
        spec.training.schedule(),
        seed=spec.seed,
        augmentation=federated,
        finetuning_augmentation=personal,
        objective=spec.build_objective(),
        privacy=private.example,
        device=device,
        precision=spec.training.precision,
        memory_format=spec.training.memory_format,
    )


def check_training(
    spec: Spec, model: nn.Module, sizes: Sequence[int], image_shape: tuple[int, int, int]
) -> None:
    """Refuse, before anything is written, a network that these clients cannot train.

    Args:
        spec: of the study.
        model: the network; it stays as it is.
        sizes: number of training images of each client.
        image_shape: (c, h, w).

    Raises:
        ModelError: BatchNorm and a client or batches of one image, or a network that has no
            gradients of single images where privacy needs them.
    """
    check_batches(model, spec.training.batch_size)
    check_images(model, dict(enumerate(sizes)))
    if spec.privacy.kind == "example":
        try_clipping(model, image_shape)


def participation(spec: Spec) -> Participation | None:
    """Which clients take part in a round; None = all, or the privacy's own choice."""
    share, private = spec.clients.participation, spec.privacy.kind == "client"
    if private or (share == 1 and not spec.clients.unseen):
        return None
    return RandomShare(share, spec.clients.seen, spec.seed)


def by_client(entry: dict[str, Any]) -> dict[str, Any]:
    """A round of the history with its clients under their numbers."""
    rows = {
        str(row["client"]): {k: v for k, v in row.items() if k != "client"}
        for row in entry["clients"]
    }
    return {**entry, "clients": rows}
