"""A study's training: what every client's half is made of, and how its rounds are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from certifl.federated import LocalTraining
from certifl.federated.client import check_batches, check_images
from certifl.federated.engine import Participation, RandomShare
from certifl.federated.privacy.clipping import try_clipping
from certifl.spec import Spec
from certifl.work.private import Protection

__all__ = ["by_client", "check_training", "local_training", "participation"]


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


def participation(spec: Spec, clients: int) -> Participation | None:
    """Which of so many clients take part in a round; None = all, or the privacy's own choice."""
    share, private = spec.clients.participation, spec.privacy.kind == "client"
    return None if share == 1 or private else RandomShare(share, clients, spec.seed)


def by_client(entry: dict[str, Any]) -> dict[str, Any]:
    """A round of the history with its clients under their numbers."""
    rows = {
        str(row["client"]): {k: v for k, v in row.items() if k != "client"}
        for row in entry["clients"]
    }
    return {**entry, "clients": rows}
