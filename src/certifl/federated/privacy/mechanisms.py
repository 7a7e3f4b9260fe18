"""The mechanisms: gradients of single images, changes of single clients, clipped, summed, noised.

`Augmented` sees every image of a batch once, so one backward pass of the whole batch gives all
gradients (opacus's hooks). Other objectives may pass several copies of an image through the
network; there every image is a batch of one, which is always correct and slow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from certifl import rng as streams
from certifl.errors import InputError, ModelError, SpecError, first_line
from certifl.federated.batches import Batch
from certifl.federated.objectives import Augmented, Objective
from certifl.federated.privacy.accounting import STEPS, opacus, steps_per_epoch
from certifl.federated.states import ClientData, ModelState, ServerState, Update
from certifl.federated.steps import GradientHook, Outcome, StepContext
from certifl.models import fingerprint
from certifl.module_copies import copy_of
from certifl.registry import check_number

Gradients = dict[str, torch.Tensor]

_NUMBERS_AT_ONCE = 1 << 26  # of gradients per image, 256 MiB
_TINY = 1e-6  # as in opacus: no division by zero, and a length slightly below the norm


def clipped_sum(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    batch: Batch,
    max_norm: float,
) -> tuple[Gradients, Outcome]:
    """sum_j g_j min(1, C / ||g_j||), g_j the gradient of image j over all parameters together.

    Replacing one image by nothing changes the sum by at most C: a gradient that is not finite
    counts as zero. So does a loss that is not finite in the outcome, or one image could make the
    training fail visibly.

    Args:
        model: in training mode; its `.grad` are cleared. parameters: the trainable ones, by name.
        objective, batch: the loss of m >= 0 images. max_norm: C; infinity = no clipping.
    """
    some = next(iter(parameters.values()))
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    loss, correct = some.new_zeros(()), some.new_zeros((), dtype=torch.int64)
    for gradients, outcome in _per_image(model, parameters, objective, batch):
        for name, value in _clipped(gradients, max_norm).items():
            total[name] += value
        loss, correct = loss + outcome.loss, correct + outcome.correct
    return total, Outcome(loss, correct)


def try_clipping(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Take gradients of two blank images (c, h, w); ModelError for impossible networks."""
    tried = copy_of(model).train()
    parameters = {name: value for name, value in tried.named_parameters() if value.requires_grad}
    device = next(iter(parameters.values())).device
    images = torch.zeros(2, *image_shape, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    batch = Batch(images, labels, None, torch.Generator(device=device))
    with torch.random.fork_rng(devices=[]):  # dropout draws
        clipped_sum(tried, parameters, Augmented(), batch, max_norm=1.0)


@torch.no_grad()
def _clipped(gradients: Gradients, max_norm: float) -> Gradients:
    lengths = [value.flatten(1).norm(dim=1) for value in gradients.values()]
    length = torch.stack(lengths, 1).norm(dim=1)
    factor = (max_norm / (length + _TINY)).clamp(max=1.0)
    finite = length.isfinite()
    return {
        name: torch.einsum("m,m...->...", factor[finite], value[finite])
        for name, value in gradients.items()
    }


def _per_image(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, batch: Batch
) -> Iterator[tuple[Gradients, Outcome]]:
    """Gradients (m', ...) of as many images at a time as memory allows."""
    numbers = sum(parameter.numel() for parameter in parameters.values())
    together = isinstance(objective, Augmented)
    size = max(1, _NUMBERS_AT_ONCE // numbers) if together else 1
    for start in range(0, len(batch), size):
        part = batch.part(start, start + size)
        loss, logits, gradients = (_of_batch if together else _of_one)(
            model, parameters, objective, part
        )
        with torch.no_grad():
            total = loss.detach() * len(part)
            total = torch.where(total.isfinite(), total, torch.zeros_like(total))
            yield gradients, Outcome(total, (logits.argmax(1) == part.labels).sum())


def _of_batch(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    hooks = opacus("opacus.grad_sample").GradSampleHooks(model)
    # Hooks on modules whose input needs no gradient make torch warn.
    # The clone is for networks that write into their input, which they may not with a leaf.
    handle = model.register_forward_pre_hook(lambda _, inputs: inputs[0].requires_grad_().clone())
    try:
        loss, logits = objective(model, batch)
        loss.backward()
        per_parameter = {n: getattr(p, "grad_sample", None) for n, p in parameters.items()}
        return loss, logits, {n: g for n, g in per_parameter.items() if g is not None}
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise ModelError(
            'privacy.kind = "example" needs the output of each layer as it was, and the network '
            f"overwrites one ({first_line(error)}). Leave operations such as x += y, "
            "x.relu_() and inplace=True out of its forward."
        ) from error
    finally:
        handle.remove()
        hooks.cleanup()
        for parameter in parameters.values():
            parameter.grad = None


def _of_one(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    loss, logits = objective(model, batch)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = zip(parameters, gradients, strict=True)
    return loss, logits, {name: value[None] for name, value in named if value is not None}


# Noise that repeats with the same sum and is never used for two different ones.
#
# A resumed training must repeat an interrupted one bit for bit, so the noise cannot be drawn
# anew. But the same noise on two different sums would cancel in their difference and expose the
# images. Noise is therefore a function of (secret key, names, THE SUM ITSELF): a repeated step
# releases the same bits again and discloses nothing new; any other sum, after a failure or with
# another learning rate, gets its own noise. This is the idea of deterministic nonces in signatures
# (RFC 6979).


_KEY_BYTES = 32


def derived_key(secret: bytes, *names: int | str) -> bytes:
    """A key for one purpose from a secret; it discloses nothing about other keys."""
    text = "\x1f".join(map(str, names)).encode()
    shortened = hashlib.blake2b(secret, digest_size=_KEY_BYTES).digest()
    return hashlib.blake2b(text, key=shortened, digest_size=_KEY_BYTES).digest()


def add_noise(
    sums: Mapping[str, torch.Tensor], std: float, key: bytes, *names: int | str
) -> dict[str, torch.Tensor]:
    """The sums with independent Gaussian noise on every coordinate.

    Args:
        sums: by name, any floating dtype and device; they are not changed.
        std: standard deviation of the noise; 0 = none.
        key: with it the noise can be removed.
        names: of the release; the noise depends on them and on the bytes of the sums.
    """
    if std == 0:
        return dict(sums)
    drawn = streams.secret_generator(key, "privacy noise", *names, fingerprint(sums))
    noisy = {}
    for name in sorted(sums):
        noise = torch.from_numpy(drawn.standard_normal(tuple(sums[name].shape))).mul_(std)
        noisy[name] = sums[name] + noise.to(sums[name])
    return noisy


NO_SECOND_GRADIENT = (
    'privacy.kind = "example" allows one gradient per batch, and this algorithm takes another: '
    "two sums over one sample cost more than is accounted for. Choose another algorithm."
)


@dataclass(frozen=True)
class ExampleLevel:
    """Example-level differential privacy, with zero-out adjacency.

    One step draws every image with probability q, clips each image's gradient to length C, sums,
    and moves along

        g = 1 / (q n) ( sum_{j drawn} clip_C(grad l_j) + N(0, z^2 C^2 I) ).

    Everything after it (hooks, weight decay, momentum, the server) is post-processing of such
    noisy sums and costs no further privacy. The distribution of everything that a client sends
    hardly depends on any one of its images. This holds against everyone, the server included,
    since the client adds the noise. Two datasets are neighbors if one image of the one is replaced
    by nothing in the other: its position stays, is drawn as before, and adds nothing to the sum.
    The number of images is public and the same in both, since it determines the sampling rate and
    the denominator.

    Attributes:
        max_norm: C, the length to which each image's gradient is clipped.
        noise_multiplier: z, one for all clients, or one for each.
        key: secret key of the draws; with it the noise can be removed.
        watch: called before passes use an image; may refuse them by raising.

    Source: Abadi et al., Deep Learning with Differential Privacy, 2016, Algorithm 1; the fixed
    denominator q n as in opacus.
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
            check_number("noise_multiplier", value, "a number of at least 0", low=0)

    def multiplier(self, client: int) -> float:
        """The noise multiplier z of a client."""
        given = self.noise_multiplier
        return given[client] if isinstance(given, tuple) else float(given)

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
        steps, multiplier = steps_per_epoch(len(data), batch_size), self.multiplier(data.client)
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
        self._batches = self._taken = 0
        self.sums = 0  # number of noisy sums so far

    def positions(self, device: torch.device) -> Iterator[torch.Tensor]:
        """One epoch: the images of each batch, by position; a batch may be empty."""
        for _ in range(self.steps):
            self._batches += 1
            inside = self._drawn.random(self._images) < 1 / self.steps
            yield torch.from_numpy(inside.nonzero()[0]).to(device)

    def metrics(self) -> dict[str, float]:
        """The public metrics: how many noisy sums were taken. Loss and accuracy are private."""
        return {STEPS: self.sums}

    def noisy_gradient(
        self, sum_of: Callable[[float], tuple[ModelState, Outcome]]
    ) -> tuple[ModelState, Outcome]:
        """The latest batch's clipped sum with noise, over the expected number of its images.

        `sum_of` gives the sum and how the batch went for the norm to clip to. SpecError where the
        batch had its sum already.
        """
        if self._taken == self._batches:
            raise SpecError(NO_SECOND_GRADIENT)
        total, outcome = sum_of(self._max_norm)
        noisy = add_noise(total, self._std, self._key, self._batches)
        self._taken, self.sums = self._batches, self.sums + 1
        expected = self._images / self.steps
        return {name: value / expected for name, value in noisy.items()}, outcome


Watch = Callable[[str, float, PrivatePasses], None]
"""Called with an identifier of the passes' draws (which does not disclose their key), z, and the
passes. Passes with the same identifier have the same sample, and the same noise for equal sums."""


class PrivateStepContext(StepContext):
    """A `StepContext` whose gradients are clipped per image and noisy, by `passes`."""

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


_SERVER = -1


@dataclass(frozen=True)
class ClientLevel:
    """Client-level differential privacy: the rule of aggregation, and who takes part.

    One round draws every client with probability q, clips the change of each model to length S,
    and moves the model that was broadcast by

        Delta = 1 / (q n) ( sum_{i drawn} clip_S(theta_i - theta_bar) + N(0, z^2 S^2 I) )

    with the fixed denominator q n: the number of drawn clients would disclose participation. The
    noise is added also where no client was drawn. One client more or less hardly changes the
    distribution of the models that the server sends out. This holds against anyone who sees those,
    all clients included, but not against the server, which sees what each client sends. The
    algorithm gets ONE update, the private average; post-processing it costs no further privacy.

    Memory: one sum in float64.

    Attributes:
        max_norm: S, the length to which the change of each client's model is clipped.
        noise_multiplier: z.
        rate: q, probability of each client to take part in a round.
        clients: n, how many there are; the number is public.
        key: secret key of the draws; with it the noise can be removed.

    Source: McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language
    Models, 2018, Algorithm 1 with flat clipping, equal weights and the estimator f_f.
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
        check_number("noise_multiplier", self.noise_multiplier, "a number of at least 0", low=0)
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
        """One update of the server: the broadcast model, moved by the noisy average."""
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
