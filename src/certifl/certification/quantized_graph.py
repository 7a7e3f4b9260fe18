"""A traced network written anew with integer layers: what is computed together, and in 8 bits.

A convolution takes with it the sum and the ReLU that follow; values pass from an integer layer to
the next without leaving 8 bits where everything between them can.

Layers compute on oneDNN's kernels (CPU), which torch ships and its compiler uses. They are
internal to torch, and this file is the only one that calls them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from certifl.module_copies import called, is_plain

LEVELS = 255
_kernels = torch.ops.onednn


@dataclass(frozen=True)
class Range:
    """How an activation is written in 8 bits: value = scale * (number - zero)."""

    scale: float
    zero: int


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pool_pairs(pool: nn.MaxPool2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel size, stride and dilation of a pooling, for both axes."""
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.dilation)


class _Quantize(nn.Module):
    """float32 to 8 bits."""

    def __init__(self, own: Range) -> None:
        super().__init__()
        self.inverse, self.shift = 1.0 / own.scale, own.zero + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.inverse).add_(self.shift).clamp_(0, LEVELS).to(torch.uint8)


class _Dequantize(nn.Module):
    """8 bits to float32."""

    def __init__(self, own: Range) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return x.float().sub_(self.own.zero).mul_(self.own.scale)


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
        self.size, self.stride, _ = _pool_pairs(layer)
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
        packed = _kernels.qlinear_prepack(self.numbers, None)
        self.weights = (packed, torch.ones_like(self.scales), self.zeros)
        self.factors = self.scales * source.scale
        self.quantize = None if out is None else _Quantize(out)

    def forward(self, x: Tensor) -> Tensor:
        whole = (None, 1.0, 0, torch.float32, "none", [], "")
        sums = _kernels.qlinear_pointwise(x, 1.0, self.source.zero, *self.weights, *whole)
        sums.mul_(self.factors)
        if self.bias is not None:
            sums.add_(self.bias)
        if self.relu == "relu":
            sums.relu_()
        return sums if self.quantize is None else self.quantize(sums)


