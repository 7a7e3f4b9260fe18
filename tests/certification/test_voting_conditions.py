"""How votes are cast: in how many rows, held to which algorithms, and where memory runs out."""

import contextlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
from certifl.certification import counts as engine
from certifl.certification import network
from certifl.certification import sampling as votes
from certifl.certification.api import _rounding, conditions
from certifl.certification.counts import CHUNK, Request, votes_per_image
from certifl.certification.network import Network, prepare, tf32_state
from certifl.certification.sampling import VoteCounter, predict_plain
from certifl.certification.settings import Settings
from certifl.errors import ModelError
from certifl.rng import image_key
from certifl.study.certify import Job, _votes_key
from known_models import HalfSpace

G = torch.Generator().manual_seed(0)
IMAGES = torch.rand((3, 1, 8, 8), generator=G)
MODEL = HalfSpace(torch.randn(64, generator=G), 0.0).eval()
NOISE = certifl.PixelNoise(0.5)


def test_batches_of_a_processor_keep_the_turn_they_had():
    assert {votes_per_image(1 << k) for k in range(10)} == {3200}  # 512 is the largest there


@pytest.mark.parametrize("batch_size", [801, 1000, 4096, 8192])
def test_a_turn_is_whole_chunks_and_fills_some_batches(batch_size):
    turn = votes_per_image(batch_size)
    assert turn % CHUNK == 0
    assert 4 * batch_size <= turn < 4 * batch_size + CHUNK


@pytest.mark.parametrize("estimator", ["top-class", "sequential", "scan"])
def test_votes_are_the_same_whatever_the_turn(estimator, monkeypatch):
    def made() -> certifl.Certificates:
        noise = certifl.Rotation(0.2 * math.pi) if estimator == "scan" else NOISE
        return certifl.certify(
            MODEL, IMAGES, noise, n0=700, n=4000, estimator=estimator, batch_size=64
        )

    expected = made()
    for turn in (100, 130, 900, 6400):
        monkeypatch.setattr(engine, "votes_per_image", lambda _size, turn=turn: turn)
        assert made().same_results(expected), turn


def test_a_last_image_that_is_alone_fills_large_batches():
    rows = 0

    def call(batch: Tensor) -> Tensor:
        nonlocal rows
        rows += len(batch)
        with torch.no_grad():
            return MODEL(batch)

    made = certifl.certify(
        call, IMAGES[:1], NOISE, n=100_000, estimator="top-class", batch_size=8192
    )
    assert rows < 1.4 * made.votes.sum()  # 2.6 in turns of 3200


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    now: list[torch.device] = []

    @contextlib.contextmanager
    def noted(device: torch.device) -> Iterator[None]:
        now.append(device)
        try:
            yield
        finally:
            now.pop()

    for module in (network, votes):
        monkeypatch.setattr(module, "exact_convolutions", noted)
    return now


def test_every_call_of_a_network_is_held_to_exact_convolutions(held):
    """Also the calls that look at it first: one that differs between calls would be refused."""
    seen: list[bool] = []

    def call(batch: Tensor) -> Tensor:
        seen.append(held == [torch.device("cpu")])
        with torch.no_grad():
            return MODEL(batch)

    certifl.certify(call, IMAGES, NOISE, n=300)
    certifl.predict(call, IMAGES, NOISE, n=200)
    predict_plain(prepare(call, IMAGES, batch_size=2), IMAGES)
    counter = VoteCounter(prepare(call, IMAGES, batch_size=50), NOISE, 0)
    counter.disagreement(IMAGES, [Request(0, 0, 1, "attack", 0, 100)], torch.tensor([0]))
    assert len(seen) > 20
    assert all(seen)
    assert held == []


def test_rows_and_slots_reach_the_device_as_they_were_asked_for():
    parts = [(k % 3, k, torch.full((k + 1, 2), float(k))) for k in range(4)]
    rows, slots, params = votes._packed(parts)
    assert rows.tolist() == [0, 1, 1, 2, 2, 2, 0, 0, 0, 0]
    assert slots.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert params[:, 0].tolist() == [float(s) for s in slots]
    assert {rows.dtype, slots.dtype} == {torch.int64}


