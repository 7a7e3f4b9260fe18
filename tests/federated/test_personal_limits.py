"""Limits of the algorithms that deploy a model of its own to every client."""

import pytest
import torch
from torch import nn

import quadratics
from algorithm_cases import INITIAL, all_rounds, deployed, in_memory, light
from certifl.errors import SpecError
from certifl.federated import (
    APFL,
    FLIX,
    L2GD,
    ClientState,
    Ditto,
    FedAvg,
    FedBN,
    FedRep,
    Local,
    PerFedAvg,
    ServerState,
    state_of,
)
from certifl.federated.algorithms.personal_layers import norm_keys
from quadratics import BEST, CENTERS, CURVATURES, value
from tiny_federation import TinyNet, assert_same, client_data, clients, differ, training

CLIENTS = list(zip(CURVATURES, CENTERS, strict=True))


def ends(algorithm):
    return all_rounds(algorithm, [0, 1, 2], light(momentum_between_rounds="keep"))


@pytest.mark.parametrize(
    ("algorithm", "plain"),
    [
        (FLIX(personalization=0.0, weighting="size"), "fedavg by size"),
        (APFL(alpha=0, adaptive=False), "fedavg"),
        (FedRep(head=""), "fedavg"),
        (PerFedAvg(inner_lr=0), "fedavg"),
    ],
    ids=str,
)
def test_federated_averaging_bit_for_bit(algorithm, plain):
    server, states = ends(algorithm)
    assert_same(server.parts, in_memory(plain)[1].parts)
    for model in deployed(algorithm, server, states):
        assert_same(model, server.parts["model"])


@pytest.mark.parametrize(
    "algorithm", [Ditto(mu=0), FLIX(1), APFL(alpha=1, adaptive=False)], ids=str
)
def test_local_training_bit_for_bit(algorithm):
    server, states = ends(algorithm)
    own = deployed(algorithm, server, states)
    for one, other in zip(deployed(Local(), *in_memory("local")[1:]), own, strict=True):
        assert_same(one, other)
    if not isinstance(algorithm, FLIX):
        assert_same(server.parts, in_memory("fedavg")[1].parts)


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_a_federated_averaging_runs_underneath_bit_for_bit(name):
    assert_same(in_memory(name)[1].parts, in_memory("fedavg")[1].parts)


def test_coins_are_thrown_for_all_clients_together_and_are_geometric():
    algorithm = L2GD(0.5, probability=0.2)
    assert algorithm.coins(3, 7) == algorithm.coins(3, 7)
    thrown = torch.tensor([algorithm.coins(1, round) for round in range(2000)]).double()
    # Standard deviations sqrt(p) / (1 - p) = 0.56 and sqrt(1 - p) / p = 4.5, over sqrt(2000).
    assert thrown[:, 0].mean().item() == pytest.approx(1 / 0.8, abs=5 * 0.0125)
    assert thrown[:, 1].mean().item() == pytest.approx(1 / 0.2, abs=5 * 0.1)
    assert thrown.min().item() == 1


def test_a_round_of_l2gd_is_so_many_pulls_and_so_many_steps():
    lam, p, lr = 0.6, 0.25, 0.05
    algorithm, local = L2GD(lam, p), quadratics.training(rounds=9, lr=lr)
    data = quadratics.parabolas()
    for round in range(1, 9):
        heads, tails = algorithm.coins(local.seed, round)
        server = ServerState(round, {"model": state_of(quadratics.Point(0.9))})
        own = ClientState({"model": state_of(quadratics.Point(0.2))})
        for (a, b), one in zip(CLIENTS, data, strict=True):
            _, state = algorithm.client_round(server, own, one, local)
            x = 0.9 + (1 - lr / p * 2 * (1 - lam)) ** heads * (0.2 - 0.9)
            x = b + (1 - lr / (1 - p) * lam * a) ** tails * (x - b)
            assert value(state.parts["model"]) == pytest.approx(x, rel=1e-6)