class _Convolution(_Layer):
    """A convolution in integers, with a ReLU where one follows."""

    def __init__(self, layer: nn.Conv2d, source: Range, out: Range | None, relu: bool) -> None:
        super().__init__(layer, source, out, relu)
        assert not isinstance(layer.padding, str)
        shape = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        packed = _kernels.qconv_prepack(
            self.numbers, self.scales, source.scale, source.zero, *shape, None
        )
        self.before = (source.scale, source.zero, packed, self.scales, self.zeros)
        self.after = (self.bias, *shape, self.out.scale, self.out.zero, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _kernels.qconv_pointwise(x, *self.before, *self.after, self.relu, [], "")


class _Sum(_Convolution):
    """A convolution added to other values, whose memory the sum takes."""

    def __init__(
        self, layer: nn.Conv2d, source: Range, out: Range, relu: bool, other: Range
    ) -> None:
        super().__init__(layer, source, out, relu)
        self.other = (other.scale, other.zero)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        added = (*self.other, "sum", 1.0, self.relu, [], "")
        return _kernels.qconv2d_pointwise.binary(x, *self.before, other, *self.after, *added)


_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_AUGMENTED = ("iadd", "isub", "imul", "itruediv")
_RELU = (torch.relu, functional.relu, "relu", "relu_")


def kind_of(node: fx.Node, graph: fx.GraphModule) -> type[nn.Module] | None:
    """nn.Conv2d or nn.Linear where a node is a plain one that can compute in integers."""
    layer = called(node, graph)
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
    return type(called(node, graph)) in kinds


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


@dataclass
class _Group:
    """A layer with what is computed along with it: a sum, and a ReLU.

    Attributes:
        layer: the convolution or product. last: the node whose value the group has.
        other: what is added, overwritten by the sum, the node `sum`.
        relu: whether negative values become 0.
    """

    layer: fx.Node
    last: fx.Node
    other: fx.Node | None = None
    sum: fx.Node | None = None
    relu: bool = False


class Plan:
    """Which nodes are computed together, and which values have 8 bits."""

    def __init__(self, graph: fx.GraphModule, layers: Sequence[fx.Node]) -> None:
        self.graph = graph
        self.order = {node: position for position, node in enumerate(graph.graph.nodes)}
        self.groups: dict[fx.Node, _Group] = {}
        self._sums: set[fx.Node] = set()
        for layer in layers:
            group = self._group(layer)
            self.groups[group.last] = group
        self.layers = set(layers)
        self.ranged = list(self._ranged())

    def _group(self, layer: fx.Node) -> _Group:
        group = _Group(layer, layer)
        user = _only_user(layer)
        if user is not None and kind_of(layer, self.graph) is nn.Conv2d:
            other = self._added(layer, user)
            if other is not None:
                self._sums.add(user)
                group = _Group(layer, user, other, user)
                user = _only_user(user)
        if user is not None and _is(user, self.graph, _RELU, nn.ReLU):
            group.relu, group.last = True, user
        return group

    def _added(self, layer: fx.Node, user: fx.Node) -> fx.Node | None:
        """What is added to a convolution, where its memory may be overwritten by the sum."""
        if user in self._sums or not _is(user, self.graph, _ADD) or user.kwargs:
            return None
        others = [value for value in user.args if value is not layer]
        if len(user.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        other = others[0]
        last = max(other.users, key=lambda node: self.order[node])
        free = last is user and other is not layer.args[0] and other.op != "placeholder"
        kept = not self._changed_before(user, layer.all_input_nodes[0])
        return other if free and kept and self._computed(other) else None

    def _changed_before(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether a value is written over before a node: the sum reads it as late as that."""
        before = [node for node in value.users if self.order[node] < self.order[user]]
        return any(
            _in_place(node, self.graph) and node.all_input_nodes[0] is value for node in before
        )

    def _computed(self, node: fx.Node) -> bool:
        """Whether its value has memory of its own: of a layer, a sum or a ReLU."""
        relu = _is(node, self.graph, _RELU, nn.ReLU)
        return relu or kind_of(node, self.graph) is not None or _is(node, self.graph, _ADD)

    def wants_integers(self, node: fx.Node) -> bool:
        """Whether some user of a value takes it in 8 bits."""
        return any(self.takes_integers(node, user) for user in node.users)

    def takes_integers(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a user of a value takes it in 8 bits."""
        if user in self.layers:
            return True
        if any(group.other is node for group in self.groups.values()):
            return True
        return passes(user, self.graph) and self.wants_integers(user)

    def _ranged(self) -> Iterator[fx.Node]:
        """Nodes whose values are written in 8 bits, once each, in order."""
        sources = {group.layer.all_input_nodes[0] for group in self.groups.values()}
        sources |= {group.other for group in self.groups.values() if group.other is not None}
        sources |= {group.last for group in self.groups.values() if self.in_integers(group)}
        ranged = {self.source_of(node) for node in sources}
        return iter(sorted(ranged, key=self.order.__getitem__))

    def in_integers(self, group: _Group) -> bool:
        """Whether the value of a group is 8 bits: where somebody wants it, and every sum."""
        return group.other is not None or self.wants_integers(group.last)

    def source_of(self, node: fx.Node) -> fx.Node:
        """The value that a passed-on one has its range from."""
        while passes(node, self.graph):
            node = node.all_input_nodes[0]
        return node


def overwritten(graph: fx.GraphModule) -> fx.Node | None:
    """A node that writes over a value which another one reads later; None where there is none."""
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    for node in order:
        if _in_place(node, graph) and node.all_input_nodes:
            last = max(node.all_input_nodes[0].users, key=order.__getitem__)
            if last is not node:
                return node
    return None


def _in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        return bool(getattr(called(node, graph), "inplace", False))
    requested = bool(node.kwargs.get("inplace")) or (len(node.args) > 1 and node.args[1] is True)
    named = name.endswith("_") and not name.endswith("__")
    return node.op.startswith("call") and (requested or named or name in _AUGMENTED)


def passes(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a node passes 8-bit values on as they are: pooling by maximum, flattening."""
    layer = called(node, graph)
    if type(layer) is nn.MaxPool2d:
        return not layer.return_indices and not layer.ceil_mode and _pool_pairs(layer)[2] == (1, 1)
    return type(layer) in (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d) or (
        _is(node, graph, (torch.flatten, "flatten")) and bool(node.all_input_nodes)
    )


class Writer:
    """Writes the integer network, node by node."""

    def __init__(self, graph: fx.GraphModule, plan: Plan, ranges: Mapping[str, Range]) -> None:
        self._old, self._plan, self._scales = graph, plan, ranges
        self._new = fx.Graph()
        self._root = nn.Module()
        self._floats: dict[fx.Node, fx.Node] = {}
        self._integers: dict[fx.Node, tuple[fx.Node, Range]] = {}
        self._made = 0
        self._passed: set[fx.Node] = set()
        # A group is written where its layer or its sum stands, not where its ReLU does: its
        # inputs may be written over in between.
        groups = plan.groups.values()
        self._starts = {group.sum or group.layer: group for group in groups}
        self._parts = {node for g in groups for node in (g.layer, g.sum, g.last) if node}

    def written(self) -> fx.GraphModule:
        """The whole network."""
        for node in self._old.graph.nodes:
            self._write(node)
        self._keep_what_is_read()
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

    def _keep_what_is_read(self) -> None:
        """A sum takes the memory of what is added: a copy where that is read with it or later.

        Values that are passed on share their memory with what they were made from.
        """
        order = {node: position for position, node in enumerate(self._new.nodes)}
        memory: dict[fx.Node, fx.Node] = {}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in order:
            for source in node.all_input_nodes:
                readers.setdefault(memory[source], []).append(node)
            shared = node in self._passed
            memory[node] = memory[node.all_input_nodes[0]] if shared else node
        for node in order:
            called_here = node.op == "call_module"
            if not (called_here and isinstance(getattr(self._root, str(node.target), None), _Sum)):
                continue
            value, other = node.args
            assert isinstance(value, fx.Node)
            assert isinstance(other, fx.Node)
            read = any(order[reader] > order[node] for reader in readers[memory[other]])
            if read or memory[value] is memory[other]:
                with self._new.inserting_before(node):
                    node.update_arg(1, self._new.call_method("clone", (other,)))

    def _write(self, node: fx.Node) -> None:
        group = self._starts.get(node)
        if group is not None:
            self._write_group(group)
        elif node in self._parts:
            return  # written with its group
        elif passes(node, self._old) and (
            node.all_input_nodes[0] in self._integers or self._plan.wants_integers(node)
        ):
            self._pass_on(node)
        elif _is(node, self._old, _RELU, nn.ReLU) and self._only_integers(node):
            # Its range begins at 0, so writing it in 8 bits cuts negative values off.
            own = self._scales[node.name]
            self._integers[node] = (
                self._add(_Quantize(own), self._float(node.all_input_nodes[0])),
                own,
            )
        elif self._is_mean(node):
            value, own = self._integers[node.all_input_nodes[0]]
            self._floats[node] = self._add(_Mean(own), value)
        elif _is(node, self._old, (), nn.GroupNorm):
            # In channels-last its sums depend on the number of threads.
            values = self._float(node.all_input_nodes[0])
            source = self._new.call_method("contiguous", (values,))
            self._floats[node] = self._new.node_copy(node, lambda _old: source)
        else:
            self._floats[node] = self._new.node_copy(node, self._float)

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
            own = self._scales[self._plan.source_of(node).name]
            self._integers[node] = self._add(_Quantize(own), self._float(node)), own
        return self._integers[node]

    def _only_integers(self, node: fx.Node) -> bool:
        """Whether all users of a value take it in 8 bits."""
        return bool(node.users) and all(self._plan.takes_integers(node, u) for u in node.users)

    def _pass_on(self, node: fx.Node) -> None:
        value, own = self._integer(node.all_input_nodes[0])
        layer = called(node, self._old)
        if isinstance(layer, nn.MaxPool2d):
            made = self._add(_MaxPool(layer), value)
        else:
            made = self._new.node_copy(node, lambda _old: value)
        self._passed.add(made)
        self._integers[node] = made, own

    def _is_mean(self, node: fx.Node) -> bool:
        layer = called(node, self._old)
        one = isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
        return one and node.all_input_nodes[0] in self._integers

    def _write_group(self, group: _Group) -> None:
        layer = called(group.layer, self._old)
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
