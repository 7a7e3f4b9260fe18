"""Captures that fail, on a CUDA that is made of notes: what is asked of it, and in which order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from certifl.errors import WorkError
from certifl.federated import captured as captured_module
from certifl.federated import replay, state_of
from certifl.federated.replay import CaptureFailed, record
from test_captured import make, recordings
from tiny_federation import TinyNet, client_data, federate

CUDA = torch.device("cuda")


class Stream:
    def __init__(self, cuda: NotedCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.notes.append(f"{self.name} waits for {other.name}")


class NotedCuda:
    """What `replay` asks of `torch.cuda`, and the state that torch would be in."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.mode: Any = 0
        self.capturing = False
        self.current = Stream(self, "main")

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def Stream(self) -> Stream:
        return Stream(self, "side")

    def CUDAGraph(self) -> object:
        return object()

    def current_stream(self) -> Stream:
        return self.current

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    def get_sync_debug_mode(self) -> Any:
        return self.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: object, stream: Stream) -> Iterator[None]:
        """As torch's: where the work raises, its end raises again and puts nothing back."""
        self.notes.append("capture")
        self.current, self.capturing = stream, True
        try:
            yield
        except Exception:
            raise RuntimeError("CUDA error: operation failed due to a previous error") from None
        self.capturing, self.current = False, Stream(self, "main")

    def work(self, fails: Callable[[], bool] = lambda: False) -> Callable[[], Sequence[Any]]:
        def work() -> Sequence[Any]:
            self.notes.append("work")
            if fails():
                raise RuntimeError("a value was asked for\nand more lines")
            return [torch.zeros(1)]

        return work


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> NotedCuda:
    noted = NotedCuda()
    for name in dir(NotedCuda):
        if not name.startswith("_") and name != "work":
            monkeypatch.setattr(torch.cuda, name, getattr(noted, name))
    return noted


def test_work_is_warmed_up_without_waiting_before_it_is_captured(cuda):
    seen: list[tuple[Any, str, bool]] = []

    def notes() -> bool:
        seen.append((cuda.mode, cuda.current.name, cuda.capturing))
        return False

    assert len(record(cuda.work(notes), CUDA).results) == 1
    usual, strict = (0, "side", False), ("error", "side", False)
    assert seen == [*[usual] * replay._WARM_UPS, strict, (0, "side", True)]
    works = ["work"] * len(seen)
    expected = ["side waits for main", *works[1:], "main waits for side", "capture", "work"]
    assert cuda.notes == expected


def test_what_waits_for_the_gpu_fails_before_a_capture_begins(cuda):
    with pytest.raises(RuntimeError, match="a value was asked for"):
        record(cuda.work(lambda: cuda.mode == "error"), CUDA)
    assert "capture" not in cuda.notes
    assert cuda.notes[-1] == "main waits for side"
    assert (cuda.mode, cuda.current.name) == (0, "main")


def test_a_warm_up_that_fails_is_waited_for(cuda):
    """What puts weights back comes on the main stream, after kernels of the side one."""
    with pytest.raises(RuntimeError, match="a value was asked for"):
        record(cuda.work(lambda: True), CUDA)
    assert cuda.notes == ["side waits for main", "work", "main waits for side"]


def test_a_capture_that_breaks_off_ends_the_work(cuda):
    with pytest.raises(CaptureFailed, match=r"captured \(a value was asked for\)") as raised:
        record(cuda.work(lambda: cuda.capturing), CUDA)
    assert isinstance(raised.value, WorkError)
    assert "\n" not in str(raised.value)
    assert cuda.current.name == "main"


def breaking(error: Exception) -> Callable[..., Any]:
    def breaks(work: Callable[[], object], device: torch.device) -> Any:
        work()
        raise error

    return breaks


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not enough memory")]
)
def test_a_full_memory_says_nothing_about_a_step(error, monkeypatch):
    """It is told as what it is, and the step is recorded once there is room."""
    local, plain = make("captured"), make("plain")
    start, data = state_of(TinyNet()), client_data(0)
    with monkeypatch.context() as patch:
        patch.setattr(captured_module, "record", breaking(error))
        with pytest.raises(RuntimeError, match=r"memory"):
            local.passes(start, data, 0)
    assert local.passes(start, data, 0).metrics == plain.passes(start, data, 0).metrics
    assert len(recordings(local)) == 1


def test_training_stops_where_memory_ran_out(tmp_path, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(captured_module, "record", breaking(full))
    with pytest.raises(WorkError, match="Memory ran out while client 0 trained"):
        federate(tmp_path, local=make("captured"))


def test_training_stops_where_a_capture_broke_off(tmp_path, monkeypatch):
    """No client's fault: the next one could not train in this process either."""
    monkeypatch.setattr(captured_module, "record", breaking(CaptureFailed("broken off")))
    with pytest.raises(CaptureFailed, match="broken off"):
        federate(tmp_path, local=make("captured"))


def test_what_cannot_be_put_back_after_it_hides_nothing(tmp_path, monkeypatch):
    """A generator that takes itself to be captured refuses its state: still no client's fault."""

    @contextlib.contextmanager
    def stuck(devices: object) -> Iterator[None]:
        try:
            yield
        except CaptureFailed:
            raise RuntimeError("a captured generator cannot be set") from None

    monkeypatch.setattr(captured_module, "record", breaking(CaptureFailed("broken off")))
    monkeypatch.setattr(torch.random, "fork_rng", stuck)
    with pytest.raises(CaptureFailed, match="broken off"):
        federate(tmp_path, local=make("captured"))
