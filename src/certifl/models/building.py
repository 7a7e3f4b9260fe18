"""Models by name, with weights that depend on the seed alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from certifl.errors import ModelError, first_line
from certifl.models import MODELS
from certifl.module_copies import (
    answer_in_words,
    answers_with_logits,
    evaluating,
    format_advice,
    take_logits,
)
from certifl.registry import choices
from certifl.rng import derive_seed

PREFIX = "hf:"
_ANY_SIZE = 224
# Names, versions and file types in a configuration of transformers.
_NOT_COMPUTED_WITH = (
    *("_name_or_path", "architectures", "id2label", "label2id"),
    *("dtype", "torch_dtype", "transformers_version"),
)
_log = logging.getLogger(__name__)


def build(
    name: str,
    in_channels: int,
    num_classes: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """A network whose weights depend on the seed alone, as its function made it.

    Torch's global generator is seeded for the duration of the call, then restored.

    Args:
        name: a name in `MODELS`; `module:function` for one's own, called as
            `function(in_channels=..., num_classes=..., **options)`; or hf:OWNER/NAME of the
            Hugging Face hub, hf:./folder, whose weights the network begins with.
        in_channels, num_classes: channels of the images, and logits that must come out.
        seed: the study's. options: further arguments of the function.
        image_size: (h, w); when given, one blank image is passed through to check the logits.

    Raises:
        SpecError: an option that a network in `MODELS` does not have, or a value not allowed.
        ModelError: an unknown name, something that is not a function, a call that fails, a result
            that is not a torch module, or logits of the wrong shape.
    """
    from_hub = name.startswith(PREFIX)
    if from_hub and options:
        raise ModelError(f"{name} takes no options; leave out {', '.join(options)}.")
    if name in MODELS:
        MODELS.check_named(name, options or {})
        function: Callable[..., Any] = MODELS[name]
    else:
        function = load if from_hub else _users_function(name)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also seed the generators of all GPUs.
        torch.default_generator.manual_seed(derive_seed(seed, "model", name))
        if from_hub:  # with its weights; a new last layer is drawn
            return load(name, in_channels, num_classes, image_size, new_head=True).train()
        try:
            model = function(
                in_channels=in_channels, num_classes=num_classes, **dict(options or {})
            )
        except Exception as error:
            raise ModelError(
                f"Building the model {name!r} failed with {type(error).__name__}: {error}. It is "
                f"called with in_channels={in_channels}, num_classes={num_classes} and the "
                f"options {dict(options or {})}."
            ) from error
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"The model {name!r} returned {type(model).__name__}, not a torch.nn.Module. "
                "Return the network itself."
            )
        if image_size is not None:
            with _in_evaluation(model):
                blank = torch.zeros(1, in_channels, *image_size)
                if answers_with_logits(model, blank):
                    model.register_forward_hook(take_logits)
            check_logits(model, in_channels, num_classes, image_size)
    return model


def _users_function(name: str) -> Callable[..., Any]:
    """The function behind `module:function`, or an error that says where it went wrong."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ModelError(f"model name = {name!r} is unknown: {choices(name, MODELS, MODELS.also)}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"The module of the model {name!r} cannot be imported "
            f"({type(error).__name__}: {error}). Install it, or put it beside the spec, into the "
            "working directory or on PYTHONPATH. Modules that it imports must be installed, on "
            "PYTHONPATH, or in one package with it."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        reason = "is not callable" if function is not None else "does not exist"
        raise ModelError(
            f"{function_name!r} in the module {module_name!r} {reason}. Name a function that "
            "takes in_channels and num_classes and returns a torch.nn.Module."
        )
    return function