def test_a_throw_of_the_coin_estimates_the_step_of_equation_5():
    """p times the step towards the average and 1 - p times the local one: the mixture's step."""
    lam, p, lr, own, mean, a, b = 0.3, 0.2, 0.05, 0.7, 0.4, 2.0, 0.1
    towards = L2GD(lam, p).pull(lr) * (own - mean)
    along = lr * lam / (1 - p) * a * (own - b)
    assert p * towards + (1 - p) * along == pytest.approx(
        lr * (lam * a * (own - b) + 2 * (1 - lam) * (own - mean))
    )


def test_l2gd_never_pulled_is_local_training_of_random_length():
    local, data, algorithm = light(rounds=3), client_data(0), L2GD(1.0, probability=0.4)
    server, state, alone = algorithm.init(INITIAL), ClientState(), INITIAL
    for round in range(3):
        _, steps = algorithm.coins(local.seed, round)
        alone = local.train_epochs(alone, data, round, lr_factor=1 / 0.6, steps=steps).state
        update, state = algorithm.client_round(server, state, data, local)
        server = algorithm.aggregate(server, [update])
        server.parts["model"]["head.bias"].fill_(9.0)  # an average that must not matter
    assert_same(state.parts["model"], alone)


def test_l2gd_pulled_all_the_way_starts_every_round_from_the_average():
    local = light(rounds=2, lr=0.05, decay_every=None)
    algorithm = L2GD(personalization=0.5, probability=0.05)
    assert algorithm.pull(0.05) == 1
    own = ClientState({"model": state_of(TinyNet(seed=2))})
    server = ServerState(1, {"model": INITIAL})
    _, state = algorithm.client_round(server, own, client_data(0), local)
    weights = {name: INITIAL[name] for name in local.trainable}
    _, steps = algorithm.coins(local.seed, 1)
    plain = local.train_epochs(
        {**own.parts["model"], **weights}, client_data(0), 1, lr_factor=0.5 / 0.95, steps=steps
    )
    assert_same(state.parts["model"], plain.state)


def test_ditto_settles_between_the_clients_best_and_the_global_model():
    mu = 1.5
    server, states = quadratics.run(Ditto(mu), quadratics.training(rounds=60, lr=0.2))
    assert value(server.parts["model"]) == pytest.approx(BEST, abs=1e-6)
    for (a, b), state in zip(CLIENTS, states, strict=True):
        assert value(state.parts["model"]) == pytest.approx((a * b + mu * BEST) / (a + mu))


def test_a_step_of_flix_has_the_gradient_of_the_mixture():
    lam, lr, start, decay = 0.3, 0.05, 0.5, 0.1
    local = quadratics.training(rounds=1, lr=lr, weight_decay=decay)
    server, states = quadratics.run(FLIX(lam), local, start)
    ends = []
    for (a, b), state in zip(CLIENTS, states, strict=True):
        own = start - lr * (a * (start - b) + decay * start)
        assert value(state.parts["own"]) == pytest.approx(own)
        mixed = (1 - lam) * start + lam * own
        ends.append(start - lr * (1 - lam) * (a * (mixed - b) + decay * mixed))
    shared = value(server.parts["model"])
    assert shared == pytest.approx(sum(ends) / 3)
    for state in states:
        model = FLIX(lam).deployed(server, state)
        assert value(model) == pytest.approx((1 - lam) * shared + lam * value(state.parts["own"]))


def test_the_own_models_of_flix_are_trained_once_and_alone():
    local, _, states = in_memory("flix")
    for model, state in zip(deployed(Local(), *in_memory("local")[1:]), states, strict=True):
        assert_same(state.parts["own"], {name: model[name] for name in local.trainable})


