"""Work that is recorded once and then repeated on the same memory, without the host's hand.

On CUDA this is a graph: hundreds of kernels are launched as one. The work must read and write the
same tensors every time, must not ask the host for a value, and may draw from the device's default
generator only, whose state every repetition takes up and moves on as the work itself would.

Elsewhere there is nothing to record: a repetition is the work itself, with results put where the
first ones lay. So whatever is built on it takes one road on every device.

Source: Gray, Getting Started with CUDA Graphs, 2019; torch.cuda.CUDAGraph.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from certifl.errors import WorkError

__all__ = ["CaptureFailed", "Recorded", "Work", "failed_capture", "record"]

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
        RuntimeError: the work cannot be captured as a graph, and was not.
        CaptureFailed: it seemed that it could be, and the capture broke off.
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


class CaptureFailed(WorkError):
    """A capture that broke off, after which torch leaves this process unfit for further work.

    The side stream stays the current one, the default generator takes itself to be captured, and
    the allocator a capture to be under way. Only the first of these can be put right from here.
    """


def failed_capture(error: BaseException | None) -> CaptureFailed | None:
    """The capture that broke off, where this error is that or came of putting things back."""
    while error is not None and not isinstance(error, CaptureFailed):
        error = error.__context__
    return error


class _Graph:
    """A CUDA graph with memory of its own."""

    def __init__(self, work: Work, device: torch.device) -> None:
        with torch.cuda.device(device):
            here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(here)
            try:
                with torch.cuda.stream(stream):
                    _warm_up(work)
            finally:
                # Also where it raised: what follows must not overtake kernels that still write.
                here.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    self.results: Sequence[torch.Tensor] = list(work())
            except Exception as error:
                torch.cuda.set_stream(here)
                raise CaptureFailed(_broken_off(error)) from error

    def repeat(self) -> None:
        self._graph.replay()


def _warm_up(work: Work) -> None:
    """Let libraries set themselves up, and find out here what a capture would not survive."""
    for _ in range(_WARM_UPS):
        work()
    with _without_waiting():
        work()


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Whatever lets the host wait for the GPU raises: an ordinary error, unlike in a capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says once that this mode does not see every wait.
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _broken_off(error: Exception) -> str:
    # Where the work itself failed, torch reports the end of the capture and has this as context.
    first = error.__context__ or error
    reason = (str(first).strip().splitlines() or [type(first).__name__])[0].rstrip(".")
    return (
        f"A CUDA graph of a training step could not be captured ({reason}), and this process "
        "cannot go on after that. Rounds finished so far are kept, and the same command goes on "
        "from the last one. Should it fail again, free memory of the GPU, or choose "
        'training.steps = "plain", which is another training.'
    )
