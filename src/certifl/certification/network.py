"""The base classifier made ready for many votes: the same function up to rounding, but fast.

Folding BatchNorm into convolutions, channels-last memory and bfloat16 change the rounding of the
network, never the noise: what is certified is the network as it is prepared here, and the record
says in which precision.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from certifl.certification.checks import (
    Model,
    check_model,
    depends_on_its_past,
    probe_classes,
    probe_of,
    writes_into_its_input,
)
from certifl.certification.quantization import Calibration, Quantized, Scales, quantize
from certifl.certification.settings import PRECISIONS, REMOVED_PRECISIONS, removed_precision
from certifl.errors import InputError, ModelError, first_line
from certifl.module_copies import (
    bare_copy_of,
    called,
    foreign_formats,
    format_advice,
    is_plain,
    logits_in,
    loses_hooks,
    to_format,
    unwrapped,
)
from certifl.torch_env import (
    exact_convolutions,
    is_small,
    one_thread,
    out_of_memory,
    threads_in_use,
    without_autocast,
)

_log = logging.getLogger(__name__)
# Of images and weights as they enter; int8 has 8 bits inside, see `quantization`.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
_DEVICES = ("cpu", "cuda", "xpu", "mps")

# Bytes of the largest activation of one batch that still keep caches warm (CPU), and the share of
# the memory that one activation may take (GPU). Only the speed depends on them.
_CPU_ACTIVATION_BYTES = 4 << 20
_GPU_MEMORY_SHARE = 0.02
_SMALLEST_BATCH = 16
_MOST_IMAGES = 1 << 20  # a batch is filled up, whatever the number of votes
BEYOND = (
    "Such images may lie outside [0, 1] or be black, where roots, powers, logarithms and "
    "quotients may have no value: let the model begin with images.clamp(0, 1) and never divide "
    "by 0."
)
_UNSEEN = 16  # how many times larger than its input that activation is guessed to be
_LARGEST_BATCH = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Network:
    """A base classifier ready to vote.

    Attributes:
        call: images (b, c, h, w) float32 -> logits (b, classes).
        classes: number of classes.
        device: where images and votes live.
        precision: a name in `PRECISIONS`, the arithmetic of the network.
        folded: whether BatchNorm was folded into the convolutions.
        batch_size: images per call; every call has exactly this many rows.
        small: whether it has so few weights that it votes on one thread, see `threads`.
        one_thread: whether it votes on one thread in any case.
        as_it_is: whether it is called as it was given: a function, or a module without a copy.
        quantized: how it computes in integers; None in other precisions.
    """

    call: Model
    classes: int
    device: torch.device
    precision: str
    folded: bool
    batch_size: int
    small: bool = False
    one_thread: bool = False
    as_it_is: bool = False
    quantized: Quantized | None = None

    @property
    def threads(self) -> int:
        """The threads that its votes are cast with."""
        return 1 if self.one_thread else threads_in_use(self.small)

    def logits(self, noisy: Tensor) -> Tensor:
        """Of a batch of noisy images; ModelError where the model fails on them."""
        try:
            return self.call(noisy)
        except Exception as error:  # the model's own code: anything may be raised
            if out_of_memory(error):
                raise
            raise ModelError(
                f"The model fails on noisy images: {type(error).__name__}: {first_line(error)}. "
                f"{BEYOND}"
            ) from error


def prepare(
    model: Model,
    images: Tensor,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | str = "auto",
    calibration: Calibration | Scales | None = None,
) -> Network:
    """Prepare a model for voting on images like these; the model itself is left as it is.

    Args:
        model: callable from images (m, c, h, w) in [0, 1] to logits (m, classes), or to an object
            that has them as `.logits`. Modules are
            copied; any other callable, and a module that cannot be copied, is used as it is, in
            its own precision and on its device.
        images: (m, c, h, w); only shapes and one image as a probe are used.
        device: "auto", or a torch device.
        precision: "float32", "bfloat16" or "int8"; "auto" is float32 here, see `arithmetic.ready`.
        batch_size: "auto", or a number of noisy images per call.
        calibration: for "int8", what its scales are read from, or the scales of a record.

    Raises:
        ModelError: see `checks.check_model`, `checks.probe_classes` and `quantization.quantize`.
        InputError: unknown device, precision or batch size.
    """
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    check_model(model)
    copied = _copied(model)
    if device == "auto" and copied is None:  # where its own values are
        values = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device = values[0].device if values else images.device
    target = choose_device(device)
    probe = images[:1].to(target, copy=True)  # a copy, for a network may write into it
    small = isinstance(model, nn.Module) and is_small(model)
    threads = one_thread(threads_in_use(small) == 1)
    with exact_convolutions(target), without_autocast(target), threads:
        if copied is None or not isinstance(model, nn.Module):
            return _as_it_is(model, probe, target, precision, batch_size)
        chosen = choose_precision(precision)
        return _prepared(copied, probe, target, chosen, batch_size, calibration)


def _copied(model: Model) -> nn.Module | None:
    """A copy to prepare; None where a model must be called as it is."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return bare_copy_of(model)
    except ModelError as error:
        _log.info("The model votes as it is, in float32 and where it lies: %s", error)
        return None


