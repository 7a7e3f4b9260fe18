"""A network whose convolutions and products compute with 8-bit integers (CPU).

Static quantization: the range of every activation is fixed beforehand from training images under
the certified perturbation, and weights get a scale for each output channel. Integer sums have no
order of rounding. What has no integer form here (GroupNorm, means over quarters) runs in float32
between an integer layer and the next.

This module is the only one that knows how: it rewrites the traced network onto oneDNN's integer
kernels, which torch ships and its compiler uses. Another engine would replace `quantize` alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from certifl.certification.checks import check_images
from certifl.certification.inference import is_plain
from certifl.errors import InputError, ModelError
from certifl.perturbations.base import Perturbation
from certifl.rng import generator
from certifl.torch_env import one_thread

CALIBRATION_IMAGES = 128
_DRAWS = 2  # noisy copies of each image that ranges are read from, and as many for agreement
_LEVELS = 255
_BITS = 12  # of a scale, so that the last bits of a float sum do not move it
_SAMPLE = 1 << 16  # values of an activation in which its range is looked for
_CLIPS = tuple(1.0 - 0.05 * k for k in range(13))
_kernels = torch.ops.onednn

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELU = (torch.relu, functional.relu, "relu", "relu_")


@dataclass(frozen=True)
class Range:
    """How an activation is written in 8 bits: value = scale * (number - zero)."""

    scale: float
    zero: int


@dataclass(frozen=True)
class Scales:
    """The ranges of a network's activations, by the name of their node in the traced network."""

    ranges: Mapping[str, Range]

    def stored(self) -> dict[str, list[float | int]]:
        """As a record holds them."""
        return {name: [one.scale, one.zero] for name, one in self.ranges.items()}

    @classmethod
    def read(cls, stored: Any) -> Scales:
        """From a record.

        Raises:
            InputError: they are no scales.
        """
        try:
            ranges = {str(k): Range(float(v[0]), int(v[1])) for k, v in stored.items()}
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"These are no scales of a quantized network: {error}") from error
        fine = all(math.isfinite(r.scale) and r.scale > 0 for r in ranges.values())
        if not fine or not all(0 <= r.zero <= _LEVELS for r in ranges.values()):
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
    """What `certify` and `predict` are given to quantize a network with.

    Args:
        given: images (m, c, h, w) in [0, 1]; or `conditions["quantization"]` of a record.
        perturbation, seed: of the noise that the images get.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return Scales.read(given.get("scales"))
    return Calibration.of(check_images(given), perturbation, seed)


def recorded(conditions: Mapping[str, Any], client: int | None = None) -> Scales | None:
    """The scales that a record's votes were cast with; None in other precisions.

    Args:
        client: whose, in a record of several clients.

    Raises:
        InputError: a record in int8 without scales.
    """
    if conditions.get("precision") != "int8":
        return None
    known = conditions.get("quantization")
    if client is not None and isinstance(known, Mapping) and "scales" not in known:
        known = known.get(str(client))
    return Scales.read(known.get("scales") if isinstance(known, Mapping) else None)


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


def quantize(module: nn.Module, given: Calibration | Scales) -> Quantized:
    """A network in integers; the module, in evaluation mode and float32 on the CPU, is left as is.

    Args:
        module: with BatchNorm folded, as far as it can be.
        given: what the ranges are read from, or the ranges themselves.

    Raises:
        ModelError: it cannot be traced, or nothing in it can be quantized.
        InputError: scales of another network.
    """
    graph = _traced(module)
    layers = [node for node in graph.graph.nodes if _kind(node, graph) is not None]
    everything = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in graph.modules())
    if not layers:
        raise ModelError(
            "Nothing in this network can be quantized: int8 takes plain Conv2d and Linear layers. "
            'Choose precision = "float32" or "bfloat16".'
        )
    plan = _Plan(graph, layers)
    if isinstance(given, Scales):
        scales = given
        if set(scales.ranges) != {node.name for node in plan.ranged}:
            raise InputError("These scales are of another network than the one to be quantized.")
    else:
        scales = _calibrated(graph, plan.ranged, given.noisy)
    with torch.inference_mode():
        made = _Writer(graph, plan, scales).written()
    agreement = None
    if isinstance(given, Calibration):
        agreement = _agreement(module, made, given.held_out)
    return Quantized(made, scales, (len(layers), everything), agreement)


def _traced(module: nn.Module) -> fx.GraphModule:
    if isinstance(module, fx.GraphModule):
        return copy.deepcopy(module)
    try:
        return fx.symbolic_trace(copy.deepcopy(module)).eval()
    except Exception as error:  # tracing runs the model's own forward: anything may be raised
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"The network cannot be quantized, since it cannot be traced ({first}). Choose "
            'precision = "float32" or "bfloat16".'
        ) from error


def _called(node: object, graph: fx.GraphModule) -> nn.Module | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def _kind(node: fx.Node, graph: fx.GraphModule) -> type[nn.Module] | None:
    """nn.Conv2d or nn.Linear where a node is a plain one that can compute in integers."""
    layer = _called(node, graph)
    if is_plain(layer, nn.Linear):
        return nn.Linear
    if is_plain(layer, nn.Conv2d):
        assert isinstance(layer, nn.Conv2d)
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            return nn.Conv2d
    return None


def _is(node: object, graph: fx.GraphModule, targets: tuple[Any, ...], *kinds: type) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op in ("call_function", "call_method"):
        return node.target in targets
    return type(_called(node, graph)) in kinds


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


@dataclass
class _Group:
    """A layer with what is computed along with it: a sum, and a ReLU.

    Attributes:
        layer: the convolution or product. last: the node whose value the group has.
        other: what is added, overwritten by the sum. relu: whether negative values become 0.
    """

    layer: fx.Node
    last: fx.Node
    other: fx.Node | None = None
    relu: bool = False


class _Plan:
    """Which nodes are computed together, and which values have 8 bits."""

    def __init__(self, graph: fx.GraphModule, layers: Sequence[fx.Node]) -> None:
        self.graph = graph
        self.order = {node: place for place, node in enumerate(graph.graph.nodes)}
        self.groups: dict[fx.Node, _Group] = {}
        self.inside: set[fx.Node] = set()
        for layer in layers:
            group = self._group(layer)
            self.groups[group.last] = group
            self.inside |= {layer, group.last}
            if group.other is not None:
                self.inside |= set(group.last.all_input_nodes if not group.relu else ())
        self.layers = set(layers)
        self.ranged = list(self._ranged())

    def _group(self, layer: fx.Node) -> _Group:
        group = _Group(layer, layer)
        user = _only_user(layer)
        if user is not None and _kind(layer, self.graph) is nn.Conv2d:
            other = self._added(layer, user)
            if other is not None:
                self._claimed.add(user)
                group = _Group(layer, user, other)
                user = _only_user(user)
        if user is not None and _is(user, self.graph, _RELU, nn.ReLU):
            group.relu, group.last = True, user
        return group

    @property
    def _claimed(self) -> set[fx.Node]:
        return self.__dict__.setdefault("_sums", set())

    def _added(self, layer: fx.Node, user: fx.Node) -> fx.Node | None:
        """What is added to a convolution, where its memory may be overwritten by the sum."""
        if user in self._claimed or not _is(user, self.graph, _ADD) or user.kwargs:
            return None
        others = [value for value in user.args if value is not layer]
        if len(user.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        other = others[0]
        last = max(other.users, key=lambda node: self.order[node])
        free = last is user and other is not layer.args[0] and other.op != "placeholder"
        return other if free and self._computed(other) else None

    def _computed(self, node: fx.Node) -> bool:
        """Whether its value has memory of its own: of a layer, a sum or a ReLU."""
        relu = _is(node, self.graph, _RELU, nn.ReLU)
        return relu or _kind(node, self.graph) is not None or _is(node, self.graph, _ADD)

    def wants_integers(self, node: fx.Node) -> bool:
        """Whether some user of a value takes it in 8 bits."""
        return any(self.takes_integers(node, user) for user in node.users)

    def takes_integers(self, node: fx.Node, user: fx.Node) -> bool:
        if user in self.layers:
            return True
        if any(group.other is node for group in self.groups.values()):
            return True
        return passes(user, self.graph) and self.wants_integers(user)

    def _ranged(self) -> Iterator[fx.Node]:
        """Nodes whose values are written in 8 bits, once each, in order."""
        wanted = {group.layer.all_input_nodes[0] for group in self.groups.values()}
        wanted |= {group.other for group in self.groups.values() if group.other is not None}
        wanted |= {group.last for group in self.groups.values() if self.in_integers(group)}
        sources = {self._source(node) for node in wanted}
        return iter(sorted(sources, key=self.order.__getitem__))

    def in_integers(self, group: _Group) -> bool:
        """Whether the value of a group is 8 bits: where somebody wants it, and every sum."""
        return group.other is not None or self.wants_integers(group.last)

    def _source(self, node: fx.Node) -> fx.Node:
        """The value that a passed-on one has its range from."""
        while passes(node, self.graph):
            node = node.all_input_nodes[0]
        return node


def passes(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a node passes 8-bit values on as they are: pooling by maximum, flattening."""
    layer = _called(node, graph)
    if type(layer) is nn.MaxPool2d:
        return not layer.return_indices and not layer.ceil_mode and _pairs(layer)[2] == (1, 1)
    return type(layer) in (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d) or (
        _is(node, graph, (torch.flatten, "flatten")) and bool(node.all_input_nodes)
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pairs(pool: nn.MaxPool2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.dilation)


class _Observer(fx.Interpreter):
    """Runs a network and keeps values of some of its nodes."""

    def __init__(self, graph: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(graph)
        self._wanted = set(wanted)
        self.seen: dict[str, list[Tensor]] = {node.name: [] for node in wanted}
        self.ends: dict[str, list[float]] = {node.name: [0.0, 0.0] for node in wanted}

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, kept where it is wanted."""
        value = super().run_node(n)
        if n in self._wanted:
            flat = value.flatten()
            low, high = self.ends[n.name]
            self.ends[n.name] = [min(low, float(flat.min())), max(high, float(flat.max()))]
            self.seen[n.name].append(flat[:: max(1, len(flat) // 4096)].clone())
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
                for name, parts in observer.seen.items()
            }
        )


def _range(values: Tensor, low: float, high: float) -> Range:
    """The range of the least squared error: outliers may be cut off for finer steps."""
    best, error = _fitted(low, high), math.inf
    for clip in _CLIPS:
        tried = _fitted(clip * low, clip * high)
        numbers = (values / tried.scale + tried.zero).round().clamp(0, _LEVELS)
        off = float(((numbers - tried.zero) * tried.scale - values).square().mean())
        if off < error * (1 - 1e-6):
            best, error = tried, off
    return best


def _fitted(low: float, high: float) -> Range:
    mantissa, exponent = math.frexp(max(high - low, 1e-6) / _LEVELS)
    scale = math.ldexp(math.ceil(mantissa * (1 << _BITS)) / (1 << _BITS), exponent)
    return Range(scale, min(_LEVELS, max(0, round(-low / scale))))


def _agreement(module: nn.Module, made: nn.Module, noisy: Tensor) -> float:
    same = 0
    with torch.inference_mode():
        for batch in noisy.split(16):
            held = batch.contiguous(memory_format=torch.channels_last)
            same += int((module(held.clone()).argmax(1) == made(held).argmax(1)).sum())
    return same / len(noisy)


class _Writer:
    """Writes the integer network, node by node."""

    def __init__(self, graph: fx.GraphModule, plan: _Plan, scales: Scales) -> None:
        self._old, self._plan, self._scales = graph, plan, scales.ranges
        self._new = fx.Graph()
        self._root = nn.Module()
        self._floats: dict[fx.Node, fx.Node] = {}
        self._integers: dict[fx.Node, tuple[fx.Node, Range]] = {}
        self._made = 0

    def written(self) -> fx.GraphModule:
        for node in self._old.graph.nodes:
            self._write(node)
        for name, module in self._old.named_children():
            if not hasattr(self._root, name):
                self._root.add_module(name, module)
        for name, value in [*self._old.named_parameters(), *self._old.named_buffers()]:
            if "." not in name:
                self._root.register_buffer(name, value.detach())
        for name, value in vars(self._old).items():
            if name.startswith("_tensor_constant"):
                setattr(self._root, name, value)
        made = fx.GraphModule(self._root, self._new)
        made.delete_all_unused_submodules()
        return made.eval()

    def _write(self, node: fx.Node) -> None:
        group = self._plan.groups.get(node)
        if group is not None:
            self._write_group(group)
        elif node in self._plan.layers or self._is_part(node):
            return  # written with its group
        elif passes(node, self._old) and self._passed_as_integers(node):
            self._pass_on(node)
        elif _is(node, self._old, _RELU, nn.ReLU) and self._only_integers(node):
            # Its range begins at 0, so writing it in 8 bits cuts negative values off.
            own = self._scales[node.name]
            self._integers[node] = (
                self._add(_Quantize(own), self._float(node.all_input_nodes[0])),
                own,
            )
        elif self._is_mean(node):
            self._write_mean(node)
        elif _is(node, self._old, (), nn.GroupNorm):
            # In channels-last its sums depend on the number of threads.
            source = self._add(_Contiguous(), self._float(node.all_input_nodes[0]))
            self._floats[node] = self._new.node_copy(node, lambda _old: source)
        else:
            self._floats[node] = self._new.node_copy(node, self._float)

    def _is_part(self, node: fx.Node) -> bool:
        """A sum inside a group that ends in a ReLU."""
        after = _only_user(node)
        group = self._plan.groups.get(after) if after is not None else None
        return group is not None and group.other is not None and group.last is not node

    def _add(self, module: nn.Module, *args: fx.Node) -> fx.Node:
        self._made += 1
        name = f"int8_{self._made}"
        self._root.add_module(name, module)
        return self._new.call_module(name, args)

    def _float(self, node: fx.Node) -> fx.Node:
        if node not in self._floats:
            value, own = self._integers[node]
            self._floats[node] = self._add(_Dequantize(own), value)
        return self._floats[node]

    def _integer(self, node: Any) -> tuple[fx.Node, Range]:
        if node not in self._integers:
            own = self._scales[self._plan._source(node).name]
            self._integers[node] = self._add(_Quantize(own), self._float(node)), own
        return self._integers[node]

    def _passed_as_integers(self, node: fx.Node) -> bool:
        source = node.all_input_nodes[0]
        return source in self._integers or self._plan.wants_integers(node)

    def _only_integers(self, node: fx.Node) -> bool:
        """Whether all users of a value take it in 8 bits."""
        return bool(node.users) and all(self._plan.takes_integers(node, u) for u in node.users)

    def _pass_on(self, node: fx.Node) -> None:
        value, own = self._integer(node.all_input_nodes[0])
        layer = _called(node, self._old)
        if isinstance(layer, nn.MaxPool2d):
            made = self._add(_MaxPool(layer), value)
        else:
            made = self._new.node_copy(node, lambda _old: value)
        self._integers[node] = made, own

    def _is_mean(self, node: fx.Node) -> bool:
        layer = _called(node, self._old)
        one = isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
        return one and node.all_input_nodes[0] in self._integers

    def _write_mean(self, node: fx.Node) -> None:
        value, own = self._integers[node.all_input_nodes[0]]
        self._floats[node] = self._add(_Mean(own), value)

    def _write_group(self, group: _Group) -> None:
        layer = _called(group.layer, self._old)
        value, source = self._integer(group.layer.args[0])
        out = self._scales[group.last.name] if self._plan.in_integers(group) else None
        if isinstance(layer, nn.Linear):
            made = self._add(_Linear(layer, source, out, group.relu), value)
        else:
            assert isinstance(layer, nn.Conv2d)
            if group.other is None:
                made = self._add(_Convolution(layer, source, out, group.relu), value)
            else:
                assert out is not None
                other, own = self._integer(group.other)
                made = self._add(_Sum(layer, source, out, group.relu, own), value, other)
        if out is None:
            self._floats[group.last] = made
        else:
            self._integers[group.last] = made, out


class _Quantize(nn.Module):
    def __init__(self, own: Range) -> None:
        super().__init__()
        self.inverse, self.shift = 1.0 / own.scale, own.zero + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.inverse).add_(self.shift).clamp_(0, _LEVELS).to(torch.uint8)


class _Dequantize(nn.Module):
    def __init__(self, own: Range) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return x.float().sub_(self.own.zero).mul_(self.own.scale)


class _Contiguous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


class _Mean(nn.Module):
    """Means over all places; sums of so few bits are exact in float32."""

    def __init__(self, own: Range) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        total = x.float().sum((-2, -1), keepdim=True)
        places = x.shape[-2] * x.shape[-1]
        return total.sub_(self.own.zero * places).mul_(self.own.scale / places)


class _MaxPool(nn.Module):
    """By the maximum of shifted slices: torch's own pooling has no fast kernel for 8 bits."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        self.size, self.stride, _ = _pairs(layer)
        self.padding = _pair(layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.padding
        if down or across:
            x = functional.pad(x, (across, across, down, down), value=0)  # the least number
        height = (x.shape[-2] - self.size[0]) // self.stride[0] + 1
        width = (x.shape[-1] - self.size[1]) // self.stride[1] + 1
        out: Tensor | None = None
        for row in range(self.size[0]):
            rows = slice(row, row + (height - 1) * self.stride[0] + 1, self.stride[0])
            for column in range(self.size[1]):
                end = column + (width - 1) * self.stride[1] + 1
                part = x[:, :, rows, slice(column, end, self.stride[1])]
                out = part if out is None else torch.maximum(out, part)
        assert out is not None
        return out


class _Layer(nn.Module):
    """The weights of a layer as 8-bit numbers, with a scale for each output channel."""

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, source: Range, out: Range | None, relu: bool
    ) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        largest = weight.abs().flatten(1).amax(1).clamp(min=1e-12)
        scales = largest / 127
        shape = (-1, *(1 for _ in weight.shape[1:]))
        self.numbers = (weight / scales.view(shape)).round().clamp(-127, 127).to(torch.int8)
        self.scales, self.zeros = scales, torch.zeros(len(scales), dtype=torch.int64)
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        self.source, self.relu = source, "relu" if relu else "none"
        self.out = out or Range(1.0, 0)
        self.dtype = torch.float32 if out is None else torch.uint8


class _Linear(_Layer):
    """Its kernel gives whole sums, scaled afterwards: it would round otherwise by batch size."""

    def __init__(self, layer: nn.Linear, source: Range, out: Range | None, relu: bool) -> None:
        super().__init__(layer, source, out, relu)
        self.weight = _kernels.qlinear_prepack(self.numbers, None)
        self.factors = self.scales * source.scale
        self.ones = torch.ones_like(self.scales)
        self.quantize = None if out is None else _Quantize(out)

    def forward(self, x: Tensor) -> Tensor:
        sums = _kernels.qlinear_pointwise(
            x,
            1.0,
            self.source.zero,
            self.weight,
            self.ones,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).mul_(self.factors)
        if self.bias is not None:
            sums.add_(self.bias)
        if self.relu == "relu":
            sums.relu_()
        return sums if self.quantize is None else self.quantize(sums)


class _Convolution(_Layer):
    def __init__(self, layer: nn.Conv2d, source: Range, out: Range | None, relu: bool) -> None:
        super().__init__(layer, source, out, relu)
        assert not isinstance(layer.padding, str)
        self.shape = (
            list(layer.stride),
            list(layer.padding),
            list(layer.dilation),
            layer.groups,
        )
        packed = _kernels.qconv_prepack(
            self.numbers, self.scales, source.scale, source.zero, *self.shape, None
        )
        self.weight = packed
        self.before = (source.scale, source.zero)
        self.after = (self.out.scale, self.out.zero, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _kernels.qconv_pointwise(
            x,
            *self.before,
            self.weight,
            self.scales,
            self.zeros,
            self.bias,
            *self.shape,
            *self.after,
            self.relu,
            [],
            "",
        )


class _Sum(_Convolution):
    """A convolution added to other values, whose memory the sum takes."""

    def __init__(
        self, layer: nn.Conv2d, source: Range, out: Range, relu: bool, other: Range
    ) -> None:
        super().__init__(layer, source, out, relu)
        self.other = (other.scale, other.zero)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _kernels.qconv2d_pointwise.binary(
            x,
            *self.before,
            self.weight,
            self.scales,
            self.zeros,
            other,
            self.bias,
            *self.shape,
            *self.after,
            *self.other,
            "sum",
            1.0,
            self.relu,
            [],
            "",
        )
