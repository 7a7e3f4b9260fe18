"""A network whose convolutions and products compute with 8-bit integers (CPU).

Static quantization: the range of every activation is fixed beforehand from training images under
the certified perturbation, and weights get a scale for each output channel. Integer sums have no
order of rounding. What has no integer form here (GroupNorm, means over quarters) runs in float32
between an integer layer and the next.

The network is traced (here), its integer form planned and written (`quantized_graph`), onto
oneDNN's kernels. Another engine would replace `quantize` alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from certifl.certification.checks import check_images
from certifl.certification.quantized_graph import (
    LEVELS,
    Plan,
    Range,
    Writer,
    kind_of,
    overwritten,
)
from certifl.errors import InputError, ModelError, first_line
from certifl.module_copies import loses_hooks
from certifl.perturbations.base import Perturbation
from certifl.rng import generator
from certifl.torch_env import one_thread

_log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 128
_DRAWS = 2  # noisy copies of each image that ranges are read from, and as many for agreement
_BITS = 12  # of a scale, so that the last bits of a float sum do not move it
_SAMPLE = 1 << 16  # values of an activation in which its range is looked for
_CLIPS = tuple(1.0 - 0.05 * k for k in range(13))
_LOW_AGREEMENT = 0.95
_CLIENT = re.compile("[0-9]{1,18}")
_PRODUCTS = (
    *(functional.conv2d, functional.linear, torch.conv2d, torch.matmul, torch.bmm),
    *("matmul", "bmm", "addmm"),
)


@dataclass(frozen=True)
class Scales:
    """The ranges of a network's activations, by the name of their node in the traced network."""

    ranges: Mapping[str, Range]

    def stored(self) -> dict[str, list[float | int]]:
        """As a record holds them."""
        return {name: [one.scale, one.zero] for name, one in self.ranges.items()}

    @classmethod
    def read(cls, stored: Any) -> Scales:
        """From a record; InputError where they cannot be read as scales."""
        try:
            ranges = {str(k): Range(float(v[0]), int(v[1])) for k, v in stored.items()}
        except (AttributeError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise InputError(f"These are not scales of a quantized network: {error}") from error
        fine = all(math.isfinite(r.scale) and r.scale > 0 for r in ranges.values())
        if not fine or not all(0 <= r.zero <= LEVELS for r in ranges.values()):
            raise InputError("The scales of a quantized network must be positive numbers.")
        return cls(ranges)

    def fingerprint(self, model: str | None) -> str:
        """SHA-256 of the quantized network: of its weights' fingerprint and these scales."""
        text = json.dumps([model, self.stored()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Calibration:
    """Noisy training images: one half fixes the ranges, agreement is counted on the other."""

    noisy: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, images: Tensor, perturbation: Perturbation, seed: int) -> Calibration:
        """The first images under the perturbation: a pure function of images and seed."""
        chosen = images[:CALIBRATION_IMAGES].to("cpu")
        shape = tuple(chosen.shape[1:])
        drawn = generator(seed, "calibration")
        copies = chosen.repeat_interleave(2 * _DRAWS, dim=0)
        params = perturbation.sample(len(copies), shape, drawn)  # pyright: ignore[reportArgumentType]
        with torch.inference_mode():
            noisy = perturbation.apply(copies, params).unflatten(0, (len(chosen), 2, _DRAWS))
        return cls(noisy[:, 0].flatten(0, 1), noisy[:, 1].flatten(0, 1))


def calibration_of(
    given: Tensor | np.ndarray | Mapping[str, Any] | None, perturbation: Perturbation, seed: int
) -> Calibration | Scales | None:
    """What images in [0, 1], or `conditions["quantization"]` of a record, quantize with."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return Scales.read(given.get("scales"))
    return Calibration.of(check_images(given), perturbation, seed)


def recorded(conditions: Mapping[str, Any], client: int | None = None) -> Scales | None:
    """The scales that a record's votes (of a client) were cast with; None unless in int8."""
    if conditions.get("precision") != "int8":
        return None
    known = conditions.get("quantization")
    if client is not None and isinstance(known, Mapping) and "scales" not in known:
        known = known.get(str(client))
    return Scales.read(known.get("scales") if isinstance(known, Mapping) else None)


def fingerprint_problems(conditions: Mapping[str, Any]) -> list[tuple[int | None, str]]:
    """Where scales of int8 do not give the recorded fingerprint: client (None = of all), why."""
    if conditions.get("precision") != "int8":
        stray = "quantization" in conditions
        return [(None, "scales of int8 are recorded with votes in another precision")] * stray
    known, models = conditions.get("quantization"), conditions.get("model_fingerprint")
    if not isinstance(models, Mapping):
        named: list[tuple[int | None, Any, Any]] = [(None, models, known)]
    else:
        if strange := [name for name in models if not _CLIENT.fullmatch(str(name))]:
            return [(None, f"a network is recorded for {strange[0]!r:.40}, which is not a client")]
        by_client = known if isinstance(known, Mapping) else {}
        named = [(int(name), model, by_client.get(name)) for name, model in models.items()]
    problems = ((client, _fingerprint_problem(model, own)) for client, model, own in named)
    return [(client, problem) for client, problem in problems if problem is not None]


def _fingerprint_problem(model: str | None, stored: Any) -> str | None:
    if not isinstance(stored, Mapping):
        return "its votes were cast in int8, but no scales are recorded"
    try:
        fingerprint = Scales.read(stored.get("scales")).fingerprint(model)
    except InputError as error:
        return f"its scales cannot be read: {error}"
    if stored.get("fingerprint") != fingerprint:
        return "the fingerprint of its network in int8 is not that of its weights and scales"
    return None


@dataclass(frozen=True)
class Quantized:
    """A network in integers.

    Attributes:
        module: images (m, c, h, w) float32 -> logits (m, classes).
        scales: the ranges it computes with.
        layers: how many convolutions and products compute in integers, of how many.
        agreement: share of noisy training images that it classifies as the float32 network does;
            None where the scales were given.
    """

    module: nn.Module
    scales: Scales
    layers: tuple[int, int]
    agreement: float | None


def quantize(module: nn.Module, given: Calibration | Scales, probe: Tensor) -> Quantized:
    """A network in integers; the module, in evaluation mode and float32 on the CPU, is left as is.

    Args:
        module: with BatchNorm folded, as far as it can be.
        given: what the ranges are read from, or the ranges themselves.
        probe: (m, c, h, w), images on which the traced network must give the module's logits.

    Raises:
        ModelError: it cannot be traced, or nothing in it can be quantized.
        InputError: scales of another network.
    """
    graph = _traced(module, probe)
    layers = [node for node in graph.graph.nodes if kind_of(node, graph) is not None]
    if not layers:
        raise ModelError(
            "Nothing in this network can be quantized: int8 takes plain Conv2d and Linear layers. "
            'Choose precision = "float32" or "bfloat16".'
        )
    if (node := overwritten(graph)) is not None:
        raise ModelError(
            f"The network cannot be quantized: {node.target} writes over a value that is read "
            'later. Choose precision = "float32" or "bfloat16".'
        )
    plan = Plan(graph, layers)
    if isinstance(given, Scales):
        scales = given
        if set(scales.ranges) != {node.name for node in plan.ranged}:
            raise InputError("These scales are of another network than the one to be quantized.")
    else:
        scales = _calibrated(graph, plan.ranged, given.noisy)
    with torch.inference_mode():
        written = Writer(graph, plan, scales.ranges).written()
    share = _agreement(module, written, given.held_out) if isinstance(given, Calibration) else None
    quantized = Quantized(
        written, scales, (len(layers), len(layers) + _others(graph, layers)), share
    )
    _report(quantized)
    return quantized


def _report(quantized: Quantized) -> None:
    """Log what stays in float32, and how often the two networks agree."""
    if quantized.layers[0] < quantized.layers[1]:
        _log.info("%d of %d layers compute in int8, the others in float32.", *quantized.layers)
    if quantized.agreement is None:
        return
    level = logging.WARNING if quantized.agreement < _LOW_AGREEMENT else logging.INFO
    _log.log(
        level,
        "In int8 the network agrees with float32 on %.1f %% of noisy training images.",
        100 * quantized.agreement,
    )


def _others(graph: fx.GraphModule, layers: Sequence[fx.Node]) -> int:
    """How many convolutions and products compute in float32."""
    own = {id(graph.get_submodule(str(node.target))) for node in layers}
    kinds = (nn.Conv2d, nn.Linear)
    modules = [m for m in graph.modules() if isinstance(m, kinds) and id(m) not in own]
    calls = [
        node
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_method") and node.target in _PRODUCTS
    ]
    return len(modules) + len(calls)


def _traced(module: nn.Module, probe: Tensor) -> fx.GraphModule:
    """A copy as a graph of its layers; ModelError if none computes the same."""
    advice = 'Choose precision = "float32" or "bfloat16".'
    if isinstance(module, fx.GraphModule):
        return copy.deepcopy(module)
    try:
        graph = fx.symbolic_trace(copy.deepcopy(module)).eval()
        with torch.inference_mode():
            before, after = module(probe.clone()), graph(probe.clone())
    except Exception as error:  # tracing runs the model's own forward: anything may be raised
        raise ModelError(
            f"The network cannot be quantized, since it cannot be traced ({first_line(error)}). "
            f"{advice}"
        ) from error
    tolerance = 1e-3 * (1.0 + float(before.abs().max()))
    if loses_hooks(module, graph) or not torch.allclose(before, after, atol=tolerance):
        raise ModelError(
            "The network cannot be quantized: tracing leaves out hooks, or computes other logits. "
            f"{advice}"
        )
    return graph


class _Observer(fx.Interpreter):
    """Runs a network and records values of some of its nodes."""

    def __init__(self, graph: fx.GraphModule, ranged: Sequence[fx.Node]) -> None:
        super().__init__(graph)
        self._ranged = set(ranged)
        self.samples: dict[str, list[Tensor]] = {node.name: [] for node in ranged}
        self.ends: dict[str, list[float]] = {node.name: [0.0, 0.0] for node in ranged}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, recorded where it gets a range."""
        value = super().run_node(n)
        if n in self._ranged:
            flat = value.flatten()
            low, high = self.ends[n.name]
            self.ends[n.name] = [min(low, float(flat.min())), max(high, float(flat.max()))]
            self.samples[n.name].append(flat[:: max(1, len(flat) // 4096)].clone())
        return value


def _calibrated(graph: fx.GraphModule, ranged: Sequence[fx.Node], noisy: Tensor) -> Scales:
    """On one thread, since sums of several round in another order."""
    observer = _Observer(graph, ranged)
    with torch.inference_mode(), one_thread(True):
        for batch in noisy.split(16):
            observer.run(batch.contiguous(memory_format=torch.channels_last))
        return Scales(
            {
                name: _range(torch.cat(parts)[:_SAMPLE].double(), *observer.ends[name])
                for name, parts in observer.samples.items()
            }
        )


def _range(values: Tensor, low: float, high: float) -> Range:
    """The range of the least squared error: outliers may be cut off for finer steps."""
    best, error = _fitted(low, high), math.inf
    for clip in _CLIPS:
        tried = _fitted(clip * low, clip * high)
        numbers = (values / tried.scale + tried.zero).round().clamp(0, LEVELS)
        off = float(((numbers - tried.zero) * tried.scale - values).square().mean())
        if off < error * (1 - 1e-6):
            best, error = tried, off
    return best


def _fitted(low: float, high: float) -> Range:
    mantissa, exponent = math.frexp(max(high - low, 1e-6) / LEVELS)
    scale = math.ldexp(math.ceil(mantissa * (1 << _BITS)) / (1 << _BITS), exponent)
    return Range(scale, min(LEVELS, max(0, round(-low / scale))))


def _agreement(module: nn.Module, quantized: nn.Module, noisy: Tensor) -> float:
    same = 0
    with torch.inference_mode():
        for batch in noisy.split(16):
            images = batch.contiguous(memory_format=torch.channels_last)
            same += int((module(images.clone()).argmax(1) == quantized(images).argmax(1)).sum())
    return same / len(noisy)
