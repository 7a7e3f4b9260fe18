"""Example-level privacy: clipping, noise, batches, and what a client may send."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from certifl import rng as streams
from certifl.errors import ModelError, SpecError
from certifl.federated import FedAvg, LocalTraining, Mixture, Personalized, state_of
from certifl.federated.batches import Batch
from certifl.federated.objectives import Augmented, Consistency
from certifl.federated.privacy import Budget, ExampleLevel, check_algorithm
from certifl.federated.privacy import mechanisms as clipping
from certifl.federated.privacy.mechanisms import PrivatePasses, add_noise
from certifl.models import resnet18, small_cnn, small_resnet
from private_federation import (
    BUDGET,
    KEY,
    SCHEDULE,
    PlainNet,
    example_training,
    models,
    plain_training,
)
from tiny_federation import Noise, TinyNet, assert_same, client_data, differ, without_seconds

pytest.importorskip("opacus", reason="needs the extra [dp]")


def batch_of(images: int, augmentation: Noise | None = None) -> Batch:
    data = client_data(0, images)
    return Batch(
        data.images.float() / 255, data.labels, augmentation, streams.generator(3, "noise")
    )


def oracle(model: nn.Module, batch: Batch, images: torch.Tensor, norm: float) -> dict:
    """Image after image: the gradient, its length, the clipped sum."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(images, batch.labels, strict=True):
        model.zero_grad()
        functional.cross_entropy(model(image[None]), label[None]).backward()
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for name, p in model.named_parameters():
            total[name] += p.grad * min(1.0, norm / length)
    model.zero_grad()
    return total


def clipped(model: nn.Module, batch: Batch, norm: float, objective=None) -> dict:
    parameters = dict(model.named_parameters())
    total, _ = clipping.clipped_sum(model, parameters, objective or Augmented(), batch, norm)
    return total


def length_of(total: dict) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in total.values()))


def minus(left: dict, right: dict) -> dict:
    return {name: left[name] - right[name] for name in left}


@pytest.mark.parametrize("norm", [0.05, 0.4, 100.0])
@pytest.mark.parametrize(
    "make", [PlainNet, lambda: small_cnn(1, 3), lambda: small_resnet(1, 3, norm="group")]
)
def test_clipped_sums_are_those_of_a_loop_over_images(norm, make, monkeypatch):
    # In float32 a unit near its kink may switch between the batch and the single image.
    model, batch = make().train().double(), batch_of(11, Noise())
    images = batch.again().draw().double()
    wanted = oracle(model, batch, images, norm)
    for at_once in (1 << 26, 4 * sum(p.numel() for p in model.parameters())):
        monkeypatch.setattr(clipping, "_NUMBERS_AT_ONCE", at_once)
        # In parts, the same noise is drawn in another order of calls: take it from the whole.
        whole = Batch(images, batch.labels, None, batch.noise)
        found = clipped(model, whole, norm)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_the_noise_on_images_is_drawn_once_for_all_of_them():
    model, batch = PlainNet().train(), batch_of(9, Noise())
    images = batch.again().draw()
    found = clipped(model, batch, 0.3)
    for name, value in oracle(model, batch, images, 0.3).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_objectives_with_several_copies_are_clipped_per_image_too():
    model, objective, batch = PlainNet().train(), Consistency(copies=2), batch_of(6, Noise())
    found = clipped(model, batch.again(), 1e-3, objective)
    assert 0 < length_of(found) <= 6e-3
    one = [clipped(model, batch.part(j, j + 1), 1e-3, objective) for j in range(6)]
    for name, value in found.items():
        torch.testing.assert_close(value, sum(each[name] for each in one))


def test_both_ways_to_an_image_s_gradient_agree(monkeypatch):
    model, batch = PlainNet().train(), batch_of(7)
    together = clipped(model, batch, 0.2)
    monkeypatch.setattr(clipping, "Augmented", Consistency)  # nothing is an Augmented any more
    apart = clipped(model, batch, 0.2)
    for name, value in together.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-4, atol=1e-6)


def test_one_image_more_changes_a_sum_by_no_more_than_the_norm():
    model = PlainNet().train()
    for scale in (1.0, 1e3, 1e8):
        batch = batch_of(8)
        batch.images[-1] *= scale
        change = minus(clipped(model, batch, 0.3), clipped(model, batch.part(0, 7), 0.3))
        assert 0 < length_of(change) <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_an_image_without_a_finite_gradient_counts_as_none(poison):
    model, batch = PlainNet().train(), batch_of(8)
    clean = clipped(model, batch.part(0, 7), 0.3)
    batch.images[-1] = poison
    poisoned = clipped(model, batch, 0.3)
    assert all(bool(value.isfinite().all()) for value in poisoned.values())
    assert length_of(minus(poisoned, clean)) <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_no_image_makes_a_training_fail_by_its_loss(together):
    """Whether a client fails is seen by others, and no noise is added to it."""
    model, batch = PlainNet().train(), batch_of(8)
    batch.images[-1] = math.nan
    objective = Augmented() if together else Consistency(copies=2)
    parameters = dict(model.named_parameters())
    _, outcome = clipping.clipped_sum(model, parameters, objective, batch, 0.3)
    assert bool(outcome.loss.isfinite())


