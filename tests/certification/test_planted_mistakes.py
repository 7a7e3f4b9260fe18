"""Mistakes that were planted once and no other test saw: votes that are not what they are for."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

import certifl
import tiny_study as tiny
from certifl.certification import Certificates
from certifl.certification.counts import Votes, finalize
from certifl.certification.network import prepare
from certifl.certification.settings import Settings
from certifl.data import to_float
from certifl.perturbations import Perturbation
from certifl.smoothing.bounds import BOUNDS
from certifl.smoothing.laws import GAUSSIAN
from certifl.study.certify import Job, VoteSource, certify_job
from certifl.study.opened_run import NetworkCache
from known_models import HalfSpace

NOISE = certifl.PixelNoise(0.5)
SETTINGS = Settings(estimator="sequential", n0=50, n=400)


def model(seed: int) -> HalfSpace:
    """A half space through the middle of the cube, so that images near it vote both ways."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return HalfSpace(weight, -0.5 * float(weight.sum())).eval()


def job(saved: Path) -> Job:
    g = torch.Generator().manual_seed(7)
    images = torch.randint(96, 160, (6, 1, 8, 8), generator=g, dtype=torch.uint8)
    return Job(0, np.arange(6), images, np.zeros(6, np.int64), saved)


def certified(
    saved: Path,
    *,
    of: int = 0,
    noise: Perturbation = NOISE,
    settings: Settings = SETTINGS,
    seed: int = 0,
) -> Certificates:
    work, net = job(saved), model(of)
    network = prepare(net, to_float(work.images[:1]), "cpu", "float32")
    return certify_job(work, net, network, VoteSource(noise, settings, seed, "data"))


@pytest.mark.parametrize("estimator", ["top-class", "runner-up", "sequential"])
def test_the_votes_that_bound_a_class_are_not_those_that_chose_it(estimator):
    """As many estimation as selection votes: were they the same ones, so were the counts."""
    images = to_float(job(Path()).images)
    radii = [0.9]  # so far that most images are certified from all votes
    made = certifl.certify(
        model(0), images, NOISE, n0=300, n=300, estimator=estimator, radii=radii
    )
    some = made.votes == 300
    assert some.sum() >= 2
    assert (made.counts != made.selection_counts).any(axis=1)[some].all()


def finalized(counts: list[list[int]], looks: list[int], bounds: str) -> Certificates:
    """Certificates of images whose votes are written down; class 0 was chosen for all of them."""
    estimation, m = np.array(counts, np.int64), len(counts)
    selection = np.tile(np.array([[30, 20, 0]], np.int64), (m, 1))
    votes = Votes(selection, estimation, np.array(looks), np.ones(m, np.bool_), np.zeros(m))
    labels = np.zeros(m, np.int64)
    return finalize(votes, Settings(bounds, n0=50, n=400).estimator_for(NOISE), labels)


@pytest.mark.parametrize("estimator", ["sequential", "sequential-top-class"])
def test_bounds_are_those_of_the_votes_cast_at_their_look(estimator):
    rule = Settings(estimator, n0=50, n=400).estimator_for(NOISE)
    counts = [[95, 3, 2], [190, 6, 4], [285, 9, 6], [380, 12, 8]]
    made = finalized(counts, [1, 2, 3, 4], estimator)
    assert rule.looks == (100, 200, 300, 400)
    share = 1.0 if rule.bounds == "top-class" else 0.9
    for row, (top, runner, _) in enumerate(counts):
        votes, own, so_far = rule.looks[row], rule.levels[row], sum(rule.levels[: row + 1])
        at_own, most = (BOUNDS[rule.bounds](top, runner, votes, a)[0] for a in (own, so_far))
        grid_point = 2 * 0.5 / 128  # between two values that limits of 400 votes take
        assert at_own - grid_point < made.p_lower[row] <= most
        assert binom.sf(top - 1, votes, made.p_lower[row]) <= share * so_far
        radius = GAUSSIAN.radius(0.5, made.p_lower[row], made.p_upper[row])
        assert made.radius[row] == radius


@pytest.mark.parametrize("estimator", ["sequential", "runner-up", "top-class"])
def test_a_chosen_class_that_does_not_lead_is_abstained_from(estimator):
    """The rival is the most voted OTHER class, also where that is the most voted of all."""
    made = finalized([[100, 290, 10], [160, 200, 40], [200, 200, 0]], _last(estimator), estimator)
    assert made.abstained.all()
    assert (made.radius == 0).all()
    assert (made.p_upper >= np.array([290, 200, 200]) / 400).all()
    assert made.average_certified_radius() == 0
    assert made.certified_accuracy([0.0])[0] == 0


def _last(estimator: str) -> list[int]:
    return [len(Settings(estimator, n0=50, n=400).estimator_for(NOISE).looks)] * 3


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"of": 1},
        {"noise": certifl.PixelNoise(0.4)},
        {"noise": certifl.PixelNoise(0.5, exact=True)},
        {"settings": dataclasses.replace(SETTINGS, alpha=0.01)},
        {"settings": dataclasses.replace(SETTINGS, n=800)},
        {"settings": dataclasses.replace(SETTINGS, n0=60)},
        {"settings": dataclasses.replace(SETTINGS, radii=(0.0, 0.3))},
        {"settings": dataclasses.replace(SETTINGS, label_aware=False)},
        {"settings": dataclasses.replace(SETTINGS, estimator="top-class")},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_votes_kept_for_another_question_are_not_taken_over(changed, tmp_path):
    """A resume after a change of settings begins anew: its certificates are the fresh ones."""
    first = certified(tmp_path / "votes.safetensors")
    resumed = certified(tmp_path / "votes.safetensors", **changed)
    fresh = certified(tmp_path / "fresh.safetensors", **changed)
    assert resumed.same_results(fresh)
    assert resumed.conditions == fresh.conditions
    assert not np.array_equal(resumed.seconds, first.seconds)


def test_votes_of_the_same_question_are_taken_over(tmp_path):
    """The other way round: nothing is cast twice, which the computing times show."""
    first = certified(tmp_path / "votes.safetensors")
    again = certified(tmp_path / "votes.safetensors")
    assert first.same_results(again)
    assert np.array_equal(first.seconds, again.seconds)


def test_clients_of_different_models_are_certified_with_their_own():
    cache, images = NetworkCache(), to_float(job(Path()).images)
    for number in (0, 1, 1, 0):
        prepared = partial(prepare, model(number), images, "cpu", "float32")
        network = cache.network(model(number), prepared)
        assert torch.equal(network.call(images), model(number)(images))


def test_abstaining_from_an_image_without_a_label_is_not_being_right():
    made = finalized([[100, 290, 10]], _last("runner-up"), "runner-up")
    unlabeled = dataclasses.replace(made, label=np.full(1, -1, np.int64))
    assert unlabeled.abstained.all()
    assert not unlabeled.correct.any()


@pytest.mark.parametrize(
    "setting",
    [
        *("seed=1", "certification.alpha=0.01", "certification.n=2000", "certification.n0=50"),
        *("training.lr=0.01", "clients.count=3", "algorithm={name='local'}"),
    ],
)
def test_what_changes_a_result_changes_the_name_of_the_study(setting):
    """A folder of another seed would otherwise be taken for the run that was asked for."""
    assert tiny.spec(setting).hash() != tiny.spec().hash()
    alike = setting.startswith("certification")
    assert (tiny.spec(setting).training_hash() == tiny.spec().training_hash()) == alike
