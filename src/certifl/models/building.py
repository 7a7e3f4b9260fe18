"""Models by name, with weights that depend on the seed alone."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from certifl.errors import ModelError
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


def build(
    name: str,
    in_channels: int,
    num_classes: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """A network whose weights depend on the seed alone.

    Torch's global generator is seeded for the duration of the call, then restored.

    Args:
        name: a name in `MODELS`; `module:function` for one's own, called as
            `function(in_channels=..., num_classes=..., **options)`; or hf:OWNER/NAME of the
            Hugging Face hub, hf:./folder, whose weights the network begins with.
        in_channels: channels of the images.
        num_classes: logits that must come out.
        seed: the study's seed.
        options: further arguments of the function.
        image_size: (h, w); when given, one blank image is passed through to check the logits.

    Returns:
        The network as the function made it, from images (m, c, h, w) to logits.

    Raises:
        SpecError: an option that the network in `MODELS` does not have, or a value that is not
            allowed.
        ModelError: a name that is unknown or cannot be imported, something that is not a function,
            a call that fails, a result that is not a torch module, or logits of the wrong shape.
    """
    if name.startswith("hf:"):
        return _from_hub(name, in_channels, num_classes, seed, options, image_size)
    if name in MODELS:
        MODELS.check_named(name, options or {})
        function: Callable[..., Any] = MODELS[name]
    else:
        function = _users_function(name)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also seed the generators of all GPUs.
        torch.default_generator.manual_seed(derive_seed(seed, "model", name))
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


def _from_hub(
    name: str,
    in_channels: int,
    num_classes: int,
    seed: int,
    options: Mapping[str, Any] | None,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """A network of the hub with its weights; a new last layer depends on the seed alone."""
    from certifl.models.huggingface import load  # it builds on this file

    if options:
        raise ModelError(f"{name} takes no options; leave out {', '.join(options)}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "model", name))
        return load(name, in_channels, num_classes, image_size, new_head=True).train()


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
        found = "is not callable" if function is not None else "does not exist"
        raise ModelError(
            f"{function_name!r} in the module {module_name!r} {found}. Name a function that takes "
            "in_channels and num_classes and returns a torch.nn.Module."
        )
    return function


def check_logits(
    model: nn.Module, in_channels: int, num_classes: int, image_size: tuple[int, int]
) -> None:
    """Pass one blank image through the model, in evaluation mode, and require its logits.

    Args:
        model: on any device; training or evaluation mode is put back afterwards.
        in_channels: channels of the image.
        num_classes: logits that must come out.
        image_size: (h, w).

    Raises:
        ModelError: the model fails on such an image, or does not return (1, num_classes) floats.
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
