"""One client's passes over its own images: SGD over a stream of batches.

Every random choice comes from a generator derived from (seed, purpose, client, round), so a
client's round is a pure function of what it starts from: no order of clients, no interruption and
no global generator can change it. Images stay uint8 on the device; shuffling, flipping, cropping
and perturbing happen there, and nothing is brought back to the host within an epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from certifl import rng as streams
from certifl.errors import InputError, ModelError, SpecError, TrainingDiverged
from certifl.federated.objectives import Augmented, Objective
from certifl.federated.privacy.compatibility import check_network
from certifl.federated.privacy.example_level import (
    NO_SECOND_GRADIENT,
    ExampleLevel,
    PrivatePasses,
    PrivateStepContext,
)
from certifl.federated.states import ClientData, ModelState, Parts
from certifl.federated.training.batches import (
    Augmentation,
    BatchStream,
    PerClient,
    augmentation_of,
)
from certifl.federated.training.precision import TRAINING_PRECISIONS, InBfloat16, own_randomness
from certifl.federated.training.schedule import Schedule
from certifl.federated.training.steps import GradientHook, Outcome, Step, StepContext, plain_step
from certifl.models import state_of
from certifl.module_copies import copy_of
from certifl.registry import check_choice

_SHOWN = 5


@dataclass(frozen=True)
class Trained:
    """What a client's passes give.

    Attributes:
        state: the trained model.
        momentum: SGD's buffers by parameter name; empty unless the schedule keeps them.
        metrics: "loss" (mean) and "accuracy" over all images seen in training mode. Neither is
            protected: with privacy there is only the number of noisy steps.
    """

    state: ModelState
    momentum: ModelState
    metrics: dict[str, float]

    @property
    def kept(self) -> Parts:
        """The parts of a client's state that the optimiser asks for: momentum, or nothing."""
        return {"momentum": self.momentum} if self.momentum else {}


@dataclass(frozen=True)
class _Plan:
    """Learning rate of each epoch, and what else differs from pass to pass."""

    rates: tuple[float, ...]
    weight_decay: float
    augmentation: Augmentation | PerClient | None
    step: Step = plain_step
    stream: str = ""
    hook: GradientHook | None = None
    momentum: ModelState = field(default_factory=dict)
    keep: bool = False
    steps: int | None = None

    @property
    def names(self) -> str:
        """What sets these passes apart from others of the same round and beginning."""
        kind = (self.hook is not None, self.step is plain_step)
        return repr((self.stream, self.rates, self.steps, self.weight_decay, kind))

    def pieces(self, batches: int) -> list[tuple[float, int]]:
        """Learning rate and number of batches of each pass over images of so many batches."""
        if self.steps is None:
            return [(rate, batches) for rate in self.rates]
        whole, rest = divmod(self.steps, batches)
        return [(self.rates[0], n) for n in [batches] * whole + [rest] * (rest > 0)]


