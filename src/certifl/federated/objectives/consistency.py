"""Consistency regularisation: the same answer under every noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from certifl.federated.objectives import OBJECTIVES
from certifl.federated.objectives.base import by_copy, log_mean_exp, noisy_copies, single
from certifl.federated.training.batches import Batch


@dataclass(frozen=True)
class Consistency:
    """Cross entropy on m noisy copies, plus a price for copies that disagree.

    With F the softmax output, eps_i the draws and F_hat(x) = 1/m sum_i F(T_{eps_i}(x)),

      L = 1/m sum_i CE(F(T_{eps_i}(x)), y)
          + lambda 1/m sum_i KL(F_hat(x) || F(T_{eps_i}(x))) + eta H(F_hat(x)).

    The entropy H keeps F_hat from becoming consistent by becoming undecided. Gradients flow
    through F_hat too. It asks nothing of the law, so it serves every perturbation.

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
        """The loss above as a mean over the batch; judged by the first copy."""
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
