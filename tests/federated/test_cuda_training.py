"""Training on a GPU: repeats and resumes; skipped without."""

from dataclasses import replace
from typing import Any

import pytest
import torch

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
from certifl.models.architectures import QuarterMeans
from certifl.perturbations import Rotation
from tiny_federation import SCHEDULE, Noise, TinyNet, assert_same, client_data, federate, in_pieces

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device: training on a GPU needs one"
)


def make(model: torch.nn.Module | None = None, **changes: Any) -> LocalTraining:
    options = {
        key: changes.pop(key)
        for key in ("augmentation", "objective", "precision", "device")
        if key in changes
    }
    return LocalTraining(
        TinyNet() if model is None else model,
        replace(SCHEDULE, **changes),
        seed=5,
        **{"augmentation": Noise(), "device": "cuda", **options},
    )


def pictures(
    client: int = 0, images: int = 150, shape: tuple[int, int, int] = (3, 32, 32)
) -> ClientData:
    drawn = torch.Generator().manual_seed(client)
    pixels = torch.randint(256, (images, *shape), generator=drawn, dtype=torch.uint8)
    return ClientData(client, pixels, torch.randint(10, (images,), generator=drawn))


def two_rounds(local: LocalTraining, data: list[ClientData], start: Any) -> list[Any]:
    first = [local.train_epochs(start, one, 0) for one in data]
    return [
        local.train_epochs(before.state, one, 1, momentum=before.momentum)
        for before, one in zip(first, data, strict=True)
    ]


def assert_alike(one: list[Any], other: list[Any]) -> None:
    for left, right in zip(one, other, strict=True):
        assert_same(left.state, right.state)
        assert_same(left.momentum, right.momentum)
        assert left.metrics == right.metrics


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["resnet18", "small_resnet", "small_cnn"])
def test_training_on_mnists_shape_repeats_itself(network, precision):
    """7 x 7 features in quarters: rows and columns in common get two gradients each."""
    model = certifl.models.build(network, 1, 10, seed=0)
    data, start = [pictures(0, 600, (1, 28, 28))], state_of(model)
    changes = {"model": model, "batch_size": 64, "lr": 0.02, "precision": precision}
    first = two_rounds(make(**changes), data, start)
    for _ in range(3):
        assert_alike(two_rounds(make(**changes), data, start), first)


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


@pytest.mark.parametrize("algorithm", [FedAvg(), Mixture(0.3), FedProx(0.7), Scaffold()], ids=repr)
def test_a_run_in_pieces_is_the_run_in_one(tmp_path, algorithm):
    def run(folder: str, progress: Any = None) -> Any:
        local = make(momentum_between_rounds="keep")
        return federate(tmp_path / folder, algorithm, local=local, progress=progress)

    pieces, stops = in_pieces(4, lambda stop: run("pieces", stop))
    whole = run("whole")
    assert stops > 0
    assert_same(pieces.server(), whole.server())
    for client in range(3):
        assert_same(pieces.client(client), whole.client(client))


def test_an_epoch_does_not_wait_for_the_host():
    """torch raises at whatever synchronises; a client's round does so at its two ends alone."""
    local = make(augmentation=Rotation(0.4), flip=True, crop=1)
    start, data = state_of(TinyNet()), client_data(0, 24).to("cuda")
    local.train_epochs(start, data, 0)
    epoch_of = local._epoch

    def strict(*arguments: Any) -> Any:
        context, stream, rate, batches, step, round = arguments

        def watched(on: Any, batch: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step(on, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return epoch_of(context, stream, rate, batches, watched, round)

    local._epoch = strict
    assert local.train_epochs(start, data, 0).metrics["loss"] > 0


def test_the_device_agrees_with_the_processor():
    """Other kernels and other draws, so other bits; without draws the same up to rounding."""
    still = TinyNet()
    still.dropout.p = 0.0
    data = [ClientData(0, client_data(0).images[:8], client_data(0).labels[:8])]  # one batch
    changes = {"model": still, "augmentation": None}
    gpu, cpu = (
        two_rounds(make(device=device, **changes), data, state_of(still))[0].state
        for device in ("cuda", "cpu")
    )
    for name, value in cpu.items():
        assert torch.allclose(gpu[name].float(), value.float(), atol=1e-3), name