def test_no_image_gives_noise_alone():
    model = PlainNet().train()
    passes = PrivatePasses(images=20, steps=4, max_norm=0.5, std=2.0, key=KEY)
    next(passes.positions(torch.device("cpu")))
    empty = batch_of(0)
    gradient, outcome = passes.noisy_gradient(
        lambda norm: clipping.clipped_sum(
            model, dict(model.named_parameters()), Augmented(), empty, norm
        )
    )
    assert float(outcome.loss) == 0
    assert all(float(value.abs().min()) > 0 for value in gradient.values())


def test_noise_has_the_scale_that_is_accounted_for():
    # 200 000 normal draws: their mean square is 1 within 4.4 standard errors of sqrt(2 / n).
    n, std = 200_000, 0.7
    noise = add_noise({"a": torch.zeros(n)}, std, KEY, 1)["a"].double() / std
    assert abs(float(noise.square().mean()) - 1) < 4.4 * math.sqrt(2 / n)
    assert abs(float(noise.mean())) < 4.4 / math.sqrt(n)
    fourth = float(noise.pow(4).mean())
    assert abs(fourth - 3) < 4.4 * math.sqrt(96 / n)


def test_a_step_adds_noise_of_multiplier_times_norm_over_the_expected_batch():
    data, start = client_data(0, 20), state_of(PlainNet())
    # Batches of at most 5 in 20 images: every image with probability 1/4, 5 expected.
    for client, z in ((0, 1.2), (1, 3.0)):
        level = ExampleLevel(0.5, (1.2, 3.0), KEY)
        owned = replace(data, client=client)
        passes = level.passes(owned, round=0, names="", start=start, batch_size=5)
        next(passes.positions(torch.device("cpu")))
        gradient, norm = passes.noisy_gradient(lambda norm: ({"a": torch.zeros(100_000)}, norm))
        assert norm == 0.5
        assert float(gradient["a"].std()) == pytest.approx(z * 0.5 / 5, rel=0.012)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(poison):
    gradients = {"a": torch.ones(3, 4), "b": torch.ones(3, 2, 2)}
    gradients["b"][1, 0, 1] = poison
    clean = {name: value[[0, 2]] for name, value in gradients.items()}
    assert_same(clipping._clipped(gradients, 1.0), clipping._clipped(clean, 1.0))


def test_noise_repeats_with_its_sum_and_with_nothing_else():
    sums = {"a": torch.arange(5.0), "b": torch.ones(2, 3)}
    base = add_noise(sums, 1.0, KEY, 3, "x")
    assert_same(add_noise(dict(reversed(sums.items())), 1.0, KEY, 3, "x"), base)
    near = {**sums, "a": sums["a"] + torch.tensor([0, 0, 0, 0, 5e-7])}
    for other in (
        add_noise(sums, 1.0, KEY + b"!", 3, "x"),
        add_noise(sums, 1.0, KEY, 4, "x"),
        add_noise(near, 1.0, KEY, 3, "x"),
    ):
        noise = [made["b"] - sums["b"] for made in (base, other)]
        assert float((noise[0] - noise[1]).abs().min()) > 1e-6


def test_batches_are_poisson_samples():
    passes = PrivatePasses(images=50, steps=10, max_norm=1.0, std=1.0, key=KEY)
    drawn = np.zeros((4000, 50))
    row = 0
    for _ in range(400):
        for chosen in passes.positions(torch.device("cpu")):
            drawn[row, chosen.numpy()] = 1
            row += 1
    assert row == 4000
    sizes = drawn.sum(1)
    # Binomial(50, 0.1): mean 5, variance 4.5; each within 4.4 standard errors.
    assert abs(sizes.mean() - 5) < 4.4 * math.sqrt(4.5 / 4000)
    assert abs(sizes.var() - 4.5) < 4.4 * 4.5 * math.sqrt(2 / 4000)
    assert sizes.min() == 0
    shares = drawn.mean(0)
    assert np.abs(shares - 0.1).max() < 4.8 * math.sqrt(0.09 / 4000)
    correlation = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(correlation) < 4.4 / math.sqrt(drawn.size)


