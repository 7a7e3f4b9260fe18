"""Attacks: nothing inside true radii, something just outside, and planted false certificates."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import certifl
from certifl.certification.attack import (
    AttackBudget,
    AttackResult,
    deformed_first,
    region_of,
    search,
)
from certifl.certification.counts import sign_test_against, vote_margins
from certifl.certification.network import prepare
from certifl.certification.sampling import VoteCounter, lengths
from certifl.errors import InputError
from certifl.perturbations import PERTURBATIONS
from certifl.perturbations.base import Perturbation
from known_models import HalfSpace, ramps, read_angle, read_shift, votes_for

SIGMA = 0.5
QUICK = AttackBudget(screen=200, confirm=20_000)


def half_space(images: int = 3) -> tuple[HalfSpace, Tensor, np.ndarray]:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(64, generator=g)
    model = HalfSpace(weight, -float(weight.sum() / 2)).eval()
    x = 0.5 + 0.05 * torch.randn((images, 64), generator=g)
    unit = weight / weight.norm()
    wanted = 0.1 * torch.arange(1, images + 1) * torch.tensor([1.0, -1.0]).repeat(images)[:images]
    x = x - (((x - 0.5) @ unit) - wanted)[:, None] * unit
    x = x.reshape(-1, 1, 8, 8)
    with torch.no_grad():
        return model, x, model(x).argmax(1).numpy()


def attacked(
    model: object,
    images: Tensor,
    perturbation: Perturbation,
    predicted: np.ndarray,
    radius: object,
    budget: AttackBudget = QUICK,
    interval: np.ndarray | None = None,
) -> AttackResult:
    counter = VoteCounter(prepare(model, images, precision="float32"), perturbation, 0)
    return search(counter, images, predicted, np.asarray(radius, float), interval, budget)


def test_a_half_space_changes_just_outside_its_true_radius_and_not_inside():
    model, images, classes = half_space()
    images, classes = images[1:], classes[1:]
    true = model.true_radius(images).numpy()
    noise, budget = (
        certifl.PixelNoise(SIGMA),
        dataclasses.replace(QUICK, aim=20_000, confirm=40_000),
    )
    inside = attacked(model, images, noise, classes, true, budget)
    assert not inside.violated.any()
    outside = attacked(model, images, noise, classes, 1.1 * true, budget)
    assert outside.violated.all()
    assert (outside.p_value < 1e-6).all()
    # What was found is the direction of the half-space's edge, at full length.
    unit = model.weight.detach() / model.weight.detach().norm()
    cosine = (outside.delta.flatten(1) @ unit).abs() / outside.delta.flatten(1).norm(dim=1)
    assert (cosine > 0.97).all()
    assert (outside.length <= 1.1 * true).all()
    assert (outside.length > 1.09 * true).all()


def test_random_directions_alone_would_not_find_it():
    """The test above can fail: in 64 dimensions the direction is what finds the change."""
    model, images, classes = half_space()
    counter = VoteCounter(prepare(model, images, precision="float32"), certifl.PixelNoise(0.5), 0)
    region = region_of(counter.perturbation, (1, 8, 8), 1.1 * model.true_radius(images).numpy())
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    deltas = region.towards(region.directions(56, generators))
    with torch.no_grad():
        moved = model((images[:, None] + deltas).flatten(0, 1)).argmax(1).reshape(3, 56)
    assert (moved.numpy() == classes[:, None]).all()


def test_real_certificates_hold_and_inflated_ones_are_found():
    model, images, _ = half_space(3)
    noise = certifl.PixelNoise(SIGMA)
    made = certifl.certify(
        model, images, noise, n0=1000, n=4000, precision="float32", estimator="runner-up"
    )
    assert not made.abstained.any()
    budget = dataclasses.replace(QUICK, confirm=10 * 4000)
    honest = attacked(model, images, noise, made.predicted, made.radius, budget)
    assert not honest.violated.any()
    assert honest.tried == 3 * (32 + 3 * 8)
    assert honest.votes > 0
    planted = made.radius.copy()
    planted[2] *= 1.5
    false = attacked(model, images, noise, made.predicted, planted, budget)
    assert false.violated.tolist() == [False, False, True]
    rival = false.counts[2].argmax()
    assert rival != made.predicted[2]
    assert false.counts[2].sum() == 40_000


def test_an_image_is_attacked_alike_alone_and_among_others():
    model, images, classes = half_space(10)
    noise, radius = certifl.PixelNoise(SIGMA), np.full(10, 0.2)
    budget = dataclasses.replace(QUICK, confirm=4000, steps=1)
    together = attacked(model, images, noise, classes, radius, budget)
    for row in (1, 9):
        alone = attacked(model, images[[row]], noise, classes[[row]], radius[[row]], budget)
        assert torch.equal(alone.delta[0], together.delta[row])
        assert np.array_equal(alone.counts[0], together.counts[row])


@pytest.mark.parametrize(("radius", "found"), [(0.68, False), (0.75, True)])
def test_rotation(radius, found):
    # sigma = 1, f right on |t| <= 0.7: the class changes where (1.7 - delta) / 2 < 1/2.
    model = votes_for(lambda x: read_angle(x).abs() <= 0.7)
    made = attacked(model, ramps(), certifl.Rotation(1.0), np.array([1]), [radius])
    assert made.violated.tolist() == [found]
    assert abs(made.delta[0, 0].abs() - radius) < 1e-5  # the ends are the worst


@pytest.mark.parametrize(
    ("interval", "found"), [((-1.4, 0.35), False), ((-0.3, 0.5), True), ((-1.7, 0.3), True)]
)
def test_a_two_sided_certificate_is_searched_on_both_sides(interval, found):
    # f right on [-1.5, 0.4]: the window of half width 1 holds half of it up to -1.5 and 0.4.
    model = votes_for(lambda x: (read_angle(x) <= 0.4) & (read_angle(x) >= -1.5))
    radius = min(-interval[0], interval[1])
    turned, ends = (ramps(), certifl.Rotation(1.0), np.array([1])), np.array([interval])
    made = attacked(model, *turned, [radius], interval=ends)
    assert made.violated.tolist() == [found]
    if found:
        assert not -1.5 < float(made.delta[0, 0]) < 0.4


@pytest.mark.parametrize(("share", "found"), [(0.97, False), (1.1, True)])
def test_translation(share, found):
    sigma, edge = 0.25, 0.2
    model = votes_for(lambda x: read_shift(x)[:, 0] <= edge)
    made = attacked(model, ramps(), certifl.Translation(sigma), np.array([1]), [share * edge])
    assert made.violated.tolist() == [found]
    across, down = made.delta[0]
    assert across > 5 * abs(down)


def test_a_gap_in_the_middle_of_the_interval_is_found():
    """h is right but for 0.3 to 0.5: with a narrow law g fails there and not at the ends."""
    model = votes_for(lambda x: ~((read_angle(x) > 0.3) & (read_angle(x) < 0.5)))
    made = attacked(model, ramps(), certifl.Rotation(0.05), np.array([1]), [1.0])
    assert made.violated.tolist() == [True]
    assert 0.3 < float(made.delta[0, 0]) < 0.5


def test_a_tie_is_no_violation():
    """At equal probabilities the level of the verdict is all that stands against false alarms."""
    model = votes_for(lambda x: read_angle(x) <= 0.0)
    budget, network = AttackBudget(directions=2, steps=0, confirm=4000), prepare(model, ramps())
    for seed in range(5):
        counter = VoteCounter(network, certifl.Rotation(0.5), seed)
        tie = search(counter, ramps(), np.array([1]), np.array([0.0]), None, budget)
        assert not tie.violated.any()
        assert tie.suspicious == 2


@pytest.mark.statistical
def test_the_verdict_errs_no_more_often_than_it_says():
    """Ten classes alike, the certified one among them: the hardest case for the level.

    40 000 runs at level 0.05; the tolerance is a one-sided binomial test at 1e-3. Without the
    factor for the number of other classes the share would be above 0.15.
    """
    rng = np.random.default_rng(5)
    counts = rng.multinomial(500, np.full(10, 0.1), size=40_000)
    p_values = sign_test_against(counts, np.zeros(40_000, int))
    wrong = int((p_values <= 0.05).sum())
    assert binom.sf(wrong - 1, 40_000, 0.05) > 1e-3
    assert ((p_values / 9) <= 0.05).mean() > 0.15
    ahead = sign_test_against(counts, np.zeros(40_000, int), in_favor=True)
    assert binom.sf(int((ahead <= 0.05).sum()) - 1, 40_000, 0.05) > 1e-3


def test_the_sign_test_in_closed_form():
    counts = np.array([[3, 9, 0], [9, 3, 0], [6, 6, 0], [0, 0, 0]])
    tail = binom.sf(8, 12, 0.5)
    p_values = sign_test_against(counts, np.zeros(4, int))
    assert p_values[:2] == pytest.approx([2 * tail, 1.0], rel=1e-6)
    assert p_values[2:].tolist() == [1.0, 1.0]
    ahead = sign_test_against(counts, np.zeros(4, int), in_favor=True)
    assert ahead == pytest.approx([1.0, tail, 1.0, 1.0], rel=1e-6)
    assert vote_margins(counts, np.zeros(4, int)).tolist() == [-0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("family", PERTURBATIONS)
def test_every_delta_lies_inside_the_certified_set(family):
    perturbation = PERTURBATIONS[family](0.2)
    radius = np.array([0.0, 1e-4, 0.37, 2.9])
    region = region_of(perturbation, (3, 9, 8), radius)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    aim = region.directions(1, generators)[:, 0]
    deltas = [region.random(40, generators), region.first(40, aim, generators)]
    if region.dim > 1:
        aims = region.directions(2, generators)
        deltas.append(region.beyond(deltas[1][:, :1], aims, 8, 0.5, generators))
    else:
        deltas.append(region.around(deltas[1][:, 36:37], 8, 0.1))
    for some in deltas:
        assert some.dtype == torch.float32
        size = lengths(some, perturbation.norm, len(region.shape)).numpy()
        assert (size <= radius[:, None]).all()
        assert size[3].max() > 0.9 * radius[3]
    assert deltas[0].shape[1:2] == deltas[1].shape[1:2] == (40,)


def test_deltas_of_exact_noise_lie_on_its_grid():
    region = region_of(certifl.PixelNoise(0.2, exact=True), (1, 8, 8), np.array([0.3]))
    deltas = region.random(20, [torch.Generator().manual_seed(0)])
    levels = deltas * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert levels.abs().max() >= 1
    assert lengths(deltas, "l2", 3).max() <= 0.3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"predicted": np.array([-1])}, "leave out abstained"),
        ({"predicted": np.array([2])}, "certified classes"),
        ({"predicted": np.array([0, 1])}, "a class for each"),
        ({"radius": np.array([0.1, 0.1])}, "2 radii for 1"),
        ({"radius": np.array([np.inf])}, "finite"),
        ({"radius": np.array([-0.1])}, "at least 0"),
    ],
)
def test_arguments_that_do_not_fit(change, says):
    model, images, _ = half_space(1)
    values = {"predicted": np.array([0]), "radius": np.array([0.1]), **change}
    with pytest.raises(InputError, match=says):
        attacked(model, images, certifl.PixelNoise(SIGMA), values["predicted"], values["radius"])


def test_an_interval_must_hold_zero():
    with pytest.raises(InputError, match="around 0"):
        region_of(certifl.Rotation(0.1), (1, 8, 8), np.array([0.1]), np.array([[0.1, 0.2]]))


@pytest.mark.parametrize(
    "wrong", [{"directions": 1}, {"screen": 10}, {"level": 0.0}, {"confirm": 0}, {"proposals": 2}]
)
def test_budgets_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        AttackBudget(**wrong)


def test_an_image_that_arrives_rotated_is_smoothed_around_its_angle():
    # Ramps stay ramps under bilinear interpolation, so here two rotations do add up.
    model = votes_for(lambda x: read_angle(x).abs() <= 0.7)
    counter = VoteCounter(prepare(model, ramps()), certifl.Rotation(1.0), 0)
    deltas = torch.tensor([0.0, 0.5, -0.5, 0.9])[None, :, None]
    votes = deformed_first(counter, ramps(), deltas, 4000)
    assert votes.shape == (1, 4, 3)
    assert (votes.sum(axis=2) == 4000).all()
    shares = votes[0, :, 1] / 4000
    # 5 standard errors of 4000 votes at one half: 0.04
    assert shares == pytest.approx([0.7, 0.6, 0.6, 0.4], abs=0.04)


def test_without_a_deformation_the_votes_are_those_of_the_image():
    model, images, _ = half_space(2)
    counter = VoteCounter(prepare(model, images, precision="float32"), certifl.PixelNoise(0.5), 0)
    votes = deformed_first(counter, images, torch.zeros(2, 3, 1, 8, 8), 300)
    assert (votes == votes[:, :1]).all()
    other = deformed_first(counter, images, torch.full((2, 1, 1, 8, 8), 0.3), 300)
    assert not np.array_equal(other[:, 0], votes[:, 0])
