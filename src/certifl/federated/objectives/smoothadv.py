"""SmoothAdv: adversarial training of the smoothed classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from certifl.errors import InputError
from certifl.federated.batches import Batch
from certifl.federated.objectives import OBJECTIVES
from certifl.federated.objectives.base import by_copy, log_mean_exp, single, smoothing_of


@dataclass(frozen=True)
class SmoothAdv:
    """Cross entropy on m noisy copies, with the noise's center moved by an attack.

    With F the softmax output and eps_1 ... eps_m drawn once for attack and training,

      delta = argmax over ||delta||_2 <= epsilon sigma of -log 1/m sum_i F(T_{delta + eps_i}(x))_y,
      L = 1/m sum_i CE(F(T_{delta + eps_i}(x)), y),

    the first by steps of projected gradient ascent from delta = 0, each of length
    2 epsilon sigma / steps along the gradient's direction. L has no gradient through delta.

    What is attacked is what a certificate of the family covers:

    - pixel noise: the image. T_{delta + eps}(x) = (x + delta) + eps, so delta is the l2 attack of
      the source. With `exact` noise the derivative is taken straight through the rounding. The
      ball is not cut to intensities in [0, 1]: certificates do not assume that either.
    - deformations: the PARAMETERS, not the image; the gradient flows through the sampler. For one
      parameter (rotation, scaling) the ball is an interval and a step is a sign.

    Attack steps run in evaluation mode: they use BatchNorm's running averages, which the voting
    network also uses, do not update them, and apply no dropout. Training copies are
    concatenated in training mode as everywhere. The source raises epsilon over the first epochs;
    here it is constant, because a client does not know how far the whole training is.

    One copy and epsilon = 0 is `Augmented`, bit for bit.

    Attributes:
        copies: m, noisy copies of each image.
        epsilon: radius of the ball in multiples of sigma, so that one value serves every family.
        steps: of the ascent. A step of training takes about copies (1 + steps) times the time.

    Source: Salman et al., Provably Robust Deep Learning via Adversarially Trained Smoothed
    Classifiers, 2019, objective (S) in section 2.2. Parameter space: our reading of (S) for the
    paper's Eq. (3).
    """

    copies: int = 2
    epsilon: float = 1.0
    steps: int = 2

    name: ClassVar[str] = "smoothadv"

    def __post_init__(self) -> None:
        OBJECTIVES.check_component(self)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss above as a mean over the batch; logits of the first attacked copy.

        InputError without sigma and norm, in an l1 ball of several dimensions, or without a
        derivative in the parameters.
        """
        if batch.augmentation is None:
            return single(model, batch)
        draws = drawn_params(batch, self.copies)
        if self.epsilon > 0:
            draws = draws + self.attack(model, batch, draws)
        copies = _repeated(batch, self.copies)
        with torch.no_grad():
            images = copies.applied(draws.flatten(0, 1))
        logits = model(images)
        loss = functional.cross_entropy(logits, copies.labels)
        return loss, by_copy(logits, self.copies)[0]

    def attack(self, model: nn.Module, batch: Batch, draws: torch.Tensor) -> torch.Tensor:
        """The delta (m, *params_shape) of the ascent from draws (copies, m, *params_shape)."""
        reach = self.epsilon * _scale(batch, draws)
        step, copies = 2 * reach / self.steps, _repeated(batch, len(draws))
        delta = torch.zeros_like(draws[0])
        # Certificates of a one-sided law cover no parameter below 0.
        one_sided = getattr(getattr(batch.augmentation, "law", None), "one_sided", False)
        with _evaluating(model):
            for _ in range(self.steps):
                delta.requires_grad_()
                log_votes = by_copy(
                    model(_moved(copies, draws, delta)).log_softmax(-1), len(draws)
                )
                loss = functional.nll_loss(log_mean_exp(log_votes), batch.labels, reduction="sum")
                (uphill,) = torch.autograd.grad(loss, delta)
                delta = delta.detach() + step * (uphill / _lengths(uphill))
                delta = delta * (reach / _lengths(delta)).clamp(max=1.0)
                delta = delta.clamp(min=0.0) if one_sided else delta
        return delta


def drawn_params(batch: Batch, copies: int) -> torch.Tensor:
    """Independent draws (copies, m, *params_shape); the first is that of `batch.params()`."""
    draws = (batch.params() for _ in range(copies))
    return torch.stack([params for params in draws if params is not None])


def _repeated(batch: Batch, copies: int) -> Batch:
    images, labels = batch.images.repeat(copies, 1, 1, 1), batch.labels.repeat(copies)
    return replace(batch, images=images, labels=labels)


def _moved(copies: Batch, draws: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """T_{delta + eps} of every copy, with a gradient in delta."""
    images = copies.applied((draws + delta).flatten(0, 1))
    if getattr(copies.augmentation, "additive", False):
        # The noisy image moves one to one with delta. Rounding (`exact`) has no derivative.
        spread = delta.expand_as(draws).flatten(0, 1)
        images = images.detach() + (spread - spread.detach())
    if not images.requires_grad:
        raise InputError(
            f"The objective 'smoothadv' needs the gradient of "
            f"{type(copies.augmentation).__name__}.apply in the parameters, which it does not "
            "give: compute the images from them with torch operations, or choose another one."
        )
    return images


def _scale(batch: Batch, draws: torch.Tensor) -> float:
    """sigma, where the ball of radii is one that the ascent can project on."""
    smoothing = smoothing_of(batch, SmoothAdv.name)
    if smoothing is None:
        return 0.0
    if smoothing.norm != "l2" and draws[0, 0].numel() > 1:
        raise InputError(
            f"The objective 'smoothadv' attacks in l2, and radii of "
            f"{type(batch.augmentation).__name__} are in {smoothing.norm} over "
            f"{draws[0, 0].numel()} parameters: choose another objective."
        )
    return smoothing.sigma


def _lengths(values: torch.Tensor) -> torch.Tensor:
    """l2 length of each image's parameters, kept above 0, shaped to divide by."""
    lengths = values.flatten(1).norm(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    return lengths.view(-1, *(1 for _ in values.shape[1:]))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
