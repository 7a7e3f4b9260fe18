"""How much of its images' privacy a party may spend: its own limit, or what a study planned."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.deploy.refusing import Refusal
from certifl.deploy.settings import Settings
from certifl.federated.privacy import (
    ExampleLedger,
    Pass,
    composed,
    finetuning_epochs,
    sends_nothing,
)
from certifl.spec import Spec

__all__ = ["Limit", "Planned", "check_own_limit", "limit_of", "planned"]


@dataclass(frozen=True)
class Limit:
    """How much epsilon may be spent.

    Attributes:
        sent: by answers that leave. total: also by models that stay with the party.
        delta: at which it is counted.
        everywhere: over all studies (the party's own limit), or in this one (what it planned).
    """

    sent: float
    total: float
    delta: float
    everywhere: bool


@dataclass(frozen=True)
class Planned:
    """What a study planned to ask of this party.

    Attributes:
        multiplier: z. batches: of an epoch; images are drawn with probability 1 / batches.
        rounds: of the schedule. steps: private ones in each of these rounds.
        tuning: private steps after them, for a model that stays with the party.
        sends: whether what the rounds give is sent.
    """

    multiplier: float
    batches: int
    rounds: int
    steps: int
    tuning: int
    sends: bool

    def of(self, round: int) -> tuple[Pass, bool]:
        """What a round costs, and whether its answer is sent."""
        late = round >= self.rounds and self.tuning > 0
        steps = self.tuning if late else self.steps
        return Pass("", self.multiplier, self.batches, steps), self.sends and not late

    def limit(self, delta: float) -> Limit:
        """What all of it spends."""

        def spent(steps: int) -> float:
            return composed({(self.multiplier, 1 / self.batches): steps}, delta)

        sent = self.rounds * self.steps
        return Limit(spent(sent), spent(sent + self.tuning), delta, everywhere=False)


def planned(spec: Spec, ledger: ExampleLedger, client: int) -> Planned:
    """What a study asks of a client."""
    batches = round(1 / ledger.rates[client])
    return Planned(
        multiplier=ledger.multipliers[client],
        batches=batches,
        rounds=ledger.rounds,
        steps=ledger.planned[client],
        tuning=finetuning_epochs(spec.algorithm) * batches,
        sends=not sends_nothing(spec.algorithm),
    )


def limit_of(settings: Settings, plan: Planned, delta: float) -> Limit:
    """The party's own limit, or else what the study planned at its delta."""
    most = settings.max_epsilon
    if most is None:
        return plan.limit(delta)
    return Limit(most, most, settings.delta or delta, everywhere=True)


def check_own_limit(settings: Settings, spec: Spec, images: int) -> None:
    """A party with a limit takes part only where it adds the noise itself.

    Raises:
        Refusal: the study asks for none of its noise, or the limit promises nothing.
    """
    if settings.max_epsilon is None:
        return
    if spec.privacy.kind != "example":
        raise Refusal(
            "it has set max_epsilon, and answers only studies whose clients add the noise: "
            'privacy.kind = "example"'
        )
    if (settings.delta or spec.privacy.delta) * images >= 1:
        raise Refusal("the delta at which it counts is as large as one of its images")
