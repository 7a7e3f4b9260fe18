"""Limits of the algorithms that deploy one global model: FedProx, SCAFFOLD, server optimisers."""

from dataclasses import replace

import pytest
import torch

import quadratics
from algorithm_cases import INITIAL, all_rounds, light
from certifl.federated import (
    ClientState,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Scaffold,
    ServerState,
    Update,
)
from tiny_federation import assert_same, client_data, clients, training

either_momentum = pytest.mark.parametrize("momentum", ["reset", "keep"])
SHAPE = (5, 3)


@either_momentum
@pytest.mark.parametrize(
    "algorithm",
    [FedProx(mu=0), FedAvgM(beta=0, server_lr=1), FedAvgM(beta=0.0, weighting="size")],
    ids=str,
)
def test_federated_averaging_bit_for_bit(algorithm, momentum):
    local = training(momentum_between_rounds=momentum)
    plain, states = all_rounds(FedAvg(algorithm.weighting), [0, 1, 2], local)
    other, others = all_rounds(algorithm, [0, 1, 2], local)
    assert_same(plain.parts["model"], other.parts["model"])
    for state, its in zip(states, others, strict=True):
        assert_same(state.parts, its.parts)


def test_the_proximal_term_is_equation_2_of_the_source():
    """On parabolas: the fixed point of the steps from theta_bar, and how fast they get there."""
    mu, steps, lr = 3.0, 7, 0.1
    local = quadratics.training(rounds=1, steps=steps, lr=lr)
    server, _ = quadratics.run(FedProx(mu), local, start=0.2)
    ends = []
    for a, b in zip(quadratics.CURVATURES, quadratics.CENTERS, strict=True):
        best = (a * b + mu * 0.2) / (a + mu)
        ends.append(best + (1 - lr * (a + mu)) ** steps * (0.2 - best))
    assert quadratics.value(server.parts["model"]) == pytest.approx(sum(ends) / 3, rel=1e-6)


def test_a_larger_mu_holds_clients_closer():
    local, data = training(rounds=1), client_data(0)
    moved = []
    for mu in (0.0, 1.0, 10.0):
        algorithm = FedProx(mu)
        update, _ = algorithm.client_round(algorithm.init(INITIAL), ClientState(), data, local)
        moved.append((update.model["head.weight"] - INITIAL["head.weight"]).norm().item())
    assert moved[0] > moved[1] > moved[2] > 0


def test_scaffold_without_control_variates_is_federated_averaging():
    local = training(momentum_between_rounds="keep", rounds=1)
    plain, states = all_rounds(FedAvg(), [0, 1, 2], local)
    first, others = all_rounds(Scaffold(), [0, 1, 2], local)
    assert_same(plain.parts["model"], first.parts["model"])
    for state, its in zip(states, others, strict=True):
        assert_same(state.parts["momentum"], its.parts["momentum"])


def test_equal_control_variates_correct_nothing():
    local, algorithm = light(), Scaffold()
    drawn = torch.Generator().manual_seed(3)
    control = {n: torch.randn(INITIAL[n].shape, generator=drawn) for n in local.trainable}
    server = ServerState(1, {"model": INITIAL, "control": control})
    state = ClientState({"control": control})
    update, _ = algorithm.client_round(server, state, client_data(0), local)
    plain, _ = FedAvg().client_round(server, ClientState(), client_data(0), local)
    assert_same(update.model, plain.model)


def test_scaffold_with_one_client_is_federated_averaging():
    local = training(rounds=3)
    plain, _ = all_rounds(FedAvg(), [0], local)
    alone, _ = all_rounds(Scaffold(), [0], local)
    torch.testing.assert_close(alone.parts["model"], plain.parts["model"], rtol=1e-5, atol=1e-6)


def test_control_variates_are_option_2_of_the_source():
    """For plain SGD: c_i - c + (theta - y_i) / (K gamma)."""
    lr = 0.05
    local = training(momentum=0.0, weight_decay=0.0, lr=lr, decay_every=None)
    algorithm, data = Scaffold(), client_data(0)
    drawn = torch.Generator().manual_seed(4)
    own, common = (
        {n: 0.01 * torch.randn(INITIAL[n].shape, generator=drawn) for n in local.trainable}
        for _ in range(2)
    )
    server = ServerState(1, {"model": INITIAL, "control": common})
    update, state = algorithm.client_round(server, ClientState({"control": own}), data, local)
    steps = 2 * 3  # two epochs of 8 + 8 + 4 images
    for name in local.trainable:
        moved = (INITIAL[name] - update.model[name]) / (steps * lr)
        expected = own[name] - common[name] + moved
        kept = state.parts["control"][name]
        torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-5)
        sent = update.extra["control_step"][name]
        torch.testing.assert_close(sent, kept - own[name])


