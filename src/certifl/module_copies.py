"""Networks as people have them, wrapped, parametrized or in other formats, and their copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from certifl.errors import ModelError, first_line

LAZY = (
    "The model has lazy layers without weights yet. Pass one batch of images through it, or load "
    "its weights, first."
)

# The attribute of each wrapper that holds the network itself.
_WRAPPERS = {DataParallel: "module", DistributedDataParallel: "module"}


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and `torch.compile`.

    The wrappers change how a network is computed, not what. One with hooks stays, since its hooks
    may change the result.
    """
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy; the module itself is left as it is.

    `copy.deepcopy` refuses tensors with a gradient history. `weight_norm`, `spectral_norm` and
    pruning keep their latest result as such a tensor and compute it again at every call, so the
    copy gets its value alone.

    Raises:
        ModelError: a weight has no shape yet, or some attribute cannot be copied, such as a lock.
    """
    if any_lazy(module):
        raise ModelError(LAZY)
    known = {id(value): value.detach().clone() for value in _derived(module)}
    try:
        with torch.no_grad():  # copies of scripted weights would otherwise have a history
            made = copy.deepcopy(module, known)
    except Exception as error:  # whatever an attribute of the user's own module raises
        raise ModelError(
            f"The model cannot be copied ({type(error).__name__}: {first_line(error)}). Keep "
            "locks, generators, open files and tensors with a gradient history out of its "
            "attributes."
        ) from error
    for value, original in zip(made.parameters(), module.parameters(), strict=True):
        value.requires_grad_(original.requires_grad)
    return made


def bare_copy_of(module: nn.Module) -> nn.Module:
    """A `copy_of` without wrappers, at every level; its weights may have other names."""
    made = unwrapped(copy_of(module))
    _unwrap_children(made)
    return made


def evaluating(module: nn.Module) -> nn.Module:
    """The module, set to evaluation mode in place.

    A program of `torch.export` and a frozen TorchScript module stay in the mode they were made in.
    """
    try:
        return module.eval()
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        if not (_exported(module) or isinstance(module, torch.jit.ScriptModule)):
            raise ModelError(f"The model cannot be set to evaluation mode: {error}") from error
        return module


def _exported(module: nn.Module) -> bool:
    """Whether it is a program of `torch.export`, which replaces `train` and `eval` by errors."""
    return isinstance(module, fx.GraphModule) and "eval" in vars(module)


def _derived(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _inside(module: nn.Module) -> nn.Module | None:
    name = next((name for kind, name in _WRAPPERS.items() if isinstance(module, kind)), None)
    if name is None and type(module).__name__ == "OptimizedModule":  # of torch.compile
        name = "_orig_mod"
    inner = None if name is None else getattr(module, name, None)
    if not isinstance(inner, nn.Module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    return inner


def _unwrap_children(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        return  # compiled as a whole: nothing in it is a wrapper
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            inner = unwrapped(child)
            if inner is not child:
                setattr(parent, name, inner)


def in_training_mode(module: nn.Module) -> str | None:
    """The name of the first layer in training mode ("" = the network itself), or None.

    The flag of a wrapper says nothing of what is inside. A program of `torch.export` has the mode
    it was exported in and a flag that cannot be changed: it is recognized by its output.
    """
    skipped: tuple[str, ...] = ()
    for name, part in module.named_modules():
        if _exported(part):
            skipped = (*skipped, name)
        inside = any(own in ("", name) or name.startswith(f"{own}.") for own in skipped)
        if not inside and _inside(part) is None and getattr(part, "training", False):
            return name
    return None


def any_lazy(module: nn.Module) -> bool:
    """Whether some weights have no shape yet, as in `nn.LazyLinear` before its first call."""
    return any(torch.nn.parameter.is_lazy(value) for value in _values(module))


def foreign_formats(module: nn.Module) -> list[str]:
    """The floating-point formats of its weights and buffers other than float32, by name."""
    found = {str(v.dtype).removeprefix("torch.") for v in _values(module) if v.is_floating_point()}
    return sorted(found - {"float32"})


def format_advice(module: nn.Module) -> str:
    """What to do about weights that are not in float32, as a sentence; "" where all are."""
    formats = foreign_formats(module)
    if not formats:
        return ""
    return (
        f"It has weights in {' and '.join(formats)}, and images are in float32: call "
        "model.float(), and leave conversions such as x.half() or x.double() out of it."
    )


def to_format(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its floating-point weights and buffers in another format, changed in place.

    Unlike `module.to(dtype)` it leaves complex numbers complex.
    """
    return module._apply(lambda value: value.to(dtype) if value.is_floating_point() else value)


def logits_in(answer: Any) -> Any:
    """The logits of an answer: its `.logits` where it is an object that has some, else itself."""
    return answer if isinstance(answer, Tensor) else getattr(answer, "logits", answer)


def answers_with_logits(model: Callable[[Tensor], Any], images: Tensor) -> bool:
    """Whether a model's answer is an object that has a tensor as `.logits`."""
    try:
        with torch.inference_mode():
            answer = model(images.clone())
    except Exception:  # whatever it raises is reported where its logits are checked
        return False
    return not isinstance(answer, Tensor) and isinstance(logits_in(answer), Tensor)


def take_logits(_model: nn.Module, _images: object, answer: Any) -> Tensor:
    """A forward hook that returns the logits alone; names of weights stay as they are."""
    return answer.logits


def answer_in_words(answer: object) -> str:
    """What a model returned in place of logits, and how to get at them; for messages."""
    if isinstance(answer, Tensor):
        return f"{tuple(answer.shape)}."
    name, take = type(answer).__name__, ""
    if hasattr(answer, "logits"):
        take = ".logits"
    elif isinstance(answer, Mapping):
        take = f"[{next(iter(answer), 'logits')!r}]"
    elif isinstance(answer, (tuple, list)):
        take = "[0]"
    if not take:
        return f"{name}."
    return f"{name}. Wrap it in a module whose forward(x) returns model(x){take} alone."


def _values(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# Layers of a traced network.


def called(node: object, graph: fx.GraphModule) -> nn.Module | None:
    """The layer that a node calls; None where it calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def loses_hooks(module: nn.Module, graph: fx.GraphModule) -> bool:
    """Whether a layer has hooks and is not called as a whole in the traced network."""
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return any(_hooked(part) and name not in targets for name, part in module.named_modules())


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a layer is exactly of this kind and computes with the weights that it stores.

    `spectral_norm`, `weight_norm`, pruning and other parametrizations compute the weight at every
    call, by a hook or a subclass, and would overwrite a folded one. They stay as they are.
    """
    if module is None or type(module) is not kind or _hooked(module):
        return False
    return all(name in module._parameters for name in ("weight", "bias"))
