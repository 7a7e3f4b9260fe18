"""Local training of one client: epochs of SGD over its own images.

All randomness comes from generators derived from (seed, purpose, client, round), so a client's
round is a pure function of its inputs: the order of clients, interruptions and the global
generator do not change it. Images stay uint8 on the device; they are shuffled, flipped, cropped
and perturbed there, and nothing is copied to the host within an epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from certifl import rng as streams
from certifl.errors import InputError, ModelError, SpecError, TrainingDiverged
from certifl.federated.batches import (
    Augmentation,
    BatchStream,
    PerClient,
    augmentation_of,
)
from certifl.federated.objectives import Augmented, Objective
from certifl.federated.privacy.accounting import STEPS
from certifl.federated.privacy.mechanisms import (
    NO_SECOND_GRADIENT,
    ExampleLevel,
    PrivateStepContext,
)
from certifl.federated.privacy.planning import check_network
from certifl.federated.schedule import Schedule, check_arithmetic
from certifl.federated.states import ClientData, ModelState, Parts
from certifl.federated.steps import (
    MEMORY_FORMATS,
    TRAINING_PRECISIONS,
    GradientHook,
    InBfloat16,
    Outcome,
    Step,
    StepContext,
    isolated_rng,
    plain_step,
    put_in_format,
)
from certifl.models import state_of
from certifl.module_copies import copy_of
from certifl.registry import check_choice

_SHOWN = 5


@dataclass(frozen=True)
class Trained:
    """The result of a client's local training.

    Attributes:
        state: the trained model.
        momentum: SGD's buffers by parameter name; empty unless the schedule keeps them.
        metrics: "loss" (mean) and "accuracy" in training mode. Neither is protected: with privacy
            only the number of noisy steps is reported.
    """

    state: ModelState
    momentum: ModelState
    metrics: dict[str, float]

    @property
    def momentum_part(self) -> Parts:
        """The momentum buffers as a part of a client's state; no part where there are none."""
        return {"momentum": self.momentum} if self.momentum else {}


def with_counted_steps(
    metrics: dict[str, float], *others: Mapping[str, float]
) -> dict[str, float]:
    """Metrics with the noisy steps of all trainings of a round; as they are without any."""
    counted = [one[STEPS] for one in (metrics, *others) if STEPS in one]
    return {**metrics, STEPS: sum(counted)} if counted else metrics


@dataclass(frozen=True)
class _Plan:
    """Learning rate of each epoch, and the other settings of one local training."""

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
        """Distinguishes this training from others of the same round and initial model."""
        kind = (self.hook is not None, self.step is plain_step)
        return repr((self.stream, self.rates, self.steps, self.weight_decay, kind))

    def pieces(self, batches: int) -> list[tuple[float, int]]:
        """(learning rate, number of batches) of each epoch of `batches` batches."""
        if self.steps is None:
            return [(rate, batches) for rate in self.rates]
        whole, rest = divmod(self.steps, batches)
        return [(self.rates[0], n) for n in [batches] * whole + [rest] * (rest > 0)]


