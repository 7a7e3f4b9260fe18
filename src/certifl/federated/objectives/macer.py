"""MACER: the certified radius in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from certifl.errors import InputError
from certifl.federated.batches import Batch
from certifl.federated.objectives import OBJECTIVES
from certifl.federated.objectives.base import (
    Smoothing,
    by_copy,
    log_mean_exp,
    noisy_copies,
    single,
    smoothing_of,
)


@dataclass(frozen=True)
class Macer:
    """Cross entropy of the soft smoothed classifier, plus a hinge on its certified radius.

    With f the logits, eps_i the draws, z^b_c(x) = 1/k sum_i softmax_c(b f(T_{eps_i}(x))),

      L = -log z^1_y(x) + lambda sigma/2 max(gamma - xi(x, y), 0) 1[argmax_c z^beta_c(x) = y],

    where sigma/2 xi is the certified radius with z^beta in the place of the probabilities:

      Gaussian:  xi = PhiInv(z^beta_y) - PhiInv(max_{c != y} z^beta_c)     (the source)
      uniform:   xi = 2 (z^beta_y - max_{c != y} z^beta_c)                 (ours)
      exponential:  xi = -2 ln(1 - z^beta_y + max_{c != y} z^beta_c)       (ours)

    The uniform radius is sigma (p_A - p_B): the windows [d - sigma, d + sigma] and [-sigma, sigma]
    differ by |d| at either end, so the mean over a window of any function with values in [0, 1]
    moves by at most |d| / (2 sigma), and p_A - p_B by |d| / sigma. That holds for soft votes too.
    Its xi never exceeds 2, so with gamma >= 2 the hinge applies to every correct image.

    Only correct images with xi < gamma are pulled. Close to xi = gamma = 8 the derivative of
    PhiInv is still finite; images beyond are left out before it is taken, so gradients are always
    finite. beta sharpens the soft votes towards the hard ones that a certificate counts.

    One copy and weight = 0 is `Augmented`, bit for bit.

    The source's own values (k = 16, lambda = 12 on CIFAR-10 at sigma 0.25, gamma = 8, beta = 16)
    belong to hundreds of epochs at a learning rate of 0.01. In short trainings at larger rates so
    steep a hinge can undo what the cross entropy learns, hence the milder defaults.

    Attributes:
        copies: k, noisy copies of each image in a step, which takes about k times the time.
        weight: lambda.
        gamma: the margin xi up to which radii are pulled (8: radius 4 sigma).
        beta: inverse temperature of the soft votes.

    Source: Zhai et al., MACER: Attack-free and Scalable Robust Training via Maximizing Certified
    Radius, 2020, Algorithm 1; uniform radius: the paper, Corollary 1, and Yang et al. 2020.
    """

    copies: int = 4
    weight: float = 1.0
    gamma: float = 8.0
    beta: float = 4.0

    name: ClassVar[str] = "macer"

    def __post_init__(self) -> None:
        OBJECTIVES.check_component(self)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss above, logits of the first copy; InputError for laws without a radius."""
        smoothing = smoothing_of(batch, self.name)
        if smoothing is None:
            return single(model, batch)
        each = by_copy(model(noisy_copies(batch, self.copies)), self.copies)
        loss = functional.nll_loss(log_mean_exp(each.log_softmax(-1)), batch.labels)
        if self.weight > 0:
            votes = (self.beta * each).softmax(-1).mean(0)
            loss = loss + self.weight * self._hinge(votes, batch.labels, smoothing)
        return loss, each[0]

    def _hinge(
        self, votes: torch.Tensor, labels: torch.Tensor, smoothing: Smoothing
    ) -> torch.Tensor:
        """sigma/2 max(gamma - xi, 0) on correct images, mean over all of them."""
        others = votes.scatter(1, labels[:, None], 0.0)
        miss, second = others.sum(1), others.amax(1)
        with torch.no_grad():
            margins = soft_margins(miss, second, smoothing)
            pulled = (1 - miss > second) & (margins < self.gamma)
        # Finite values replace the others: a gradient that is not finite, times zero, is not 0.
        miss, second = (torch.where(pulled, value, 0.25) for value in (miss, second))
        short = self.gamma - soft_margins(miss, second, smoothing)
        return 0.5 * smoothing.sigma * torch.where(pulled, short, 0.0).mean()


def soft_margins(miss: torch.Tensor, second: torch.Tensor, smoothing: Smoothing) -> torch.Tensor:
    """The margin xi = 2 radius / sigma from soft votes; InputError for laws without a radius.

    Args:
        miss: (m,) soft votes of all classes but the label, together; taken instead of the label's
            own because near 1 a float has no digits left.
        second: (m,) largest of them. smoothing: its distribution decides the formula.
    """
    margin = _MARGINS.get(smoothing.law.name)
    if margin is None:
        raise InputError(
            f"The objective 'macer' has no radius for the distribution {smoothing.law.name!r}: "
            f"it must be one of {', '.join(_MARGINS)}."
        )
    return margin(miss, second)


_MARGINS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gaussian": lambda miss, second: -torch.special.ndtri(miss) - torch.special.ndtri(second),
    "uniform": lambda miss, second: 2 * ((1 - miss) - second),
    "exponential": lambda miss, second: -2 * (miss + second).log(),
}