class LocalTraining:
    """Everything a client's half needs besides states and data; the same object for all clients.

    It holds one model object and reuses it for every client: whatever a client trains is loaded
    into it first and copied out of it afterwards, so the memory of a federation does not grow with
    its clients.

    Args:
        model: the architecture; a copy of it is used, its weights do not matter.
        schedule: rounds, epochs and optimiser.
        seed: all random streams are derived from it.
        augmentation: perturbation sampled once per image and step in the schedule's rounds (the
            one-sample estimate of Eq. 3), or every client's own; None = none.
        finetuning_augmentation: the same for personalisation, which may differ; None = none.
        objective: what is minimised on a batch; the paper's Eq. (3) unless told otherwise.
        privacy: makes every client's gradients noisy and its batches random in size; None = none.
        device: where the passes run.
        precision: a name in `TRAINING_PRECISIONS`.

    Raises:
        ModelError: the model has nothing to train, cannot be copied, needs larger batches, or
            cannot be trained with privacy.
        SpecError: an unknown precision, or privacy with another one than float32.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        seed: int,
        augmentation: Augmentation | PerClient | None = None,
        finetuning_augmentation: Augmentation | PerClient | None = None,
        objective: Objective | None = None,
        privacy: ExampleLevel | None = None,
        device: torch.device | str = "cpu",
        precision: str = "float32",
    ) -> None:
        check_choice("precision", precision, TRAINING_PRECISIONS)
        self.precision = precision
        self.schedule = schedule
        self.seed = seed
        self.augmentation = augmentation
        self.finetuning_augmentation = finetuning_augmentation
        self.objective = Augmented() if objective is None else objective
        self.privacy = privacy
        if privacy is not None:
            if precision != "float32":
                raise SpecError(
                    'privacy.kind = "example" clips the gradient of every image: it needs '
                    'training.precision = "float32".'
                )
            check_network(model, privacy.kind)
        self.device = torch.device(device)
        self._model = _training(copy_of(model).to(self.device))
        check_batches(self._model, schedule.batch_size)
        self._trainable = _trainable(self._model)
        if not self._trainable:
            raise ModelError(
                "The model has no parameter that requires a gradient: nothing to train."
            )
        if precision == "bfloat16":
            # What is fast in it; the order of a tensor in memory is not part of its state.
            self._model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def network(self) -> nn.Module:
        """The network that is trained, to look at its layers: its weights do not matter."""
        return self._model

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the weights that are trained."""
        return tuple(self._trainable)

    def passes(
        self,
        start: ModelState,
        data: ClientData,
        round: int,
        *,
        momentum: ModelState | None = None,
        hook: GradientHook | None = None,
        weight_decay: float | None = None,
        step: Step | None = None,
        stream: str = "",
        lr_factor: float = 1.0,
        epochs: int | None = None,
        steps: int | None = None,
    ) -> Trained:
        """The schedule's passes of one round, from `start`; arguments are not changed.

        Args:
            start: the model to start from.
            data: the client's images.
            round: communication round, from 0; sets the learning rates and the random streams.
            momentum: buffers the client kept; ignored where the schedule resets them.
            hook: changes gradients before each step.
            weight_decay: instead of the schedule's.
            step: what is done with each batch; None = gradient, hook, optimiser.
            stream: names random streams of its own, where one round passes over the images twice.
            lr_factor: multiplies the schedule's learning rates.
            epochs: passes instead of the schedule's, at the learning rate of the round's first.
            steps: batches instead of passes, from 1, at the learning rate of the round's first.

        Raises:
            TrainingDiverged: the loss or the weights stopped being finite.
            ModelError: the model normalises over batches, and the client has one image.
        """
        schedule = self.schedule
        first = round * schedule.local_epochs
        rates = tuple(schedule.lr_at(first + epoch) for epoch in range(schedule.local_epochs))
        rates = rates if epochs is None else (rates[0],) * epochs
        plan = _Plan(
            rates=rates if lr_factor == 1.0 else tuple(rate * lr_factor for rate in rates),
            weight_decay=schedule.weight_decay if weight_decay is None else weight_decay,
            augmentation=self.augmentation,
            step=plain_step if step is None else step,
            stream=stream,
            hook=hook,
            momentum=(momentum or {}) if schedule.keeps_momentum else {},
            keep=schedule.keeps_momentum,
            steps=steps,
        )
        return self._train(start, data, round, plan)

    def finetune(
        self, start: ModelState, data: ClientData, round: int, *, epochs: int, lr: float | None
    ) -> Trained:
        """Passes of personalisation: its own augmentation, a constant rate, fresh momentum.

        Args:
            start: the model to start from.
            data: the client's images.
            round: number of the round, for the random streams.
            epochs: passes over the images.
            lr: learning rate; None = that of the schedule's last epoch.
        """
        schedule = self.schedule
        rate = schedule.lr_at(schedule.epochs - 1) if lr is None else lr
        plan = _Plan((rate,) * epochs, schedule.weight_decay, self.finetuning_augmentation)
        return self._train(start, data, round, plan)

    def beside(
        self, start: ModelState, *, momentum: ModelState | None = None, weight_decay: float
    ) -> StepContext:
        """A second model under training, with an optimiser of its own, for steps that move two.

        It lives as long as the caller keeps it. Its learning rate is the schedule's first until
        the caller sets another; `concluded` tells what has become of it.

        Args:
            start: the model to start from.
            momentum: buffers the client kept; ignored where the schedule resets them.
            weight_decay: of its optimiser.

        Raises:
            SpecError: with privacy, whose noise a second model would not have.
        """
        if self.privacy is not None:
            raise SpecError(NO_SECOND_GRADIENT)
        model = copy_of(self._model)
        model.load_state_dict(start)
        kept = (momentum or {}) if self.schedule.keeps_momentum else {}
        plan = _Plan((self.schedule.lr,), weight_decay, None, momentum=kept)
        parameters = _trainable(model)
        return StepContext(
            model, parameters, self._optimizer(parameters, plan), self._judge(), None
        )

    def concluded(self, bench: StepContext, client: int, round: int) -> Trained:
        """What a bench holds: model, and momentum where the schedule keeps it; no metrics.

        Raises:
            TrainingDiverged: a weight is not finite.
        """
        state = _finite_state(bench.model, client, round)
        return Trained(state, bench.momentum() if self.schedule.keeps_momentum else {}, {})

    def on_device(self, state: ModelState) -> ModelState:
        """A state's tensors where the passes run, for gradient hooks."""
        return {name: value.to(self.device) for name, value in state.items()}

    def _train(self, start: ModelState, data: ClientData, round: int, plan: _Plan) -> Trained:
        if len(data) == 0:
            raise InputError(
                f"Client {data.client} has no training images: give it some or leave it out."
            )
        check_images(self._model, {data.client: len(data)})
        schedule = self.schedule
        private = None
        if self.privacy is not None:
            private = self.privacy.passes(data, round, plan.names, start, schedule.batch_size)
        stream = BatchStream(
            data.to(self.device),
            batch_size=schedule.batch_size,
            augmentation=augmentation_of(plan.augmentation, data.client),
            flip=schedule.flip,
            crop=schedule.crop,
            seed=self.seed,
            round=round,
            stream=plan.stream,
            positions=None if private is None else private.positions,
        )
        seed = streams.derive_seed(self.seed, plan.stream + "model", data.client, round)
        with own_randomness(self.device, seed):
            self._model.load_state_dict(start)
            optimizer = self._optimizer(self._trainable, plan)
            bench = self._bench(optimizer, plan, private)
            sums = [
                self._epoch(bench, stream, rate, batches, plan.step, round)
                for rate, batches in plan.pieces(len(stream))
            ]
            state = _finite_state(self._model, data.client, round)
        metrics = _metrics(sums) if private is None else private.metrics()
        return Trained(state, bench.momentum() if plan.keep else {}, metrics)

    def _judge(self) -> Objective:
        """The objective in the arithmetic of this training."""
        return InBfloat16(self.objective) if self.precision == "bfloat16" else self.objective

    def _bench(
        self, optimizer: torch.optim.Optimizer, plan: _Plan, private: PrivatePasses | None
    ) -> StepContext:
        what = self._model, self._trainable, optimizer, self._judge(), plan.hook
        return StepContext(*what) if private is None else PrivateStepContext(*what, private)

    def _epoch(
        self,
        bench: StepContext,
        stream: BatchStream,
        rate: float,
        batches: int,
        step: Step,
        round: int,
    ) -> tuple[float, float, int]:
        """Steps over the first batches of a pass: summed loss, correct predictions, images."""
        bench.rate = rate
        outcomes: list[Outcome] = []
        images = 0
        for batch in itertools.islice(stream.epoch(), batches):
            outcomes.append(step(bench, batch))
            judged = outcomes[-1].images
            images += len(batch) if judged is None else judged
        # The epoch's only transfer to the host.
        total = math.fsum(torch.stack([outcome.loss for outcome in outcomes]).tolist())
        if not math.isfinite(total):
            raise TrainingDiverged(stream.client, round, f"the loss became {total}")
        correct = float(torch.stack([outcome.correct for outcome in outcomes]).sum())
        return total, correct, images

    def _optimizer(self, parameters: Mapping[str, nn.Parameter], plan: _Plan) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(
            parameters.values(),
            lr=plan.rates[0],
            momentum=self.schedule.momentum,
            weight_decay=plan.weight_decay,
        )
        for name, buffer in plan.momentum.items():
            own = buffer.to(self.device, copy=True)
            optimizer.state[parameters[name]]["momentum_buffer"] = own
        return optimizer