class LocalTraining:
    """Trains clients, one after the other, with one model object: memory does not grow with them.

    Args:
        model: the architecture; a copy of it is used, its weights do not matter.
        schedule: rounds, epochs and optimizer.
        seed: all random streams are derived from it.
        augmentation: perturbation sampled once per image and step in the schedule's rounds (the
            one-sample estimate of Eq. 3), or one per client; None = none.
        finetuning_augmentation: the same for personalization; None = none.
        objective: the loss of a batch; default: the paper's Eq. (3).
        privacy: noisy gradients and batches of random size; None = none.
        device: where training runs.
        precision: a name in `TRAINING_PRECISIONS`.
        memory_format: a name in `MEMORY_FORMATS`.

    Raises:
        ModelError: the model has no trainable parameter, cannot be copied, needs larger batches,
            or cannot be trained with privacy.
        SpecError: an unknown precision or format, or privacy with another precision than float32
            or with channels-last.
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
        memory_format: str = "auto",
    ) -> None:
        check_choice("precision", precision, TRAINING_PRECISIONS)
        check_choice("memory_format", memory_format, MEMORY_FORMATS)
        self.precision = precision
        self.memory_format = memory_format
        self.schedule = schedule
        self.seed = seed
        self.augmentation = augmentation
        self.finetuning_augmentation = finetuning_augmentation
        self.objective = Augmented() if objective is None else objective
        self.privacy = privacy
        if privacy is not None:
            check_arithmetic(precision, memory_format)
            check_network(model, privacy.kind)
        self.device = torch.device(device)
        try:
            self._model = copy_of(model).to(self.device).train()
        except (NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"The model cannot be trained ({error}): give the network itself, not a program "
                "exported or frozen from it, which can only be certified."
            ) from error
        check_batches(self._model, schedule.batch_size)
        self._trainable = _trainable(self._model)
        if not self._trainable:
            raise ModelError(
                "The model has no parameter that requires a gradient: nothing to train."
            )
        put_in_format(self._model, memory_format, precision)

    @property
    def network(self) -> nn.Module:
        """The network that is trained, for its layers; its weights are arbitrary."""
        return self._model

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the weights that are trained."""
        return tuple(self._trainable)

    def train_epochs(
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
        """The schedule's epochs of one round, from `start`; arguments are not changed.

        Args:
            start, data: the initial model, and the client's images.
            round: communication round, from 0; sets the learning rates and the random streams.
            momentum: the client's buffers; ignored if the schedule resets them.
            hook: changes gradients before each step.
            weight_decay: instead of the schedule's.
            step: what is done with each batch; None = gradient, hook, optimizer step.
            stream: prefix of the random streams, for a second training in one round.
            lr_factor: multiplies the schedule's learning rates.
            epochs: instead of the schedule's, at the learning rate of the round's first.
            steps: number of batches instead of epochs, at the learning rate of the round's first.

        Raises:
            TrainingDiverged: the loss or the weights stopped being finite.
            ModelError: the model normalizes over batches, and the client has one image.
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
        """Fine-tuning: its own augmentation, a constant learning rate, fresh momentum.

        `epochs` are over the client's images; without `lr` it is that of the schedule's last.
        """
        schedule = self.schedule
        rate = schedule.lr_at(schedule.epochs - 1) if lr is None else lr
        plan = _Plan((rate,) * epochs, schedule.weight_decay, self.finetuning_augmentation)
        return self._train(start, data, round, plan)

    def second_model(
        self, start: ModelState, *, momentum: ModelState | None = None, weight_decay: float
    ) -> StepContext:
        """A second model with its own optimizer, for steps that train two models.

        Its learning rate is the schedule's first until the caller sets another, and its momentum
        starts afresh if the schedule resets it; `result_of` reads the trained model. SpecError
        with privacy, which protects one model only.
        """
        if self.privacy is not None:
            raise SpecError(NO_SECOND_GRADIENT)
        model = copy_of(self._model)
        model.load_state_dict(start)
        kept = (momentum or {}) if self.schedule.keeps_momentum else {}
        plan = _Plan((self.schedule.lr,), weight_decay, None, momentum=kept)
        parameters = _trainable(model)
        return StepContext(
            model, parameters, self._optimizer(parameters, plan), self._loss(), None
        )

    def result_of(self, context: StepContext, client: int, round: int) -> Trained:
        """Model and momentum of a second model; TrainingDiverged if not finite."""
        state = _finite_state(context.model, client, round)
        return Trained(
            state, context.momentum_buffers() if self.schedule.keeps_momentum else {}, {}
        )

    def on_device(self, state: ModelState) -> ModelState:
        """A state on the training device, for gradient hooks."""
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
        with isolated_rng(self.device, seed):
            self._model.load_state_dict(start)
            optimizer = self._optimizer(self._trainable, plan)
            common = self._model, self._trainable, optimizer, self._loss(), plan.hook
            context = (
                StepContext(*common) if private is None else PrivateStepContext(*common, private)
            )
            sums = [
                self._epoch(context, stream, rate, batches, plan.step, round)
                for rate, batches in plan.pieces(len(stream))
            ]
            state = _finite_state(self._model, data.client, round)
        if private is not None:
            metrics = private.metrics()
        else:
            losses, correct, images = zip(*sums, strict=True)
            metrics = {
                "loss": math.fsum(losses) / sum(images),
                "accuracy": sum(correct) / sum(images),
            }
        return Trained(state, context.momentum_buffers() if plan.keep else {}, metrics)

    def _loss(self) -> Objective:
        return InBfloat16(self.objective) if self.precision == "bfloat16" else self.objective

    def _epoch(
        self,
        context: StepContext,
        stream: BatchStream,
        rate: float,
        batches: int,
        step: Step,
        round: int,
    ) -> tuple[float, float, int]:
        """One epoch, up to `batches` batches: summed loss, correct predictions, images."""
        context.lr = rate
        outcomes: list[Outcome] = []
        images = 0
        for batch in itertools.islice(stream.epoch(), batches):
            outcomes.append(step(context, batch))
            counted = outcomes[-1].images
            images += len(batch) if counted is None else counted
        # The epoch's only copy to the host.
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


def check_images(model: nn.Module, sizes: Mapping[int, int]) -> None:
    """Refuse clients (images by client) with one image for a BatchNorm (ModelError)."""
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
    """Refuse batches of one image for a network with BatchNorm (ModelError)."""
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


def _finite_state(model: nn.Module, client: int, round: int) -> ModelState:
    floating = {n: value for n, value in model.state_dict().items() if value.is_floating_point()}
    checks = [value.isfinite().all() for value in floating.values()]
    finite = torch.stack(checks).tolist() if checks else []  # one copy to the host
    for name, good in zip(floating, finite, strict=True):
        if not good:
            raise TrainingDiverged(client, round, f"{name} is not finite")
    return state_of(model)