def check_logits(
    model: nn.Module, in_channels: int, num_classes: int, image_size: tuple[int, int]
) -> None:
    """Pass a blank image through the model, in evaluation mode; ModelError without its logits.

    The model is on any device; training or evaluation mode is put back afterwards.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    try:
        with torch.no_grad(), _in_evaluation(model):
            logits = model(torch.zeros(1, in_channels, *image_size, device=device))
    except Exception as error:
        raise ModelError(
            f"The model fails on a blank image of shape (1, {in_channels}, {image_size[0]}, "
            f"{image_size[1]}) with {type(error).__name__}: {error}. "
            f"{format_advice(model) or 'It must take images (m, c, h, w).'}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise ModelError(
            f"The model must return logits of shape (1, {num_classes}) for one image, got "
            f"{answer_in_words(logits)} Give its last layer num_classes outputs."
        )


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode; its layers' modes are put back."""
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]
    evaluating(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class ImageClassifier(nn.Module):
    """A classifier of `transformers` on images in [0, 1].

    Args:
        network: its outputs have `.logits`.
        channels: that it takes; gray images are repeated in three.
        mean, std: per channel, of intensities in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, channels: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network, self._channels = network, channels
        shape = (1, channels, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    @property
    def constants(self) -> dict[str, Any]:
        """What the network computes with besides its state: normalization and configuration.

        A configuration names activations, heads and epsilons, which no weight shows.
        """
        configuration = json.loads(cast(Any, self.network).config.to_json_string())
        return {
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "config": {k: v for k, v in configuration.items() if k not in _NOT_COMPUTED_WITH},
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (m, c, h, w) in [0, 1]."""
        wide = images.expand(-1, self._channels, -1, -1)
        return self.network(pixel_values=(wide - self.mean) / self.std).logits


def load(
    name: str,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    new_head: bool = False,
    class_names: Sequence[str] = (),
) -> nn.Module:
    """The network `hf:OWNER/NAME` or `hf:./folder` with its weights, in evaluation mode.

    Args:
        name: as above; a folder begins with ".", "~" or "/".
        in_channels, num_classes: 1 or 3 channels of the images, and logits that must come out.
        image_size: (h, w); when given, one blank image is tried.
        new_head: whether a network of another number of classes gets a new last layer, drawn from
            torch's generator, to be trained.
        class_names: of the data; where the network names the same ones, the order must agree.

    Raises:
        ModelError: it cannot be loaded, or does not fit the images or classes.
    """
    config, processor = _described(name)
    known = getattr(config, "num_labels", num_classes)
    if known != num_classes and not new_head:
        raise ModelError(
            f"{name} has {known} classes, the images {num_classes}. Only training gives it a new "
            "last layer: name it as model.name of a study."
        )
    _check_order(name, config, class_names)
    channels, side = int(getattr(config, "num_channels", 3)), _size_of(processor)
    if in_channels not in (1, channels):
        raise ModelError(f"{name} takes images of {channels} channels, these have {in_channels}.")
    network = _network(name, num_classes if known != num_classes else None)
    mean, std = _normalization(name, processor, channels)
    model = ImageClassifier(network.float(), channels, mean, std).eval()
    if image_size is not None:
        try:
            check_logits(model, in_channels, num_classes, image_size)
        except ModelError as error:
            raise ModelError(
                f"{error} {name} was made for images of {side or _ANY_SIZE} pixels: "
                f"data.resize = {side or _ANY_SIZE} (--resize {side or _ANY_SIZE})."
            ) from error
    return model


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` gets: a name of the hub or a folder, and how it may load it."""
    base = name.removeprefix(PREFIX)
    local = base[:1] in (".", "~", "/") or Path(base).is_absolute()
    if local and not Path(base).expanduser().is_dir():
        raise ModelError(f"There is no folder {base}: model.save_pretrained({base!r}) writes it.")
    if not local and Path(base).is_dir():
        raise ModelError(
            f"{name} is a name of the hub, and a folder here. Write {PREFIX}./{base} for the "
            "folder, or work elsewhere."
        )
    allowed = {"trust_remote_code": False, "local_files_only": local}
    return str(Path(base).expanduser()) if local else base, allowed


def _described(name: str) -> tuple[Any, Mapping[str, Any]]:
    """The configuration of a network and of its image processor."""
    try:
        from transformers import AutoConfig
        from transformers.image_processing_utils import BaseImageProcessor
    except ImportError as error:
        raise ModelError(
            f"The model {name!r} is read by the package `transformers`, which is not installed: "
            "install the extra `certifl[hf]`."
        ) from error
    source, allowed = _source(name)
    try:
        config = AutoConfig.from_pretrained(source, **allowed)
        local = allowed["local_files_only"]
        processor, _ = BaseImageProcessor.get_image_processor_dict(source, local_files_only=local)
    except Exception as error:  # the hub's client raises many unrelated types
        raise ModelError(
            f"{name} cannot be read ({first_line(error)}). It needs config.json and "
            "preprocessor_config.json, whose mean and standard deviation become the first layer: "
            "model.save_pretrained(FOLDER) and processor.save_pretrained(FOLDER) write them."
        ) from error
    return config, processor


def _network(name: str, classes: int | None) -> nn.Module:
    from transformers import AutoModelForImageClassification

    source, allowed = _source(name)
    head: dict[str, Any] = {}
    if classes is not None:
        head = {"num_labels": classes, "ignore_mismatched_sizes": True}
        _log.warning("%s gets a new last layer of %d classes, to be trained.", name, classes)
    try:
        made, loading = AutoModelForImageClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **head, **allowed
        )
    except Exception as error:  # as above
        raise ModelError(
            f"{name} cannot be loaded ({first_line(error)}). It must be an image classifier of "
            "transformers with weights in model.safetensors; code of a repository is never run."
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing and classes is None:
        raise ModelError(
            f"{name} lacks weights of its network, {missing[0]} the first: it was not trained as "
            "an image classifier."
        )
    return made


def _normalization(
    name: str, processor: Mapping[str, Any], channels: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of intensities in [0, 1], from what the processor does.

    It computes (255 x factor + offset - mean) / std of x in [0, 1].
    """
    scale, offset = 255.0, 0.0
    if processor.get("do_rescale", True):
        scale = 255.0 * float(processor.get("rescale_factor", 1 / 255))
        offset = -1.0 if processor.get("rescale_offset", False) else 0.0
    mean: Any = [0.0] * channels
    std: Any = [1.0] * channels
    if processor.get("do_normalize", True):
        mean, std = processor.get("image_mean"), processor.get("image_std")
    if not (_numbers(mean, channels) and _numbers(std, channels) and scale > 0 and min(std) > 0):
        raise ModelError(
            f"The processor of {name} says no mean and standard deviation of {channels} "
            "channel(s), so its normalization is unknown. Give the network as module:function."
        )
    return [(m - offset) / scale for m in mean], [s / scale for s in std]


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(value, (int, float)) for value in values)
    )


def _size_of(processor: Mapping[str, Any]) -> int | None:
    """The side of the images that the processor makes, where it says one."""
    for size in (processor.get("crop_size"), processor.get("size")):
        sides = size.values() if isinstance(size, Mapping) else [size]
        known = [side for side in sides if isinstance(side, int)]
        if known:
            return known[0]
    return None


def _check_order(name: str, config: Any, class_names: Sequence[str]) -> None:
    """Refuse a network that numbers the classes of the data in another order."""
    numbered = getattr(config, "id2label", None) or {}
    own = [str(numbered.get(number, "")).casefold() for number in range(len(numbered))]
    data = [one.casefold() for one in class_names]
    if sorted(own) == sorted(data) and own != data:
        raise ModelError(
            f"{name} numbers the classes as {', '.join(own[:5])}, the data as "
            f"{', '.join(data[:5])}: labels would be compared with other classes. Name the "
            "classes of the data in the network's order (docs/data.md)."
        )