def _as_it_is(
    model: Model, probe: Tensor, target: torch.device, precision: str, batch_size: int | str
) -> Network:
    """A network that cannot be changed: a function, or a module that cannot be copied."""
    if choose_precision(precision) == "int8":
        raise ModelError(
            "Only a module that can be copied can be quantized: give an nn.Module, or choose "
            'precision = "float32".'
        )
    if isinstance(model, nn.Module):
        if foreign_formats(model):
            raise ModelError(f"{format_advice(model)} certifl cannot copy this model to do so.")
        if precision not in ("auto", "float32"):
            raise ModelError(
                f"The model cannot be copied, so it cannot vote in {precision}: choose the "
                "precision auto or float32, or keep locks, generators and open files out of its "
                "attributes."
            )
    call = _own_input(model, probe)
    classes = probe_classes(call, probe)
    if isinstance(model, nn.Module):
        depends_on_its_past(call, model, probe)
    size = _batch(batch_size, target, _UNSEEN * 4 * probe.numel())
    return Network(call, classes, target, "float32", False, size, as_it_is=True)


def _prepared(
    plain: nn.Module,
    probe: Tensor,
    target: torch.device,
    precision: str,
    batch_size: int | str,
    calibration: Calibration | Scales | None,
) -> Network:
    """A copy of a model, probed on a few images under the conditions it votes under."""
    advice = format_advice(plain)
    plain = _moved(plain, target)
    try:
        call = _own_input(plain, probe)
        probe_classes(call, probe)
        changes = depends_on_its_past(call, plain, probe)
    except ModelError as error:
        raise (ModelError(f"{error} {advice}") if advice else error) from error
    # Tracing would leave out what a network writes into its own state.
    folded = None if changes else fold_batch_norm(plain, probe_of(probe))
    ready = folded if folded is not None else plain
    largest = _largest_activation(plain, probe)  # before its weights are rounded
    dtype, quantized = _DTYPES[precision], None
    if precision == "int8":
        quantized = _quantized(ready, changes, probe, calibration)
        ready = quantized.module
    call, classes = _called(ready, dtype, probe)
    size = _batch(batch_size, target, largest * (1 if quantized else dtype.itemsize))
    return Network(
        call,
        classes,
        target,
        precision,
        folded is not None,
        size,
        is_small(plain),
        quantized=quantized,
    )


