"""Limits: what the paper's ways of training together become at the ends of their parameters."""

from dataclasses import replace

import pytest
import torch

from algorithm_cases import CASES, all_rounds, in_memory, light
from certifl.federated import (
    ClientState,
    FedAvg,
    Local,
    Mixture,
    Personalized,
    ServerState,
    deployed_model,
    state_of,
    total_rounds,
    train,
)
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import (
    TinyNet,
    assert_same,
    client_data,
    clients,
    differ,
    training,
    without_seconds,
)


def test_mixture_at_lambda_1_is_local_training_bit_for_bit():
    local, alone, own = in_memory("local")
    mixed, pulled = all_rounds(Mixture(personalization=1.0), [0, 1, 2], local)
    for a, b in zip(own, pulled, strict=True):
        assert_same(a.parts, b.parts)
        assert_same(Local().deployed(alone, a), Mixture(1.0).deployed(mixed, b))


def test_mixture_near_lambda_1_is_near_local_training():
    local = light(rounds=1)
    _, own = all_rounds(Local(), [0, 1], local)
    _, pulled = all_rounds(Mixture(1 - 1e-7), [0, 1], local)
    for a, b in zip(own, pulled, strict=True):
        for name, value in a.parts["model"].items():
            torch.testing.assert_close(b.parts["model"][name], value, atol=1e-4, rtol=1e-4)
    assert differ(own[0].parts["model"], pulled[0].parts["model"])


def test_mixture_at_lambda_0_is_the_pull_alone():
    """theta - theta_bar shrinks by (1 - 2 gamma) a step; the loss and its decay play no part."""
    local = training(rounds=5, momentum=0.0, lr=0.05, decay_every=None, weight_decay=0.1)
    average, start = state_of(TinyNet(seed=1)), state_of(TinyNet(seed=2))
    server = ServerState(1, {"model": average})
    data = client_data(0, images=16)
    _, state = Mixture(0.0).client_round(server, ClientState({"model": start}), data, local)
    steps = 2 * 2
    for name, _ in TinyNet().named_parameters():
        expected = average[name] + (1 - 2 * 0.05) ** steps * (start[name] - average[name])
        torch.testing.assert_close(state.parts["model"][name], expected)


def test_a_mixture_step_is_equation_5():
    lam, gamma, decay = 0.3, 0.1, 0.01
    options = {"rounds": 1, "local_epochs": 1, "augmentation": None, "batch_size": 100}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    local = training(model=model, lr=gamma, weight_decay=decay, **options)
    drawn = torch.Generator().manual_seed(1)
    shapes = {"1.weight": (3, 64), "1.bias": (3,)}
    theta, bar = (
        {k: torch.randn(s, generator=drawn) * 0.1 for k, s in shapes.items()} for _ in range(2)
    )
    data = client_data(0)
    _, state = Mixture(lam).client_round(
        ServerState(0, {"model": bar}), ClientState({"model": theta}), data, local
    )
    images = data.images.flatten(1).float() / 255
    probabilities = torch.softmax(images @ theta["1.weight"].T + theta["1.bias"], 1)
    error = (probabilities - torch.nn.functional.one_hot(data.labels, 3)) / len(data)
    gradient = {"1.weight": error.T @ images, "1.bias": error.sum(0)}
    for name, value in theta.items():
        bracket = lam * (gradient[name] + decay * value) + 2 * (1 - lam) * (value - bar[name])
        torch.testing.assert_close(state.parts["model"][name], value - gamma * bracket)


def test_mixture_clients_keep_their_own_batchnorm_statistics():
    _, server, states = in_memory("mixture")
    means = [state.parts["model"]["norm.running_mean"] for state in states]
    assert not torch.equal(means[0], means[1])
    averaged = torch.stack(means).double().mean(0).float()
    torch.testing.assert_close(server.parts["model"]["norm.running_mean"], averaged)


def test_a_smaller_lambda_keeps_clients_closer_together():
    spreads = []
    for states in (
        in_memory("local")[2],
        all_rounds(Mixture(0.7), [0, 1, 2], light(momentum_between_rounds="keep"))[1],
        in_memory("mixture")[2],
    ):
        weights = [state.parts["model"]["head.weight"] for state in states]
        spreads.append(torch.stack(weights).std(0).mean().item())
    assert spreads[0] > spreads[1] > spreads[2] > 0


@pytest.mark.parametrize("name", ["fedavg", "mixture", "scaffold", "apfl", "perfedavg"])
def test_personalized_rounds_are_those_of_the_base(name, tmp_path):
    """A global model, one of its own, another part that is sent, a mixed one, an extra round."""
    base = CASES[name]

    def trained(algorithm, folder, **options):
        return train(algorithm, TinyNet(), clients(2), light(), Checkpoints(folder), **options)

    tuned = Personalized(base, epochs=1, lr=0.01)
    alone = trained(base, tmp_path / "base")
    before = {}

    def remember(progress):
        if (progress.round, progress.client) == (total_rounds(base, light()), 0):
            last = Checkpoints(tmp_path / "whole").latest()
            before.update(server=last.server(), states=[last.client(i) for i in range(2)])

    whole = trained(tuned, tmp_path / "whole", progress=remember)
    assert_same(before["server"], alone.server())
    for client in range(2):
        assert_same(before["states"][client], alone.client(client))

    reused = trained(tuned, tmp_path / "reused", start_from=Checkpoints(tmp_path / "base"))
    assert_same(reused.server(), whole.server())
    for client in range(2):
        assert_same(deployed_model(tuned, reused, client), deployed_model(tuned, whole, client))
        assert differ(deployed_model(tuned, reused, client), deployed_model(base, alone, client))
    assert without_seconds(reused.history) == without_seconds(whole.history)


def test_personalization_has_its_own_rate_and_augmentation():
    local = training(rounds=1, momentum=0.0, weight_decay=0.0)
    server = replace(FedAvg().init(state_of(TinyNet())), round=1)
    start = server.parts["model"]

    def moved(algorithm, trainer):
        _, state = algorithm.client_round(server, ClientState(), client_data(0), trainer)
        tuned = state.parts["personalized"]
        return tuned["head.weight"] - start["head.weight"]

    small = moved(Personalized(FedAvg(), epochs=1, lr=1e-6), local)
    large = moved(Personalized(FedAvg(), epochs=1, lr=2e-6), local)
    torch.testing.assert_close(large, 2 * small, rtol=0.05, atol=1e-7)
    plain = moved(Personalized(FedAvg(), epochs=1), local)
    # The federated augmentation plays no part in fine-tuning, the personalization's does.
    local.augmentation = None
    assert torch.equal(moved(Personalized(FedAvg(), epochs=1), local), plain)
    local.finetuning_augmentation = None
    assert not torch.equal(moved(Personalized(FedAvg(), epochs=1), local), plain)
