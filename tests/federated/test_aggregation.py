"""Averages of models, and robust aggregation: what each rule is, withstands and leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from certifl.errors import InputError, SpecError
from certifl.federated import FedAvg, ServerState, Update, train
from certifl.federated.aggregation import RULES, Clip, Krum, Mean, Median, TrimmedMean, make_rule
from certifl.federated.averaging import average_models, average_parts, moved
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import TinyNet, assert_same, clients, training
from tiny_updates import EMPTY, most_alive, result, updates

ROBUST = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(0.3),
    "krum": Krum(0.2),
    "multi-krum": Krum(0.2, keep=3),
    "clip and median": Clip(1e6, Median()),
    "clip": Clip(1e6),
}
every_rule = pytest.mark.parametrize("rule", ROBUST.values(), ids=ROBUST.keys())


def test_the_table_names_every_rule():
    assert {name: kind.name for name, kind in RULES.items()} == {name: name for name in RULES}
    assert set(RULES) == {"mean", "median", "trimmed-mean", "krum"}


def test_the_median_is_that_of_each_coordinate():
    odd = updates([1.0, 30.0], [2.0, 10.0], [9.0, 20.0])
    assert result(Median(), odd).tolist() == [2.0, 20.0]
    assert result(Median(), updates(1.0, 2.0, 4.0, 100.0)).tolist() == [3.0]
    values = np.random.default_rng(0).normal(size=(7, 200_001)).astype(np.float32)
    found = result(Median(), updates(*values, dtype=torch.float32))
    assert np.array_equal(found.numpy(), np.median(values, axis=0))


def test_the_trimmed_mean_drops_a_share_at_both_ends():
    values = [-1000.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1000.0]
    assert result(TrimmedMean(0.1), updates(*values)).tolist() == [4.5]
    assert result(TrimmedMean(0.0), updates(*values)).tolist() == [3.6]
    # A share that is no whole number is rounded up; one that is, is not (0.07 x 100 > 7).
    assert result(TrimmedMean(0.05), updates(*values)).tolist() == [4.5]
    many = updates(*range(100))
    assert result(TrimmedMean(0.07), many).item() == pytest.approx(np.mean(range(7, 93)))
    from scipy.stats import trim_mean

    drawn = np.random.default_rng(1).normal(size=(10, 50))
    found = result(TrimmedMean(0.2), updates(*drawn)).numpy()
    np.testing.assert_allclose(found, trim_mean(drawn, 0.2, axis=0), rtol=1e-12)


def krum_in_a_loop(points, wrong):
    """The definition, word for word."""
    scores = []
    for i in range(len(points)):
        others = [float(((points[i] - p) ** 2).sum()) for j, p in enumerate(points) if j != i]
        scores.append(sum(sorted(others)[: len(points) - wrong - 2]))
    return np.argsort(scores, kind="stable")


@pytest.mark.parametrize("seed", range(5))
def test_krum_is_the_definition(seed):
    points = np.random.default_rng(seed).normal(size=(9, 6))
    order = krum_in_a_loop(points, wrong=2)
    assert np.array_equal(result(Krum(2 / 9), updates(*points)).numpy(), points[order[0]])
    several = result(Krum(2 / 9, keep=4), updates(*points)).numpy()
    np.testing.assert_allclose(several, points[order[:4]].mean(0), rtol=1e-12)


def test_krum_weighs_statistics_and_weights_apart():
    drawn = np.random.default_rng(3)
    for poisoned, scale in (("w", 1e-6), ("norm.running_var", 1e6)):
        sent = []
        for client in range(7):
            small, large = drawn.normal(size=4) * 1e-6, 1e6 + 1e6 * drawn.random(4)
            model = {"w": torch.from_numpy(small), "norm.running_var": torch.from_numpy(large)}
            model["norm.num_batches_tracked"] = torch.tensor(client)
            if client == 3:
                model[poisoned] = model[poisoned] + 30 * scale
            sent.append(Update(client, 1.0, model, {}))
        order = [Krum(0.2)._chosen([u.model for u in sent])]
        assert not torch.equal(order[0][poisoned], sent[3].model[poisoned])
        alone = Krum(1 / 7, keep=6)._chosen([u.model for u in sent])
        honest = [u.model[poisoned].numpy() for u in sent if u.client != 3]
        np.testing.assert_allclose(alone[poisoned].numpy(), np.mean(honest, axis=0))


def test_clipping_shortens_what_is_too_long_around_the_broadcast():
    broadcast = ServerState(4, {"model": {"w": torch.tensor([1.0, 1.0])}})
    near, far = updates([1.0, 2.0], [4.0, 5.0], dtype=torch.float32)
    clipped = list(Clip(2.5)(broadcast, [near, far]))
    assert clipped[0].model["w"] is near.model["w"]
    torch.testing.assert_close(clipped[1].model["w"], torch.tensor([2.5, 3.0]))
    assert clipped[1].model["w"].dtype == torch.float32
    assert [(u.client, u.weight, u.metrics) for u in clipped] == [
        (u.client, u.weight, u.metrics) for u in (near, far)
    ]


def test_clipping_bounds_weights_statistics_and_extra_parts_each():
    zero, sent = (
        {"w": torch.tensor(w), "n.running_var": torch.tensor(v), "n.num_batches_tracked": count}
        for w, v, count in (
            ([0.0, 0.0], [1.0], torch.tensor(0)),
            ([3.0, 4.0], [101.0], torch.tensor(7)),
        )
    )
    control = {"c": torch.tensor([0.0, 10.0])}
    update = Update(0, 1.0, sent, {}, {"control": control})
    (made,) = Clip(1.0)(ServerState(0, {"model": zero}), [update])
    torch.testing.assert_close(made.model["w"], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(made.model["n.running_var"], torch.tensor([2.0]))
    assert made.model["n.num_batches_tracked"].item() == 7
    torch.testing.assert_close(made.extra["control"]["c"], torch.tensor([0.0, 1.0]))


def test_clipping_comes_before_the_rule_it_is_composed_with():
    broadcast = ServerState(0, {"model": {"w": torch.zeros(1, dtype=torch.float64)}})
    sent = updates(0.5, 1.0, -40.0, 8.0)
    assert result(Clip(2.0), sent, broadcast).item() == pytest.approx((0.5 + 1 - 2 + 2) / 4)
    assert result(Clip(2.0, Median()), sent, broadcast).item() == pytest.approx(0.75)


def test_clipping_needs_a_broadcast_model():
    with pytest.raises(InputError, match="broadcasts no part 'model'"):
        list(Clip(1.0)(EMPTY, updates(1.0)))


def test_the_mean_and_clipping_hold_one_update_at_a_time():
    broadcast = ServerState(0, {"model": {"w": torch.zeros(3)}})
    for rule in (Mean(), Clip(1.0), Clip(100.0)):
        assert most_alive(lambda sent, rule=rule: average_models(rule(broadcast, sent))) <= 3


@pytest.mark.parametrize("rule", [Mean(), *ROBUST.values()], ids=["mean", *ROBUST])
def test_equal_models_are_given_back_bit_for_bit(rule):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:3] = torch.tensor([-0.0, 5e-324, 1.7e308])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64):
        wide = values.to(dtype)
        finite = wide[wide.isfinite()]
        model = {"w": finite, "n.running_mean": finite[:7]}
        model["n.num_batches_tracked"] = torch.tensor(3)
        broadcast = ServerState(0, {"model": model, "control": {"c": finite}})
        sent = []
        for i in range(8):
            control = {"control": {"c": finite.clone()}}
            copies = {k: v.clone() for k, v in model.items()}
            sent.append(Update(i, 0.1 + i / 3, copies, {}, control))
        for update in rule(broadcast, sent):
            assert_same(update.model, model)
            assert_same(update.extra["control"], {"c": finite})
        for weighting in ("uniform", "size"):
            assert_same(average_models(rule(broadcast, sent), weighting), model)


def test_averaging_one_table_many_times_changes_nothing_in_it():
    """What a rule hands on is the same object for every client, also in float64."""
    model = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    made = average_models([Update(client, 1.0, model, {}) for client in range(3)])
    assert_same(made, {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)})
    assert_same(model, made)


@every_rule
def test_the_order_of_arrival_changes_nothing(rule):
    drawn = torch.randn((9, 300), generator=torch.Generator().manual_seed(1))
    sent = updates(*drawn, dtype=torch.float32)
    broadcast = ServerState(0, {"model": {"w": torch.zeros(300)}})
    shuffled = [sent[i] for i in (3, 8, 1, 0, 7, 2, 6, 5, 4)]
    one = {u.client: u.model["w"] for u in rule(broadcast, sent)}
    two = {u.client: u.model["w"] for u in rule(broadcast, shuffled)}
    assert_same(one, {client: two[client] for client in one})


@every_rule
def test_nothing_received_is_changed(rule):
    sent = updates(*torch.randn((6, 40), generator=torch.Generator().manual_seed(2)))
    before = [update.model["w"].clone() for update in sent]
    center = torch.ones(40, dtype=torch.float64)
    list(Clip(0.5, rule)(ServerState(0, {"model": {"w": center}}), sent))
    assert all(torch.equal(u.model["w"], b) for u, b in zip(sent, before, strict=True))
    assert torch.equal(center, torch.ones(40, dtype=torch.float64))


@every_rule
def test_as_many_updates_leave_as_arrive_with_their_names_on(rule):
    sent = updates(*range(7))
    broadcast = ServerState(0, {"model": {"w": torch.zeros(1, dtype=torch.float64)}})
    left = list(rule(broadcast, sent))
    assert [(u.client, u.weight, u.metrics) for u in left] == [
        (u.client, u.weight, u.metrics) for u in sent
    ]
    nothing = [replace(update, model=None) for update in sent]
    assert list(rule(broadcast, nothing)) == nothing
    assert list(rule(broadcast, [])) == []


def test_counters_take_the_maximum_and_keep_their_type():
    sent = []
    for i in range(5):
        model = {"w": torch.ones(1) * i, "steps": torch.tensor(i), "on": torch.tensor(i == 2)}
        sent.append(Update(i, 1.0, model, {}))
    for rule in (Median(), TrimmedMean(0.2)):
        made = average_models(rule(EMPTY, sent))
        assert (made["steps"].item(), made["steps"].dtype) == (4, torch.int64)
        assert made["on"].item() is True


@every_rule
def test_another_architecture_is_refused_by_name(rule):
    broadcast = ServerState(0, {"model": {"w": torch.zeros(1, dtype=torch.float64)}})
    sent = [*updates(1.0, 2.0, 3.0), Update(3, 1.0, {"v": torch.zeros(1)}, {})]
    with pytest.raises(InputError, match="Client 3 sent"):
        average_models(rule(broadcast, sent))


def test_rules_by_name():
    assert make_rule("mean", {}) is None
    assert make_rule("mean", {}, clip=3.0) == Clip(3.0, Mean())
    assert make_rule("krum", {"malicious": 0.2, "keep": 2}, 1.0) == Clip(1.0, Krum(0.2, 2))
    assert make_rule("median", {}) == Median()


@pytest.mark.parametrize(
    ("name", "options", "clip", "said"),
    [
        ("medain", {}, None, "rule name = 'medain' is unknown: .*Did you mean 'median'"),
        ("median", {"trim": 0.1}, None, "median has no parameter 'trim'"),
        ("trimmed-mean", {}, None, "trimmed-mean needs the parameter 'trim'"),
        ("trimmed-mean", {"trim": 0.5}, None, "trim = 0.5 is not allowed"),
        ("trimmed-mean", {"trim": -0.1}, None, "trim = -0.1 is not allowed"),
        ("krum", {"malicious": float("nan")}, None, "malicious = nan"),
        ("krum", {"malicious": 0.1, "keep": 0}, None, "keep = 0"),
        ("mean", {}, 0.0, "clip = 0.0"),
        ("mean", {}, float("inf"), "clip = inf"),
    ],
)
def test_wrong_options_name_the_key(name, options, clip, said):
    with pytest.raises(SpecError, match=said):
        make_rule(name, options, clip)


def test_too_few_clients_for_the_promise_are_refused(tmp_path):
    with pytest.raises(SpecError, match="needs at least 7 clients"):
        Krum(0.3).check(6)
    Krum(0.25).check(7)
    with pytest.raises(SpecError, match="keep = 6"):
        Krum(0.25, keep=6).check(7)
    with pytest.raises(SpecError, match="leaves none"):
        Clip(1.0, TrimmedMean(0.4)).check(2)
    TrimmedMean(0.4).check(5)
    with pytest.raises(SpecError, match="needs at least 5 clients"):
        train(FedAvg(), TinyNet(), clients(3), training(), Checkpoints(tmp_path), rule=Krum(0.2))


def test_a_round_made_small_by_faults_is_still_combined():
    assert result(Krum(0.4), updates(1.0)).item() == 1.0
    assert result(Krum(0.4), updates(1.0, 2.0)).item() in (1.0, 2.0)
    assert result(TrimmedMean(0.45), updates(1.0, 2.0)).item() == 1.5


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
