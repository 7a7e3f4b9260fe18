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
        """The batch's mean loss (a scalar with a gradient) and logits (m, classes) to judge by.

        Parameters of the perturbation are drawn from the batch alone, so that results depend on
        (seed, client, round) and nothing else. The model is in training mode when called and when
        left. Where the batch has no perturbation, the loss is plain cross entropy.
        """
        ...


@runtime_checkable
class Smoothing(Augmentation, Protocol):
    """An augmentation that says how it smooths, as every family of `perturbations` does."""

    @property
    def sigma(self) -> float:
        """Scale of the law, in the family's unit."""
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
    """The batch's perturbation with its law; None where the batch has no perturbation.

    Args:
        batch: the batch.
        objective: who asks, for the message.

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
# Copies are concatenated, not passed one after the other. BatchNorm then normalizes all of them
# with
# the same statistics, those of the whole noisy mixture that its running averages estimate, and
# updates these once a step, as with one copy. Passed apart, each copy would be normalized by its
# own statistics, and differences between two copies of an image would measure which images share a
# batch as well as the noise.


def single(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of one copy of each image: noisy, or plain without a perturbation."""
    logits = model(batch.draw())
    return functional.cross_entropy(logits, batch.labels), logits


def noisy_copies(batch: Batch, copies: int) -> torch.Tensor:
    """Independent noisy copies (copies * m, c, h, w): all images once, then all once more.

    The first m are those that `batch.draw()` would have given.
    """
    return torch.cat([batch.draw() for _ in range(copies)])


def by_copy(logits: torch.Tensor, copies: int) -> torch.Tensor:
    """Logits (copies * m, classes) as (copies, m, classes)."""
    return logits.reshape(copies, -1, logits.shape[-1])


def log_mean_exp(values: torch.Tensor) -> torch.Tensor:
    """Log of the mean of exp over the first axis; of one copy, that copy bit for bit."""
    return values.logsumexp(0) - math.log(len(values))
