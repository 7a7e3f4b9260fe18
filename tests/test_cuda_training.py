"""Training on a GPU: recorded steps against plain ones, repeats and resumes; skipped without."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

import certifl
from certifl.federated import (
    ClientData,
    FedAvg,
    FedProx,
    LocalTraining,
    Mixture,
    Scaffold,
    state_of,
)
from certifl.federated import captured as captured_module
from certifl.federated.objectives import Augmented, Consistency, Macer, SmoothAdv, Stability
from certifl.federated.replay import CaptureFailed
from certifl.models.networks import QuarterMeans
from certifl.perturbations import PixelNoise, Rotation
from tiny_federation import (
    SCHEDULE,
    Noise,
    TinyNet,
    assert_same,
    client_data,
    differ,
    federate,
    in_pieces,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device: a GPU's graphs need one"
)
OBJECTIVES = (Augmented(), Consistency(), SmoothAdv(), Macer(copies=3), Stability())


def make(steps: str, model: torch.nn.Module | None = None, **changes: Any) -> LocalTraining:
    options = {
        key: changes.pop(key)
        for key in ("augmentation", "objective", "precision", "device")
        if key in changes
    }
    return LocalTraining(
        TinyNet() if model is None else model,
        replace(SCHEDULE, **changes),
        seed=5,
        steps=steps,
        **{"augmentation": Noise(), "device": "cuda", **options},
    )


def pictures(
    client: int = 0, images: int = 150, shape: tuple[int, int, int] = (3, 32, 32)
) -> ClientData:
    drawn = torch.Generator().manual_seed(client)
    pixels = torch.randint(256, (images, *shape), generator=drawn, dtype=torch.uint8)
    return ClientData(client, pixels, torch.randint(10, (images,), generator=drawn))


def two_rounds(local: LocalTraining, data: list[ClientData], start: Any) -> list[Any]:
    first = [local.passes(start, one, 0) for one in data]
    return [
        local.passes(before.state, one, 1, momentum=before.momentum)
        for before, one in zip(first, data, strict=True)
    ]


def assert_alike(one: list[Any], other: list[Any]) -> None:
    for left, right in zip(one, other, strict=True):
        assert_same(left.state, right.state)
        assert_same(left.momentum, right.momentum)
        assert left.metrics == right.metrics


def recorded(local: LocalTraining) -> int:
    assert local._recordings is not None
    return len(local._recordings._steps)


@pytest.mark.parametrize("momentum", ["keep", "reset"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)], ids=str)
@pytest.mark.parametrize("network", ["resnet18", "small_resnet", "small_cnn"])
def test_graphs_give_the_bits_of_plain_steps(network, shape, precision, momentum):
    """The study's network with flips, crops and rotations, odd last batches, kept momentum."""
    model = certifl.models.build(network, shape[0], 10, seed=0)
    changes: dict[str, Any] = {
        "model": model,
        "batch_size": 64,
        "lr": 0.02,
        "decay_every": 1,
        "flip": True,
        "crop": 4,
        "momentum_between_rounds": momentum,
        "augmentation": Rotation(0.3),
        "precision": precision,
    }
    data, local = [pictures(0, 150, shape), pictures(1, 90, shape)], make("captured", **changes)
    captured = two_rounds(local, data, state_of(model))
    assert recorded(local) == 1
    assert_alike(captured, two_rounds(make("plain", **changes), data, state_of(model)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["resnet18", "small_resnet", "small_cnn"])
def test_training_on_mnists_shape_repeats_itself(network, precision):
    """7 x 7 features in quarters: rows and columns in common get two gradients each."""
    model = certifl.models.build(network, 1, 10, seed=0)
    data, start = [pictures(0, 600, (1, 28, 28))], state_of(model)
    changes = {"model": model, "batch_size": 64, "lr": 0.02, "precision": precision}
    first = two_rounds(make("plain", **changes), data, start)
    for _ in range(3):
        assert_alike(two_rounds(make("plain", **changes), data, start), first)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (7, 8), (8, 8), (1, 3)], ids=str)
