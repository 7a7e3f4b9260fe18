"""What `certify` refuses before the first vote, because its certificate would not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certifl.certification.certificates import UNLABELLED
from certifl.errors import InputError, ModelError
from certifl.perturbations.base import Perturbation

__all__ = [
    "check_exact",
    "check_images",
    "check_labels",
    "check_model",
    "check_perturbation",
    "check_seed",
    "probe_classes",
]

Model = Callable[[Tensor], Tensor]
_PROBE = 6
_ARRAYS = (Tensor, np.ndarray, tuple, list, str)
_CHANNELS = (1, 3, 4)
_HIDDEN = (
    " A label of -1 usually marks an image whose label is not known: certify such images apart, "
    "without labels."
)
_OVERSHOOT = 0.25  # how far resampling may leave [0, 1]; normalized images leave it farther


def check_images(images: Tensor | np.ndarray) -> Tensor:
    """Images as a float32 tensor (m, c, h, w) with values in [0, 1].

    Raises:
        InputError: no array, wrong rank, no images, NaN, values outside [0, 1], or integers.
    """
    _refuse_pairs(images)
    values = _tensor("images", images)
    if values.ndim != 4:
        raise InputError(
            f"images must have four axes (images, channels, height, width); got shape "
            f"{tuple(values.shape)}. One image x is images=x.unsqueeze(0); labels are given as "
            "labels=."
        )
    _refuse_channels_last(tuple(values.shape))
    if values.shape[0] == 0 or 0 in values.shape:
        raise InputError(f"There is nothing to certify: images has shape {tuple(values.shape)}.")
    if not values.is_floating_point():
        raise InputError(
            f"images must be floating point in [0, 1]; got {values.dtype}. "
            "Divide 8-bit images by 255 first."
        )
    values = values.detach().to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InputError("images holds NaN or infinity; a certificate needs a definite image.")
    low, high = float(values.min()), float(values.max())
    if low < 0.0 or high > 1.0:
        raise InputError(
            f"images must lie in [0, 1], found {low:.9g} to {high:.9g}: sigma and radius are in "
            f"units of that range. {_into_range(low, high)}"
        )
    return values


def _into_range(low: float, high: float) -> str:
    if low >= -_OVERSHOOT and high <= 1.0 + _OVERSHOOT:
        return (
            "Rounding and bicubic resampling leave it by a little: give images.clamp(0, 1). If "
            "the images are normalized, put normalization inside the model instead."
        )
    return "Put normalisation inside the model."


def _refuse_pairs(images: Any) -> None:
    """Refuse what loaders of (images, labels) give, and say how to give each alone."""
    if isinstance(images, Mapping):
        key = next((name for name in ("image", "img", "pixel_values") if name in images), "image")
        raise InputError(
            "images must be a tensor or an array; got a dictionary of "
            f"{', '.join(map(str, images))}. Give its images alone: (b[{key!r}] for b in loader), "
            "and the labels likewise as labels=, from a loader that does not shuffle."
        )
    parts = images if isinstance(images, (tuple, list)) else ()
    shapes = [np.shape(part) for part in parts if isinstance(part, (Tensor, np.ndarray))]
    if shapes and (len(shapes) < len(parts) or len(set(shapes)) > 1):
        raise InputError(
            "images must be a tensor or an array; got a pair or a longer tuple, such as a loader "
            "of (images, labels) gives. Give images=(x for x, _ in loader) and labels=(y for _, y "
            "in loader), from a loader that does not shuffle; where a function takes one tensor, "
            "torch.cat makes it of blocks."
        )
    if shapes:
        raise InputError(
            f"images must be one tensor or array; got a {type(images).__name__} of {len(shapes)}. "
            "torch.stack makes one tensor of single images, torch.cat of blocks."
        )
    is_array = isinstance(images, _ARRAYS) or hasattr(images, "__array__")
    if isinstance(images, Iterable) and not is_array:
        raise InputError(
            f"images must be one tensor or array here; got {type(images).__name__}. torch.cat "
            "makes one of blocks: torch.cat([x for x, _ in loader])."
        )


def _refuse_channels_last(shape: tuple[int, ...]) -> None:
    if shape[3] in _CHANNELS and shape[1] not in _CHANNELS:
        raise InputError(
            f"images of shape {shape} have their channels last, as in numpy or TensorFlow; here "
            "they come after the first axis, (images, channels, height, width). Give "
            "images.permute(0, 3, 1, 2), or of an array images.transpose(0, 3, 1, 2)."
        )


def check_perturbation(perturbation: Any) -> None:
    """Refuse what is no perturbation: a name, or a family without its sigma.

    Raises:
        InputError: it cannot draw and apply parameters.
    """
    if isinstance(perturbation, type) or not hasattr(perturbation, "sample"):
        raise InputError(
            "perturbation must be an object with its sigma, such as "
            f'certifl.Rotation(sigma="18deg"); got {perturbation!r}.'
        )


def check_seed(seed: Any) -> None:
    """Refuse a seed that is no whole number from 0, before it is silently cut to one.

    Raises:
        InputError: it is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed must be a whole number from 0; got {seed!r}.")


