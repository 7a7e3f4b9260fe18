"""Stability training: learn from the clean image, answer alike on the noisy one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from certifl.federated.objectives import OBJECTIVES
from certifl.federated.objectives.base import by_copy
from certifl.federated.training.batches import Batch


@dataclass(frozen=True)
class Stability:
    """Cross entropy on the clean image, plus that of the noisy answer against the clean one.

    With F the softmax output and one draw eps,

      L = CE(F(x), y) - lambda sum_c F(x)_c log F(T_eps(x))_c.

    Gradients flow through both factors. Labels are only learned on clean images. weight = 0 is
    nominal training (`Augmented` without a perturbation), bit for bit. It asks nothing of the law.

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
        """The loss above as a mean over the batch; judged by the clean images."""
        if batch.augmentation is None or self.weight == 0:
            logits = model(batch.images.clone())  # the network may write into it
            return functional.cross_entropy(logits, batch.labels), logits
        both = model(torch.cat([batch.images, batch.draw()]))
        clean, noisy = by_copy(both, 2)
        answers = clean.softmax(-1)
        distance = -(answers * noisy.log_softmax(-1)).sum(-1).mean()
        return functional.cross_entropy(clean, batch.labels) + self.weight * distance, clean


# The paper's objective: cross entropy on one perturbed copy of every image.


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
        logits = model(batch.draw())
        return functional.cross_entropy(logits, batch.labels), logits
