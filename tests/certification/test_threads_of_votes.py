"""Small networks vote on one thread unless more are asked for; nothing is left changed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import certifl
import tiny_study as tiny
from certifl.certification.sampling import VoteCounter
from certifl.study.environment import training_threads
from certifl.torch_env import requested_threads

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
seen: set[int] = set()


class Watching(nn.Module):
    def __init__(self, weights: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, weights // 64)

    def forward(self, images: Tensor) -> Tensor:
        seen.add(torch.get_num_threads())
        return self.layer(images.flatten(1))[:, :4]


SMALL, LARGE = Watching(640).eval(), Watching(1_280_000).eval()


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    seen.clear()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2


def certify(model: Any, **options: Any) -> certifl.Certificates:
    return certifl.certify(model, IMAGES, certifl.PixelNoise(0.25), n=100, device="cpu", **options)


def test_a_small_network_votes_on_one_thread():
    assert certify(SMALL).conditions["threads"] == 1
    certifl.predict(SMALL, IMAGES, certifl.PixelNoise(0.25), n=100, device="cpu")
    assert seen == {1}


def test_a_large_network_votes_on_all():
    assert certify(LARGE, precision="float32").conditions["threads"] == 2
    assert seen == {2}


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_more_threads_can_be_asked_for(variable, monkeypatch):
    monkeypatch.setenv(variable, "2")
    assert certify(SMALL).conditions["threads"] == 2
    assert seen == {2}


def test_threads_that_a_client_asks_for_are_used():
    with requested_threads(2):
        certify(SMALL)
    assert seen == {2}
    with requested_threads(0):
        certify(SMALL)
    assert seen == {1, 2}


def test_certificates_do_not_depend_on_it(monkeypatch):
    one = certify(SMALL)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert one.same_results(certify(SMALL))


def test_training_and_votes_have_one_rule():
    for model, count in ((SMALL, 1), (LARGE, 2)):
        with training_threads(model):
            assert torch.get_num_threads() == count


def test_runs_attacks_and_explorations_vote_on_one_thread(copied, tmp_path, monkeypatch):
    used: set[int] = set()
    votes = VoteCounter._votes

    def watched(counter: VoteCounter, *arguments: Any) -> Tensor:
        used.add(torch.get_num_threads())
        return votes(counter, *arguments)

    monkeypatch.setattr(VoteCounter, "_votes", watched)
    tiny.cli("attack", copied, "--images", "1", "--directions", "2").fine()
    tiny.cli("explore", copied).fine()
    place = tmp_path / "new"
    tiny.cli("run", tiny.write_spec(tmp_path, "seed=5"), "--out", place, "--device", "cpu").fine()
    assert used == {1}