def _quantized(
    module: nn.Module, changes: bool, probe: Tensor, calibration: Calibration | Scales | None
) -> Quantized:
    """The network in integers; InputError without images or a CPU, ModelError if it has none."""
    if probe.device.type != "cpu":
        raise InputError(
            f'precision = "int8" computes on the processor alone, not on {probe.device}: choose '
            'device = "cpu", or precision = "bfloat16".'
        )
    if calibration is None:
        raise InputError(
            'precision = "int8" needs calibration: images such as those of training, from which '
            "the ranges of activations are read (a hundred are enough), or the scales that a "
            'record holds in conditions["quantization"].'
        )
    if changes:
        raise ModelError("The network writes into its own state, so it cannot be quantized.")
    return quantize(module, calibration, probe)


def _moved(plain: nn.Module, target: torch.device) -> nn.Module:
    """The copy on its device, in float32."""
    try:
        made = to_format(plain.to(target), torch.float32)
    except NotImplementedError as error:  # weights on the device "meta" have no values
        raise ModelError(f"The model cannot be moved to {target}: {error}") from error
    for value in made.parameters():
        value.requires_grad_(False)
    return made


def _called(ready: nn.Module, dtype: torch.dtype, probe: Tensor) -> tuple[Model, int]:
    """The network in this arithmetic, in the first layout of memory that it works in.

    Convolutions are fastest in channels-last, but a network that flattens by `view` fails in it.
    """
    ready = to_format(ready, dtype)
    try:
        return _laid_out(ready, dtype, torch.channels_last, probe)
    except ModelError:
        return _laid_out(ready, dtype, torch.contiguous_format, probe)


def _laid_out(
    ready: nn.Module, dtype: torch.dtype, layout: torch.memory_format, probe: Tensor
) -> tuple[Model, int]:
    ready.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    call = _own_input(lambda images: ready(images.to(dtype, memory_format=layout)), probe)
    return call, probe_classes(call, probe)


def _own_input(call: Model, probe: Tensor) -> Model:
    """The network's logits, or `.logits` of its answer; it may write into its own batch alone."""

    def logits(images: Tensor) -> Tensor:
        return logits_in(call(images))

    if not writes_into_its_input(logits, probe):
        return logits
    return lambda images: logits(images.clone())


def tf32_state() -> dict[str, bool]:
    """Whether torch now rounds the factors of float32 convolutions and products to TF32.

    It is a setting of the whole process and only GPUs follow it. Since torch 2.9 it has another
    name, and the older one raises an error where a program has used the newer.
    """
    backends: Any = torch.backends
    return {
        "convolutions": _is_tf32(getattr(backends.cudnn, "conv", None), backends.cudnn),
        "products": _is_tf32(backends.cuda.matmul, backends.cuda.matmul),
    }


def _is_tf32(newer: Any, older: Any) -> bool:
    try:
        return newer.fp32_precision == "tf32"
    except AttributeError:  # before torch 2.9
        return bool(older.allow_tf32)


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device to compute on, a GPU for "auto" where there is one; InputError if unusable."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, str) and device.partition(":")[0] not in _DEVICES:
        raise InputError(
            f"device {device!r} cannot be used: choose auto, {', '.join(_DEVICES)}, or one of "
            "several as cuda:1."
        )
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        first = first_line(error)
        raise InputError(
            f"device {device!r} cannot be used here: {first}. Choose another, or auto; `certifl "
            "doctor` says what this machine has."
        ) from error
    return target