def test_apfl_moves_both_models_and_alpha_as_its_source_says():
    """Alpha moves with the first batch of a round, the models with all."""
    lr, rounds, steps = 0.1, 6, 2
    local = quadratics.training(rounds, steps, lr)
    server, states = quadratics.run(APFL(0.4), local, start=0.5)
    shared, own, alphas = 0.5, [0.5] * 3, [0.4] * 3
    for _ in range(rounds):
        ends = []
        for i, (a, b) in enumerate(CLIENTS):
            end = shared
            for step in range(steps):
                alpha, before = alphas[i], own[i]
                slope = a * (alpha * before + (1 - alpha) * end - b)
                if step == 0:
                    alphas[i] = min(max(alpha - lr * slope * (before - end), 0.0), 1.0)
                own[i] -= lr * alpha * slope
                end -= lr * a * (end - b)
            ends.append(end)
        shared = sum(ends) / 3
    assert value(server.parts["model"]) == pytest.approx(shared)
    for i, state in enumerate(states):
        assert value(state.parts["own"]) == pytest.approx(own[i])
        assert state.parts["mix"]["alpha"].item() == pytest.approx(alphas[i])
        assert alphas[i] != 0.4
        mixed = alphas[i] * own[i] + (1 - alphas[i]) * shared
        assert value(APFL(0.4).deployed(server, state)) == pytest.approx(mixed)


@pytest.mark.parametrize("algorithm", [FLIX(0.5), APFL(0.5)], ids=lambda a: a.name)
def test_running_statistics_of_a_mixture_are_the_clients_own(algorithm):
    local, data = light(), client_data(0)
    server = algorithm.init(INITIAL)
    update, state = algorithm.client_round(server, ClientState(), data, local)
    server = algorithm.aggregate(server, [update])
    server.parts["model"]["norm.running_mean"].fill_(99.0)
    _, state = algorithm.client_round(server, state, data, local)
    mean = algorithm.deployed(server, state)["norm.running_mean"]
    assert torch.equal(mean, state.parts["statistics"]["norm.running_mean"])
    assert mean.abs().max() < 5


def test_alpha_stays_between_global_and_local():
    local = quadratics.training(rounds=1, lr=0.4)
    for own, mixed in ((0.0, 1.0), (100.0, 0.0)):  # far better, or far worse, than the global
        server = ServerState(1, {"model": state_of(quadratics.Point(50.0))})
        parts = {"own": state_of(quadratics.Point(own)), "mix": {"alpha": torch.tensor(0.5)}}
        one = quadratics.parabolas()[2]
        _, state = APFL().client_round(server, ClientState(parts), one, local)
        assert state.parts["mix"]["alpha"].item() == mixed


def small_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def sent_and_kept(algorithm, local, initial):
    server = algorithm.init(initial)
    update, state = algorithm.client_round(server, ClientState(), client_data(0), local)
    return update, state


def test_fedbn_without_batchnorm_is_federated_averaging():
    network = small_groups()
    local, initial = light(model=network), state_of(network)
    update, state = sent_and_kept(FedBN(), local, initial)
    plain, nothing = sent_and_kept(FedAvg(), local, initial)
    assert_same(update.model, plain.model)
    assert state.parts == nothing.parts == {}
    update, state = sent_and_kept(FedBN(layers="all"), local, initial)
    assert state.parts["layers"].keys() == {"1.weight", "1.bias"}
    assert_same({n: update.model[n] for n in ("1.weight", "1.bias")}, small_entries(initial))


def small_entries(state):
    return {name: state[name] for name in ("1.weight", "1.bias")}


def test_batchnorm_layers_stay_with_the_client():
    local, server, states = in_memory("fedbn")
    private = norm_keys(TinyNet(), "batch")
    assert {name.partition(".")[0] for name in private} == {"norm"}
    assert len(private) == 5
    model = server.parts["model"]
    assert_same({n: model[n] for n in private}, {n: INITIAL[n] for n in private})
    ones = deployed(FedBN(), server, states)
    for name in model:
        equal = torch.equal(ones[0][name], ones[1][name])
        assert equal == (name not in private or name.endswith("tracked")), name
        assert torch.equal(ones[0][name], model[name]) == (name not in private)
    # What a client sends says nothing of its own layers.
    update, _ = FedBN().client_round(server, states[0], client_data(0), local)
    assert_same({n: update.model[n] for n in private}, {n: INITIAL[n] for n in private})


def test_fedrep_shares_the_representation_and_nothing_of_the_head():
    local, server, states = in_memory("fedrep")
    ones = deployed(FedRep(), server, states)
    for name, value_ in server.parts["model"].items():
        head = name.startswith("head.")
        assert torch.equal(value_, INITIAL[name]) == head
        assert torch.equal(ones[0][name], value_) == (not head)
        assert torch.equal(ones[0][name], ones[1][name]) == (not head)
    assert {*states[0].parts["momentum"]} == {*local.trainable} - {"head.weight", "head.bias"}


