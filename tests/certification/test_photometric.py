"""Brightness, contrast and blur against classifiers whose true radii are known in closed form."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import fft
from scipy.stats import binom

import certifl
from certifl.certification.attack import AttackBudget, deformed_first, region_of, search
from certifl.certification.network import prepare
from certifl.certification.sampling import VoteCounter, sweep_along, sweeps_of
from certifl.errors import InputError
from certifl.federated.objectives.macer import soft_margins
from certifl.perturbations import format_amount
from certifl.perturbations.units import factor_texts
from certifl.smoothing import EXPONENTIAL, clopper_pearson_lower
from known_models import HalfSpace
from pictures import IMAGE, pictures, rng

SIDE, FREQUENCY = 8, 2
TRUTHS = np.array([0.1, 0.25, 0.6])  # in units of sigma; of a blur, beyond ln 2


def _cosine() -> torch.Tensor:
    centers = torch.arange(SIDE, dtype=torch.float64) + 0.5
    return (math.pi * FREQUENCY / SIDE * centers).cos().expand(SIDE, SIDE)


def _brightness(sigma: float) -> tuple[HalfSpace, torch.Tensor]:
    """w.(x + b) crosses 0 at b = truth."""
    weight = torch.full((SIDE, SIDE), 1.0 / SIDE**2)
    levels = 0.7 - sigma * torch.as_tensor(TRUTHS)
    return HalfSpace(weight, -0.7), levels[:, None, None, None].expand(-1, 1, SIDE, SIDE)


def _contrast(sigma: float) -> tuple[HalfSpace, torch.Tensor]:
    """The amplitude e^k a crosses 0.3 at k = truth."""
    wave = _cosine()
    weight = (wave / wave.square().sum()).float()
    bias = -0.3 - 0.5 * float(weight.sum())
    size = 0.3 * torch.exp(-sigma * torch.as_tensor(TRUTHS))
    return HalfSpace(weight, bias), 0.5 + size[:, None, None, None] * wave


def _blur(sigma: float) -> tuple[HalfSpace, torch.Tensor]:
    """The amplitude a exp(-v w^2 / 2) crosses 0.1 at v = truth + sigma ln 2."""
    wave = _cosine()
    weight = (wave / wave.square().sum()).float()
    v = sigma * (torch.as_tensor(TRUTHS) + math.log(2))
    size = 0.1 * torch.exp(v * (math.pi * FREQUENCY / SIDE) ** 2 / 2)
    bias = -0.1 - 0.5 * float(weight.sum())
    return HalfSpace(weight, bias), 0.5 + size[:, None, None, None] * wave


CASES = {
    "brightness": (certifl.Brightness(0.4), _brightness),
    "contrast": (certifl.Contrast(0.4), _contrast),
    "blur": (certifl.GaussianBlur(1.5), _blur),
}


def _case(name: str):
    perturbation, made = CASES[name]
    model, images = made(perturbation.sigma)
    return perturbation, model.eval(), images.float().contiguous(), perturbation.sigma * TRUTHS


@pytest.mark.parametrize("estimator", ["top-class", "runner-up", "sequential"])
@pytest.mark.parametrize("name", CASES)
def test_linear_classifiers_are_certified_up_to_their_true_radii(name, estimator):
    perturbation, model, images, truth = _case(name)
    certs = certifl.certify(
        model, images, perturbation, n=20_000, estimator=estimator, precision="float32"
    )
    assert np.all(certs.radius <= truth)
    # 4 standard errors of p and the bound's own width, in units of sigma; the last stops early
    lost = 0.13 if estimator == "sequential" else 0.06
    assert np.all(certs.radius >= truth - lost * perturbation.sigma)


@pytest.mark.parametrize("name", CASES)
def test_the_attack_finds_nothing_inside_and_the_change_just_outside(name):
    perturbation, model, images, truth = _case(name)
    counter = VoteCounter(prepare(model, images, precision="float32"), perturbation, 0)
    classes = counter.network.call(images).argmax(1).numpy()
    if name == "blur":  # the other class at v = 0 is the smoothed one as well
        assert (classes == 1).all()
    budget = AttackBudget(directions=8, screen=400, confirm=20_000)
    inside = search(counter, images, classes, 0.9 * truth, budget=budget)
    outside = search(counter, images, classes, truth + 0.1 * perturbation.sigma, budget=budget)
    assert not inside.violated.any()
    assert outside.violated.all()
    assert (outside.delta >= 0).all() or name != "blur"


def test_a_blur_is_one_sided_in_set_sweep_and_words():
    blur = certifl.GaussianBlur(2.0)
    region = region_of(blur, IMAGE, np.array([3.0, 0.0]))
    assert region.low.tolist() == [0.0, 0.0]
    drawn = region.random(50, [rng(0), rng(1)])
    assert drawn.min() >= 0
    assert drawn.max() <= 3.0
    (sweep,) = sweeps_of(blur)
    counter = SimpleNamespace(
        perturbation=blur, seed=0, count=lambda images, requests, slots, center: center.numpy()
    )
    seen = sweep_along(counter, sweep, pictures(*IMAGE), pictures(*IMAGE), 11, 100)
    assert seen.values[0] == 0
    assert (seen.counts >= 0).all()
    assert format_amount(1.9999, blur.unit) == "added variance 0 to 1.999 px^2"
    with pytest.raises(InputError, match="one-sided"):
        blur.apply(pictures(2, *IMAGE), torch.tensor([0.1, -1e-6]))


@pytest.mark.parametrize("name", CASES)
def test_the_scan_is_refused_with_its_reason(name):
    perturbation, model, images, _ = _case(name)
    with pytest.raises(InputError, match=f"one uniform parameter.*{perturbation.family} is none"):
        certifl.certify(model, images, perturbation, estimator="scan", n=1000)


@pytest.mark.parametrize("name", CASES)
def test_changes_in_a_row_are_the_change_of_the_sum(name):
    perturbation, images = CASES[name][0], pictures(4, *IMAGE).double()
    a, b = (perturbation.sample(4, IMAGE, rng(seed)).double() for seed in (1, 2))
    twice = perturbation.apply(perturbation.apply(images, a), b)
    torch.testing.assert_close(twice, perturbation.apply(images, a + b), atol=1e-12, rtol=0)


def test_a_blur_is_the_heat_kernel_of_the_cosine_transform():
    images, v = pictures(2, 1, 6, 9).double(), 1.7
    squared = np.add.outer(*((np.pi * np.arange(n) / n) ** 2 for n in (6, 9)))
    kernel = np.exp(-0.5 * v * squared)
    expected = fft.idctn(fft.dctn(images.numpy(), axes=(2, 3)) * kernel, axes=(2, 3))
    found = certifl.GaussianBlur(1.0).apply(images, torch.full((1,), v, dtype=torch.float64))
    assert np.abs(found.numpy() - expected).max() < 1e-12
    # away from the border a single pixel becomes a Gaussian of that variance
    spot = torch.zeros(1, 1, 41, 41)
    spot[..., 20, 20] = 1.0
    row = certifl.GaussianBlur(1.0).apply(spot, torch.tensor([4.0]))[0, 0].sum(0).double()
    assert float(row @ (torch.arange(41) - 20.0).double().square()) == pytest.approx(4.0, rel=1e-4)


def test_printed_factors_lie_inside():
    assert format_amount(0.5, "log factor") == "0.500 log factor (factor 0.607 to 1.648)"
    for radius in np.random.default_rng(0).uniform(0, 3, 200):
        low, high = map(float, factor_texts(radius))
        assert math.exp(-radius) <= low <= 1 <= high <= math.exp(radius)


def test_sigmas_that_overflow_are_refused():
    with pytest.raises(InputError, match="logarithm of a factor"):
        certifl.Contrast(11)
    with pytest.warns(UserWarning, match="square of a standard deviation"):
        certifl.GaussianBlur(400)


def test_a_received_image_is_sent_in_8_bits():
    seen = []
    counter = SimpleNamespace(
        perturbation=certifl.Brightness(0.3),
        count_each=lambda images, *_: seen.append(images) or np.zeros((len(images), 2), int),
    )
    deformed_first(counter, pictures(1, *IMAGE), torch.tensor([[[0.0], [0.3001]]]), 100)
    levels = seen[0] * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert 0 <= seen[0].min() <= seen[0].max() <= 1
    assert (seen[0][1] > pictures(1, *IMAGE)[0]).any()


def test_macer_takes_the_radius_of_the_law():
    smoothing = SimpleNamespace(law=EXPONENTIAL, sigma=1.5)
    miss, second = torch.tensor([0.1, 0.02]), torch.tensor([0.08, 0.02])
    expected = EXPONENTIAL.radius(1.5, 1 - miss.numpy(), second.numpy())
    margins = soft_margins(miss, second, smoothing)
    np.testing.assert_allclose(0.5 * 1.5 * margins.numpy(), expected, rtol=1e-5)


RUNS, VOTES, ALPHA, MEAN = 40_000, 20, 0.05, 2.0
# Just below the bound of unanimous votes, where the error rate is the level itself.
P_TOP = ALPHA ** (1 / VOTES) * (1 - 1e-6)
EDGE = -MEAN * math.log(1 - P_TOP)
"""The worst case of the bound: the class changes at this variance, for all of [0, EDGE]."""
TRUE = EDGE - MEAN * math.log(2)


def _rejected(radius: np.ndarray) -> bool:
    """As in test_validity_synthetic: over-claims that a level of ALPHA would not give."""
    return bool(binom.sf(int((radius > TRUE * (1 + 1e-12)).sum()) - 1, RUNS, ALPHA) < 1e-3)


def _lower(sigma: float) -> np.ndarray:
    """p_lower of every run, from noise that the family draws itself."""
    drawn = certifl.GaussianBlur(sigma).sample(RUNS * VOTES, (1, 8, 8), rng(5)).double()
    votes = (drawn < EDGE).reshape(RUNS, VOTES).sum(1).numpy()
    bounds = clopper_pearson_lower(np.arange(VOTES + 1), VOTES, ALPHA)
    return bounds[votes]


@pytest.mark.statistical
def test_exponential_certificates_hold_at_their_level_and_planted_mistakes_do_not():
    low = _lower(MEAN)
    assert not _rejected(EXPONENTIAL.radius(MEAN, low, 1 - low))
    gap = np.clip(2 * low - 1, 0, None)
    mistakes = {
        "the other class left out": -MEAN * np.log1p(-low),
        "linear in the odds": MEAN * gap / (1 - gap),
    }
    for name, radius in mistakes.items():
        assert _rejected(radius), name
    narrow = _lower(0.9 * MEAN)  # drawn with another mean than the radius uses
    assert _rejected(EXPONENTIAL.radius(MEAN, narrow, 1 - narrow))