def choose_precision(precision: str) -> str:
    """The network's arithmetic; "auto" is float32 until measured; InputError if unknown."""
    if precision == "auto":
        return "float32"
    if precision in REMOVED_PRECISIONS:
        raise InputError(removed_precision(precision))
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise InputError(f"precision must be auto or one of {known}; got {precision!r}.")
    return precision


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has instructions for bfloat16; they need not be faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _batch(batch_size: int | str, device: torch.device, per_image: int) -> int:
    """Noisy images per call; `per_image` bytes has the largest activation of one."""
    if batch_size != "auto":
        if (
            isinstance(batch_size, (str, bool))
            or not isinstance(batch_size, (int, np.integer))
            or not 1 <= batch_size <= _MOST_IMAGES
        ):
            raise InputError(
                f"batch_size must be 'auto' or a whole number from 1 to {_MOST_IMAGES:,}; got "
                f"{batch_size!r:.80}."
            )
        return int(batch_size)
    budget = _CPU_ACTIVATION_BYTES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        budget = int(memory * _GPU_MEMORY_SHARE)
    largest = _LARGEST_BATCH.get(device.type, 512)
    fitting = max(_SMALLEST_BATCH, min(largest, budget // max(1, per_image)))
    # A power of two that depends on shapes and the machine alone: the same votes at every run.
    return 1 << (fitting.bit_length() - 1)


def _largest_activation(module: nn.Module, probe: Tensor) -> int:
    """Elements of the largest tensor that one image makes inside the network."""
    largest = [probe.numel()]

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            largest[0] = max(largest[0], output.numel())

    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        return _UNSEEN * largest[0]  # it takes no hooks
    hooks = [m.register_forward_hook(note) for m in module.modules()]
    try:
        with torch.inference_mode():
            module(probe.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return largest[0]


# BatchNorm in evaluation mode is affine: folded into the convolution before it, it is free.


def fold_batch_norm(module: nn.Module, probe: Tensor) -> nn.Module | None:
    """A copy with every BatchNorm that follows a convolution folded into it, or None.

    Only a module that can be traced is folded, and only if its logits stay the same up to float32
    rounding on a probe; otherwise the network votes unfolded, which is slower and equally valid.

    Args:
        module: in evaluation mode; left as it is.
        probe: (m, c, h, w) images to compare the two on.
    """
    try:
        graph = _folded(module)
        if graph is None:
            return None
        with torch.inference_mode():
            # Clones, for either may write into its input.
            before, after = module(probe.clone()), graph(probe.clone())
    except Exception as error:  # tracing runs the model's own forward: anything may be raised
        _log.info("BatchNorm is not folded, the model cannot be traced: %s", error)
        return None
    if not isinstance(before, Tensor):
        return None
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * (1.0 + float(before.abs().max()))):
        _log.warning("BatchNorm is not folded: it changed the logits beyond rounding.")
        return None
    return graph


def _folded(module: nn.Module) -> fx.GraphModule | None:
    """The traced network with its BatchNorm folded; None where there is nothing to fold."""
    graph = fx.symbolic_trace(copy.deepcopy(module))
    if loses_hooks(module, graph):
        _log.info("BatchNorm is not folded: tracing would leave out hooks of the model.")
        return None
    pairs = [pair for node in graph.graph.nodes if (pair := _pair(node, graph)) is not None]
    if not pairs:
        return None
    for convolution, norm in pairs:
        layers = called(convolution, graph), called(norm, graph)
        assert isinstance(layers[0], nn.Conv2d)
        assert isinstance(layers[1], nn.BatchNorm2d)
        graph.set_submodule(str(convolution.target), fuse_conv_bn_eval(layers[0], layers[1]))
        norm.replace_all_uses_with(convolution)
        graph.graph.erase_node(norm)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    graph.eval()
    return graph


def _pair(node: fx.Node, graph: fx.GraphModule) -> tuple[fx.Node, fx.Node] | None:
    """The convolution and the BatchNorm that reads it alone, where `node` is such a BatchNorm."""
    if not is_plain(called(node, graph), nn.BatchNorm2d):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return None
    if not is_plain(called(source, graph), nn.Conv2d):
        return None
    own = f"{source.target}."
    used_elsewhere = any(  # the convolution, or one of its weights
        (other.op == "call_module" and other.target == source.target and other is not source)
        or (other.op == "get_attr" and str(other.target).startswith(own))
        for other in graph.graph.nodes
    )
    return None if used_elsewhere else (source, node)