def test_without_noise_and_clipping_it_is_federated_averaging(tmp_path):
    # One batch of all images: sampling at rate 1 draws what an epoch shuffles.
    free = Budget(max_norm=1e6, delta=1e-3, noise_multiplier=0.0)
    private = example_training(FedAvg(), tmp_path / "a", budget=free, schedule={"batch_size": 64})
    plain = plain_training(tmp_path / "b", batch_size=64)
    found, wanted = (models(FedAvg(), one)["server"] for one in (private, plain))
    assert differ(wanted, state_of(PlainNet()))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert "epsilon" not in private.history[-1]


@pytest.mark.parametrize("algorithm", [Mixture(0.4), Personalized(FedAvg())])
def test_training_is_the_same_after_an_interruption(algorithm, tmp_path):
    whole = example_training(algorithm, tmp_path / "whole")

    def stop(now):
        if now.round == 1 and now.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example_training(algorithm, tmp_path / "cut", progress=stop)
    cut = example_training(algorithm, tmp_path / "cut")
    assert_same(models(algorithm, cut), models(algorithm, whole))
    assert without_seconds(cut.history) == without_seconds(whole.history)


def test_another_key_is_another_training(tmp_path):
    one = example_training(FedAvg(), tmp_path / "a")
    other = example_training(FedAvg(), tmp_path / "b", key=b"another")
    assert differ(models(FedAvg(), one)["server"], models(FedAvg(), other)["server"])


def test_the_key_is_shown_nowhere(tmp_path):
    stored = example_training(FedAvg(), tmp_path)
    level = ExampleLevel(1.0, 1.0, KEY)
    for text in (repr(level), str(stored.identity), str(stored.history)):
        assert KEY.decode() not in text
        assert KEY.hex() not in text


def test_a_trainer_goes_to_another_process_and_trains_the_same():
    level = ExampleLevel(0.5, 1.0, KEY)
    training = LocalTraining(PlainNet(), SCHEDULE, seed=1, privacy=level)
    sent = pickle.loads(pickle.dumps(training))
    start, data = state_of(PlainNet()), client_data(0)
    assert_same(
        training.train_epochs(start, data, 0).state, sent.train_epochs(start, data, 0).state
    )


def test_nothing_is_told_of_loss_and_accuracy():
    training = LocalTraining(PlainNet(), SCHEDULE, seed=1, privacy=ExampleLevel(0.5, 1.0, KEY))
    told = training.train_epochs(state_of(PlainNet()), client_data(0), 0).metrics
    assert told == {"private_steps": 2 * math.ceil(20 / 8)}


@pytest.mark.parametrize("model", [TinyNet(), small_resnet(1, 3)])
def test_batchnorm_is_refused(model):
    with pytest.raises(ModelError, match=r"BatchNorm .*small_cnn.*norm = \"group\""):
        LocalTraining(model, SCHEDULE, seed=1, privacy=ExampleLevel(1.0, 1.0, KEY))


def test_a_state_beside_the_parameters_is_refused():
    model = PlainNet()
    model.register_buffer("seen", torch.zeros(3))
    with pytest.raises(ModelError, match="also holds seen"):
        LocalTraining(model, SCHEDULE, seed=1, privacy=ExampleLevel(1.0, 1.0, KEY))


def test_residual_networks_come_without_batchnorm():
    for make in (small_resnet, resnet18):
        model = make(1, 3, norm="group")
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    with pytest.raises(ModelError, match="norm = 'layer' is unknown"):
        small_resnet(1, 3, norm="layer")


def test_a_second_gradient_of_a_batch_is_refused():
    training = LocalTraining(PlainNet(), SCHEDULE, seed=1, privacy=ExampleLevel(1.0, 1.0, KEY))

    def twice(context, batch):
        context.compute_gradients(batch)
        return context.compute_gradients(batch.again())

    with pytest.raises(SpecError, match="one gradient per batch"):
        training.train_epochs(state_of(PlainNet()), client_data(0), 0, step=twice)
    with pytest.raises(SpecError, match="one gradient per batch"):
        training.second_model(state_of(PlainNet()), weight_decay=0.0)


def test_an_algorithm_that_nobody_looked_at_is_refused():
    with pytest.raises(SpecError, match=r"'unheard-of': nobody has shown .* Choose one of local"):
        check_algorithm({"name": "unheard-of"}, "example")


def test_delta_must_promise_something(tmp_path):
    with pytest.raises(SpecError, match="guarantees nothing to 14 images"):
        example_training(FedAvg(), tmp_path, budget=Budget(1.0, 0.08, noise_multiplier=1.0))
    assert BUDGET.delta < 1 / 20
