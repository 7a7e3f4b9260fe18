"""Steps whose work is recorded once and replayed for every client, batch and round.

A step of a small network is hundreds of short kernels, and on a GPU the host cannot launch them as
fast as they are done. Recorded, they are launched as one. What is recorded is the work of a plain
step: the perturbation applied, forward, loss, backward, and (where nothing comes between) weight
decay and momentum. What is not: choosing, flipping and cropping the images and drawing the
perturbation's parameters, which come from the same streams in the same order as in a plain step,
and the last line of SGD, so that the learning rate may change at any time:

    theta <- theta - gamma b.

A batch of another size than the schedule's, the last of an epoch, is a plain step on the same
weights and the same momentum.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from certifl.errors import WorkError
from certifl.federated import together
from certifl.federated.batches import Augmentation, Batch
from certifl.federated.bench import Bench, GradientHook, Outcome
from certifl.federated.faults import out_of_memory
from certifl.federated.objectives import Objective
from certifl.federated.replay import Recorded, failed_capture, record
from certifl.federated.states import ModelState

__all__ = ["STEPS", "CapturedBench", "Recordings", "Weights"]

STEPS = {
    "plain": "every operation of a step is launched by itself",
    "captured": "a step is recorded once and replayed, on CUDA as a graph",
}

# A recording keeps the memory of a step. Clients with perturbations of their own have one each.
_MOST_RECORDINGS = 16


class _Unfit(WorkError):
    """A step that cannot be recorded, and why."""


@dataclass(frozen=True, eq=False)
class _Fed(Batch):
    """A batch whose parameters of the perturbation are given, one draw after the other."""

    given: Iterator[torch.Tensor] = field(default_factory=lambda: iter(()))

    def params(self) -> torch.Tensor | None:
        if self.augmentation is None:
            return None
        drawn = next(self.given, None)
        if drawn is None:
            raise _Unfit("the objective draws more often than at first")
        return drawn

    def part(self, start: int, stop: int) -> Batch:
        raise _Unfit("the objective takes batches apart")

    def again(self) -> Batch:
        raise _Unfit("the objective takes a batch twice")


@dataclass(frozen=True)
class _Kind:
    """What a recording is of; another needs another recording.

    Attributes:
        shape: of the images.
        augmentation, objective: as of the batch and the training.
        whole: momentum and weight decay of that much; None = gradients alone.
    """

    shape: torch.Size
    augmentation: Augmentation | None
    objective: Objective
    whole: tuple[float, float] | None


class Weights:
    """The weights of one network and their momentum, which recorded steps work on.

    Args:
        model: its weights stay where they are in memory.
        parameters: the trainable ones, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = parameters
        self.momentum: ModelState = {}

    def reset(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Momentum as it was kept, and none for the other weights."""
        for name, parameter in self.parameters.items():
            if name not in self.momentum:
                self.momentum[name] = torch.empty_like(parameter)
            if name in kept:
                self.momentum[name].copy_(kept[name])
            else:
                # m (-0.0) + g is g to the last bit for every g, as a first step of SGD has it.
                self.momentum[name].fill_(-0.0)

    def taken(self) -> ModelState:
        """The gradients as they are, of the weights that have one."""
        every = ((name, value.grad) for name, value in self.parameters.items())
        return {name: gradient for name, gradient in every if gradient is not None}

    @torch.no_grad()
    def directions(
        self, gradients: ModelState, momentum: float, weight_decay: float
    ) -> ModelState:
        """What SGD multiplies with the learning rate; moves the momentum on.

        b <- momentum b + (gradient + weight_decay theta), in the operations of torch.optim.SGD.
        """
        names, values = list(gradients), list(gradients.values())
        if weight_decay != 0:
            values = together.sums(values, [self.parameters[n] for n in names], weight_decay)
        if momentum != 0:
            buffers = [self.momentum[name] for name in names]
            together.scale(buffers, momentum)
            together.add(buffers, values)
            values = buffers
        return dict(zip(names, values, strict=True))


class _Work:
    """What is recorded: one step on a batch that lies always in the same place.

    It knows the weights and not the recordings, and a recording knows it and not the reverse:
    without a cycle all their memory is given back as soon as a training is dropped.
    """

    def __init__(self, weights: Weights, kind: _Kind, batch: Batch) -> None:
        self._weights, self._kind = weights, kind
        self.images, self.labels = batch.images.clone(), batch.labels.clone()
        # For nobody to draw from; made here, for none can be made while a graph is captured.
        self._idle = torch.Generator(device=batch.images.device)
        self.params = self._draws(batch)
        self.reached: tuple[str, ...] = ()

    def __call__(self) -> list[torch.Tensor]:
        """Loss, correct predictions, and the gradients unless they went into the momentum."""
        weights, batch = self._weights, self._batch(iter(self.params))
        for parameter in weights.parameters.values():
            parameter.grad = None
        loss, logits = self._kind.objective(weights.model, batch)
        loss.backward()
        with torch.no_grad():
            outcome = [loss.detach() * len(batch), (logits.argmax(1) == batch.labels).sum()]
            gradients = weights.taken()
            self.reached = tuple(gradients)
            if self._kind.whole is not None:
                gradients = weights.directions(gradients, *self._kind.whole)
                if self._kind.whole[0] != 0:
                    return outcome  # the directions are the momentum, which stays where it is
            return [*outcome, *gradients.values()]

    def _batch(self, given: Iterator[torch.Tensor]) -> Batch:
        return _Fed(self.images, self.labels, self._kind.augmentation, self._idle, given)

    def _draws(self, batch: Batch) -> list[torch.Tensor]:
        """Places for the parameters that one call of the objective draws, found by calling it."""
        drawn: list[torch.Tensor] = []
        same = batch.again()

        def noted() -> Iterator[torch.Tensor]:
            while (params := same.params()) is not None:
                drawn.append(params)
                yield params

        before = self._idle.get_state()
        self._kind.objective(self._weights.model, self._batch(noted()))
        if not torch.equal(self._idle.get_state(), before):
            raise _Unfit("the objective draws from the batch's generator itself")
        return drawn


class _Step:
    """One recorded step: where its batch goes in, and where its outcome comes out."""

    def __init__(self, weights: Weights, kind: _Kind, batch: Batch) -> None:
        self.kind = kind
        self._work = _Work(weights, kind, batch)
        self._recorded: Recorded = record(self._work, batch.images.device)

    def __call__(self, batch: Batch) -> Outcome:
        """Replay on this batch: what it leaves is in `gradients`, or in the momentum."""
        for place in self._work.params:
            drawn = batch.params()
            assert drawn is not None
            place.copy_(drawn)
        self._work.images.copy_(batch.images)
        self._work.labels.copy_(batch.labels)
        self._recorded.repeat()
        loss, correct = self._recorded.results[:2]
        return Outcome(loss.clone(), correct.clone())

    @property
    def reached(self) -> tuple[str, ...]:
        """Names of the weights that the loss has a gradient for."""
        return self._work.reached

    @property
    def gradients(self) -> Sequence[torch.Tensor]:
        """Of the weights in `reached`; with weight decay where the recording is of whole steps."""
        return self._recorded.results[2:]


class Recordings:
    """The recorded steps of one network.

    Args:
        model, parameters: as of `Weights`.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.weights = Weights(model, parameters)
        self._steps: list[_Step] = []
        self._unfit: list[_Kind] = []

    def __reduce__(self) -> tuple[object, ...]:
        # What is recorded belongs to this process and this memory.
        return Recordings, (self.weights.model, self.weights.parameters)

    def step(self, kind: _Kind, batch: Batch) -> _Step | None:
        """The recorded step of this kind, recorded now if need be; None if it cannot be.

        Raises:
            CaptureFailed: torch began to record and broke off; nothing can be done here any more.
            RuntimeError: memory ran out, which says nothing about the step.
        """
        found = next((step for step in self._steps if step.kind == kind), None)
        if found is not None or kind in self._unfit:
            return found
        try:
            with self._untouched(batch.images.device):
                made = _Step(self.weights, kind, batch)
        except (RuntimeError, _Unfit) as error:
            if out_of_memory(error) or failed_capture(error) is not None:
                raise
            self._unfit.append(kind)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"This training's steps cannot be recorded ({reason}), so they are launched one "
                'by one: the same results, more slowly. Choose steps = "plain" to say so.',
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._steps = [*self._steps[1 - _MOST_RECORDINGS :], made]
        return made

    @contextmanager
    def _untouched(self, device: torch.device) -> Iterator[None]:
        """Weights, buffers, momentum and generators are afterwards what they were."""
        model, momentum = self.weights.model, self.weights.momentum
        held = [*model.parameters(), *model.buffers(), *momentum.values()]
        before = [value.detach().clone() for value in held]
        gradients = [(value, value.grad) for value in self.weights.parameters.values()]
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device]):
                yield
        finally:
            with torch.no_grad():
                for value, was in zip(held, before, strict=True):
                    value.copy_(was)
            for parameter, gradient in gradients:
                parameter.grad = gradient