def test_the_head_is_trained_with_the_representation_held_still():
    """Without a rate for what comes after: only the head's passes are left to move anything."""
    local = light(momentum=0.0, weight_decay=0.1, local_epochs=1)
    update, state = sent_and_kept(FedRep(head="head", head_epochs=2), local, INITIAL)
    body = [n for n in local.trainable if not n.startswith("head.")]
    head = {"stream": "head-", "epochs": 2, "hook": only(["head.weight", "head.bias"])}
    seen = local.train_epochs(INITIAL, client_data(0), 0, **head).state
    for name in ("head.weight", "head.bias"):
        assert torch.equal(state.parts["head"][name], seen[name])
        assert torch.equal(update.model[name], INITIAL[name])
    assert all(torch.equal(seen[n], INITIAL[n]) for n in body)
    assert all(differ({n: update.model[n]}, {n: INITIAL[n]}) for n in body)


def only(names):
    def hook(parameters):
        for name in parameters.keys() - set(names):
            parameters[name].grad = None

    return hook


def test_a_head_that_the_network_does_not_have_is_refused():
    with pytest.raises(SpecError, match=r"head = 'haed' is no part .* convolution, norm, dropout"):
        sent_and_kept(FedRep(head="haed"), light(), INITIAL)


@pytest.mark.parametrize(
    ("approximation", "power"), [("first-order", 1), ("hessian-free", 2)], ids=lambda x: str(x)
)
def test_per_fedavg_settles_where_its_source_says(approximation, power):
    """Parabolas: weights a (1 - alpha a) without the Hessian, a (1 - alpha a)^2 with it."""
    alpha = 0.15
    local = quadratics.training(rounds=70, lr=0.2)
    algorithm = PerFedAvg(alpha, approximation)
    server, states = quadratics.run(algorithm, local)
    weights = [a * (1 - alpha * a) ** power for a in CURVATURES]
    best = sum(w * b for w, b in zip(weights, CENTERS, strict=True)) / sum(weights)
    assert value(server.parts["model"]) == pytest.approx(best, abs=1e-6)
    for (a, b), state in zip(CLIENTS, states, strict=True):
        model = algorithm.deployed(server, state)
        assert value(model) == pytest.approx(best - alpha * a * (best - b), abs=1e-6)


def test_the_last_step_is_the_gradient_over_all_images():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    local = training(model=network, rounds=1, augmentation=None, weight_decay=0.1)
    server = ServerState(1, {"model": state_of(network)})
    data = client_data(0, images=21)  # 8 + 8 + 5
    update, state = PerFedAvg(inner_lr=0.3).client_round(server, ClientState(), data, local)
    images = data.images.flatten(1).float() / 255
    loss = nn.functional.cross_entropy(network[1](images), data.labels)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    for (name, weight), gradient in zip(network.named_parameters(), gradients, strict=True):
        expected = weight.detach() - 0.3 * gradient
        torch.testing.assert_close(state.parts["adapted"][name], expected)
    assert update.model is None
    assert update.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_loss_told_is_that_after_the_inner_step():
    algorithm, local = PerFedAvg(inner_lr=0.1), quadratics.training(rounds=1)
    server = algorithm.init(state_of(quadratics.Point(0.5)))
    update, _ = algorithm.client_round(server, ClientState(), quadratics.parabolas()[2], local)
    (a, b), start = CLIENTS[2], 0.5
    ahead = start - 0.1 * a * (start - b)
    assert update.metrics["loss"] == pytest.approx(a / 2 * (ahead - b) ** 2)


def test_batches_too_small_to_be_cut_serve_as_all_parts():
    local = light(batch_size=2)
    for approximation in ("first-order", "hessian-free"):
        algorithm = PerFedAvg(0.1, approximation)
        update, _ = algorithm.client_round(
            algorithm.init(INITIAL), ClientState(), clients(1)[0], local
        )
        assert 0 < update.metrics["accuracy"] < 1
