"""Recorded steps against plain ones: the same bits, for every algorithm and objective."""

from __future__ import annotations

import gc
import pickle
import weakref
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny_study as tiny
from algorithm_cases import CASES, all_rounds, deployed, light
from certifl.errors import SpecError, StoreMismatch
from certifl.federated import ClientData, LocalTraining, state_of
from certifl.federated import captured as captured_module
from certifl.federated.augmentations import PerClient
from certifl.federated.bench import plain_step
from certifl.federated.client import Trained
from certifl.federated.objectives import (
    Augmented,
    Consistency,
    Macer,
    SmoothAdv,
    Stability,
)
from certifl.federated.privacy.example import ExampleLevel
from certifl.perturbations import PixelNoise, Rotation
from certifl.work.private import Protection
from certifl.work.training import local_training
from tape import HostReads, Tape
from tiny_federation import (
    SCHEDULE,
    Noise,
    TinyNet,
    assert_same,
    client_data,
    differ,
    federate,
    in_pieces,
    without_seconds,
)

OBJECTIVES = (Augmented(), Consistency(), SmoothAdv(), Macer(copies=3), Stability())


@pytest.fixture(params=["itself", "tape"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Recorded work as a CPU has it, and as operations repeated without their Python."""
    if request.param == "tape":
        monkeypatch.setattr(captured_module, "record", Tape)
    return request.param


def make(steps: str, model: nn.Module | None = None, **changes: Any) -> LocalTraining:
    options = {
        key: changes.pop(key)
        for key in ("augmentation", "objective", "precision", "privacy")
        if key in changes
    }
    return LocalTraining(
        TinyNet() if model is None else model,
        replace(SCHEDULE, **changes),
        seed=5,
        steps=steps,
        **{"augmentation": Noise(), "finetuning_augmentation": Noise(0.3), **options},
    )


def rounds_of(local: LocalTraining, sizes: tuple[int, ...] = (20, 17, 16, 5)) -> list[Trained]:
    """Two clients after each other, then once more with what they kept, and a fine-tuning."""
    data = [client_data(client, images) for client, images in enumerate(sizes)]
    start = state_of(TinyNet()) if isinstance(local.network, TinyNet) else state_of(local.network)
    first = [local.passes(start, one, 0) for one in data]
    second = [
        local.passes(before.state, one, 1, momentum=before.momentum)
        for before, one in zip(first, data, strict=True)
    ]
    return [*first, *second, local.finetune(second[0].state, data[0], 2, epochs=1, lr=0.3)]


def assert_alike(one: list[Trained], other: list[Trained]) -> None:
    for left, right in zip(one, other, strict=True):
        assert_same(left.state, right.state)
        assert_same(left.momentum, right.momentum)
        assert left.metrics == right.metrics


def recordings(local: LocalTraining) -> list[Any]:
    assert local._recordings is not None
    return local._recordings._steps


SCHEDULES = {
    "momentum kept": {"momentum_between_rounds": "keep"},
    "momentum reset": {},
    "no momentum": {"momentum": 0.0},
    "no decay": {"weight_decay": 0.0},
    "neither": {"momentum": 0.0, "weight_decay": 0.0},
    "flip and crop": {"flip": True, "crop": 1},
    "rate decays each epoch": {"decay_every": 1, "momentum_between_rounds": "keep"},
    "nothing drawn": {"augmentation": None},
    "own perturbations": {"augmentation": PerClient((Noise(0.2), None, Noise(0.1), Noise(0.2)))},
}


@pytest.mark.parametrize("case", SCHEDULES, ids=str)
def test_recorded_steps_are_plain_steps_bit_for_bit(recorder, case):
    """Clients of several sizes (with odd last batches), rounds, decaying rates, a fine-tuning."""
    changes = SCHEDULES[case]
    local = make("captured", **changes)
    assert_alike(rounds_of(local), rounds_of(make("plain", **changes)))
    # One recording for each perturbation (and that of the fine-tuning), not for each client.
    noises = {"own perturbations": 4, "nothing drawn": 2}.get(case, 2)
    assert len(recordings(local)) == noises
    if recorder == "tape":
        assert sum(step._recorded.repeated for step in recordings(local)) == 22


@pytest.mark.parametrize("perturbation", [PixelNoise(0.3), Rotation(0.4), None], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_every_objective_can_be_recorded(recorder, objective, perturbation):
    changes = {"objective": objective, "augmentation": perturbation, "lr": 0.01}
    data, start = client_data(0), state_of(TinyNet())
    both = [make(steps, **changes) for steps in ("plain", "captured")]
    plain, captured = (local.passes(start, data, 0) for local in both)
    assert_alike([captured], [plain])
    assert len(recordings(both[1])) == 1


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_is_the_same_with_recorded_steps(name, monkeypatch):
    monkeypatch.setattr(captured_module, "record", Tape)
    algorithm, order = CASES[name], [0, 1, 2]
    schedule = {"momentum_between_rounds": "keep"}
    results = [
        all_rounds(algorithm, order, local)
        for local in (light(**schedule), make("captured", rounds=2, local_epochs=1, **schedule))
    ]
    for plain, captured in zip(*(deployed(algorithm, *r) for r in results), strict=True):
        assert_same(captured, plain)
    assert_same(results[1][0].parts, results[0][0].parts)


class Partly(nn.Module):
    """Frozen weights, unused ones, and a gradient of exactly -0.0."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 8)
        self.used, self.unused = nn.Linear(8, 3), nn.Linear(2, 2)
        self.silent = nn.Parameter(torch.tensor([-0.0, 0.0, 1.0]))
        self.frozen.requires_grad_(False)
        with torch.no_grad():
            for parameter in list(self.parameters())[1:]:
                parameter.fill_(0.01)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.used(self.frozen(images.flatten(1))) + self.silent * -0.0


def test_frozen_unused_and_unmoved_weights(recorder):
    """Signs of zeros too: buffers that begin at +0 would turn a gradient of -0.0 around."""
    changes = {"momentum_between_rounds": "keep", "weight_decay": 0.0, "lr": 0.05}
    both = [rounds_of(make(steps, Partly(), **changes)) for steps in ("plain", "captured")]
    assert_alike(*both)
    assert set(both[1][0].momentum) == {"used.weight", "used.bias", "silent"}


@dataclass(frozen=True)
class InParts:
    """An objective that takes batches apart, which no recording can follow."""

    name: ClassVar[str] = "parts"

    def __call__(self, model, batch):
        logits = torch.cat([model(batch.part(0, 3).draw()), model(batch.part(3, 99).draw())])
        return functional.cross_entropy(logits, batch.labels), logits


@dataclass(frozen=True)
class Drawing(InParts):
    """An objective that draws past the batch."""

    def __call__(self, model, batch):
        noise = torch.randn(batch.images.shape, generator=batch.noise)
        logits = model(batch.images + noise)
        return functional.cross_entropy(logits, batch.labels), logits


@dataclass(frozen=True)
class Looking(InParts):
    """An objective that asks the device for a number."""

    def __call__(self, model, batch):
        logits = model(batch.draw())
        factor = 1.0 if float(logits.detach().sum()) > 0 else 2.0
        return factor * functional.cross_entropy(logits, batch.labels), logits


@pytest.mark.parametrize("objective", [InParts(), Drawing(), Looking()], ids=repr)
def test_what_cannot_be_recorded_is_said_once_and_trained_plainly(objective, monkeypatch):
    monkeypatch.setattr(captured_module, "record", Tape)
    local, changes = make("captured", objective=objective), {"objective": objective}
    with pytest.warns(RuntimeWarning, match=r"cannot be recorded \(") as said:
        results = rounds_of(local)
    assert len(said) == 2  # for training, and for the other noise of the fine-tuning
    assert recordings(local) == []
    assert_alike(results, rounds_of(make("plain", **changes)))


def test_a_recording_that_breaks_off_leaves_nothing_behind(monkeypatch):
    def breaks(work, device):
        work()
        torch.rand(3)
        raise RuntimeError("CUDA error: out of graphs")

    monkeypatch.setattr(captured_module, "record", breaks)
    changes = {"momentum_between_rounds": "keep"}
    with pytest.warns(RuntimeWarning, match="out of graphs"):
        results = rounds_of(make("captured", **changes))
    assert_alike(results, rounds_of(make("plain", **changes)))


@pytest.mark.parametrize("steps", ["plain", "captured"])
@pytest.mark.parametrize("perturbation", [PixelNoise(0.3, True), Rotation(0.4)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_no_step_asks_the_host_for_a_value(steps, perturbation, objective):
    """Longer epochs ask no more often: what there is belongs to a client's round, not to steps."""
    changes = {"objective": objective, "augmentation": perturbation, "flip": True, "crop": 1}
    local, start, asked = make(steps, **changes, lr=0.001), state_of(TinyNet()), []
    for images in (8, 8, 24):  # the first one records
        with HostReads() as reads:
            local.passes(start, client_data(0, images), 0)
        asked.append(len(reads.found))
    assert asked[1] == asked[2]


def test_many_perturbations_do_not_fill_the_memory():
    local, data = make("captured"), client_data(0)
    for number in range(captured_module._MOST_RECORDINGS + 3):
        local.augmentation = Noise(0.01 * number)
        local.passes(state_of(TinyNet()), data, 0)
    kinds = [step.kind.augmentation.sigma for step in recordings(local)]
    assert kinds == [0.01 * n for n in range(3, captured_module._MOST_RECORDINGS + 3)]


def test_what_is_recorded_goes_with_its_training(recorder):
    """At once, not when cycles are looked for: on a GPU it is most of the memory."""
    local = make("captured", momentum_between_rounds="keep")
    local.passes(state_of(TinyNet()), client_data(0), 0)
    step, held = recordings(local)[0], local._recordings
    assert held is not None
    kept = [*local.network.parameters(), *held.weights.momentum.values(), *step.gradients]
    gone = [weakref.ref(one) for one in (local.network, step, held, *kept)]
    gc.collect()
    gc.disable()
    try:
        del local, step, held, kept
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_a_diverging_client_does_not_harm_the_next(recorder):
    local, start = make("captured", lr=1e30), state_of(TinyNet())
    with pytest.raises(Exception, match="diverged"):
        local.passes(start, client_data(1), 0)
    local.schedule = SCHEDULE
    plain = make("plain").passes(start, client_data(0), 0)
    assert_alike([local.passes(start, client_data(0), 0)], [plain])


def test_other_processes_record_for_themselves(recorder):
    local, data, start = make("captured"), client_data(0), state_of(TinyNet())
    expected = local.passes(start, data, 0)
    sent = pickle.loads(pickle.dumps(local))
    assert recordings(sent) == []
    assert_alike([sent.passes(start, data, 0)], [expected])


def test_a_run_in_pieces_is_the_run_in_one(tmp_path):
    def work(progress: Any, folder: str = "pieces") -> Any:
        return federate(tmp_path / folder, local=make("captured"), progress=progress)

    pieces, stops = in_pieces(4, work)
    whole = federate(tmp_path / "whole", local=make("captured"))
    plain = federate(tmp_path / "plain", local=make("plain"))
    assert stops > 0
    for other in (pieces, plain):
        assert without_seconds(other.history) == without_seconds(whole.history)
        assert_same(other.server(), whole.server())
    with pytest.raises(StoreMismatch, match="steps: captured there, None asked for"):
        federate(tmp_path / "whole", local=make("plain"))


@pytest.mark.parametrize("network", ["small_cnn", "small_resnet"])
def test_bfloat16_keeps_its_weights_in_float32(recorder, network):
    import certifl

    model = certifl.models.build(network, 1, 3, seed=0)
    start, data = state_of(model), client_data(0)
    changes = {"model": model, "lr": 0.01, "momentum_between_rounds": "keep"}
    exact = make("plain", **changes).passes(start, data, 0)
    low = [make(steps, **changes, precision="bfloat16") for steps in ("plain", "captured")]
    plain, captured = (local.passes(start, data, 0) for local in low)
    assert_alike([captured], [plain])
    assert all(not v.is_floating_point() or v.dtype == torch.float32 for v in plain.state.values())
    assert all(value.dtype == torch.float32 for value in plain.momentum.values())
    assert differ(plain.state, exact.state)
    assert plain.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)


def test_the_spec_names_both_and_leaves_their_defaults_out():
    plain, captured = tiny.spec(), tiny.spec('training.steps="captured"')
    low = tiny.spec('training.precision="bfloat16"')
    assert plain.training_hash() == tiny.spec('training.steps="plain"').training_hash()
    assert len({one.training_hash() for one in (plain, captured, low)}) == 3
    assert plain.training.schedule() == captured.training.schedule() == low.training.schedule()
    for asked in (plain, captured, low):
        local = local_training(asked, TinyNet(), "cpu", Protection())
        assert (local.steps, local.precision) == (asked.training.steps, asked.training.precision)
    private = ('privacy.kind="example"', "privacy.max_norm=1.0", "privacy.noise_multiplier=1.0")
    with pytest.raises(SpecError, match=r'needs training\.steps = "plain"'):
        tiny.spec('training.steps="captured"', *private)


def test_requests_that_cannot_be_met_are_refused():
    with pytest.raises(SpecError, match="steps = 'faster' is not allowed: choose one of captured"):
        make("faster")
    with pytest.raises(SpecError, match="precision = 'float16' is not allowed"):
        make("plain", precision="float16")
    private = ExampleLevel(1.0, 1.0, b"key")
    with pytest.raises(SpecError, match=r'needs training\.steps = "plain"'):
        make("captured", nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), privacy=private)


def test_a_step_may_take_another_perturbation(recorder):
    """What an algorithm's own step gives the bench need not be the batch that it was given."""

    def turns(bench, batch):
        bench.gradients(replace(batch, augmentation=None))
        return plain_step(bench, batch)

    data, start = client_data(0), state_of(TinyNet())
    both = [make(s) for s in ("plain", "captured")]
    plain, captured = (local.passes(start, data, 0, step=turns) for local in both)
    assert_alike([captured], [plain])
    assert len(recordings(both[1])) == 2


def test_labels_stay_with_their_images(recorder):
    """Recorded buffers are filled for every batch: a stale label would still lower the loss."""
    images = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 1, 8, 8) * 16
    data = ClientData(0, images.contiguous(), torch.arange(16) % 3)
    changes = {"augmentation": None, "local_epochs": 3}
    both = [make(s, **changes).passes(state_of(TinyNet()), data, 0) for s in ("plain", "captured")]
    assert_alike([both[1]], [both[0]])
