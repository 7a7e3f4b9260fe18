"""The mechanism: per-image gradients, clipped and summed, and the noise on a sum.

`Augmented` sees every image of a batch once, so one backward pass of the whole batch gives all
gradients (opacus's hooks). Other objectives may pass several copies of an image through the
network; there every image is a batch of one, which is always correct and slow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from certifl import rng as streams
from certifl.errors import ModelError, first_line
from certifl.federated.objectives import Augmented, Objective
from certifl.federated.privacy.accounting import grad_sample
from certifl.federated.training.batches import Batch
from certifl.federated.training.steps import Outcome
from certifl.models import fingerprint
from certifl.module_copies import copy_of

Gradients = dict[str, torch.Tensor]

_NUMBERS_AT_ONCE = 1 << 26  # of gradients per image, 256 MiB
_TINY = 1e-6  # as in opacus: no division by zero, and a length slightly below the norm


def clipped_sum(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    batch: Batch,
    max_norm: float,
) -> tuple[Gradients, Outcome]:
    """sum_j g_j min(1, C / ||g_j||), g_j the gradient of image j over all parameters together.

    Replacing one image by nothing changes the sum by at most C: a gradient that is not finite
    counts as zero.

    Args:
        model: in training mode; its `.grad` are cleared.
        parameters: the trainable ones, by name.
        objective: the loss of a batch.
        batch: m images, m >= 0.
        max_norm: C; infinity = no clipping.

    Returns:
        The sum by parameter, and how the batch went; a loss that is not finite counts as zero, or
        one image could make the training fail visibly.
    """
    some = next(iter(parameters.values()))
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    loss, correct = some.new_zeros(()), some.new_zeros((), dtype=torch.int64)
    for gradients, outcome in _per_image(model, parameters, objective, batch):
        for name, value in _clipped(gradients, max_norm).items():
            total[name] += value
        loss, correct = loss + outcome.loss, correct + outcome.correct
    return total, Outcome(loss, correct)


def try_clipping(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Take the gradients of two blank images: detects impossible networks before training.

    Args:
        model: not changed.
        image_shape: (c, h, w).

    Raises:
        ModelError: the network cannot be trained with gradients of single images.
    """
    tried = copy_of(model).train()
    parameters = {name: value for name, value in tried.named_parameters() if value.requires_grad}
    device = next(iter(parameters.values())).device
    images = torch.zeros(2, *image_shape, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    batch = Batch(images, labels, None, torch.Generator(device=device))
    with torch.random.fork_rng(devices=[]):  # dropout draws
        clipped_sum(tried, parameters, Augmented(), batch, max_norm=1.0)


@torch.no_grad()
def _clipped(gradients: Gradients, max_norm: float) -> Gradients:
    lengths = [value.flatten(1).norm(dim=1) for value in gradients.values()]
    length = torch.stack(lengths, 1).norm(dim=1)
    factor = (max_norm / (length + _TINY)).clamp(max=1.0)
    finite = length.isfinite()
    return {
        name: torch.einsum("m,m...->...", factor[finite], value[finite])
        for name, value in gradients.items()
    }


def _per_image(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    batch: Batch,
) -> Iterator[tuple[Gradients, Outcome]]:
    """Gradients (m', ...) of as many images at a time as memory allows."""
    numbers = sum(parameter.numel() for parameter in parameters.values())
    together = isinstance(objective, Augmented)
    size = max(1, _NUMBERS_AT_ONCE // numbers) if together else 1
    for start in range(0, len(batch), size):
        part = replace(
            batch,
            images=batch.images[start : start + size],
            labels=batch.labels[start : start + size],
        )
        work = _of_batch if together else _of_one
        yield work(model, parameters, objective, part)


def _of_batch(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, batch: Batch
) -> tuple[Gradients, Outcome]:
    hooks = grad_sample().GradSampleHooks(model)
    # Hooks on modules whose input needs no gradient make torch warn.
    # The clone is for networks that write into their input, which they may not with a leaf.
    handle = model.register_forward_pre_hook(lambda _, inputs: inputs[0].requires_grad_().clone())
    try:
        loss, logits = objective(model, batch)
        loss.backward()
        per_parameter = {n: getattr(p, "grad_sample", None) for n, p in parameters.items()}
        gradients = {name: value for name, value in per_parameter.items() if value is not None}
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise ModelError(
            'privacy.kind = "example" needs the output of each layer as it was, and the network '
            f"overwrites one ({first_line(error)}). Leave operations such as x += y, "
            "x.relu_() and inplace=True out of its forward."
        ) from error
    finally:
        handle.remove()
        hooks.cleanup()
        for parameter in parameters.values():
            parameter.grad = None
    return gradients, _outcome(loss, logits, batch)


def _of_one(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, batch: Batch
) -> tuple[Gradients, Outcome]:
    loss, logits = objective(model, batch)
    per_parameter = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {
        name: value[None]
        for name, value in zip(parameters, per_parameter, strict=True)
        if value is not None
    }
    return gradients, _outcome(loss, logits, batch)


def _outcome(loss: torch.Tensor, logits: torch.Tensor, batch: Batch) -> Outcome:
    with torch.no_grad():
        total = loss.detach() * len(batch)
        total = torch.where(total.isfinite(), total, torch.zeros_like(total))
        return Outcome(total, (logits.argmax(1) == batch.labels).sum())


# Noise that repeats with the same sum and is never used for two different ones.
#
# A resumed training must repeat an interrupted one bit for bit, so the noise cannot be drawn
# anew. But the same noise on two different sums would cancel in their difference and expose the
# images. Noise is therefore a function of (secret key, names, THE SUM ITSELF): a repeated step
# releases the same bits again and discloses nothing new; any other sum, after a failure or with
# another learning rate, gets its own noise. This is the idea of deterministic nonces in signatures
# (RFC 6979).


_KEY_BYTES = 32


def derived_key(secret: bytes, *names: int | str) -> bytes:
    """A key for one purpose from a secret; it discloses nothing about other keys."""
    text = "\x1f".join(map(str, names)).encode()
    shortened = hashlib.blake2b(secret, digest_size=_KEY_BYTES).digest()
    return hashlib.blake2b(text, key=shortened, digest_size=_KEY_BYTES).digest()


def add_noise(
    sums: Mapping[str, torch.Tensor], std: float, key: bytes, *names: int | str
) -> dict[str, torch.Tensor]:
    """The sums with independent Gaussian noise on every coordinate.

    Args:
        sums: by name, any floating dtype and device; they are not changed.
        std: standard deviation of the noise; 0 = none.
        key: with it the noise can be removed.
        names: of the release; the noise depends on them and on the bytes of the sums.
    """
    if std == 0:
        return dict(sums)
    drawn = streams.secret_generator(key, "privacy noise", *names, fingerprint(sums))
    noisy = {}
    for name in sorted(sums):
        noise = torch.from_numpy(drawn.standard_normal(tuple(sums[name].shape))).mul_(std)
        noisy[name] = sums[name] + noise.to(sums[name])
    return noisy
