"""Privacy of every client: the server clips what each of them changes, sums, and adds noise.

One round draws every client with probability q, clips the change of each model to length S, and
moves the model that was broadcast by

    Delta = 1 / (q n) ( sum_{i drawn} clip_S(theta_i - theta_bar) + N(0, z^2 S^2 I) )

with the fixed denominator q n: the number of drawn clients would disclose participation. The noise
is added also where no client was drawn.

Source: McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models,
2018, Algorithm 1 with flat clipping, equal weights and the estimator f_f.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from certifl import rng as streams
from certifl.errors import InputError
from certifl.federated.privacy.mechanism import add_noise, derived_key
from certifl.federated.states import ModelState, ServerState, Update
from certifl.registry import check_number

_SERVER = -1


@dataclass(frozen=True)
class ClientLevel:
    """Client-level differential privacy: the rule of aggregation, and who takes part.

    One client more or less hardly changes the distribution of the models that the server sends
    out. This holds against anyone who sees those, all clients included, but not against the
    server, which sees what each client sends. The algorithm gets ONE update, the private average;
    post-processing it costs no further privacy.

    Memory: one sum in float64.

    Attributes:
        max_norm: S, the length to which the change of each client's model is clipped.
        noise_multiplier: z.
        rate: q, probability of each client to take part in a round.
        clients: n, how many there are; the number is public.
        key: secret key of the draws; with it the noise can be removed.
    """

    max_norm: float
    noise_multiplier: float
    rate: float
    clients: int
    key: bytes = field(repr=False)

    kind: ClassVar[str] = "client"
    name: ClassVar[str] = "private-mean"

    def __post_init__(self) -> None:
        check_number("max_norm", self.max_norm, "a number above 0", low=0, open_low=True)
        check_number("noise_multiplier", self.noise_multiplier, "a number from 0", low=0)
        allowed = "a number above 0, up to 1"
        check_number("sampling_rate", self.rate, allowed, low=0, high=1, open_low=True)

    def described(self) -> dict[str, Any]:
        """What a resumed training must agree with; of the key, a digest."""
        return {
            "kind": self.kind,
            "max_norm": self.max_norm,
            "noise_multiplier": self.noise_multiplier,
            "rate": self.rate,
            "key": derived_key(self.key, "name").hex()[:16],
        }

    def participants(self, round: int) -> list[int]:
        """The clients of a scheduled round: each with probability q, so possibly none."""
        drawn = streams.secret_generator(self.key, "private participation", round)
        return (drawn.random(self.clients) < self.rate).nonzero()[0].tolist()

    def check(self, participants: int) -> None:
        """Any number of participants is allowed, also none."""

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """One update in the server's name: the broadcast model, moved by the noisy average.

        Raises:
            InputError: an update carries more than a model, or a model of other keys.
        """
        start = broadcast.parts["model"]
        total = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in start.items()}
        for update in updates:
            for name, change in self._clipped(update, start).items():
                total[name] += change
            del update  # free it before the next one arrives
        std = self.noise_multiplier * self.max_norm
        noisy = add_noise(total, std, self.key, "round", broadcast.round)
        expected = self.rate * self.clients
        model = {
            name: (value.to(torch.float64) + noisy[name] / expected).to(value.dtype)
            for name, value in start.items()
        }
        yield Update(_SERVER, 1.0, model, {})

    def _clipped(self, update: Update, start: ModelState) -> ModelState:
        """The change of one client's model, clipped to S; none where it is not finite."""
        model = update.model
        if update.extra or model is None or model.keys() != start.keys():
            raise InputError(
                f"Client {update.client} sent something other than the model that was broadcast, "
                'and privacy.kind = "client" protects nothing else: choose another algorithm.'
            )
        change = {n: model[n].to(torch.float64) - v.to(torch.float64) for n, v in start.items()}
        length = math.sqrt(math.fsum(float(v.square().sum()) for v in change.values()))
        if not math.isfinite(length):
            return {}
        factor = min(1.0, self.max_norm / length) if length > 0 else 1.0
        return {name: value.mul_(factor) for name, value in change.items()}
