"""Votes on a GPU: cast without waiting for it, the same at every run.

Without one there is nothing to test. Where nothing but torch is installed:
`PYTHONPATH=src:tests/support python -m pytest --noconftest -c /dev/null FILE`
"""

import numpy as np
import pytest
import torch

import certifl
from certifl.certification.counts import Request
from certifl.certification.network import prepare
from certifl.certification.sampling import VoteCounter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

NOISE = certifl.PixelNoise(0.5)


def model(seed: int = 0) -> torch.nn.Module:
    return certifl.models.build("resnet18", 3, 10, seed=seed).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def counter(precision: str, batch_size: int = 512, seed: int = 0) -> VoteCounter:
    network = prepare(model(seed), images(), "cuda", precision, batch_size)
    return VoteCounter(network, NOISE, 0)


REQUESTS = [Request(i, i, i, "estimation", 0, 1300) for i in range(3)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_batch_of_votes_waits_for_the_host(precision):
    ready, here = counter(precision), images().cuda()
    batches = ready._cast(here, REQUESTS, None)
    with torch.inference_mode():
        next(batches)  # what libraries do once
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            list(batches)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_votes_and_leanings_are_the_same_at_every_run(precision):
    ready, here = counter(precision), images().cuda()
    expected = torch.zeros(3, dtype=torch.int64, device="cuda")
    first = ready.count(here, REQUESTS, 3), ready.disagreement(here, REQUESTS, expected)
    torch.backends.cudnn.benchmark = True  # somebody else's choice, not to be followed
    try:
        for _ in range(3):
            assert np.array_equal(ready.count(here, REQUESTS, 3), first[0])
            assert torch.equal(ready.disagreement(here, REQUESTS, expected), first[1])
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False


def test_the_record_says_whether_float32_was_rounded_to_tf32():
    made = certifl.certify(model(), images(1), NOISE, n=200, device="cuda", precision="float32")
    assert made.conditions["tf32"] == {"convolutions": True, "products": False}
