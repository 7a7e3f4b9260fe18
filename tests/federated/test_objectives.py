"""Training objectives: formulas on linear models, limits, and what they do to networks."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

import certifl
from algorithm_cases import CASES
from certifl import rng as streams
from certifl.data import load
from certifl.federated import ClientData, ClientState, LocalTraining, state_of
from certifl.federated.batches import Batch
from certifl.federated.objectives import Augmented, Consistency, Macer, SmoothAdv, Stability
from certifl.federated.objectives.smoothadv import drawn_params
from certifl.perturbations import PERTURBATIONS, Affine, PixelNoise, Rotation
from certifl.smoothing.laws import UNIFORM, Law
from tiny_federation import SCHEDULE, Noise, TinyNet, assert_same, client_data, differ

PIXEL, ROTATION = PixelNoise(0.3), Rotation(0.4)
ROBUST = (Consistency(), SmoothAdv(), Macer(copies=3, weight=1.0), Stability())

every_robust = pytest.mark.parametrize("objective", ROBUST, ids=lambda objective: objective.name)
either_law = pytest.mark.parametrize("perturbation", [PIXEL, ROTATION], ids=["pixel", "rotation"])


class Linear(nn.Module):
    """Logits W x, in the type of W."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).to(self.weight.dtype) @ self.weight.T


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=streams.generator(seed, "values"), dtype=torch.float64)


WEIGHT = 0.3 * drawn(3, 42)
IMAGES = torch.sigmoid(drawn(5, 1, 6, 7, seed=2))
LABELS = torch.tensor([0, 1, 2, 1, 0])


def batch(
    perturbation: Any, images: torch.Tensor = IMAGES, labels: torch.Tensor = LABELS
) -> Batch:
    """The same batch at every call: its generator starts afresh."""
    return Batch(images, labels, perturbation, streams.generator(3, "noise"))


def logits_of(perturbation: Any, copies: int) -> np.ndarray:
    """Logits (copies, m, classes) of the linear model, one copy after the other."""
    same = batch(perturbation)
    return np.stack([(same.draw().flatten(1).double() @ WEIGHT.T).numpy() for _ in range(copies)])


def cross_entropy(logits: np.ndarray) -> np.ndarray:
    return -special.log_softmax(logits, -1)[..., np.arange(len(LABELS)), LABELS]


@either_law
def test_consistency_is_its_formula(perturbation):
    logits = logits_of(perturbation, 3)
    each = special.softmax(logits, -1)
    mean = each.mean(0)
    divergence = np.mean([stats.entropy(mean, one, axis=1) for one in each], 0)
    wanted = cross_entropy(logits).mean(0) + 7 * divergence + 0.3 * stats.entropy(mean, axis=1)
    loss, judged = Consistency(3, 7.0, 0.3)(Linear(WEIGHT), batch(perturbation))
    assert loss.item() == pytest.approx(wanted.mean(), rel=1e-6)
    np.testing.assert_allclose(judged, logits[0], rtol=1e-6)


@either_law
def test_macer_is_its_formula(perturbation):
    logits, objective = logits_of(perturbation, 4), Macer(4, weight=5.0, gamma=1.5, beta=2.0)
    soft = special.softmax(logits, -1).mean(0)
    votes = special.softmax(2.0 * logits, -1).mean(0)
    total, pulled = 0.0, 0
    for label, plain, vote in zip(LABELS.tolist(), soft, votes, strict=True):
        total -= np.log(plain[label])
        second = max(value for c, value in enumerate(vote) if c != label)
        if perturbation is PIXEL:
            margin = stats.norm.ppf(vote[label]) - stats.norm.ppf(second)
        else:
            margin = 2 * (vote[label] - second)
        if vote[label] > second and margin < 1.5:
            pulled += 1
            total += 5.0 * perturbation.sigma / 2 * (1.5 - margin)
    loss, _ = objective(Linear(WEIGHT), batch(perturbation))
    assert 0 < pulled < len(LABELS)
    assert loss.item() == pytest.approx(total / len(LABELS), rel=1e-6)


