"""What an objective is: a frozen record that forms the loss of one batch."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from certifl.errors import InputError
from certifl.federated.training.batches import Augmentation, Batch
from certifl.smoothing.laws import Law


class Objective(Protocol):
    """The loss that a client minimizes, as a frozen record of its hyper-parameters.

    Attributes:
        name: its key in `OBJECTIVES`.
    """

    name: ClassVar[str]

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's mean loss (a scalar with a gradient), and logits (m, classes).

        Perturbations are drawn from the batch only, so that results depend on (seed, client,
        round) only. The model is in training mode before and after. Without a perturbation the
        loss is the plain cross entropy.
        """
        ...


@runtime_checkable
class Smoothing(Augmentation, Protocol):
    """An augmentation with a smoothing distribution, as every family of `perturbations`."""

    @property
    def sigma(self) -> float:
        """Scale of the distribution, in the family's unit."""
        ...

    @property
    def law(self) -> Law:
        """Distribution of the parameters."""
        ...

    @property
    def norm(self) -> str:
        """Norm of the parameters in which radii are measured."""
        ...


def smoothing_of(batch: Batch, objective: str) -> Smoothing | None:
    """The batch's perturbation with its distribution; None if the batch has none.

    Args:
        batch: the batch.
        objective: name for the message.

    Raises:
        InputError: an augmentation that has no sigma, law and norm.
    """
    if batch.augmentation is None or isinstance(batch.augmentation, Smoothing):
        return batch.augmentation
    raise InputError(
        f"The objective {objective!r} needs a perturbation with sigma, law and norm, and "
        f"{type(batch.augmentation).__name__} has only sample and apply: train with a family of "
        'certifl.perturbations, or with the objective "augmented" or "consistency".'
    )


# Several noisy copies of a batch in one forward pass.
#
# Copies are concatenated, so that BatchNorm normalizes all of them with the statistics of the
# noisy mixture, which its running averages estimate, and updates these once a step, as with one
# copy. In separate passes each copy would have statistics of its own, and differences between two
# copies of an image would depend on the other images of the batch.


def single(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of one copy of each image: noisy, or plain without a perturbation."""
    logits = model(batch.draw())
    return functional.cross_entropy(logits, batch.labels), logits


def noisy_copies(batch: Batch, copies: int) -> torch.Tensor:
    """Independent noisy copies (copies * m, c, h, w), copy by copy.

    The first m are those of `batch.draw()`.
    """
    return torch.cat([batch.draw() for _ in range(copies)])


def by_copy(logits: torch.Tensor, copies: int) -> torch.Tensor:
    """Logits (copies * m, classes) as (copies, m, classes)."""
    return logits.reshape(copies, -1, logits.shape[-1])


def log_mean_exp(values: torch.Tensor) -> torch.Tensor:
    """Log mean exp over the first axis; exact for one copy."""
    return values.logsumexp(0) - math.log(len(values))
