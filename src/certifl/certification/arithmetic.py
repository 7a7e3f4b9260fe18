"""The arithmetic that `precision = "auto"` stands for: measured once, then stored.

A choice by time is random: two measurements of one network may end differently, and the votes with
them. So a choice is made once and read from then on. It is stored in the cache folder, one file
for each network, perturbation, processor and version, and besides in the manifest of a run, beside
saved votes, and in every record (`precision`, `batch_size`, `threads`).

bfloat16 has to be faster, and must lose nothing. A network is cast only if all that it computes is
known to bear it: layers, activations, pooling. One that computes with coordinates or probabilities
of its own does not, since bfloat16 has eight bits. Then votes of both arithmetics are compared on
images whose votes in float32 are unanimous.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import operator
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from certifl._version import __version__
from certifl.certification.network import Model, Network, computes_bfloat16, prepare
from certifl.certification.quantization import Calibration, Scales
from certifl.certification.sampling import VoteCounter, voting
from certifl.certification.settings import Settings
from certifl.data.dataset import cache_folder
from certifl.errors import ModelError
from certifl.models import code_fingerprint, fingerprint
from certifl.models.architectures import Normalize, QuarterMeans
from certifl.module_copies import unwrapped
from certifl.perturbations import describe
from certifl.perturbations.base import Perturbation
from certifl.torch_env import several_threads_requested

_log = logging.getLogger(__name__)

FASTER = 1.15  # what a change of arithmetic, batch size or threads has to gain
_SECONDS = 1.5  # of all timed calls together
_CALLS = 5  # of each candidate; the fastest counts, since other work on a machine only slows
_LONGEST_CALL = 0.1
_SHARE_OF_VOTES = 0.01  # of the planned votes, for the comparison of both arithmetics
_FEWEST_IMAGES = 2
_LARGEST_BATCH = 1 << 15
_EARLY = 10  # times fewer votes than n that sequential certification takes on average
_SURPLUS = 1.6  # standard deviations by which lost votes may exceed won ones

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Linear),
    *(nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, Normalize),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, QuarterMeans),
    *(nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d, nn.Identity),
)
_FUNCTIONS = {
    *(operator.add, operator.iadd, torch.add, torch.cat, torch.flatten, functional.dropout),
    *(torch.relu, functional.relu, functional.leaky_relu, functional.gelu, functional.silu),
    *(functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d),
}
_METHODS = {"add", "add_", "relu", "relu_", "flatten", "view", "reshape", "size", "mean"}
_AFFINE = {operator.add, operator.sub, operator.mul, operator.truediv}
_SELECTING = {operator.getitem, getattr}  # a part, a shape: no arithmetic
_OF_SIZES = {operator.mul, operator.floordiv}


@dataclass(frozen=True)
class Arithmetic:
    """How a network votes; equal choices give equal votes on one machine.

    Attributes:
        precision: a name in `PRECISIONS`.
        batch_size: noisy images per call.
        threads: 1, or 0 for as many as torch computes with.
    """

    precision: str
    batch_size: int
    threads: int

    @classmethod
    def of(cls, network: Network) -> Arithmetic:
        """That of a network."""
        return cls(network.precision, network.batch_size, int(network.one_thread))

    @classmethod
    def read(cls, stored: Any) -> Arithmetic | None:
        """From what `stored` wrote; None where it cannot be used."""
        if not isinstance(stored, Mapping) or set(stored) != _FIELDS:
            return None
        read = cls(**stored)
        sizes = type(read.batch_size) is int and 0 < read.batch_size <= _LARGEST_BATCH
        known = read.precision in ("float32", "bfloat16") and read.threads in (0, 1)
        return read if sizes and known else None

    def stored(self) -> dict[str, Any]:
        """As a file holds it."""
        return dataclasses.asdict(self)


_FIELDS = {field.name for field in dataclasses.fields(Arithmetic)}


@dataclass(frozen=True)
class Trial:
    """The votes that an arithmetic is chosen for.

    Attributes:
        perturbation, seed: what is certified, and with which noise.
        n0: selection votes of an image.
        planned: votes that are expected in all.
    """

    perturbation: Perturbation
    seed: int
    n0: int
    planned: int

    @classmethod
    def of(cls, perturbation: Perturbation, settings: Settings, seed: int, images: int) -> Trial:
        """The certification of so many images."""
        early = len(settings.estimator_for(perturbation).looks) > 1
        each = settings.n0 + (settings.n // _EARLY if early else settings.n)
        return cls(perturbation, seed, settings.n0, images * each)

    @property
    def images(self) -> int:
        """How many images may vote in both arithmetics."""
        return int(_SHARE_OF_VOTES * self.planned / (2 * self.n0))


def ready(
    model: Model,
    images: Tensor,
    trial: Trial,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | str = "auto",
    stored: Arithmetic | None = None,
    calibration: Calibration | Scales | None = None,
) -> Network:
    """A model prepared for votes, in the arithmetic asked for; "auto" is stored, or measured.

    Args:
        model, device, precision, batch_size, calibration: as `network.prepare` takes them.
        images: (m, c, h, w), some of those that are certified. trial: the votes.
        stored: the choice of an earlier call, for "auto".
    """
    if precision != "auto":
        return prepare(model, images, device, precision, batch_size, calibration)
    if stored is None:
        stored = choose_arithmetic(model, images, trial, device, batch_size)
    return in_arithmetic(model, images, stored, device)


def in_arithmetic(
    model: Model, images: Tensor, choice: Arithmetic, device: str | torch.device
) -> Network:
    """A model prepared as was chosen."""
    network = prepare(model, images, device, choice.precision, choice.batch_size)
    return dataclasses.replace(network, one_thread=network.one_thread or choice.threads == 1)


def choose_arithmetic(
    model: Model,
    images: Tensor,
    trial: Trial,
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
) -> Arithmetic:
    """The choice that is cached for a network, or else the measured one, which is then cached.

    Few votes, of which a hundredth is not enough to look for a loss, are cast in float32 unless
    there is a choice; this is not cached.
    """
    plain = prepare(model, images, device, "float32", batch_size)
    if not isinstance(model, nn.Module) or plain.as_it_is:
        return Arithmetic.of(plain)
    asked = batch_size if batch_size == "auto" else plain.batch_size  # a plain number
    path = _cached(model, images, trial.perturbation, plain.device, asked)
    choice = _read(path)
    if choice is None and trial.images >= _FEWEST_IMAGES:
        choice = _cache(path, _measured(model, images, trial, plain, batch_size))
    return choice or Arithmetic.of(plain)


def _measured(
    model: nn.Module, images: Tensor, trial: Trial, plain: Network, batch_size: int | str
) -> Arithmetic:
    clock = _Clock(images[:1])
    network = _faster_precision(model, images, trial, plain, batch_size, clock)
    if batch_size == "auto":
        longest = clock.longest(network)
        network = clock.fastest(_sizes(network, longest), longest)
    if _threads_matter(network):
        networks = [network, dataclasses.replace(network, one_thread=True)]
        network = clock.fastest(networks, clock.longest(network))
    _log.info("Votes are cast in %s, %d at a time.", network.precision, network.batch_size)
    return Arithmetic.of(network)


def _faster_precision(
    model: nn.Module,
    images: Tensor,
    trial: Trial,
    plain: Network,
    batch_size: int | str,
    clock: _Clock,
) -> Network:
    """The network in bfloat16 where that is possible, faster and loses nothing."""
    if not (computes_bfloat16(plain.device) and bears_rounding(model)):
        return plain
    try:
        rounded = prepare(model, images, plain.device, "bfloat16", batch_size)
    except ModelError as error:  # a constant that is neither a weight nor a buffer, say
        _log.info("The network votes in float32, since it fails in bfloat16: %s", error)
        return plain
    faster = clock.fastest([plain, rounded], clock.longest(plain))
    if faster is plain or loses(plain, rounded, images, trial):
        return plain
    return rounded


def _sizes(network: Network, longest: int) -> list[Network]:
    """The network with its batch size, a quarter and four times of it, as far as it was timed."""
    own = network.batch_size
    others = [size for size in (max(1, own // 4), 4 * own) if own <= longest >= size]
    return [network, *(dataclasses.replace(network, batch_size=size) for size in others)]


def _threads_matter(network: Network) -> bool:
    several = network.device.type == "cpu" and network.threads > 1
    return several and not several_threads_requested()


class _Tracer(fx.Tracer):
    """Takes known layers as a whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_known(m) or super().is_leaf_module(m, module_qualified_name)


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer computes what its class of torch or certifl says, and nothing of its own."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    own = [
        type(layer).forward,
        *(hook if hasattr(hook, "__code__") else type(hook) for hook in hooks),
    ]
    known = all(part.__module__.partition(".")[0] in ("torch", "certifl") for part in own)
    return known and isinstance(layer, _LAYERS)


