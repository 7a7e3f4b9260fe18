"""What an objective is; augmentation, stability training and consistency regularization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from certifl.errors import InputError
from certifl.federated.batches import Augmentation, Batch
from certifl.federated.objectives import OBJECTIVES
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
    """The batch's perturbation, or None; InputError where it has no sigma, law and norm."""
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


@dataclass(frozen=True)
class Augmented:
    """The one-sample estimate of Eq. (3): E_eps[CE(f(T_eps(x)), y)] one eps an image.

    Without a perturbation this is the plain cross entropy, the paper's nominal training.

    Source: the paper, Eq. (3); Cohen et al., Certified Adversarial Robustness via Randomized
    Smoothing, 2019.
    """

    name: ClassVar[str] = "augmented"

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of one noisy copy of each image."""
        return single(model, batch)


@dataclass(frozen=True)
class Stability:
    """Cross entropy on the clean image, plus that between noisy and clean predictions.

    With F the softmax output and one draw eps,

      L = CE(F(x), y) - lambda sum_c F(x)_c log F(T_eps(x))_c.

    Gradients flow through both factors. Labels are used on clean images only. weight = 0 is
    nominal training (`Augmented` without a perturbation), bit for bit. Any distribution will do.

    Attributes:
        weight: lambda; 2 is usual for sigma up to 0.5.

    Source: Li, Chen, Wang and Carin, Certified Adversarial Robustness with Additive Noise, 2019,
    section on stability training.
    """

    weight: float = 2.0

    name: ClassVar[str] = "stability"

    def __post_init__(self) -> None:
        OBJECTIVES.check_component(self)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss above as a mean over the batch; logits of the clean images."""
        if batch.augmentation is None or self.weight == 0:
            logits = model(batch.images.clone())  # the network may modify it in place
            return functional.cross_entropy(logits, batch.labels), logits
        both = model(torch.cat([batch.images, batch.draw()]))
        clean, noisy = by_copy(both, 2)
        target = clean.softmax(-1)
        distance = -(target * noisy.log_softmax(-1)).sum(-1).mean()
        return functional.cross_entropy(clean, batch.labels) + self.weight * distance, clean


@dataclass(frozen=True)
class Consistency:
    """Cross entropy on m noisy copies, plus a penalty where they disagree.

    With F the softmax output, eps_i the draws and F_hat(x) = 1/m sum_i F(T_{eps_i}(x)),

      L = 1/m sum_i CE(F(T_{eps_i}(x)), y)
          + lambda 1/m sum_i KL(F_hat(x) || F(T_{eps_i}(x))) + eta H(F_hat(x)).

    The entropy H keeps F_hat from becoming consistent by becoming uncertain. Gradients flow
    through F_hat too. It works with every perturbation.

    One copy and no entropy is `Augmented`, bit for bit: the divergence is then zero.

    Attributes:
        copies: m, noisy copies of each image in a step.
        weight: lambda; 10 on CIFAR-10 and 5 to 20 on MNIST in the source.
        entropy: eta; 0.5 in the source.

    Source: Jeong and Shin, Consistency Regularization for Certified Robustness of Smoothed
    Classifiers, 2020, section 3, loss L^con. (The experiments of its first version took the
    softmax of F_hat instead of F_hat inside H; this is the formula as printed.)
    """

    copies: int = 2
    weight: float = 10.0
    entropy: float = 0.5

    name: ClassVar[str] = "consistency"

    def __post_init__(self) -> None:
        OBJECTIVES.check_component(self)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss above as a mean over the batch; logits of the first copy."""
        if batch.augmentation is None:
            return single(model, batch)
        logits = model(noisy_copies(batch, self.copies))
        loss = functional.cross_entropy(logits, batch.labels.repeat(self.copies))
        each = by_copy(logits, self.copies)
        if (self.weight > 0 and self.copies > 1) or self.entropy > 0:
            loss = loss + self._regularizer(each.log_softmax(-1))
        return loss, each[0]

    def _regularizer(self, log_each: torch.Tensor) -> torch.Tensor:
        """The sum lambda KL + eta H from log-probabilities (copies, m, classes), mean over images.

        mean_i KL(F_hat || F_i) = sum_c F_hat (log F_hat - mean_i log F_i).
        """
        log_mean = log_mean_exp(log_each)
        mean = log_mean.exp()
        divergence = (mean * (log_mean - log_each.mean(0))).sum(-1)
        entropy = -(mean * log_mean).sum(-1)
        return (self.weight * divergence + self.entropy * entropy).mean()
