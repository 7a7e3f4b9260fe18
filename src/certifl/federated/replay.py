"""Work that is recorded once and then repeated on the same memory, without the host's hand.

On CUDA this is a graph: hundreds of kernels are launched as one. The work must read and write the
same tensors every time, must not ask the host for a value, and may draw from the device's default
generator only, whose state every repetition takes up and moves on as the work itself would.

Elsewhere there is nothing to record: a repetition is the work itself, with results put where the
first ones lay. So whatever is built on it takes one road on every device.

Source: Gray, Getting Started with CUDA Graphs, 2019; torch.cuda.CUDAGraph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

__all__ = ["Recorded", "Work", "record"]

Work = Callable[[], Sequence[torch.Tensor]]
"""Always the same operations on the same tensors; gives its results."""

_WARM_UPS = 3  # before a graph is captured, so that libraries have set themselves up


class Recorded(Protocol):
    """Recorded work."""

    @property
    def results(self) -> Sequence[torch.Tensor]:
        """Where each repetition leaves its results."""
        ...

    def repeat(self) -> None:
        """Do the work once more."""
        ...


def record(work: Work, device: torch.device) -> Recorded:
    """Record work; it is done a few times for that, so the caller puts back what it changes.

    Raises:
        RuntimeError: the work cannot be captured as a graph.
    """
    return _Graph(work, device) if device.type == "cuda" else _Repeated(work)


class _Repeated:
    """The work itself, again and again."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.results: Sequence[torch.Tensor] = [result.clone() for result in work()]

    def repeat(self) -> None:
        for place, result in zip(self.results, self._work(), strict=True):
            place.copy_(result)


class _Graph:
    """A CUDA graph with memory of its own."""

    def __init__(self, work: Work, device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self.results: Sequence[torch.Tensor] = list(work())

    def repeat(self) -> None:
        self._graph.replay()
