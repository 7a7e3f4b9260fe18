"""Every algorithm with hyper-parameters of its own, and rounds in memory to try them with."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from certifl.federated import (
    APFL,
    FLIX,
    L2GD,
    Algorithm,
    ClientState,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedProx,
    FedRep,
    FedYogi,
    Local,
    LocalTraining,
    Mixture,
    PerFedAvg,
    Personalized,
    Scaffold,
    ServerState,
    state_of,
    total_rounds,
)
from tiny_federation import TinyNet, clients, training

INITIAL = state_of(TinyNet())

CASES: dict[str, Algorithm] = {
    "local": Local(),
    "fedavg": FedAvg(),
    "fedavg by size": FedAvg(weighting="size"),
    "personalized": Personalized(FedAvg(), epochs=1),
    "personalized mixture": Personalized(Mixture(0.5), epochs=2, lr=0.01),
    "mixture": Mixture(personalization=0.3),
    "fedprox": FedProx(mu=0.7),
    "scaffold": Scaffold(server_lr=0.8),
    "fedavgm": FedAvgM(beta=0.6),
    "fedadam": FedAdam(server_lr=0.03),
    "fedyogi": FedYogi(server_lr=0.03),
    "fedadagrad": FedAdagrad(server_lr=0.03, beta1=0.3),
    "l2gd": L2GD(personalization=0.5, probability=0.3),
    "ditto": Ditto(mu=0.5),
    "flix": FLIX(personalization=0.4),
    "apfl": APFL(alpha=0.4),
    "fedbn": FedBN(),
    "fedrep": FedRep(),
    "perfedavg": PerFedAvg(inner_lr=0.05),
    "perfedavg hessian-free": PerFedAvg(inner_lr=0.05, approximation="hessian-free"),
}


def light(**changes: Any) -> LocalTraining:
    """Two rounds of one local epoch: as much as it takes for states to matter."""
    return training(**{"rounds": 2, "local_epochs": 1, **changes})


def one_round(
    algorithm: Algorithm,
    server: ServerState,
    states: Sequence[ClientState],
    order: Sequence[int],
    local: LocalTraining,
) -> tuple[ServerState, list[ClientState]]:
    """A round in memory, working on the clients in `order`."""
    data = clients(len(states))
    worked = {i: algorithm.client_round(server, states[i], data[i], local) for i in order}
    updates = [worked[i][0] for i in sorted(worked)]
    return algorithm.aggregate(server, updates), [worked[i][1] for i in range(len(states))]


def all_rounds(
    algorithm: Algorithm, order: Sequence[int], local: LocalTraining
) -> tuple[ServerState, list[ClientState]]:
    server = algorithm.init(INITIAL)
    states = [ClientState() for _ in order]
    for _ in range(total_rounds(algorithm, local)):
        server, states = one_round(algorithm, server, states, order, local)
    return server, states


@cache
def in_memory(name: str) -> tuple[LocalTraining, ServerState, list[ClientState]]:
    """A trainer after all rounds of a case with kept momentum, and the states at their end."""
    local = light(momentum_between_rounds="keep")
    return local, *all_rounds(CASES[name], [0, 1, 2], local)


def deployed(algorithm: Algorithm, server: ServerState, states: Sequence[ClientState]) -> list:
    return [algorithm.deployed(server, state) for state in states]
