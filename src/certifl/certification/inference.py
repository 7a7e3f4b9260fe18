"""BatchNorm in evaluation mode is affine: folded into the convolution before it, it is free."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
        _fold(graph, convolution, norm)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    graph.eval()
    return graph


def loses_hooks(module: nn.Module, graph: fx.GraphModule) -> bool:
    """Whether a layer has hooks and is not called as a whole in the traced network."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return any(_hooked(part) and name not in called for name, part in module.named_modules())


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pair(node: fx.Node, graph: fx.GraphModule) -> tuple[fx.Node, fx.Node] | None:
    """The convolution and the BatchNorm that reads it alone, where `node` is such a BatchNorm."""
    if not is_plain(_called(node, graph), nn.BatchNorm2d):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return None
    if not is_plain(_called(source, graph), nn.Conv2d) or _used_elsewhere(source, graph):
        return None
    return source, node


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a layer is exactly of this kind and computes with the weights that it stores.

    `spectral_norm`, `weight_norm`, pruning and other parametrizations compute the weight at every
    call, by a hook or a subclass, and would overwrite a folded one. They stay as they are.
    """
    if module is None or type(module) is not kind or _hooked(module):
        return False
    return all(name in module._parameters for name in ("weight", "bias"))


def _used_elsewhere(source: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether the convolution, or one of its weights, serves another part of the network too."""
    own = f"{source.target}."
    return any(
        (node.op == "call_module" and node.target == source.target and node is not source)
        or (node.op == "get_attr" and str(node.target).startswith(own))
        for node in graph.graph.nodes
    )


def _called(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _fold(graph: fx.GraphModule, convolution: fx.Node, norm: fx.Node) -> None:
    layers = _called(convolution, graph), _called(norm, graph)
    assert isinstance(layers[0], nn.Conv2d)
    assert isinstance(layers[1], nn.BatchNorm2d)
    graph.set_submodule(str(convolution.target), fuse_conv_bn_eval(layers[0], layers[1]))
    norm.replace_all_uses_with(convolution)
    graph.graph.erase_node(norm)