def test_stability_is_its_formula():
    clean, noisy = (IMAGES.flatten(1) @ WEIGHT.T).numpy(), logits_of(PIXEL, 1)[0]
    distance = -(special.softmax(clean, -1) * special.log_softmax(noisy, -1)).sum(-1)
    wanted = (cross_entropy(clean) + 3.0 * distance).mean()
    loss, judged = Stability(3.0)(Linear(WEIGHT), batch(PIXEL))
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(judged, clean, rtol=1e-6)


@dataclass(frozen=True)
class Shift:
    sigma: float
    law: Law = UNIFORM
    norm: str = "l1"

    def sample(self, n, image_shape, generator):
        return self.sigma * (2 * torch.rand(n, 1, generator=generator) - 1)

    def apply(self, images, params):
        return images + params[:, :, None, None]


class Minus(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images - self.value


@pytest.mark.parametrize(
    "perturbation", [PixelNoise(0.5), Shift(0.5)], ids=["gaussian", "uniform"]
)
@pytest.mark.parametrize("distance", [0.1, 0.25, 0.4])
def test_macers_radius_is_the_distance_to_a_threshold(perturbation, distance):
    """At a threshold t both laws' radii are exact: x - t, from soft votes as sharp as votes.

    Mean over 20 images of 2 000 votes each: its standard error is below 0.005.
    """
    model = nn.Sequential(Minus(0.3), Linear(torch.tensor([[-1.0], [1.0]])))
    images = torch.full((20, 1, 1, 1), 0.3 + distance)
    labels = torch.ones(20, dtype=torch.long)
    with_hinge, without = (
        Macer(2000, weight, gamma=6.0, beta=1e4)(model, batch(perturbation, images, labels))[0]
        for weight in (1.0, 0.0)
    )
    hinge = (with_hinge - without).item()  # sigma/2 (gamma - xi) = sigma/2 gamma - radius
    assert 0.5 * 0.5 * 6.0 - hinge == pytest.approx(distance, abs=0.02)


@pytest.mark.parametrize(
    ("objective", "perturbation"),
    [
        (one, p)
        for one in ROBUST
        for p in (PIXEL, ROTATION)
        if (one.name, p) != ("smoothadv", PIXEL)
    ]
    + [(Macer(2, gamma=30.0, beta=4.0), PIXEL)],
    ids=str,
)
def test_gradients_agree_with_finite_differences(objective, perturbation):
    """SmoothAdv on one parameter: its attack ends at an end of the interval, which stays put."""
    start = WEIGHT.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda weight: objective(Linear(weight), batch(perturbation))[0],
        start,
        rtol=1e-3,
        fast_mode=True,  # along random directions
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e8])
@every_robust
def test_gradients_stay_finite_for_timid_and_for_certain_networks(objective, scale):
    weight = (WEIGHT * scale).float().requires_grad_()
    loss, _ = objective(Linear(weight), batch(PIXEL))
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("exact", [False, True])
def test_the_attack_on_a_linear_model_goes_straight_to_the_boundary(exact):
    """For pixel noise it is the l2 attack of the image: -epsilon w / ||w||, for any noise."""
    labels, sigma = LABELS % 2, 0.3
    normal = WEIGHT[1] - WEIGHT[0]
    noise = PixelNoise(sigma, exact=exact)
    same = batch(noise, labels=labels)
    draws = drawn_params(same, 3)
    found = SmoothAdv(3, epsilon=0.7, steps=1).attack(Linear(WEIGHT[:2]), same, draws)
    sign = (1 - 2 * labels.double())[:, None]
    wanted = 0.7 * sigma * sign * normal / normal.norm()
    np.testing.assert_allclose(found.flatten(1), wanted, rtol=1e-4, atol=1e-6)