class CapturedBench(Bench):
    """A bench that replays recorded steps on batches of the schedule's size.

    Args:
        model, parameters, optimizer, objective, hook: as of `Bench`.
        recordings: of this model, kept from client to client.
        size: images of a batch that is worth recording.
        whole: nothing but the optimiser moves weights or changes gradients, so that its momentum
            is part of the recording.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        hook: GradientHook | None,
        recordings: Recordings,
        size: int,
        whole: bool,
    ) -> None:
        super().__init__(model, parameters, optimizer, objective, hook)
        self._recordings, self._size = recordings, size
        self._step: _Step | None = None
        self._latest: tuple[torch.Size, Augmentation | None] | None = None
        self._directions: ModelState | None = None
        self._sgd: tuple[float, float] | None = None
        self._moved: dict[str, None] = {}
        if whole:
            group = optimizer.param_groups[0]
            self._sgd = group["momentum"], group["weight_decay"]
            kept = super().momentum()
            self._moved = dict.fromkeys(kept)
            if group["momentum"] != 0:
                recordings.weights.reset(kept)

    def gradients(self, batch: Batch) -> Outcome:
        """Replay; or, for a batch of another size, the plain work."""
        step = self._recorded(batch)
        self._directions = None
        if step is None:
            return super().gradients(batch)
        outcome = step(batch)
        held = dict(zip(step.reached, step.gradients, strict=False))
        if self._sgd is None:
            for name, parameter in self.parameters.items():
                parameter.grad = held.get(name)
        elif self._sgd[0] != 0:
            momentum = self._recordings.weights.momentum
            self._directions = {name: momentum[name] for name in step.reached}
        else:
            self._directions = held
        return outcome

    def advance(self) -> None:
        """As of `Bench`; a whole step has only its last line left."""
        if self._sgd is None:
            super().advance()
            return
        directions = self._directions
        if directions is None:
            held = self._recordings.weights
            directions = held.directions(held.taken(), *self._sgd)
        self._moved.update(dict.fromkeys(directions))
        weights = [self.parameters[name] for name in directions]
        with torch.no_grad():
            together.add(weights, list(directions.values()), -self.rate)

    def momentum(self) -> ModelState:
        """The momentum buffers on the CPU, by parameter."""
        if self._sgd is None or self._sgd[0] == 0:
            return super().momentum()
        held = self._recordings.weights.momentum
        return {n: held[n].to("cpu", copy=True) for n in self.parameters if n in self._moved}

    def _recorded(self, batch: Batch) -> _Step | None:
        if len(batch) != self._size:
            return None
        shape, augmentation = batch.images.shape, batch.augmentation
        latest = self._latest
        if latest is None or latest[0] != shape or latest[1] is not augmentation:
            kind = _Kind(shape, augmentation, self._objective, self._sgd)
            self._step, self._latest = self._recordings.step(kind, batch), (shape, augmentation)
        return self._step
