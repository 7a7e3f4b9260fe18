from pathlib import Path

import numpy as np
import pytest

from certifl.certification.recompute import RecordedNoise
from certifl.certification.settings import Settings
from certifl.smoothing import (
    BOUNDS,
    GAUSSIAN,
    average_certified_radius,
    certified_accuracy,
    grid_steps,
)

pytestmark = pytest.mark.shared
GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


def golden(name: str) -> Path:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip("the shared data folder is not beside the checkout")
    return path


def vote_vectors() -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(golden("cifar10_counts_sigma_0.25.txt"), dtype=np.int64)
    return table[:, :-1], table[:, -1]


def top_and_runner(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = np.sort(counts, axis=1)
    return ordered[:, -1], ordered[:, -2]


@pytest.mark.parametrize(
    ("rule", "abstained", "at_zero", "acr"),
    [("top-class", 0.078, 0.756, 0.4238), ("runner-up", 0.004, 0.782, 0.4326)],
)
def test_vote_vectors_give_the_measured_curve(rule, abstained, at_zero, acr):
    counts, labels = vote_vectors()
    assert (counts.sum(1) == 100_000).all()
    radius = GAUSSIAN.radius(0.25, *BOUNDS[rule](*top_and_runner(counts), 100_000, 1e-3))
    correct = (counts.argmax(1) == labels) & (radius > 0)
    assert np.mean(radius == 0) == pytest.approx(abstained)
    assert certified_accuracy(correct, radius, 0.0) == pytest.approx(at_zero)
    assert average_certified_radius(correct, radius) == pytest.approx(acr, abs=5e-5)


@pytest.mark.parametrize("rule", ["sequential", "sequential-top-class"])
def test_exact_boundaries_keep_nearly_all_certificates_for_a_ninth_of_the_votes(rule):
    """The votes of the file in a random order, labels unknown."""
    counts, _ = vote_vectors()
    rng, chosen, rows = np.random.default_rng(17), counts.argmax(1), np.arange(len(counts))
    grid = np.arange(1, 5) * 0.25
    noise = RecordedNoise("pixel", 0.25, GAUSSIAN, "intensity")
    estimator = Settings(rule, radii=grid.tolist()).estimator_for(noise)
    left, seen = counts.copy(), np.zeros_like(counts)
    radius, spent = np.zeros(len(rows)), np.zeros(len(rows), int)
    active, before = np.ones(len(rows), bool), 0
    for j, votes in enumerate(estimator.looks):
        drawn = np.array([rng.multivariate_hypergeometric(row, votes - before) for row in left])
        left, seen, before = left - drawn, seen + drawn, votes
        others = np.where(np.arange(10) == chosen[:, None], -1, seen).max(1)
        now = np.flatnonzero(active)
        at = seen[now, chosen[now]], others[now], np.full(len(now), j)
        done = estimator.finished(*at)
        limits = estimator.limits(*(column[done] for column in at))
        radius[now[done]], spent[now[done]] = GAUSSIAN.radius(0.25, *limits), votes
        active[now[done]] = False
    assert not active.any()
    fixed = GAUSSIAN.radius(
        0.25, *BOUNDS[estimator.bounds](*top_and_runner(counts), 100_000, 1e-3)
    )
    assert np.sum(grid_steps(radius, grid) < grid_steps(fixed, grid)) <= 2
    assert np.all(radius <= fixed * 1.01 + 0.02)
    assert spent.mean() <= 100_000 / 9


PUBLISHED = {
    "cifar10_resnet110_sigma_0.12": ([81.4, 58.6, 0], 0.270),
    "cifar10_resnet110_sigma_0.25": ([74.8, 60.0, 42.8, 26.6, 0], 0.429),
    "cifar10_resnet110_sigma_0.50": ([65.2, 54.6, 41.4, 32.0, 23.4, 15.2, 9.4], 0.538),
    "cifar10_resnet110_sigma_1.00": ([47.2, 39.2, 34.0, 27.8, 21.6, 17.4, 14.0], 0.542),
    "cifar10_resnet20_sigma_0.50_full": ([67.0, 55.4, 42.8, 31.4, 22.0], 0.524),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_certificates_give_the_published_curve(name):
    percent, acr = PUBLISHED[name]
    table = np.genfromtxt(golden(f"cohen/{name}.tsv"), skip_header=1, usecols=(3, 4))
    radius, correct = table[:, 0], table[:, 1].astype(bool)
    curve = certified_accuracy(correct, radius, np.arange(len(percent)) * 0.25)
    assert list(100 * curve) == pytest.approx(percent, abs=0.0501)
    assert average_certified_radius(correct, radius) == pytest.approx(acr, abs=5.01e-4)


@pytest.mark.parametrize(("sigma", "alpha"), [("0.12", 1e-3), ("0.25", 1e-2), ("0.50", 1e-2)])
def test_published_files_were_made_at_the_level_their_largest_radius_shows(sigma, alpha):
    """Unanimous images carry the largest radius, printed to the NEAREST of three digits (1.96)."""
    path = golden(f"cohen/cifar10_resnet110_sigma_{sigma}.tsv")
    largest = np.genfromtxt(path, skip_header=1, usecols=3).max()
    bound = GAUSSIAN.largest_radius(float(sigma), 100_000, alpha)
    assert largest == pytest.approx(bound, rel=2.6e-3)  # 0.005 of 1.96
    assert (largest > 1.01 * GAUSSIAN.largest_radius(float(sigma), 100_000, 1e-3)) == (
        alpha > 1e-3
    )