def test_sums_of_rows_are_those_of_index_add():
    slot = torch.randint(0, 5, (200,), generator=G)
    rows = torch.randn((200, 3), generator=G)
    totals = torch.zeros(5, 3)
    votes._add_rows(totals, slot, rows)
    assert torch.equal(totals, torch.zeros(5, 3).index_add_(0, slot, rows))  # bit for bit
    put = torch.zeros(5, 3).index_put_((slot,), rows, accumulate=True)  # what a GPU is asked for
    torch.testing.assert_close(put, totals)


def network_of(device: str, precision: str) -> Network:
    return Network(MODEL, 2, torch.device(device), precision, False, 64)


@contextlib.contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    settings: Any = torch.backends.cudnn
    if not hasattr(settings, "conv"):
        pytest.skip("this torch has no fp32_precision")
    before = settings.conv.fp32_precision
    settings.conv.fp32_precision = precision
    try:
        yield
    finally:
        settings.conv.fp32_precision = before


def test_tf32_is_told_where_it_decides_about_votes():
    assert "tf32" in _rounding(network_of("cuda", "float32"))
    assert "tf32" in _rounding(network_of("cuda:1", "float32"))
    assert _rounding(network_of("cuda", "bfloat16")) == {}
    assert _rounding(network_of("cpu", "float32")) == {}
    assert "tf32" not in certifl.certify(MODEL, IMAGES, NOISE, n=100).conditions


def test_tf32_is_read_also_after_its_newer_name_was_used():
    with convolutions_in("ieee"):
        with pytest.raises(RuntimeError, match="TF32"):
            _ = torch.backends.cudnn.allow_tf32  # why it must not be asked for by its older name
        assert tf32_state()["convolutions"] is False
    with convolutions_in("tf32"):
        assert tf32_state()["convolutions"] is True


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_read_by_its_older_name_before_torch_2_9(on):
    older = types.SimpleNamespace(allow_tf32=on)
    assert network._is_tf32(None, older) is on
    assert network._is_tf32(older, older) is on


def test_votes_of_another_tf32_are_not_counted_with_these(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    job = Job(0, np.arange(3), (IMAGES * 255).byte(), np.zeros(3, np.int64), tmp_path / "votes")

    def key(device: str, precision: str = "float32") -> str:
        ready = network_of(device, precision)
        metadata = conditions(NOISE, Settings(), ready, 0, MODEL, "data")
        return _votes_key(job, metadata, "")

    devices = ("cuda", "cpu")
    by_default = [key(device) for device in devices] + [key("cuda", "bfloat16")]
    with convolutions_in("ieee"):
        exact = [key(device) for device in devices] + [key("cuda", "bfloat16")]
    assert [a == b for a, b in zip(by_default, exact, strict=True)] == [False, True, True]


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
    def call(batch: Tensor) -> Tensor:
        if len(batch) > rows:
            raise error
        with torch.no_grad():
            return model(batch)

    return call


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_batch_is_halved_until_it_fits_and_the_votes_are_the_same(error, model, images):
    options = {"n": 1000, "precision": "float32"}
    plenty = certifl.certify(model, images, NOISE, batch_size=16, **options)
    scarce = certifl.certify(small(model, error, 16), images, NOISE, batch_size=200, **options)
    assert scarce.same_results(plenty)
    # 200, 100, 50, 25, 12
    assert scarce.conditions["batch_size"] == 12
    assert plenty.conditions["batch_size"] == 16


def test_a_failure_in_the_middle_counts_no_vote_twice(model, images):
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


def test_an_image_too_large_for_the_memory_is_said(model, images):
    network = prepare(model, images, batch_size=4)
    counter = VoteCounter(network, NOISE, 0)
    object.__setattr__(network, "call", small(model, torch.OutOfMemoryError("out of memory"), 0))
    with pytest.raises(torch.OutOfMemoryError):
        counter.count(images, [Request(0, 0, 1, "estimation", 0, 100)], 1)
    assert counter.network.batch_size == 1


def test_other_errors_of_a_network_are_not_retried(model, images):
    calls = []

    def call(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        if len(batch) > PROBES:
            raise RuntimeError("shapes cannot be multiplied")
        with torch.no_grad():
            return model(batch)

    with pytest.raises(ModelError, match="RuntimeError: shapes cannot be multiplied"):
        certifl.certify(call, images, NOISE, n=100, batch_size=64)
    assert calls.count(64) == 1
