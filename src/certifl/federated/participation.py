"""Who takes part in a round: everyone, or a random share that a resumed training repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from certifl import streams
from certifl.registry import check_number

__all__ = ["Participation", "RandomShare"]

Participation = Callable[[int], Sequence[int]]
"""Which clients take part in a round; of the round alone, so that resuming repeats it."""


@dataclass(frozen=True)
class RandomShare:
    """max(1, round(share n)) of the n clients, chosen anew in every round, without replacement.

    The choice is a function of (seed, round) alone.

    Attributes:
        share: in (0, 1]; 1 = everyone.
        clients: n, how many there are.
        seed: the study's seed.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
    Data, 2017, Algorithm 1 (the fraction C).
    """

    share: float
    clients: int
    seed: int

    def __post_init__(self) -> None:
        allowed = "a number above 0, up to 1"
        check_number("participation", self.share, allowed, low=0, high=1, open_low=True)

    @property
    def size(self) -> int:
        """How many clients take part in a round."""
        return max(1, round(self.share * self.clients))

    def __call__(self, round: int) -> list[int]:
        """The participants of a round, in client order."""
        drawn = streams.numpy_generator(self.seed, "participation", round)
        return sorted(drawn.choice(self.clients, self.size, replace=False).tolist())