def test_quarter_means_repeat_themselves_and_are_torchs(size, layout):
    x = torch.randn(64, 64, *size).to("cuda", memory_format=layout).requires_grad_()
    weight = torch.randn(64, 64, 2, 2, device="cuda")

    def gradient(pool: torch.nn.Module) -> torch.Tensor:
        return torch.autograd.grad((pool(x) * weight).sum(), x)[0]

    first = gradient(QuarterMeans())
    assert torch.allclose(first, gradient(torch.nn.AdaptiveAvgPool2d(2)), atol=1e-6)
    assert all(torch.equal(gradient(QuarterMeans()), first) for _ in range(20))


def test_dropout_draws_in_a_graph_what_it_draws_without():
    data = [client_data(client, 20) for client in range(2)]
    start, local = state_of(TinyNet()), make("captured")
    captured = two_rounds(local, data, start)
    assert recorded(local) == 1
    assert_alike(captured, two_rounds(make("plain"), data, start))
    still = TinyNet()
    still.dropout.p = 0.0
    assert differ(captured[0].state, two_rounds(make("captured", still), data, start)[0].state)


@pytest.mark.parametrize("perturbation", [PixelNoise(0.3, exact=True), Rotation(0.4)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_every_objective_is_captured(objective, perturbation):
    changes = {"objective": objective, "augmentation": perturbation, "lr": 0.01}
    both = [make(steps, **changes) for steps in ("plain", "captured")]
    plain, captured = (two_rounds(one, [client_data(0)], state_of(TinyNet())) for one in both)
    assert recorded(both[1]) == 1
    assert_alike(captured, plain)


@dataclass(frozen=True)
class Looking:
    """An objective that asks the device for a number; where `only_captured`, in captures alone."""

    only_captured: bool = False

    name: ClassVar[str] = "looking"

    def __call__(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(batch.draw())
        look = torch.cuda.is_current_stream_capturing() or not self.only_captured
        factor = 1.0 if look and float(logits.detach().sum()) > 0 else 2.0
        return factor * functional.cross_entropy(logits, batch.labels), logits


@dataclass(frozen=True)
class Drawing:
    """An objective that draws past the batch."""

    name: ClassVar[str] = "drawing"

    def __call__(self, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(batch.images.shape, generator=batch.noise, device=batch.images.device)
        logits = model(batch.images + noise)
        return functional.cross_entropy(logits, batch.labels), logits


@pytest.mark.parametrize("objective", [Looking(), Drawing()], ids=repr)
def test_what_cannot_be_captured_is_said_and_trained_plainly(objective):
    """With dropout and an emptied cache afterwards, which a capture that broke off would harm."""
    mode, stream = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream()
    data, start, local = (
        [client_data(0)],
        state_of(TinyNet()),
        make("captured", objective=objective),
    )
    with pytest.warns(RuntimeWarning, match=r"cannot be recorded \("):
        captured = two_rounds(local, data, start)
    assert recorded(local) == 0
    assert (torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream()) == (mode, stream)
    torch.cuda.empty_cache()
    assert_alike(captured, two_rounds(make("plain", objective=objective), data, start))
    sound = make("captured")
    sound.passes(start, data[0], 0)
    assert recorded(sound) == 1


def break_off(line: Any) -> None:
    """In a process of its own, for nothing can be done in it afterwards."""
    local = make("captured", objective=Looking(only_captured=True))
    here = torch.cuda.current_stream()
    try:
        local.passes(state_of(TinyNet()), client_data(0), 0)
    except CaptureFailed as error:
        line.send((str(error), torch.cuda.current_stream() == here))
    except BaseException as error:
        line.send((repr(error), False))
    else:
        line.send(("nothing was raised", False))


def test_a_capture_that_breaks_off_ends_the_training():
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=break_off, args=(theirs,))
    process.start()
    theirs.close()
    try:
        said, stream_is_back = mine.recv() if mine.poll(300) else ("no answer", False)
    finally:
        process.kill()
        process.join()
    assert "could not be captured" in said
    assert "plain" in said
    assert stream_is_back


def test_a_full_memory_is_told_as_such(monkeypatch):
    def full(work: Callable[[], object], device: torch.device) -> Any:
        work()
        torch.empty(2**50, dtype=torch.uint8, device=device)

    local, start = make("captured"), state_of(TinyNet())
    with monkeypatch.context() as patch:
        patch.setattr(captured_module, "record", full)
        with pytest.raises(torch.OutOfMemoryError):
            local.passes(start, client_data(0), 0)
    plain = make("plain").passes(start, client_data(0), 0)
    assert_alike([local.passes(start, client_data(0), 0)], [plain])
    assert recorded(local) == 1


def test_a_dropped_training_leaves_no_memory_behind():
    """Graphs, their pools, the model and its momentum go with it, without looking for cycles."""
    model = certifl.models.build("resnet18", 3, 10, seed=0)
    start, data = state_of(model), pictures(0, 64)
    make("plain", model, batch_size=64).passes(start, data, 0)  # what libraries keep for good
    gc.collect()
    before = memory_of_tensors()
    gc.disable()
    try:
        local = make("captured", model, batch_size=64, augmentation=Rotation(0.3))
        local.passes(start, data, 0)
        assert recorded(local) == 1
        held = memory_of_tensors() - before
        del local
        left = memory_of_tensors() - before
    finally:
        gc.enable()
    assert held > 80 * 2**20  # weights and momentum: two times 11.2 million numbers
    assert left < 4 * 2**20


def memory_of_tensors() -> int:
    """In bytes, without what cuBLAS keeps for each stream that it ever worked on."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("algorithm", [FedAvg(), Mixture(0.3), FedProx(0.7), Scaffold()], ids=repr)
def test_a_run_in_pieces_is_the_run_in_one(tmp_path, algorithm):
    """Every piece records anew; hooks change gradients that a graph has left."""

    def run(folder: str, progress: Any = None, steps: str = "captured") -> Any:
        local = make(steps, momentum_between_rounds="keep")
        return federate(tmp_path / folder, algorithm, local=local, progress=progress)

    pieces, stops = in_pieces(4, lambda stop: run("pieces", stop))
    whole, plain = run("whole"), run("plain", steps="plain")
    assert stops > 0
    for other in (pieces, plain):
        assert_same(other.server(), whole.server())
        for client in range(3):
            assert_same(other.client(client), whole.client(client))


@pytest.mark.parametrize("steps", ["plain", "captured"])
def test_an_epoch_does_not_wait_for_the_host(steps):
    """torch raises at whatever synchronises; a client's round does so at its two ends alone."""
    local = make(steps, augmentation=Rotation(0.4), flip=True, crop=1)
    start, data = state_of(TinyNet()), client_data(0, 24).to("cuda")
    local.passes(start, data, 0)
    bench_step = local._epoch

    def strict(*arguments: Any) -> Any:
        bench, stream, rate, batches, step, round = arguments

        def watched(on: Any, batch: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step(on, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return bench_step(bench, stream, rate, batches, watched, round)

    local._epoch = strict  # pyright: ignore[reportAttributeAccessIssue]
    assert local.passes(start, data, 0).metrics["loss"] > 0


def test_the_device_agrees_with_the_processor():
    """Other kernels and other draws, so other bits; without draws the same up to rounding."""
    still = TinyNet()
    still.dropout.p = 0.0
    data = [ClientData(0, client_data(0).images[:8], client_data(0).labels[:8])]  # one batch
    changes = {"model": still, "augmentation": None}
    gpu, cpu = (
        two_rounds(make("captured", device=device, **changes), data, state_of(still))[0].state
        for device in ("cuda", "cpu")
    )
    for name, value in cpu.items():
        assert torch.allclose(gpu[name].float(), value.float(), atol=1e-3), name