def network(perturbation: Any) -> tuple[nn.Module, ClientData]:
    """TinyNet after a few passes, and the images it saw."""
    data = client_data(0, images=60)
    local = LocalTraining(TinyNet(), SCHEDULE, seed=5, augmentation=perturbation)
    state = state_of(TinyNet())
    for round in range(4):
        state = local.train_epochs(state, data, round).state
    model = TinyNet()
    model.load_state_dict(state)
    return model, data


@pytest.mark.parametrize(
    "perturbation", [PixelNoise(0.1), Rotation(0.4), Affine(0.1)], ids=lambda p: p.family
)
def test_the_attacked_point_raises_the_loss_and_stays_in_the_ball(perturbation):
    model, data = network(perturbation)
    same = batch(perturbation, data.images.float() / 255, data.labels)
    draws = drawn_params(same, 4)
    objective = SmoothAdv(4, epsilon=1.0, steps=3)
    delta = objective.attack(model, same, draws)
    assert delta.shape == draws[0].shape
    assert delta.flatten(1).norm(dim=1).max() <= perturbation.sigma * (1 + 1e-6)
    model.eval()

    def losses(moved: torch.Tensor) -> torch.Tensor:
        logits = [model(same.applied(draw + moved)) for draw in draws]
        votes = torch.stack([one.softmax(1) for one in logits]).mean(0)
        return -votes.gather(1, data.labels[:, None]).log().squeeze(1)

    with torch.no_grad():
        before, after = losses(torch.zeros_like(delta)), losses(delta)
        chance = perturbation.sample(60, (1, 8, 8), streams.generator(0, "direction"))
        lengths = chance.flatten(1).norm(dim=1, keepdim=True)
        elsewhere = losses(
            perturbation.sigma * chance / lengths.view(60, *[1] * (chance.ndim - 1))
        )
    assert (after > before).float().mean() > 0.7
    assert (after - before).mean() > 2 * (elsewhere - before).mean()


def test_the_attack_leaves_the_model_and_the_global_generator_alone():
    model = TinyNet().train()
    model.norm.eval()  # a module may be frozen on purpose
    same = batch(PIXEL, client_data(0).images.float() / 255, client_data(0).labels)
    before, random = state_of(model), torch.get_rng_state()
    SmoothAdv().attack(model, same, drawn_params(same, 2))
    assert_same(state_of(model), before)
    assert model.training
    assert model.dropout.training
    assert not model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def passed(objective: Any, augmentation: Any, seed: int = 5) -> Any:
    data = client_data(0, images=30)
    local = LocalTraining(
        TinyNet(), SCHEDULE, seed=seed, augmentation=augmentation, objective=objective
    )
    return local.train_epochs(state_of(TinyNet()), data, 0)


@pytest.mark.parametrize(
    ("objective", "augmentation", "plain"),
    [
        (Consistency(1, weight=10.0, entropy=0.0), PIXEL, PIXEL),
        (SmoothAdv(1, epsilon=0.0), PIXEL, PIXEL),
        (SmoothAdv(1, epsilon=0.0), Noise(), Noise()),
        (Macer(1, weight=0.0), ROTATION, ROTATION),
        (Stability(0.0), PIXEL, None),
        *((one, None, None) for one in ROBUST),
    ],
    ids=str,
)
def test_limits_are_augmentation_bit_for_bit(objective, augmentation, plain):
    trained, wanted = passed(objective, augmentation), passed(Augmented(), plain)
    assert_same(trained.state, wanted.state)
    assert trained.metrics == wanted.metrics


@every_robust
def test_batch_normalization_sees_one_batch_a_step_and_draws_repeat(objective):
    trained = passed(objective, PIXEL)
    assert_same(passed(objective, PIXEL).state, trained.state)
    augmented = passed(Augmented(), PIXEL)
    assert differ(augmented.state, trained.state)
    steps = "norm.num_batches_tracked"
    assert torch.equal(trained.state[steps], augmented.state[steps])
    assert differ(passed(objective, PIXEL, seed=6).state, trained.state)


