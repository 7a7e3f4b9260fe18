"""L2GD: the randomized way to a mixture of global and local models."""

from __future__ import annotations

from dataclasses import dataclass

from certifl import rng as streams
from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.local_training import LocalTraining
from certifl.federated.states import ClientData, ClientState, ServerState, Update


@dataclass(frozen=True)
class L2GD(GlobalModel):
    """Loopless local gradient descent: for every step one coin, thrown for all clients together.

    Heads (probability p), all clients move towards the average; tails, all take a step on
    its own loss:

      theta_i <- theta_i - (gamma / p) 2 (1 - lambda) (theta_i - theta_bar)
      theta_i <- theta_i - (gamma / (1 - p)) lambda grad L_i(theta_i).

    Each is an unbiased estimate of the step of Eq. (5), so L2GD trains what `mixture` trains. In
    the source's letters the weight of its penalty is 2 (1 - lambda) / lambda and its step alpha
    is n gamma lambda.

    Steps towards the average leave the average where it is, so the clients talk only when heads
    follow tails. A round is what lies between two such moments: A >= 1 steps towards the broadcast
    average, then L >= 1 local steps, with A and L drawn from the geometric laws that coins have,
    from the seed and the round. The schedule's `local_epochs` therefore only sets where its
    learning rate decays; 1 / p is the number of local steps to expect in a round. A local step is
    one batch. Momentum acts on local steps alone; the source has none.

    Parameters are pulled, BatchNorm's running statistics are not. With partial participation
    theta_bar is the average over those who took part. A pull 2 gamma (1 - lambda) / p of 1 sets
    every client to the average (federated averaging with L steps), from 2 on it diverges.

    Deployed by client i: its own theta_i (the initial model where it never trained).

    Attributes:
        personalization: lambda in (0, 1]; 1 = local training with L steps a round.
        probability: p in (0, 1).

    Source: Hanzely and Richtarik, Federated Learning of a Mixture of Global and Local Models,
    2020, Algorithm 1 and section 4; Eq. (4) and (5) of the paper.
    """

    personalization: float
    probability: float = 0.1

    name = "l2gd"
    deploys = "its own model, pulled towards the average at random times"
    keeps_client_state = True
    personal_part = "model"

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Move towards the average, take local steps, send the result."""
        average, schedule = broadcast.parts["model"], training.schedule
        pulls, steps = self.coins(training.seed, broadcast.round)
        rate = schedule.lr_at(broadcast.round * schedule.local_epochs)
        share = (1 - self.pull(rate)) ** pulls
        own = state.parts.get("model", average)
        names = () if share == 1 else training.trainable
        moved = {name: average[name] + share * (own[name] - average[name]) for name in names}
        trained = training.train_epochs(
            {**own, **moved},  # all but weights stays the client's own
            data,
            broadcast.round,
            momentum=state.parts.get("momentum"),
            lr_factor=self.personalization / (1 - self.probability),
            steps=steps,
        )
        update = Update(data.client, len(data), trained.state, trained.metrics)
        return update, ClientState({"model": trained.state, **trained.momentum_part})

    def pull(self, rate: float) -> float:
        """Share of the way to the average that one step towards it goes, at a learning rate."""
        return rate * 2 * (1 - self.personalization) / self.probability

    def coins(self, seed: int, round: int) -> tuple[int, int]:
        """How many heads and then tails came up in a round, each at least 1; for all clients."""
        thrown = streams.numpy_generator(seed, "l2gd coins", round)
        return int(thrown.geometric(1 - self.probability)), int(thrown.geometric(self.probability))
