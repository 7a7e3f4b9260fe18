"""Averages of models: exact on equals, one update at a time, counters by their maximum."""

from __future__ import annotations

import pytest
import torch

from certifl.errors import InputError
from certifl.federated import FedAvg, Update, train
from certifl.federated.averaging import average_models, average_parts, moved
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import TinyNet, assert_same, clients, training
from tiny_updates import most_alive


def test_equal_models_are_given_back_bit_for_bit_whatever_weights_and_dtype():
    drawn = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=drawn, dtype=torch.float64)
    values[:3] = torch.tensor([-0.0, 5e-324, 1.7e308])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        finite = values.to(dtype)
        finite = finite[finite.isfinite()]
        for weighting in ("uniform", "size"):
            updates = [Update(i, 0.1 + i / 3, {"x": finite.clone()}, {}) for i in range(11)]
            assert_same(average_models(updates, weighting), {"x": finite})


def test_averages_are_means_and_counters_are_maxima():
    values = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0]), torch.tensor([6.0, 2.0])]
    updates = [
        Update(
            i, weight, {"w": value, "steps": torch.tensor(i + 3), "on": torch.tensor(i == 1)}, {}
        )
        for i, (weight, value) in enumerate(zip((1.0, 1.0, 2.0), values, strict=True))
    ]
    uniform = average_models(updates)
    assert torch.equal(uniform["w"], torch.tensor([3.0, 4.0]))
    assert torch.equal(average_models(updates, "size")["w"], torch.tensor([3.75, 3.5]))
    assert torch.equal(uniform["steps"], torch.tensor(5))
    assert uniform["steps"].dtype == torch.int64
    assert torch.equal(uniform["on"], torch.tensor(True))


def test_sums_do_not_lose_small_numbers():
    # In float32, 1 + 1e-8 is 1: a sum in float32 over 1001 clients would miss the small ones.
    models = [torch.tensor([1e8])] + [torch.tensor([1.0])] * 1000
    updates = [Update(i, 1.0, {"w": model}, {}) for i, model in enumerate(models)]
    assert torch.equal(average_models(updates)["w"], torch.tensor([(1e8 + 1000) / 1001]))


def test_updates_are_consumed_one_at_a_time():
    # When the next one is asked for, only the first is left, from which the others deviate.
    assert most_alive(average_models) == 1
    assert most_alive(average_parts) == 1


def test_another_architecture_is_refused_by_name_of_the_client():
    good = Update(0, 1.0, {"w": torch.ones(2)}, {})
    for wrong in ({"w": torch.ones(3)}, {"v": torch.ones(2)}, {}):
        with pytest.raises(InputError, match="Client 4 sent"):
            average_models([good, Update(4, 1.0, wrong, {})])


def test_batchnorm_counters_stay_whole_numbers(tmp_path):
    stored = train(FedAvg(), TinyNet(), clients(), training(), Checkpoints(tmp_path))
    counter = stored.server()["model"]["norm.num_batches_tracked"]
    assert counter.dtype == torch.int64
    # The largest client: 20 images, batches of 8 + 8 + 4, two epochs, three rounds; each round
    # starts from the largest counter.
    assert counter.item() == 3 * 2 * 3


def test_parts_are_averaged_in_one_pass_like_models():
    drawn = torch.Generator().manual_seed(1)
    models = [{"w": torch.randn(4, generator=drawn), "n": torch.tensor(i)} for i in range(4)]
    updates = [Update(i, 1.0 + i, model, {}) for i, model in enumerate(models)]
    for weighting in ("uniform", "size"):
        alone = average_models(updates, weighting)
        both = [Update(u.client, u.weight, u.model, {}, {"more": u.model}) for u in updates]
        assert_same(average_parts(iter(both), weighting), {"model": alone, "more": alone})
    # A part that some do not send is the average over those who do.
    some = [*updates[:3], Update(3, 1.0, None, {}, {"more": models[3]})]
    parts = average_parts(iter(some))
    assert_same(parts["model"], average_models(updates[:3]))
    assert_same(parts["more"], models[3])
    assert average_parts([]) == {}


def test_a_server_step_reaches_the_average_exactly_and_leaves_equals_alone():
    drawn = torch.Generator().manual_seed(2)
    old, average = ({"w": torch.randn(50, generator=drawn), "b": torch.ones(2)} for _ in range(2))
    assert_same(moved(old, average, 1.0, ["w", "b"]), average)
    assert_same(moved(old, old, 0.3, ["w", "b"]), old)
    zeros = {"w": torch.tensor([-0.0, 0.0])}
    assert_same(moved(zeros, zeros, 1.5, ["w"]), zeros)
    half = moved(old, {**average, "b": torch.zeros(2)}, 0.5, ["w"])
    torch.testing.assert_close(half["w"], (old["w"] + average["w"]) / 2)
    assert torch.equal(half["b"], torch.zeros(2))
