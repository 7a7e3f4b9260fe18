"""A network as compiled code: what is recorded as compiled is compiled at every vote.

torch keeps compiled code with the Python code it was made of, at most 8 pieces for one function;
past that it runs the function uncompiled and says so in a log only. Votes would then be cast by
another f than the record names. Three things keep that from happening:

- every network, and every shape of its batches, has a function of its own, so networks never use
  up each other's room, however many there are and in whatever order they vote;
- every call looks alike to torch (a contiguous batch, made and called in inference mode), so that
  nothing but the shape makes another piece of code;
- where code would be left uncompiled all the same, the call fails.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from certifl.errors import ModelError

Call = Callable[[Tensor], Tensor]

# A network in parts that cannot be compiled together shares code with others of its class.
_PIECES = 64
# Names of torch's settings since 2.7, then those of torch 2.6.
_SETTINGS = {
    ("recompile_limit", "cache_size_limit"): _PIECES,
    ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"): True,
    ("suppress_errors",): False,
}
_numbers = itertools.count()


class Compiled:
    """A network's call as compiled code; its first call with a shape of batch compiles it.

    Raises:
        ModelError: when called, where torch would leave some of it uncompiled.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call = call
        # `freezing` would make constants of the weights; as an option it does not (torch 2.13
        # asks for it while the graph is made, and reads options later). It stays, for votes of
        # earlier runs were cast with it. On CUDA the kernels are captured as one graph.
        self._options: dict[str, Any] = {"freezing": True}
        if device.type == "cuda":
            self._options["triton.cudagraphs"] = True
        self._made: dict[torch.Size, Call] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of one batch."""
        with torch.inference_mode(), _nothing_left_uncompiled():
            if images.shape not in self._made:
                own = _of_its_own(self._call)
                self._made[images.shape] = torch.compile(own, dynamic=False, options=self._options)
            try:
                return self._made[images.shape](_alike(images))
            except _limit_hit() as error:
                raise ModelError(
                    f"Compiled code of the network fits no more than one of its calls: after "
                    f"{_PIECES} pieces torch would go on uncompiled. Leave -compiled out of the "
                    "precision."
                ) from error


def _of_its_own(call: Call) -> Call:
    """A function that does the same and shares its code object with no other.

    Its name is another too, since code objects of equal contents are equal.
    """

    def votes(images: Tensor) -> Tensor:
        return call(images)

    name = f"votes_{next(_numbers)}"
    code = votes.__code__.replace(co_name=name)
    return types.FunctionType(code, votes.__globals__, name, None, votes.__closure__)


def _alike(images: Tensor) -> Tensor:
    """The same images as torch sees those of votes: made in inference mode, contiguous."""
    if images.is_inference() and images.is_contiguous():
        return images
    return images.clone(memory_format=torch.contiguous_format)


def _nothing_left_uncompiled() -> contextlib.AbstractContextManager[Any]:
    """The compiler of torch set to fail where it would otherwise run uncompiled code."""
    config: Any = torch._dynamo.config
    settings = {_known(config, names): value for names, value in _SETTINGS.items()}
    return config.patch(settings)


def _limit_hit() -> type[Exception]:
    errors: Any = torch._dynamo
    return errors.exc.FailOnRecompileLimitHit


def _known(module: Any, names: tuple[str, ...]) -> str:
    """The first of these names that this version of torch has."""
    return next(name for name in names if hasattr(module, name))


# BatchNorm in evaluation mode is affine: folded into the convolution before it, it is free.


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
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * (1.0 + float(before.abs().max()))):
        _log.warning("BatchNorm is not folded: it changed the logits beyond rounding.")
        return None
    return graph


def _folded(module: nn.Module) -> fx.GraphModule | None:
    """The traced network with its BatchNorm folded; None where there is nothing to fold."""
    graph = fx.symbolic_trace(copy.deepcopy(module))
    if _loses_hooks(module, graph):
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


def _loses_hooks(module: nn.Module, graph: fx.GraphModule) -> bool:
    """Whether a layer has hooks and is not called as a whole in the traced network."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return any(_hooked(part) and name not in called for name, part in module.named_modules())


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pair(node: fx.Node, graph: fx.GraphModule) -> tuple[fx.Node, fx.Node] | None:
    """The convolution and the BatchNorm that reads it alone, where `node` is such a BatchNorm."""
    if not _plain(_called(node, graph), nn.BatchNorm2d):
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return None
    if not _plain(_called(source, graph), nn.Conv2d) or _used_elsewhere(source, graph):
        return None
    return source, node


def _plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
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
