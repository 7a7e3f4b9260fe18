"""Training on a GPU: recorded steps against plain ones, repeats and resumes; skipped without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import certifl
from certifl.federated import ClientData, FedAvg, LocalTraining, Mixture, state_of
from certifl.federated.objectives import Augmented, Consistency, Macer, SmoothAdv, Stability
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


def pictures(client: int = 0, images: int = 150) -> ClientData:
    drawn = torch.Generator().manual_seed(client)
    pixels = torch.randint(256, (images, 3, 32, 32), generator=drawn, dtype=torch.uint8)
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
@pytest.mark.parametrize("network", ["resnet18", "small_resnet", "small_cnn"])
def test_graphs_give_the_bits_of_plain_steps(network, precision, momentum):
    """The study's network with flips, crops and rotations, odd last batches, kept momentum."""
    model = certifl.models.build(network, 3, 10, seed=0)
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
    data, local = [pictures(0), pictures(1, 90)], make("captured", **changes)
    captured = two_rounds(local, data, state_of(model))
    assert recorded(local) == 1
    assert_alike(captured, two_rounds(make("plain", **changes), data, state_of(model)))


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


@pytest.mark.parametrize("algorithm", [FedAvg(), Mixture(personalization=0.3)], ids=repr)
def test_a_run_in_pieces_is_the_run_in_one(tmp_path, algorithm):
    """Every piece records anew; a hook (mixture) changes gradients that a graph has left."""

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
