"""What is recorded as compiled is compiled at every vote, however many networks a process has.

A backend that compiles nothing but counts stands in for torch's own, so no compiler is needed.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import certifl
from certifl.certification import inference as compiled
from certifl.certification.certificates import predict_plain
from certifl.certification.network import Network, prepare
from certifl.certification.sampling import Request, VoteCounter
from certifl.errors import ModelError

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = certifl.PixelNoise(0.5)
ROWS = 16


@dataclass
class Counting:
    """How many pieces of code were made, and in which order they ran."""

    made: int = 0
    ran: list[int] = field(default_factory=list)

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        number, self.made = self.made, self.made + 1

        def run(*arguments: Any) -> Any:
            self.ran.append(number)
            return graph.forward(*arguments)

        return run


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    backend, compile_with = Counting(), torch.compile

    def compiles(call: Any, *, options: object = None, **others: Any) -> Any:
        return compile_with(call, backend=backend, **others)

    torch._dynamo.reset()  # as in a process of its own
    monkeypatch.setattr(torch, "compile", compiles)
    return backend


def model(seed: int) -> nn.Module:
    """Folded before it votes, so its layers are of a class of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(256, 3)).eval()


def unfolded(seed: int, last: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), last).eval()


def ready(module: nn.Module) -> Network:
    return prepare(module, IMAGES[:1], "cpu", "float32-compiled", ROWS)


def votes(network: Network, chunks: int = 2) -> Any:
    requests = [Request(0, 0, 1, "estimation", 0, 100 * chunks)]
    return VoteCounter(network, NOISE, 0).count(IMAGES, requests, slots=1)


BATCHES = -(-200 // ROWS)


def test_votes_of_every_network_of_a_process_are_compiled(counting: Counting) -> None:
    ran: list[list[int]] = []
    for number in range(8):
        network = ready(model(number))
        assert network.folded
        counting.ran.clear()
        counted = votes(network)
        ran.append(list(counting.ran))
        plain = prepare(model(number), IMAGES[:1], "cpu", "float32", ROWS)
        assert (counted == votes(plain)).all()
    assert [len(batches) for batches in ran] == [BATCHES] * 8
    assert ran == [[number] * BATCHES for number in range(8)]  # each has one piece of code


def test_networks_that_vote_in_turns_stay_compiled(counting: Counting) -> None:
    networks = [ready(model(number)) for number in range(7)]
    for turn in ([0, 1, 0], range(7), reversed(range(7)), [0, 6, 0]):
        for number in turn:
            counting.ran.clear()
            votes(networks[number])
            assert counting.ran == [number] * BATCHES
    assert counting.made == 7


def test_a_plain_prediction_runs_the_code_that_votes(counting: Counting) -> None:
    network = ready(model(0))
    counting.ran.clear()
    predict_plain(network, IMAGES)  # called on images made outside inference mode
    with torch.no_grad():
        network.call(IMAGES[:1].expand(ROWS, -1, -1, -1))  # and on images that share memory
    network.call(torch.rand(ROWS, 8, 8, 1).permute(0, 3, 1, 2))
    assert (counting.ran, counting.made) == ([0] * 3, 1)


def test_each_size_of_a_halved_batch_is_compiled(counting: Counting) -> None:
    network = ready(model(0))
    for halvings in range(14):
        rows = 1 << (13 - halvings)
        counting.ran.clear()
        for _ in range(2):
            network.call(torch.rand(rows, 1, 8, 8))
        assert len(counting.ran) == 2, rows
    assert counting.made == 14


class Broken(nn.Module):
    """What comes before it and what comes after cannot be compiled together."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return values + 1


def test_networks_in_several_pieces_stay_compiled(counting: Counting) -> None:
    networks = [ready(unfolded(number, Broken())) for number in range(12)]
    pieces = []
    for network in networks:
        counting.ran.clear()
        network.call(torch.rand(ROWS, 1, 8, 8))
        pieces.append(len(counting.ran))
    assert min(pieces) == max(pieces) >= 2


class Restless(nn.Module):
    """Another function at every call, as far as torch's compiler can tell."""

    calls = 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return values + 0.0 * self.calls


def test_a_network_that_would_run_uncompiled_is_refused(counting: Counting) -> None:
    network = ready(unfolded(0, Restless()))
    with pytest.raises(ModelError, match="Leave -compiled out"):
        votes(network, chunks=20)
    assert counting.made > 8


def test_errors_of_the_compiler_are_never_passed_over(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object) -> None:
        raise RuntimeError("no tools")

    monkeypatch.setattr(Counting, "__call__", fails)
    config: Any = torch._dynamo.config
    with (
        config.patch(suppress_errors=True),
        pytest.raises(ModelError, match="cannot be compiled here"),
    ):
        ready(model(0))


def test_torch_is_left_as_it_was(counting: Counting) -> None:
    config: Any = torch._dynamo.config
    before = config.recompile_limit, config.fail_on_recompile_limit_hit, config.suppress_errors
    votes(ready(model(0)))
    after = config.recompile_limit, config.fail_on_recompile_limit_hit, config.suppress_errors
    assert before == after


def test_a_compiled_network_is_freed_when_it_is_dropped(counting: Counting) -> None:
    network = ready(model(0))
    votes(network)
    call: Any = network.call
    weights = weakref.ref(call._call.module)
    del network, call
    gc.collect()
    assert weights() is None


def test_settings_are_found_under_their_older_names() -> None:
    older = types.SimpleNamespace(cache_size_limit=8)
    newer = types.SimpleNamespace(cache_size_limit=8, recompile_limit=8)
    names = ("recompile_limit", "cache_size_limit")
    assert compiled._known(older, names) == "cache_size_limit"
    assert compiled._known(newer, names) == "recompile_limit"
