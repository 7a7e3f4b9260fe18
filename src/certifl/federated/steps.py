"""A client's training step: model, optimizer and objective, one batch at a time.

An algorithm whose step is not plain SGD passes its own `Step` to `LocalTraining.train_epochs`. The
step works with the context: gradients of a batch at the current weights, changes to weights or
gradients, the optimizer's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from certifl.federated.batches import Batch
from certifl.federated.objectives import Objective
from certifl.federated.states import ModelState
from certifl.torch_env import exact_convolutions

GradientHook = Callable[[Mapping[str, nn.Parameter]], None]
"""Called before the step with the parameters that have a gradient, by name. May change gradients
in place, or set one to None so that the step leaves the parameter alone."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Loss and accuracy of a batch, on the device.

    Attributes:
        loss: summed over the images. correct: number of correct predictions.
        images: number of images they refer to; None = the whole batch.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    images: int | None = None


class StepContext:
    """The model under training and its optimizer: what a step may use.

    Args:
        model: in training mode, with the current weights.
        parameters: the trainable ones, by name.
        optimizer: over exactly these.
        objective: the loss of a batch.
        hook: changes gradients before the optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        hook: GradientHook | None,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self._optimizer = optimizer
        self._objective = objective
        self._hook = hook

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        return float(self._optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def compute_gradients(self, batch: Batch) -> Outcome:
        """Compute the gradients of the batch's loss at the current weights, into `.grad`."""
        loss, logits = self._objective(self.model, batch)
        self._optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            return Outcome(loss.detach() * len(batch), (logits.argmax(1) == batch.labels).sum())

    def optimizer_step(self) -> None:
        """Apply the hook to the gradients, then take a step of the optimizer."""
        if self._hook is not None:
            with torch.no_grad():
                self._hook(_with_gradient(self.parameters))
        self._optimizer.step()

    @contextlib.contextmanager
    def at_weights(self, point: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Set the trainable weights to those of `point` within this context.

        Gradients computed within it remain, for `optimizer_step`, and so do updates of BatchNorm's
        running statistics.
        """
        own = self.copy_weights()
        self._put(point)
        yield
        self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        parameters = self.parameters
        foreach_copy(list(parameters.values()), [weights[name] for name in parameters])

    @torch.no_grad()
    def scale_gradients(self, factor: float, weight_decay: float = 0.0) -> None:
        """Each gradient becomes factor (gradient + weight_decay times the current weight)."""
        parameters = list(_with_gradient(self.parameters).values())
        gradients = gradients_of(parameters)
        if weight_decay != 0:
            foreach_add(gradients, parameters, weight_decay)
        foreach_scale(gradients, factor)

    def copy_gradients(self) -> ModelState:
        """Copies of the gradients; zero for a weight without one."""
        return {
            name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in self.parameters.items()
        }

    @torch.no_grad()
    def set_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Replace the gradients, of parameters that have one, for `optimizer_step`."""
        parameters = _with_gradient(self.parameters)
        foreach_copy(gradients_of(parameters.values()), [gradients[n] for n in parameters])

    def preserve_rng_state(self) -> contextlib.AbstractContextManager[None]:
        """Restore the random state afterwards, so that layers (dropout) draw the same again."""
        device = next(iter(self.parameters.values())).device
        return torch.random.fork_rng([] if device.type == "cpu" else [device])

    def copy_weights(self) -> ModelState:
        """Copies of the trainable weights, on their device."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def momentum_buffers(self) -> ModelState:
        """The optimizer's momentum buffers on the CPU, by parameter."""
        states = self._optimizer.state
        buffers = {n: states[p].get("momentum_buffer") for n, p in self.parameters.items()}
        return {n: b.detach().to("cpu", copy=True) for n, b in buffers.items() if b is not None}


def _with_gradient(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: value for name, value in parameters.items() if value.grad is not None}


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of these parameters, without those that have none."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


Step = Callable[[StepContext, Batch], Outcome]
"""What is done with one batch."""


def plain_step(context: StepContext, batch: Batch) -> Outcome:
    """SGD: the gradient of the batch, the hook, the optimizer's move."""
    outcome = context.compute_gradients(batch)
    context.optimizer_step()
    return outcome


# Arithmetic on lists of tensors: one kernel launch on a GPU, as in torch.optim.SGD, and the same
# bits as tensor by tensor. torch has no public name for these operations; they refuse empty lists.

_lists: Any = torch


def foreach_scale(values: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply every value by factor, in place."""
    if values:
        _lists._foreach_mul_(values, factor)


def foreach_add(
    values: Sequence[torch.Tensor], others: Sequence[torch.Tensor], factor: float = 1
) -> None:
    """Add factor times other to every value, in place."""
    if values:
        _lists._foreach_add_(values, others, alpha=factor)


def foreach_sub(
    values: Sequence[torch.Tensor], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Of each pair: value - other."""
    return list(_lists._foreach_sub(values, others)) if values else []


def foreach_copy(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy every value into its target."""
    if targets:
        _lists._foreach_copy_(targets, values)


# Arithmetic and randomness around the steps.

TRAINING_PRECISIONS = ("float32", "bfloat16")
"""bfloat16: of convolutions and matrix products; weights, gradients and the loss stay float32."""
MEMORY_FORMATS = ("auto", "contiguous", "channels-last")
"""auto: contiguous in float32; channels-last, faster on processors, in bfloat16."""


def put_in_format(model: nn.Module, memory_format: str, precision: str) -> None:
    """Lay out a model's weights in memory; activations follow them. No part of a state."""
    if memory_format == "auto" and precision == "float32":
        return  # as the model came
    contiguous = memory_format == "contiguous"
    layout = torch.contiguous_format if contiguous else torch.channels_last
    model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class InBfloat16:
    """An objective whose network computes in bfloat16 (autocast) and returns float32.

    bfloat16 has the range of float32, so losses need no scaling.

    Attributes:
        objective: the loss of a batch.

    Source: Micikevicius et al., Mixed Precision Training, 2018; Kalamkar et al., A Study of
    BFLOAT16 for Deep Learning Training, 2019.
    """

    objective: Objective

    name: ClassVar[str] = "bfloat16"

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's loss and logits."""
        return self.objective(_Autocast(model), batch)


class _Autocast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images).float()


@contextlib.contextmanager
def isolated_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generator within this context, for modules that draw from it (dropout).

    On CUDA, convolutions use deterministic algorithms, so that a resumed run repeats bit for bit.
    """
    cuda = device.type == "cuda"
    index = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    with torch.random.fork_rng(devices=index), exact_convolutions(device):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(index[0]):
                torch.cuda.manual_seed(seed)
        yield
