"""What a CUDA graph does, on a CPU: operations noted once and repeated on the same memory.

As with a graph, no Python of the work runs in a repetition: only the operations do, with the
numbers that they had when they were noted, reading and writing the tensors of that time. So
whatever in a step hangs on Python (a value read, a tensor made anew, a rate) comes out wrong here
as it would on a GPU, and what asks the host for a value is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,  # a tensor made of numbers of the host
)


class Noted(TorchDispatchMode):
    """Notes every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made


class HostReads(TorchDispatchMode):
    """Notes the operations for which a GPU would have to wait for the host, or the host for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in HOST_READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Tape:
    """Recorded work, in the place of a graph; `record` for tests."""

    def __init__(self, work, device) -> None:
        del device
        work()  # a graph is warmed up as well
        with Noted() as noted:
            self.results = list(work())
        self._operations = noted.operations
        asked = [str(func) for func, *_ in self._operations if func in HOST_READS]
        if asked:
            raise RuntimeError(f"operation not permitted when stream is capturing: {asked[0]}")
        self.repeated = 0

    def repeat(self) -> None:
        self.repeated += 1
        with torch.no_grad():
            for func, args, kwargs, noted in self._operations:
                made = func(*args, **kwargs)
                for place, result in zip(tree_leaves(noted), tree_leaves(made), strict=True):
                    if isinstance(place, torch.Tensor) and place is not result:
                        _put(place, result)


def _put(place: torch.Tensor, result: torch.Tensor) -> None:
    """A result where it was before; a view of the same memory is there already."""
    if place.data_ptr() != result.data_ptr():
        place.copy_(result)