def test_the_servers_control_variate_is_the_mean_of_those_known():
    local, algorithm, data = light(rounds=4), Scaffold(), clients(3)
    server, states = algorithm.init(INITIAL), [ClientState()] * 3
    known = set()
    for present in ([0, 2], [2], [1, 2], [0, 1, 2]):
        updates = []
        for client in present:
            update, states[client] = algorithm.client_round(
                server, states[client], data[client], local
            )
            updates.append(update)
        server = algorithm.aggregate(server, updates)
        known |= {*present}
        assert server.parts["known"]["clients"].tolist() == sorted(known)
        for name, value in server.parts["control"].items():
            own = torch.stack([states[client].parts["control"][name] for client in known])
            torch.testing.assert_close(value, own.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffold_corrects_the_drift_that_federated_averaging_has(momentum):
    local = quadratics.training(rounds=25, steps=10, momentum=momentum)
    plain, _ = quadratics.run(FedAvg(), local)
    corrected, _ = quadratics.run(Scaffold(), local)
    assert abs(quadratics.value(plain.parts["model"]) - quadratics.BEST) > 0.02
    assert quadratics.value(corrected.parts["model"]) == pytest.approx(quadratics.BEST, abs=1e-5)


def pseudo_gradients(rounds):
    drawn = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=drawn, dtype=torch.float64) * 0.01 for _ in range(rounds)]


def served(algorithm, gradients):
    """Where the server goes when the clients' average is theta - gradient, round after round."""
    server = algorithm.init({"w": torch.ones(SHAPE, dtype=torch.float64)})
    path = []
    for gradient in gradients:
        arrived = server.parts["model"]["w"] - gradient
        updates = [Update(i, 1.0, {"w": arrived + far}, {}) for i, far in ((0, 0.5), (1, -0.5))]
        server = algorithm.aggregate(server, updates)
        path.append(server.parts["model"]["w"])
    return path


def torch_path(gradients, make, change=None):
    weight = torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    optimizer = make([weight])
    path = []
    for number, gradient in enumerate(gradients, start=1):
        if change is not None:
            change(optimizer.param_groups[0], number)
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path


def assert_paths(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_fedavgm_is_sgd_with_momentum_on_pseudo_gradients():
    gradients = pseudo_gradients(6)
    theirs = torch_path(gradients, lambda w: torch.optim.SGD(w, lr=0.7, momentum=0.8))
    assert_paths(served(FedAvgM(beta=0.8, server_lr=0.7), gradients), theirs)


def test_fedadam_is_adam_on_pseudo_gradients():
    """torch.optim.Adam corrects a bias, which its learning rate and epsilon can take back."""
    lr, beta1, beta2, tau = 0.02, 0.7, 0.9, 1e-2
    gradients = pseudo_gradients(8)

    def made(weights):
        optimizer = torch.optim.Adam(weights, lr=lr, betas=(beta1, beta2), eps=tau)
        optimizer.state[weights[0]] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros(SHAPE, dtype=torch.float64),
            "exp_avg_sq": torch.full(SHAPE, tau**2, dtype=torch.float64),
        }
        return optimizer

    def uncorrected(group, number):
        scale = (1 - beta2**number) ** 0.5
        group["lr"], group["eps"] = lr * (1 - beta1**number) / scale, tau / scale

    ours = served(FedAdam(lr, beta1, beta2, tau), gradients)
    assert_paths(ours, torch_path(gradients, made, uncorrected))


def test_fedadagrad_is_adagrad_on_pseudo_gradients():
    gradients = pseudo_gradients(8)
    theirs = torch_path(
        gradients,
        lambda w: torch.optim.Adagrad(w, lr=0.1, eps=1e-2, initial_accumulator_value=1e-4),
    )
    assert_paths(served(FedAdagrad(server_lr=0.1, tau=1e-2), gradients), theirs)


def test_fedyogi_changes_its_scale_by_the_sign():
    lr, beta1, beta2, tau = 0.1, 0.5, 0.9, 1e-2
    gradients = pseudo_gradients(5)
    weight, m, v = torch.ones(SHAPE, dtype=torch.float64), 0.0, torch.full(SHAPE, tau**2)
    path = []
    for gradient in gradients:
        m = beta1 * m - (1 - beta1) * gradient
        square = gradient**2
        v = torch.where(v > square, v - (1 - beta2) * square, v + (1 - beta2) * square)
        weight = weight + lr * m / (v.sqrt() + tau)
        path.append(weight)
    assert_paths(served(FedYogi(lr, beta1, beta2, tau), gradients), path)


@pytest.mark.parametrize(
    "algorithm", [FedAvgM(), FedAdam(0.5), FedYogi(0.5)], ids=lambda a: a.name
)
def test_running_statistics_are_averaged_and_not_optimised(algorithm):
    local = training(rounds=2)
    server, states = algorithm.init(INITIAL), [ClientState()] * 2
    for _ in range(2):
        rounds = [
            algorithm.client_round(server, state, one, local)
            for state, one in zip(states, clients(2), strict=True)
        ]
        after = algorithm.aggregate(server, [update for update, _ in rounds])
        for name in ("norm.running_mean", "norm.running_var"):
            sent = torch.stack([update.model[name] for update, _ in rounds])
            torch.testing.assert_close(after.parts["model"][name], sent.mean(0))
            assert not any(name in held for part, held in after.parts.items() if part != "model")
        assert after.parts["model"]["norm.num_batches_tracked"].dtype == torch.int64
        server = replace(after)
