"""A client's training step: model, optimizer and objective, one batch at a time.

An algorithm whose step is not plain SGD passes its own `Step` to `LocalTraining.train_epochs`. The
step works with the context: gradients of a batch at the current weights, changes to weights or
gradients, the optimizer's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from certifl.federated.objectives import Objective
from certifl.federated.states import ModelState
from certifl.federated.training import foreach
from certifl.federated.training.batches import Batch
from certifl.torch_env import exact_convolutions

GradientHook = Callable[[Mapping[str, nn.Parameter]], None]
"""Called before the step with the parameters that have a gradient, by name. May change gradients
in place, or set one to None so that the step leaves the parameter alone."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a batch went, still on the device.

    Attributes:
        loss: summed over the images. correct: number of correct predictions.
        images: how many images these are of; None = all of the batch.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    images: int | None = None


class StepContext:
    """One model under training: what a step may use.

    Args:
        model: in training mode, its weights where the client stands.
        parameters: the trainable ones, by name.
        optimizer: over exactly these.
        objective: the loss of a batch.
        hook: changes gradients before the optimizer moves.
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
    def lr(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def compute_gradients(self, batch: Batch) -> Outcome:
        """Put the gradients of the batch's loss at the present weights into `.grad`."""
        loss, logits = self._objective(self.model, batch)
        self._optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            return Outcome(loss.detach() * len(batch), (logits.argmax(1) == batch.labels).sum())

    def optimizer_step(self) -> None:
        """Let the hook change the gradients, then the optimizer moves the weights."""
        if self._hook is not None:
            with torch.no_grad():
                self._hook(_reached(self.parameters))
        self._optimizer.step()

    @contextlib.contextmanager
    def at_weights(self, point: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context the trainable weights are those of `point`, afterwards their own.

        Gradients that are computed meanwhile stay where they are, for `advance`. Running
        statistics of BatchNorm follow the network as it was used.
        """
        own = self.copy_weights()
        self._put(point)
        yield
        self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        places = self.parameters
        foreach.copy(list(places.values()), [weights[name] for name in places])

    @torch.no_grad()
    def scale_gradients(self, factor: float, weight_decay: float = 0.0) -> None:
        """Each gradient becomes factor (gradient + weight_decay times the present weight)."""
        reached = list(_reached(self.parameters).values())
        gradients = gradients_of(reached)
        if weight_decay != 0:
            foreach.add(gradients, reached, weight_decay)
        foreach.scale(gradients, factor)

    def copy_gradients(self) -> ModelState:
        """Copies of the gradients; zero for a weight that none reached."""
        return {
            name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in self.parameters.items()
        }

    @torch.no_grad()
    def set_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Gradients for `advance` to follow, where there are any."""
        reached = _reached(self.parameters)
        foreach.copy(gradients_of(reached.values()), [gradients[name] for name in reached])

    def preserve_rng_state(self) -> contextlib.AbstractContextManager[None]:
        """What layers draw within this context (dropout), they draw once more after it."""
        device = next(iter(self.parameters.values())).device
        return torch.random.fork_rng([] if device.type == "cpu" else [device])

    def copy_weights(self) -> ModelState:
        """The trainable weights as copies, where they are."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def momentum_buffers(self) -> ModelState:
        """The optimizer's momentum buffers on the CPU, by parameter."""
        states = self._optimizer.state
        buffers = {n: states[p].get("momentum_buffer") for n, p in self.parameters.items()}
        return {n: b.detach().to("cpu", copy=True) for n, b in buffers.items() if b is not None}


def _reached(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
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


# Arithmetic and randomness around the steps.

TRAINING_PRECISIONS = {
    "float32": "weights, activations and gradients in float32",
    "bfloat16": "convolutions and matrix products in bfloat16; weights, their gradients, momentum "
    "and the loss stay in float32",
}


@dataclass(frozen=True)
class InBfloat16:
    """An objective whose network computes in bfloat16 (autocast) and answers in float32.

    bfloat16 has the range of float32, so losses need no scaling.

    Attributes:
        objective: what is minimized.

    Source: Micikevicius et al., Mixed Precision Training, 2018; Kalamkar et al., A Study of
    BFLOAT16 for Deep Learning Training, 2019.
    """

    objective: Objective

    name: ClassVar[str] = "bfloat16"

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's loss and logits."""
        return self.objective(_Rounding(model), batch)


class _Rounding(nn.Module):
    """A network under autocast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images).float()


@contextlib.contextmanager
def isolated_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Lets modules that draw from the global generator (dropout) draw from a derived one.

    On CUDA, convolutions are held to their deterministic algorithms meanwhile, so that a resumed
    run repeats the interrupted one.
    """
    cuda = device.type == "cuda"
    index = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    with torch.random.fork_rng(devices=index), exact_convolutions(device):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(index[0]):
                torch.cuda.manual_seed(seed)
        yield
