"""BatchNorm in evaluation mode is affine: folded into the convolution before it, it is free."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batch_norm"]

_log = logging.getLogger(__name__)


def fold_batch_norm(module: nn.Module, probe: Tensor) -> nn.Module | None:
    """A copy with every BatchNorm that follows a convolution folded into it, or None.

    Only a module that can be traced is folded, and only if its logits stay the same up to float32
    rounding on a probe; otherwise the network votes unfolded, which is slower and equally valid.

    Args:
        module: in evaluation mode; left as it is.
        probe: (m, c, h, w) images to compare the two on.
    """
    try:
        graph = fx.symbolic_trace(copy.deepcopy(module))
    except Exception as error:  # tracing runs the model's own forward: anything may be raised
        _log.info("BatchNorm is not folded, the model cannot be traced: %s", error)
        return None
    pairs = [pair for node in graph.graph.nodes if (pair := _pair(node, graph)) is not None]
    if not pairs:
        return None
    for convolution, norm in pairs:
        _fold(graph, convolution, norm)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    graph.eval()
    with torch.inference_mode():
        before, after = module(probe), graph(probe)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * (1.0 + float(before.abs().max()))):
        _log.warning("BatchNorm is not folded: it changed the logits beyond rounding.")
        return None
    return graph


def _pair(node: fx.Node, graph: fx.GraphModule) -> tuple[fx.Node, fx.Node] | None:
    """The convolution and the BatchNorm that reads it alone, where `node` is such a BatchNorm."""
    if not isinstance(_called(node, graph), nn.BatchNorm2d):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return None
    if not isinstance(_called(source, graph), nn.Conv2d):
        return None
    # A convolution that is called twice is shared: folding one BatchNorm would change the other.
    calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == source.target]
    return (source, node) if len(calls) == 1 else None


def _called(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _fold(graph: fx.GraphModule, convolution: fx.Node, norm: fx.Node) -> None:
    layers = _called(convolution, graph), _called(norm, graph)
    assert isinstance(layers[0], nn.Conv2d)
    assert isinstance(layers[1], nn.BatchNorm2d)
    graph.set_submodule(str(convolution.target), fuse_conv_bn_eval(layers[0], layers[1]))
    norm.replace_all_uses_with(convolution)
    graph.graph.erase_node(norm)
