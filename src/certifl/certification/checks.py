"""What `certify` refuses before the first vote, because its certificate would not hold."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from certifl.certification.certificates import UNLABELED
from certifl.errors import InputError, ModelError, first_line
from certifl.module_copies import LAZY, answer_in_words, any_lazy, in_training_mode
from certifl.perturbations.base import Perturbation
from certifl.torch_env import out_of_memory

Model = Callable[[Tensor], Tensor]
_PROBE = 6
_ARRAYS = (Tensor, np.ndarray, tuple, list, str)
_CHANNELS = (1, 3, 4)
_HIDDEN = (
    " A label of -1 usually marks an image whose label is not known: certify such images apart, "
    "without labels."
)
_OVERSHOOT = 0.25  # how far resampling may leave [0, 1]; normalized images leave it farther
# A state that moves a little at every call has moved this many times as far after some votes.
_FAR = 1e4


def check_images(images: Tensor | np.ndarray) -> Tensor:
    """Images as float32 (m, c, h, w) in [0, 1]; InputError for any others."""
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
        raise InputError("images contains NaN or infinity, for which nothing can be certified.")
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
    return "Put normalization inside the model."


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
    """Refuse what is not a perturbation: a name, or a family without its sigma (InputError)."""
    if isinstance(perturbation, type) or not hasattr(perturbation, "sample"):
        raise InputError(
            "perturbation must be an object with its sigma, such as "
            f'certifl.Rotation(sigma="18deg"); got {perturbation!r}.'
        )


def checked_seed(seed: Any) -> int:
    """A seed as it is recorded; InputError for what is not a whole number below 2^63."""
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**63:
        raise InputError(f"seed must be a whole number from 0 to 2^63 - 1; got {seed!r:.80}.")
    return int(seed)


def check_exact(images: Tensor, perturbation: Perturbation) -> None:
    """With `exact=True`, refuse images that are not 8-bit: multiples of 1/255 (InputError)."""
    if getattr(perturbation, "exact", False):
        levels = images.double() * 255
        if float((levels - levels.round()).abs().max()) > 1e-3:
            raise InputError(
                f"{type(perturbation).__name__}(exact=True) certifies 8-bit images, and these "
                "have intensities between the 256 levels. Round them to multiples of 1/255, or "
                "use exact=False."
            )


def check_labels(
    labels: Tensor | np.ndarray | None, images: int, classes: int
) -> np.ndarray | None:
    """Labels as (m,) int64, or None; InputError if not one of the classes for each image."""
    if labels is None:
        return None
    _refuse_blocks_of_labels(labels)
    values = _tensor("labels", labels).detach().cpu().numpy()
    if values.shape != (images,):
        advice = ""
        if values.ndim == 2 and len(values) == images:
            advice = " One-hot rows become numbers with labels.argmax(1)."
        if values.shape == (images, 1):
            advice = " A column of numbers becomes that with labels[:, 0]."
        raise InputError(
            f"labels must have one number per image, ({images},); got {values.shape}.{advice}"
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
            f"{_HIDDEN if values.min() == UNLABELED else ''}"
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


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise InputError(f"{name} has masked values, which would be read as if they were known.")
    try:
        # A tensor stays where it is; nothing goes to the program's default device.
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
        if tensor.is_nested or tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError("nested, sparse and without values is none of them")
        return tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} must be a tensor or an array of numbers; got {type(values).__name__} "
            f"({first_line(error)})."
        ) from error


def check_model(model: Model) -> None:
    """Refuse a model whose vote on one noisy image would depend on its batch (ModelError)."""
    if not callable(model):
        raise ModelError(f"model must be callable on images (m, c, h, w); got {type(model)}.")
    if not isinstance(model, nn.Module):
        return
    if any_lazy(model):
        raise ModelError(LAZY)
    training = in_training_mode(model)
    if training is not None:
        raise ModelError(
            f"{_named(training, model)} is in training mode: dropout and batch statistics would "
            "make votes random in a way the certificate does not cover. Call model.eval() first."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{_named(name, model)} normalizes with the statistics of its batch even in "
                "evaluation mode, so the vote of one noisy image would depend on the others. Use "
                "track_running_stats=True, or GroupNorm."
            )


def _named(name: str, model: nn.Module) -> str:
    layer = type(dict(model.named_modules())[name]).__name__
    return f"module {name!r} ({layer})" if name else "the model"


def probe_of(images: Tensor) -> Tensor:
    """A few images to try a network on: the first of these, and strangers."""
    return torch.cat([images[:1], _strangers(images, 0)[1:]])


def _strangers(images: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (_PROBE, *images.shape[1:])  # the program's default type and device may be others
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(images.device)


def writes_into_its_input(network: Model, images: Tensor) -> bool:
    """Whether a network changes the batch it is given; ModelError if it fails on it."""
    batch = probe_of(images)
    before = batch.clone()
    _logits(network, batch)
    return not torch.equal(batch, before)


def depends_on_its_past(network: Model, module: nn.Module, images: Tensor) -> bool:
    """Whether calls change a network's state; ModelError where that changes its answers.

    Averages that go on in evaluation mode may move so slowly that two calls agree up to rounding,
    and still far over many votes. So what moved is moved much further, and the answers compared. A
    counter of calls that nothing reads is harmless.

    Args:
        network: the call, given batches of its own. images: (m, c, h, w); the first is tried.
        module: whose state is looked at; it is put back.
    """
    probe = probe_of(images)
    before = {name: value.detach().clone() for name, value in _state(module)}
    logits = _logits(network, probe.clone())
    moved = {n: v for n, v in _state(module) if n in before and not _same(v, before[n])}
    if not moved:
        return False
    with torch.inference_mode():
        for name, value in moved.items():
            was = before[name]
            floating = value.is_floating_point()
            value.copy_(was + (value - was) * _FAR if floating else value + _FAR)
        try:
            same = _agree(logits, _logits(network, probe.clone()), 1e-5)
        except ModelError:  # no longer finite
            same = False
        for name, value in _state(module):
            if name in moved:
                value.copy_(before[name])
    if not same:
        raise ModelError(
            f"The model changes its own {next(iter(moved))} at every call in evaluation mode, and "
            "its answers depend on it, so that a vote would depend on earlier ones. Let it change "
            "only while self.training is true."
        )
    return True


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _same(value: Tensor, was: Tensor) -> bool:
    return bool(torch.equal(value, was) or (value.isnan() & was.isnan() | (value == was)).all())


def _agree(first: Tensor, second: Tensor, tolerance: float) -> bool:
    first, second = first.double(), second.double()
    return float((first - second).abs().max()) <= tolerance * (1 + float(first.abs().max()))


def probe_classes(network: Model, images: Tensor) -> int:
    """Number of classes; ModelError unless logits are finite, repeatable and row by row.

    A few images go through the network twice, the second time in reversed order and among
    strangers: the logits of an image must be the same up to rounding.
    """
    probe = probe_of(images)
    logits = _logits(network, probe.clone())
    if not _agree(logits, _logits(network, probe.clone()), 1e-5):
        raise ModelError(
            "The model answers differently when asked twice about the same images: something in "
            "it is random. The only noise may be the perturbation that is certified."
        )
    mixed = torch.cat([_strangers(images, 1), probe.flip(0)])
    again = _logits(network, mixed)[_PROBE:].flip(0)
    tolerance = 0.05 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not _agree(logits, again, tolerance):
        raise ModelError(
            "The model answers differently when the same images lie in another batch, as if it "
            "normalized over the batch; a certificate needs a function of one image."
        )
    return int(logits.shape[1])


def _advice(reason: str) -> str:
    """What to do about a model that fails on images, from what it raised."""
    if "Guard failed" in reason:
        return (
            "It was exported for batches of one size: export it with dynamic_shapes={0: "
            'torch.export.Dim("batch")} for its images.'
        )
    return (
        "Give images of the size and channels it was made for, and leave them and the model on "
        "one device."
    )


def _logits(network: Model, batch: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            logits = network(batch)
    except Exception as error:  # the model's own code: anything may be raised
        if out_of_memory(error):
            raise
        first = first_line(error)
        raise ModelError(
            f"The model fails on images {tuple(batch.shape)}, {batch.dtype} on {batch.device}: "
            f"{type(error).__name__}: {first}. {_advice(first)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch.shape[0]:
        raise ModelError(
            f"The model must map images {tuple(batch.shape)} to logits ({batch.shape[0]}, "
            f"classes); got {answer_in_words(logits)}"
        )
    if logits.shape[1] < 2:
        number = "one class only" if logits.shape[1] == 1 else "no class at all"
        raise ModelError(f"The model answers with {number}: there is nothing to certify.")
    if logits.dtype is torch.bool or logits.is_complex():
        raise ModelError(f"The model answers with {logits.dtype}: logits are real numbers.")
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("The model answers with NaN or infinite logits on images in [0, 1].")
    return logits


Images = Tensor | np.ndarray | Iterable[Any] | Dataset[Any]
ImageLabels = (
    Tensor | np.ndarray | Sequence[int] | Iterable[Tensor | np.ndarray | Sequence[int]] | None
)
_ROWS = 256
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def checked_blocks(
    images: Images, labels: ImageLabels, perturbation: Perturbation
) -> Iterator[tuple[Tensor, Any]]:
    """Checked images and their labels as they were given, block by block; else InputError.

    Args:
        images: one array (m, c, h, w); an iterable of such, or of pairs (images, labels), such as
            a `DataLoader` gives; or a map-style data set of images or pairs.
        labels: in the same form; None where there are none, or images come with theirs.
        perturbation: whose `exact` mode images are checked for.
    """
    shape = None
    for number, (block, given) in enumerate(_pairs(images, labels)):
        if block is None or (given is None and labels is not None):
            raise InputError(
                "There must be as many blocks of labels as of images, but there is only one of "
                f"both for block {number}."
            )
        values = check_images(block)
        check_exact(values, perturbation)
        if shape is not None and values.shape[1:] != shape:
            raise InputError(
                f"All images must have one shape; block {number} has {tuple(values.shape[1:])}, "
                f"those before it {tuple(shape)}."
            )
        shape = values.shape[1:]
        yield values, given
    if shape is None:
        raise InputError("There is nothing to certify: images contains no block.")


def _pairs(images: Images, labels: ImageLabels) -> Iterator[tuple[Any, Any]]:
    """Blocks of images and of labels, as given; InputError where they are not blocks."""
    if isinstance(images, (Tensor, np.ndarray)):
        yield images, labels
        return
    source = _iterable(images)
    if labels is not None and not isinstance(labels, Iterable):
        raise InputError(f"labels must be numbers of classes, one per image; got {labels!r:.80}.")
    for block, given in itertools.zip_longest(source, () if labels is None else labels):
        if _is_pair(block):
            if labels is not None:
                raise InputError(
                    "images come with their labels, as pairs, so labels= must be left out; or "
                    "give images=(x for x, _ in loader)."
                )
            yield block[0], block[1]
            continue
        if isinstance(given, (int, float, np.number)) or getattr(given, "ndim", 1) == 0:
            check_images(block)  # what is wrong with images comes first
            raise InputError(
                "images come in blocks, so labels must, too: a block of labels for each block of "
                "images, such as labels=y.split([len(x) for x in blocks]) for one tensor y."
            )
        yield block, given


def _iterable(images: Any) -> Iterable[Any]:
    """Blocks, where images are not one array; InputError if they are neither."""
    if isinstance(images, DataLoader):
        inner = getattr(images.batch_sampler, "sampler", None)
        if isinstance(images.sampler, _SHUFFLING) or isinstance(inner, _SHUFFLING):
            raise InputError(
                "The loader shuffles, so that rows of the certificates would name other images at "
                "every call. Make it with shuffle=False."
            )
        return images
    if isinstance(images, Dataset) and not isinstance(images, IterableDataset):
        return _of_dataset(images)
    if not isinstance(images, Iterable) or isinstance(images, (str, Mapping)):
        raise InputError(
            f"images must be a tensor or an array (m, c, h, w), an iterable of such or of pairs "
            f"(images, labels), a DataLoader or a map-style data set; got {images!r:.80}."
        )
    if isinstance(images, (tuple, list)):  # at hand, so refused before the first vote
        for block in images:
            if getattr(block, "ndim", 4) != 4:
                check_images(block)
    return images


def _of_dataset(data: Any) -> Iterator[Any]:
    """Blocks of a map-style data set of images (c, h, w) or pairs (image, label)."""
    for start in range(0, len(data), _ROWS):
        items = [data[row] for row in range(start, min(start + _ROWS, len(data)))]
        pairs = [one for one in items if isinstance(one, (tuple, list)) and len(one) == 2]
        if pairs and len(pairs) == len(items):
            labels = np.array([_label(y) for _, y in pairs])
            yield _stacked([image for image, _ in pairs]), labels
        else:
            yield _stacked(items)


def _label(value: Any) -> int:
    """A label of a pair as a number; one number in a tensor or an array is one."""
    try:
        return operator.index(np.asarray(value).item())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The data set gives {value!r:.40} as a label: labels must be whole numbers, the "
            "classes of the model."
        ) from error


def _stacked(images: Sequence[Any]) -> Tensor:
    if not all(isinstance(image, (Tensor, np.ndarray)) for image in images):
        kind = next(type(i).__name__ for i in images if not isinstance(i, (Tensor, np.ndarray)))
        raise InputError(
            f"The data set gives images as {kind}: they must be tensors or arrays (c, h, w) in "
            "[0, 1], alone or as pairs (image, label). Give it a transform such as ToTensor()."
        )
    try:
        return torch.stack([_tensor("images", image) for image in images])
    except RuntimeError as error:
        raise InputError(f"The images of the data set differ in shape: {error}.") from error


def _is_pair(block: Any) -> bool:
    """Whether a block is (images, labels), as a loader gives it."""
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        return False
    images, labels = block
    return getattr(images, "ndim", 0) == 4 and np.ndim(labels) in (1, 2)
