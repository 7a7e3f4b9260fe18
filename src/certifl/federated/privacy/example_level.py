"""Privacy of every image: stochastic gradient descent with clipping and noise on the client.

One step draws every image with probability q, clips each image's gradient to length C, sums, and
moves along

    g = 1 / (q n) ( sum_{j drawn} clip_C(grad l_j) + N(0, z^2 C^2 I) ).

Everything after it (hooks, weight decay, momentum, the server) is post-processing of such noisy
sums and costs no further privacy.

Source: Abadi et al., Deep Learning with Differential Privacy, 2016, Algorithm 1; the fixed
denominator q n as in opacus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from certifl import rng as streams
from certifl.errors import SpecError
from certifl.federated.objectives import Objective
from certifl.federated.privacy.accounting import steps_per_epoch
from certifl.federated.privacy.mechanism import add_noise, clipped_sum, derived_key
from certifl.federated.states import ClientData, ModelState
from certifl.federated.training.batches import Batch
from certifl.federated.training.steps import GradientHook, Outcome, StepContext
from certifl.models import fingerprint
from certifl.registry import check_number

NO_SECOND_GRADIENT = (
    'privacy.kind = "example" allows one gradient per batch, and this algorithm takes another: '
    "two sums over one sample cost more than is accounted for. Choose another algorithm."
)


@dataclass(frozen=True)
class ExampleLevel:
    """Example-level differential privacy, with zero-out adjacency.

    The distribution of everything that a client sends hardly depends on any one of its images.
    This holds against everyone, the server included, since the client adds the noise. Two datasets
    are neighbors if one image of the one is replaced by nothing in the other: its position stays,
    is drawn as before, and adds nothing to the sum. The number of images is public and the same in
    both, since it determines the sampling rate and the denominator.

    Attributes:
        max_norm: C, the length to which each image's gradient is clipped.
        noise_multiplier: z, one for all clients, or one for each.
        key: secret key of the draws; with it the noise can be removed.
        watch: called before passes use an image; may refuse them by raising.
    """

    max_norm: float
    noise_multiplier: float | tuple[float, ...]
    key: bytes = field(repr=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)

    kind: ClassVar[str] = "example"

    def __post_init__(self) -> None:
        check_number("max_norm", self.max_norm, "a number above 0", low=0, open_low=True)
        given = self.noise_multiplier
        for value in given if isinstance(given, tuple) else (given,):
            check_number("noise_multiplier", value, "a number from 0", low=0)

    def multiplier(self, client: int) -> float:
        """The noise multiplier z of a client."""
        if isinstance(self.noise_multiplier, tuple):
            return self.noise_multiplier[client]
        return float(self.noise_multiplier)

    def described(self) -> dict[str, Any]:
        """What a resumed training must agree with; of the key, a digest."""
        return {
            "kind": self.kind,
            "max_norm": self.max_norm,
            "noise_multiplier": self.noise_multiplier,
            "key": derived_key(self.key, "name").hex()[:16],
        }

    def passes(
        self, data: ClientData, round: int, names: str, start: ModelState, batch_size: int
    ) -> PrivatePasses:
        """The draws and the mechanism for one client's passes of a round.

        Two passes in one round must differ in `start` or `names`, to have different samples.
        """
        key = derived_key(self.key, data.client, round, names, fingerprint(start))
        steps = steps_per_epoch(len(data), batch_size)
        multiplier = self.multiplier(data.client)
        passes = PrivatePasses(len(data), steps, self.max_norm, multiplier * self.max_norm, key)
        if self.watch is not None:
            self.watch(derived_key(key, "name").hex(), multiplier, passes)
        return passes


class PrivatePasses:
    """Poisson batches of one client's passes, and the noisy sums taken on them.

    Args:
        images: n, of this client.
        steps: of an epoch; every image is in a batch with probability 1 / steps.
        max_norm: C.
        std: of the noise on every coordinate of a sum, z C.
        key: secret key of these passes.
    """

    def __init__(self, images: int, steps: int, max_norm: float, std: float, key: bytes) -> None:
        self.steps = steps
        self._images, self._max_norm, self._std, self._key = images, max_norm, std, key
        self._drawn = streams.secret_generator(key, "privacy batches")
        self._batches = self._taken = self._sums = 0

    def positions(self, device: torch.device) -> Iterator[torch.Tensor]:
        """One epoch: the images of each batch, by position; a batch may be empty."""
        for _ in range(self.steps):
            self._batches += 1
            inside = self._drawn.random(self._images) < 1 / self.steps
            yield torch.from_numpy(inside.nonzero()[0]).to(device)

    @property
    def sums(self) -> int:
        """Number of noisy sums so far."""
        return self._sums

    def metrics(self) -> dict[str, float]:
        """The public metrics: how many noisy sums were taken. Loss and accuracy are private."""
        return {"private_steps": self._sums}

    def noisy_gradient(
        self, sum_of: Callable[[float], tuple[ModelState, Outcome]]
    ) -> tuple[ModelState, Outcome]:
        """The latest batch's clipped sum with noise, over the expected number of its images.

        Args:
            sum_of: the sum and how the batch went, given the norm to clip to.

        Raises:
            SpecError: the batch had its sum already.
        """
        if self._taken == self._batches:
            raise SpecError(NO_SECOND_GRADIENT)
        total, outcome = sum_of(self._max_norm)
        noisy = add_noise(total, self._std, self._key, self._batches)
        self._taken, self._sums = self._batches, self._sums + 1
        expected = self._images / self.steps
        return {name: value / expected for name, value in noisy.items()}, outcome


Watch = Callable[[str, float, PrivatePasses], None]
"""Called with an identifier of the passes' draws (which does not disclose their key), z, and the
passes. Passes with the same identifier have the same sample, and the same noise for equal sums."""


class PrivateStepContext(StepContext):
    """A `StepContext` whose gradients are clipped per image and noisy; all else is the same.

    Args:
        model, parameters, optimizer, objective, hook: as of `StepContext`.
        passes: the mechanism.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        hook: GradientHook | None,
        passes: PrivatePasses,
    ) -> None:
        super().__init__(model, parameters, optimizer, objective, hook)
        self._passes = passes

    def compute_gradients(self, batch: Batch) -> Outcome:
        """Put the noisy gradient into `.grad`, also where the batch is empty.

        The outcome is of the images as they are; it must not be sent.
        """

        def sum_of(max_norm: float) -> tuple[ModelState, Outcome]:
            return clipped_sum(self.model, self.parameters, self._objective, batch, max_norm)

        gradient, outcome = self._passes.noisy_gradient(sum_of)
        self._optimizer.zero_grad()
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name]
        return outcome
