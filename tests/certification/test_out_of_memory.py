"""Where memory runs out, votes are cast again in smaller batches, and come out the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
from certifl.certification.counts import Request
from certifl.certification.network import prepare
from certifl.certification.sampling import VoteCounter
from certifl.rng import image_key
from known_models import HalfSpace

NOISE = certifl.PixelNoise(0.5)
PROBES = 12  # rows of the largest batch that looks at a model before the first vote
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.fixture
def images() -> Tensor:
    return torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(images: Tensor) -> HalfSpace:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(2))
    return HalfSpace(weight, -float((images.flatten(1) @ weight).mean())).eval()


def small(model: HalfSpace, error: BaseException, rows: int) -> Callable[[Tensor], Tensor]:
    """The model on a machine that holds no more than some rows."""

    def call(batch: Tensor) -> Tensor:
        if len(batch) > rows:
            raise error
        with torch.no_grad():
            return model(batch)

    return call


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_batch_is_halved_until_it_fits_and_the_votes_are_the_same(
    error: BaseException, model: HalfSpace, images: Tensor
) -> None:
    options = {"n": 1000, "precision": "float32"}
    plenty = certifl.certify(model, images, NOISE, batch_size=16, **options)
    scarce = certifl.certify(small(model, error, 16), images, NOISE, batch_size=200, **options)
    assert scarce.same_results(plenty)
    # 200, 100, 50, 25, 12
    assert scarce.conditions["batch_size"] == 12
    assert plenty.conditions["batch_size"] == 16


def test_a_failure_in_the_middle_counts_no_vote_twice(model: HalfSpace, images: Tensor) -> None:
    calls = 0

    def call(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        with torch.no_grad():
            return model(batch)

    network = prepare(call, images, batch_size=64)
    requests = [Request(i, i, image_key(images[i]), "estimation", 0, 400) for i in range(3)]
    counter = VoteCounter(network, NOISE, 0)
    found = counter.count(images, requests, 3)
    assert calls > 8
    assert counter.network.batch_size == 32
    plain = VoteCounter(prepare(model, images, precision="float32"), NOISE, 0)
    assert np.array_equal(found, plain.count(images, requests, 3))
    assert found.sum() == 1200


def test_an_image_too_large_for_the_memory_is_said(model: HalfSpace, images: Tensor) -> None:
    network = prepare(model, images, batch_size=4)
    counter = VoteCounter(network, NOISE, 0)
    object.__setattr__(network, "call", small(model, torch.OutOfMemoryError("out of memory"), 0))
    with pytest.raises(torch.OutOfMemoryError):
        counter.count(images, [Request(0, 0, 1, "estimation", 0, 100)], 1)
    assert counter.network.batch_size == 1


def test_other_errors_of_a_network_are_not_retried(model: HalfSpace, images: Tensor) -> None:
    calls = []

    def call(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        if len(batch) > PROBES:
            raise RuntimeError("shapes cannot be multiplied")
        with torch.no_grad():
            return model(batch)

    with pytest.raises(RuntimeError, match="multiplied"):
        certifl.certify(call, images, NOISE, n=100, batch_size=64)
    assert calls.count(64) == 1