def _training(model: nn.Module) -> nn.Module:
    try:
        return model.train()
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"The model cannot be trained ({error}): give the network itself, not a program "
            "exported or frozen from it, which can only be certified."
        ) from error


def check_images(model: nn.Module, sizes: Mapping[int, int]) -> None:
    """Refuse clients with one image for a network that normalises over batches.

    With the statistics of a single image BatchNorm fails, where one pixel is left of it, or learns
    from nothing but that image; such a client would stay untrained and be certified all the same.

    Args:
        model: the network.
        sizes: number of training images by client.

    Raises:
        ModelError: names the layer and the clients.
    """
    layer = _batch_norm(model)
    alone = [client for client, size in sizes.items() if size == 1]
    if layer is None or not alone:
        return
    shown = ", ".join(map(str, alone[:_SHOWN])) + (" and more" if len(alone) > _SHOWN else "")
    who = f"Client {shown} has" if len(alone) == 1 else f"Clients {shown} have"
    raise ModelError(
        f"{who} one training image, and the network's BatchNorm ({layer}) needs at least two at a "
        "time. Give each client two images or more, take fewer clients, or a network with "
        'GroupNorm, such as model.name = "small_cnn" or model.options = { norm = "group" }.'
    )


def check_batches(model: nn.Module, batch_size: int) -> None:
    """Refuse batches of one image for a network that normalises over batches.

    Raises:
        ModelError: names the layer.
    """
    layer = _batch_norm(model)
    if layer is not None and batch_size == 1:
        raise ModelError(
            f"training.batch_size = 1, and the network's BatchNorm ({layer}) needs at least two "
            "images at a time. Take larger batches, or a network with GroupNorm."
        )


def _batch_norm(model: nn.Module) -> str | None:
    kind = nn.modules.batchnorm._BatchNorm
    return next((name for name, part in model.named_modules() if isinstance(part, kind)), None)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _metrics(sums: Sequence[tuple[float, float, int]]) -> dict[str, float]:
    """From loss, correct predictions and images of each pass."""
    seen = sum(images for _, _, images in sums)
    return {
        "loss": math.fsum(loss for loss, _, _ in sums) / seen,
        "accuracy": sum(correct for _, correct, _ in sums) / seen,
    }


def _finite_state(model: nn.Module, client: int, round: int) -> ModelState:
    sick = _not_finite(model.state_dict())
    if sick is not None:
        raise TrainingDiverged(client, round, f"{sick} is not finite")
    return state_of(model)


def _not_finite(state: ModelState) -> str | None:
    """The first entry with NaN or infinity. Looked at where they are; the host asks once."""
    held = {name: value for name, value in state.items() if value.is_floating_point()}
    verdicts = [value.isfinite().all() for value in held.values()]
    fine = torch.stack(verdicts).tolist() if verdicts else []
    return next((name for name, good in zip(held, fine, strict=True) if not good), None)
