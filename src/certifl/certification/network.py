"""The base classifier made ready for many votes: the same function up to rounding, but fast.

Folding BatchNorm into convolutions, channels-last memory and bfloat16 change the rounding of the
network, never the noise: what is certified is the network as it is prepared here, and the record
says in which precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certifl.certification.compiled import Compiled
from certifl.certification.folding import fold_batch_norm
from certifl.certification.guards import check_model, probe_classes
from certifl.convolutions import exact_convolutions
from certifl.errors import InputError, ModelError
from certifl.threads import is_small, one_thread, threads_in_use

__all__ = [
    "PRECISIONS",
    "Network",
    "choose_device",
    "choose_precision",
    "prepare",
    "tf32_state",
]

Model = Callable[[Tensor], Tensor]
# Compiled code rounds in another order, so it is another f and has a name of its own.
PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float32-compiled": torch.float32,
    "bfloat16-compiled": torch.bfloat16,
}
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)

# Bytes of the largest activation of one batch that still keep caches warm (CPU), and the share of
# the memory that one activation may take (GPU). Only the speed depends on them.
_CPU_ACTIVATION_BYTES = 4 << 20
_GPU_MEMORY_SHARE = 0.02
_SMALLEST_BATCH = 16
_COMPILED = "-compiled"
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
    """

    call: Model
    classes: int
    device: torch.device
    precision: str
    folded: bool
    batch_size: int
    small: bool = False

    @property
    def threads(self) -> int:
        """The threads that its votes are cast with."""
        return threads_in_use(self.small)


def prepare(
    model: Model,
    images: Tensor,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | str = "auto",
) -> Network:
    """Prepare a model for voting on images like these; the model itself is left as it is.

    Args:
        model: callable from images (m, c, h, w) in [0, 1] to logits (m, classes). Modules are
            copied; any other callable is used as it is, in its own precision and on its device.
        images: (m, c, h, w); only shapes and one image as a probe are used.
        device: "auto", or a torch device.
        precision: "auto" (bfloat16 where the hardware computes in it), "float32", "bfloat16", or
            one of these with "-compiled": about 20 s of compilation for each network, then 1.1 to
            1.4 times the votes per second on a CPU; it needs a C++ compiler there.
        batch_size: "auto", or a number of noisy images per call.

    Raises:
        ModelError: see `guards.check_model` and `guards.probe_classes`; or it cannot be compiled.
        InputError: unknown device, precision or batch size.
    """
    check_model(model)
    if device == "auto" and not isinstance(model, nn.Module):
        device = images.device
    place = choose_device(device)
    small = isinstance(model, nn.Module) and is_small(model)
    with exact_convolutions(place), one_thread(threads_in_use(small) == 1):
        return _prepared(model, images[:1].to(place), place, precision, batch_size)


def _prepared(
    model: Model, probe: Tensor, place: torch.device, precision: str, batch_size: int | str
) -> Network:
    """The network, probed and compared on one image, under the conditions it votes under."""
    if not isinstance(model, nn.Module):
        choose_precision(precision, place)
        classes = probe_classes(model, probe)
        return Network(model, classes, place, "float32", False, _batch(batch_size, probe, place))
    plain = copy.deepcopy(model).to(place).requires_grad_(False)
    probe_classes(plain, probe)
    folded = fold_batch_norm(plain, probe)
    ready = folded if folded is not None else plain
    chosen = choose_precision(precision, place, ready)
    size = _batch(batch_size, probe, place, plain, PRECISIONS[chosen].itemsize)
    ready = ready.to(PRECISIONS[chosen])
    ready.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    call: Model = _Caller(ready, PRECISIONS[chosen])
    classes = probe_classes(call, probe)
    if chosen.endswith(_COMPILED):
        call = _compiled(call, probe.expand(size, *probe.shape[1:]))
    return Network(call, classes, place, chosen, folded is not None, size, is_small(plain))


@dataclass(frozen=True)
class _Caller:
    module: nn.Module
    dtype: torch.dtype

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images.to(self.dtype, memory_format=torch.channels_last))


def _compiled(call: Model, images: Tensor) -> Model:
    """The same network as compiled code, after its answers on these images were compared."""
    made = Compiled(call, images.device)
    try:
        with torch.inference_mode():
            # A copy: on CUDA the answer lies where the next one will be written.
            logits, plain = made(images).float().clone(), call(images).float()
    except Exception as error:  # whatever the compiler's tools raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"The network cannot be compiled here: {first[0]}. Leave -compiled out of the "
            "precision, or see that a C++ compiler is installed."
        ) from error
    if float((logits - plain).abs().max()) > 0.05 * (1.0 + float(plain.abs().max())):
        raise ModelError(
            "The compiled network answers otherwise than the network itself: its compiler is "
            "broken. Leave -compiled out of the precision."
        )
    return made


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
    """The device to compute on; "auto" takes a GPU where there is one.

    Raises:
        InputError: the device is unknown or absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, str) and device.partition(":")[0] not in _DEVICES:
        raise InputError(
            f"device {device!r} cannot be used: choose auto, {', '.join(_DEVICES)}, or one of "
            "several as cuda:1."
        )
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"device {device!r} cannot be used here: {first}. Choose another, or auto; `certifl "
            "doctor` says what this machine has."
        ) from error
    return place


def choose_precision(precision: str, device: torch.device, module: nn.Module | None = None) -> str:
    """The network's arithmetic; "auto" is bfloat16 where the hardware is faster in it.

    On a CPU that is so for convolutions and matrix products; a normalisation layer that could not
    be folded away is slower in bfloat16 than the rest gains (measured: small_cnn at 0.6 times).

    Raises:
        InputError: unknown name.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise InputError(f"precision must be auto or one of {known}; got {precision!r}.")
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    supported = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    normalises = module is not None and any(isinstance(m, _NORMS) for m in module.modules())
    return "bfloat16" if supported and not normalises else "float32"


def _batch(
    batch_size: int | str,
    probe: Tensor,
    device: torch.device,
    module: nn.Module | None = None,
    itemsize: int = 4,
) -> int:
    if batch_size != "auto":
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(
                f"batch_size must be 'auto' or a positive number; got {batch_size!r}."
            )
        return batch_size
    per_image = itemsize * (_largest_activation(module, probe) if module else probe.numel() * 16)
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

    hooks = [m.register_forward_hook(note) for m in module.modules()]
    try:
        with torch.inference_mode():
            module(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return largest[0]