def check_exact(images: Tensor, perturbation: Perturbation) -> None:
    """With `PixelNoise(exact=True)`, images must be 8-bit: whole multiples of 1/255.

    Raises:
        InputError: some intensity is no multiple of 1/255.
    """
    if getattr(perturbation, "exact", False):
        levels = images.double() * 255
        if float((levels - levels.round()).abs().max()) > 1e-3:
            raise InputError(
                "PixelNoise(exact=True) certifies 8-bit images, and these have intensities "
                "between the 256 levels. Round them to multiples of 1/255, or use exact=False."
            )


def check_labels(
    labels: Tensor | np.ndarray | None, images: int, classes: int
) -> np.ndarray | None:
    """Labels as (m,) int64, or None.

    Raises:
        InputError: not one whole number in [0, classes) per image.
    """
    if labels is None:
        return None
    _refuse_blocks_of_labels(labels)
    values = _tensor("labels", labels).detach().cpu().numpy()
    if values.shape != (images,):
        raise InputError(
            f"labels must have one number per image, ({images},); got {values.shape}."
            f"{_as_numbers(values.shape, images)}"
        )
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"labels must be whole numbers; got {values.dtype}. Numbers of classes that are "
            "stored otherwise become whole with labels.long(), or of an array labels.astype(int)."
        )
    if values.min() < 0 or values.max() >= classes:
        raise InputError(
            f"labels must lie in 0 to {classes - 1}, the classes of the model; "
            f"found {values.min()} to {values.max()}."
            f"{_HIDDEN if values.min() == UNLABELLED else ''}"
        )
    return values.astype(np.int64)


def _refuse_blocks_of_labels(labels: Any) -> None:
    parts = labels if isinstance(labels, (tuple, list)) else ()
    arrays = [part for part in parts if isinstance(part, (Tensor, np.ndarray)) and part.ndim]
    if arrays or isinstance(labels, Iterator):
        raise InputError(
            "labels of one tensor of images must be one tensor or array, too; got a "
            f"{type(labels).__name__} of blocks. torch.cat makes one of them."
        )
    is_text = isinstance(labels, np.ndarray) and labels.dtype.kind in "USO"
    if is_text or any(isinstance(part, str) for part in parts):
        raise InputError(
            "labels must be a tensor or an array of numbers of classes; got texts or objects. "
            "Give [names.index(y) for y in labels], with the names in the order of the model's "
            "outputs."
        )


def _as_numbers(shape: tuple[int, ...], images: int) -> str:
    """What to do with labels that are a matrix."""
    if len(shape) != 2 or shape[0] != images:
        return ""
    if shape[1] == 1:
        return " A column of numbers becomes that with labels[:, 0]."
    return " One-hot rows become numbers with labels.argmax(1)."


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} must be a tensor or an array of numbers; got {type(values).__name__} "
            f"({str(error).splitlines()[0]})."
        ) from error


def check_model(model: Model) -> None:
    """Refuse a model whose vote on one noisy image would depend on the others in its batch.

    Raises:
        ModelError: a module in training mode, or normalisation by batch statistics.
    """
    if not callable(model):
        raise ModelError(f"model must be callable on images (m, c, h, w); got {type(model)}.")
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        place = f"module {name!r} ({type(module).__name__})" if name else "the model"
        if module.training:
            raise ModelError(
                f"{place} is in training mode: dropout and batch statistics would make votes "
                "random in a way the certificate does not cover. Call model.eval() first."
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{place} normalises with the statistics of its batch even in evaluation mode, so "
                "the vote of one noisy image would depend on the others. Use "
                "track_running_stats=True, or GroupNorm."
            )


def probe_classes(network: Model, images: Tensor) -> int:
    """Number of classes, after checking that logits are finite, repeatable and row by row.

    A few images go through the network twice, the second time in reversed order and among
    strangers: the logits of an image must be the same up to rounding.

    Raises:
        ModelError: the model fails on these images, its answer is no (m, classes) matrix of finite
            logits, differs between two calls, or depends on the rest of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    strangers = torch.rand((_PROBE, *images.shape[1:]), generator=generator).to(images.device)
    probe = torch.cat([images[:1], strangers[1:]])
    logits = _logits(network, probe)
    repeated = _logits(network, probe)
    if float((logits.float() - repeated.float()).abs().max()) > 1e-5 * (
        1 + float(logits.abs().max())
    ):
        raise ModelError(
            "The model answers differently when asked twice about the same images: something in "
            "it is random. The only noise may be the perturbation that is certified."
        )
    again = _logits(network, torch.cat([strangers.flip(0), probe.flip(0)]))[_PROBE:].flip(0)
    scale = float(logits.abs().max()) + 1.0
    tolerance = (0.05 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3) * scale
    if float((logits.float() - again.float()).abs().max()) > tolerance:
        raise ModelError(
            "The model answers differently when the same images lie in another batch, as if it "
            "normalised over the batch; a certificate needs a function of one image."
        )
    return int(logits.shape[1])


def _logits(network: Model, batch: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            logits = network(batch)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the model's own code: anything may be raised
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"The model fails on images {tuple(batch.shape)}, {batch.dtype} on {batch.device}: "
            f"{type(error).__name__}: {first}. Give images of the size and channels it was made "
            "for, and leave them and the model on one device."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch.shape[0]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"The model must map images {tuple(batch.shape)} to logits ({batch.shape[0]}, "
            f"classes); got {found}."
        )
    if logits.shape[1] < 2:
        raise ModelError("The model answers with one class only: there is nothing to certify.")
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("The model answers with NaN or infinite logits on images in [0, 1].")
    return logits