def bears_rounding(model: nn.Module) -> bool:
    """Whether everything that a network computes is known to bear eight bits."""
    inner = unwrapped(model)
    try:
        nodes = list(_Tracer().trace(inner).nodes)
    except Exception as error:  # tracing runs the model's own forward: anything may be raised
        _log.info("The network votes in float32, since it cannot be traced: %s", error)
        return False
    strange = next((node for node in nodes if not _bears(node, inner)), None)
    if strange is not None:
        _log.info("The network votes in float32: %s may not tolerate bfloat16.", strange.target)
    return strange is None


def _bears(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return _is_known(model.get_submodule(str(node.target)))
    if node.op == "call_function":
        known = node.target in _FUNCTIONS or node.target in _SELECTING
        return known or _is_size(node) or _normalizes(node)
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "get_attr":  # a mean or a deviation for each channel
        value = operator.attrgetter(str(node.target))(model)
        flat = value.numel() == 1 or value.shape[-2:] == (1, 1)
        return flat and all(map(_normalizes, node.users))
    return True


def _is_size(node: Any) -> bool:
    """Whether it is a number, a shape, or computed from these alone."""
    if not isinstance(node, fx.Node):
        return isinstance(node, int)
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return node.args[1] == "shape"
    if node.target is operator.getitem:
        return _is_size(node.args[0])
    return node.target in _OF_SIZES and all(map(_is_size, node.args))


def _normalizes(node: fx.Node) -> bool:
    """Whether it shifts or scales the images themselves, before any layer."""
    if node.op == "placeholder":
        return True
    affine = node.op == "call_function" and node.target in _AFFINE
    values = [value for value in node.args if isinstance(value, fx.Node)]
    return affine and all(value.op == "get_attr" or _normalizes(value) for value in values)


def loses(plain: Network, rounded: Network, images: Tensor, trial: Trial) -> bool:
    """Whether images that are unanimous in float32 lose votes in another arithmetic.

    Rounding moves votes both ways: an image may be unanimous in one arithmetic by luck. So the
    votes that are lost are compared with those that are won where the other is unanimous.
    """
    first, other = (
        VoteCounter(network, trial.perturbation, trial.seed).count_each(
            images[: trial.images].to(network.device), "selection", trial.n0
        )
        for network in (plain, rounded)
    )
    lost, won = _changed_votes(first, other), _changed_votes(other, first)
    surplus = lost - won
    loses = surplus > _SURPLUS * math.sqrt(lost + won)
    if loses:
        _log.info(
            "The network votes in float32: in bfloat16 %d votes were lost on images that are "
            "unanimous in float32, and %d gained.",
            lost,
            won,
        )
    return loses


def _changed_votes(first: np.ndarray, other: np.ndarray) -> int:
    """Votes of `other` that leave the class of images on which `first` is unanimous."""
    rows, top = np.arange(len(first)), first.argmax(axis=1)
    unanimous = first[rows, top] == first.sum(axis=1)
    return int((other.sum(axis=1) - other[rows, top])[unanimous].sum())


def seconds_of_call(network: Network, noisy: Tensor) -> float:
    """Seconds of one call."""

    def now() -> float:
        if network.device.type == "cuda":
            torch.cuda.synchronize(network.device)
        return time.perf_counter()

    with voting(network):
        started = now()
        network.logits(noisy)
        return now() - started


class _Clock:
    """Times networks against each other, within about a second for all of them."""

    def __init__(self, image: Tensor) -> None:
        self._left = _SECONDS
        self._image = image

    def fastest(self, networks: list[Network], rows: int) -> Network:
        """The first network, or the fastest if faster by `FASTER`; calls of `rows` at most."""
        if self._left <= 0 or len(networks) == 1:
            return networks[0]
        sizes = [min(network.batch_size, rows) for network in networks]
        best = [math.inf] * len(networks)
        for _ in range(_CALLS):
            for index, network in enumerate(networks):
                seconds = self._call(network, sizes[index]) / sizes[index]
                best[index] = min(best[index], seconds)
            if self._left <= 0:
                break
        winner = int(np.argmin(best))
        return networks[winner] if best[0] >= FASTER * best[winner] else networks[0]

    def longest(self, network: Network) -> int:
        """The most rows of a call that is short enough to be repeated, found with few."""
        few = min(16, network.batch_size)
        self._call(network, few)
        each = self._call(network, few) / few
        fitting = max(few, int(_LONGEST_CALL / max(each, 1e-9)))
        return 1 << (fitting.bit_length() - 1)

    def _call(self, network: Network, rows: int) -> float:
        noisy = self._image.to(network.device).expand(rows, -1, -1, -1).contiguous()
        seconds = seconds_of_call(network, noisy)
        self._left -= seconds
        return seconds


def _cached(
    model: nn.Module,
    images: Tensor,
    perturbation: Perturbation,
    device: torch.device,
    batch_size: int | str,
) -> Path:
    about = {
        "model": fingerprint(model),
        "code": code_fingerprint(model),
        "layers": str(model),
        "images": list(images.shape[1:]),
        "perturbation": describe(perturbation),
        "batch_size": batch_size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": [__version__, torch.__version__],
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "arithmetic" / f"{key[:32]}.json"


def device_name(device: torch.device) -> str:
    """A name of the device that differs where its arithmetic may differ."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    named = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    about = {key.strip(): value.strip() for key, value in named.items()}
    flags = hashlib.sha256(about.get("flags", "").encode()).hexdigest()[:8]
    return f"{about.get('model name', platform.machine())}, {flags}"


def _read(path: Path) -> Arithmetic | None:
    try:
        return Arithmetic.read(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _cache(path: Path, choice: Arithmetic) -> Arithmetic:
    """Cache a choice; where two processes measured at once, the first one is returned."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            json.dump(choice.stored(), file)
    except OSError as error:
        if (cached := _read(path)) is not None:
            return cached
        _log.warning(
            "The measured arithmetic cannot be cached (%s), so another call may choose another: "
            "give the precision, or a folder in CERTIFL_CACHE.",
            error,
        )
    return choice
