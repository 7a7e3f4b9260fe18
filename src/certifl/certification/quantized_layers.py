"""Layers that compute with 8-bit integers, on oneDNN's kernels (CPU).

torch ships these kernels and its compiler uses them; they are internal to torch, and this module
is the only one that calls them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 255
_kernels = torch.ops.onednn


@dataclass(frozen=True)
class Range:
    """How an activation is written in 8 bits: value = scale * (number - zero)."""

    scale: float
    zero: int


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def pool_pairs(pool: nn.MaxPool2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel size, stride and dilation of a pooling, for both axes."""
    return _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.dilation)


class Quantize(nn.Module):
    """float32 to 8 bits."""

    def __init__(self, own: Range) -> None:
        super().__init__()
        self.inverse, self.shift = 1.0 / own.scale, own.zero + 0.5

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.mul(self.inverse).add_(self.shift).clamp_(0, LEVELS).to(torch.uint8)


class Dequantize(nn.Module):
    """8 bits to float32."""

    def __init__(self, own: Range) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.float().sub_(self.own.zero).mul_(self.own.scale)


class Contiguous(nn.Module):
    """Values in the usual order of memory."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.contiguous()


class Copy(nn.Module):
    """Values in memory of their own."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.clone()


class Mean(nn.Module):
    """Means over all places; sums of so few bits are exact in float32."""

    def __init__(self, own: Range) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        total = x.float().sum((-2, -1), keepdim=True)
        places = x.shape[-2] * x.shape[-1]
        return total.sub_(self.own.zero * places).mul_(self.own.scale / places)


class MaxPool(nn.Module):
    """By the maximum of shifted slices: torch's own pooling has no fast kernel for 8 bits."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        self.size, self.stride, _ = pool_pairs(layer)
        self.padding = _pair(layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
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


class Linear(_Layer):
    """Its kernel gives whole sums, scaled afterwards: it would round otherwise by batch size."""

    def __init__(self, layer: nn.Linear, source: Range, out: Range | None, relu: bool) -> None:
        super().__init__(layer, source, out, relu)
        self.weight = _kernels.qlinear_prepack(self.numbers, None)
        self.factors = self.scales * source.scale
        self.ones = torch.ones_like(self.scales)
        self.quantize = None if out is None else Quantize(out)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
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


class Convolution(_Layer):
    """A convolution in integers, with a ReLU where one follows."""

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
        """See the class."""
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


class Sum(Convolution):
    """A convolution added to other values, whose memory the sum takes."""

    def __init__(
        self, layer: nn.Conv2d, source: Range, out: Range, relu: bool, other: Range
    ) -> None:
        super().__init__(layer, source, out, relu)
        self.other = (other.scale, other.zero)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See the class."""
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
