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
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from certifl.errors import ModelError

__all__ = ["Compiled"]

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
