"""Means of quarters: torch's own on a CPU, and repeatable on a GPU where quarters overlap."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import certifl
from certifl.models import architectures as networks
from certifl.models.architectures import QuarterMeans

SIZES = list(product((1, 2, 3, 7, 8), repeat=2))


def features(height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(height * 10 + width)
    return torch.randn(3, 4, height, width, generator=drawn, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_on_a_processor_it_is_torchs_own_pooling(height, width):
    x = features(height, width, torch.float32)
    pooled, expected = QuarterMeans()(x), nn.AdaptiveAvgPool2d(2)(x)
    assert torch.equal(pooled, expected)
    weight = torch.randn_like(pooled)
    gradients = (torch.autograd.grad((one * weight).sum(), x)[0] for one in (pooled, expected))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_means_of_slices_are_the_same_means(height, width):
    x = features(height, width, torch.float64)
    sliced, expected = networks._means_of_slices(x), nn.AdaptiveAvgPool2d(2)(x)
    assert torch.allclose(sliced, expected, rtol=0, atol=1e-14)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((one * weight).sum(), x)[0] for one in (sliced, expected))
    assert torch.allclose(*gradients, rtol=0, atol=1e-14)


class OnAGpu(torch.Tensor):
    """Says so, and is not."""

    is_cuda = True  # pyright: ignore[reportAssignmentType]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("size", "kind", "torchs_own"),
    [(28, OnAGpu, False), (32, OnAGpu, True), (28, torch.Tensor, True), (32, torch.Tensor, True)],
)
def test_no_gradient_of_overlapping_quarters_is_added_atomically(size, kind, torchs_own):
    """Which operations a step of small_cnn asks a GPU for: torch's own adds in any order."""
    network = networks.small_cnn(1, 10)
    images = torch.rand(2, 1, size, size).as_subclass(kind)
    with Operations() as operations:
        network(images).sum().backward()
    assert ("aten::_adaptive_avg_pool2d_backward" in operations.names) is torchs_own


def test_a_traced_network_still_chooses_by_size():
    network = certifl.models.build("small_cnn", 1, 10, seed=0).eval()
    traced = fx.symbolic_trace(copy.deepcopy(network))
    sent = pickle.loads(pickle.dumps(traced))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert networks._quarter_means in called
    for size in (28, 32):
        images = torch.rand(2, 1, size, size)
        assert torch.equal(traced(images), network(images))
        assert torch.equal(sent(images), network(images))


def test_names_of_weights_are_those_of_stored_models():
    names = list(certifl.models.build("small_cnn", 1, 10, seed=0).state_dict())
    layers = ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "head"]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