STEPS = ("fedavg", "mixture", "flix", "apfl", "perfedavg hessian-free")


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_trains_with_an_objective(name):
    trains_with(CASES[name], ROBUST[[*CASES].index(name) % len(ROBUST)])


@pytest.mark.parametrize("name", STEPS)
@every_robust
def test_every_kind_of_step_trains_with_every_objective(name, objective):
    trains_with(CASES[name], objective)


def trains_with(algorithm, objective):
    data, start = client_data(0, images=14), state_of(TinyNet())
    schedule = replace(SCHEDULE, local_epochs=1)

    def sent(objective: Any) -> Any:
        local = LocalTraining(TinyNet(), schedule, seed=1, augmentation=PIXEL, objective=objective)
        return algorithm.client_round(algorithm.init(start), ClientState(), data, local)

    (update, state), (plain, _) = sent(objective), sent(Augmented())
    assert update.metrics["loss"] != plain.metrics["loss"]
    again = sent(objective)
    assert_same(state.parts, again[1].parts)
    assert update.metrics == again[0].metrics


def test_fine_tuning_minimizes_the_objective_too():
    data, start = client_data(0), state_of(TinyNet())
    results = [
        LocalTraining(
            TinyNet(), SCHEDULE, seed=1, finetuning_augmentation=PIXEL, objective=objective
        ).finetune(start, data, 3, epochs=1, lr=0.1)
        for objective in (Augmented(), Consistency())
    ]
    assert differ(results[0].state, results[1].state)


def digits(objective: Any, perturbation: Any) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network after twelve passes over 400 digits, and 100 of these."""
    split = load("digits").train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(0.1 * drawn(*parameter.shape, seed=seed))
    schedule = replace(SCHEDULE, local_epochs=12, lr=0.01, batch_size=32, decay_every=None)
    local = LocalTraining(model, schedule, seed=2, augmentation=perturbation, objective=objective)
    data = ClientData(0, split.images[:400], split.labels[:400])
    model.load_state_dict(local.train_epochs(state_of(model), data, 0).state)
    return model.eval(), split.images[:100].float() / 255, split.labels[:100]


def test_consistency_makes_predictions_vary_less_under_noise():
    perturbation = PixelNoise(0.5)

    def spread(weight: float) -> float:
        model, images, labels = digits(Consistency(2, weight, entropy=0.0), perturbation)
        noisy = batch(perturbation, images, labels)
        with torch.no_grad():
            votes = torch.stack([model(noisy.draw()).softmax(1) for _ in range(20)])
        return votes.var(0).sum(1).mean().item()

    assert spread(20.0) < 0.7 * spread(0.0)


def test_macers_hinge_raises_the_certified_radius():
    perturbation = Rotation(0.6)

    def radius(weight: float) -> float:
        model, images, labels = digits(Macer(4, weight), perturbation)
        found = certifl.certify(model, images, perturbation, labels=labels.numpy(), n=500)
        return found.average_certified_radius()

    assert radius(1.0) > 1.05 * radius(0.0)


def cases_of_perturbations() -> list[Any]:
    paddings = ("zeros", "border", "reflection")
    rows = PERTURBATIONS.rows.items()
    moves = [name for name, row in rows if "padding" in row.parameters.model_fields]
    moved = [PERTURBATIONS[name](0.1, padding=padding) for name in moves for padding in paddings]
    return [*(kind(0.1) for name, kind in PERTURBATIONS.items() if name not in moves), *moved]


@pytest.mark.parametrize("perturbation", cases_of_perturbations(), ids=str)
def test_every_family_is_differentiable_in_its_parameters(perturbation):
    images = IMAGES[:2].clone().requires_grad_()
    params = perturbation.sample(2, (1, 6, 7), streams.generator(1, "params")).double()
    given = (images, params.requires_grad_())
    assert torch.autograd.gradcheck(perturbation.apply, given, fast_mode=True)
