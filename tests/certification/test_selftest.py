"""The self-test of the random source: correct sources pass, planted broken ones do not."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
from certifl.certification import sampling as selftest
from certifl.certification.sampling import check_random_source
from certifl.errors import RandomSourceBroken, WorkError
from certifl.perturbations import PERTURBATIONS
from certifl.rng import vote_generator

CPU = torch.device("cpu")
SHAPE = (1, 12, 10)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.77])
@pytest.mark.parametrize("family", PERTURBATIONS)
def test_every_family_passes(family, sigma):
    check_random_source(PERTURBATIONS[family](sigma), SHAPE, CPU)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 224, 224)])
@pytest.mark.parametrize("sigma", [1e-3, 0.004, 0.25])
def test_exact_noise_passes(sigma, shape):
    check_random_source(certifl.PixelNoise(sigma, exact=True), shape, CPU)


class Broken:
    """A perturbation like another, but for what it draws."""

    def __init__(self, of: object, change: object) -> None:
        self._of, self._change = of, change

    def __getattr__(self, name: str) -> object:
        return getattr(self._of, name)

    def sample(self, n: int, image_shape: tuple, generator: torch.Generator) -> Tensor:
        return self._change(self._of.sample(n, image_shape, generator))


@pytest.mark.parametrize("good", [certifl.PixelNoise(0.25), certifl.Rotation("18deg")])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (torch.zeros_like, "draw the same numbers"),
        (lambda x: x * 2.0, "the variance of .* standard errors"),
        (lambda x: x + 2.0 * x.std(), "the mean of .* standard errors"),
        (lambda x: x * float("nan"), "the same seed gives other numbers"),
        (lambda x: x.clamp(min=0.0), "standard errors"),
    ],
    ids=["constant", "too wide", "shifted", "NaN", "one-sided"],
)
def test_draws_that_do_not_follow_the_law(good, change, says):
    with pytest.raises(RandomSourceBroken, match=says):
        check_random_source(Broken(good, change), SHAPE, CPU)


def repeated(seed: int, purpose: str, image: int, chunk: int, device: object) -> torch.Generator:
    return vote_generator(seed, purpose, image, 0, device)


def one_stage(seed: int, purpose: str, image: int, chunk: int, device: object) -> torch.Generator:
    return vote_generator(seed, "estimation", image, chunk, device)


def one_image(seed: int, purpose: str, image: int, chunk: int, device: object) -> torch.Generator:
    return vote_generator(seed, purpose, 0, chunk, device)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (repeated, "two chunks of one image draw the same"),
        (one_stage, "selection and estimation draw the same"),
        (one_image, "two images draw the same"),
    ],
)
def test_streams_that_are_not_apart(source, says):
    with pytest.raises(RandomSourceBroken, match=says):
        check_random_source(certifl.PixelNoise(0.25), SHAPE, CPU, source)


def test_a_source_that_goes_on_where_it_stopped_is_not_repeatable():
    count = itertools.count()
    advancing = lambda seed, purpose, image, chunk, device: vote_generator(  # noqa: E731
        next(count), purpose, image, chunk, device
    )
    with pytest.raises(RandomSourceBroken, match="the same seed gives other numbers"):
        check_random_source(certifl.PixelNoise(0.25), SHAPE, CPU, advancing)


def test_chunks_that_follow_each_other():
    """Each chunk has the right moments alone, but the second repeats most of the first."""
    noise = certifl.PixelNoise(0.25)
    first = noise.sample(100, SHAPE, vote_generator(0, "estimation", 0, 0))
    mixed = Broken(noise, lambda x: 0.8 * first[: len(x)] + 0.6 * x)
    with pytest.raises(RandomSourceBroken, match="covariance of two chunks"):
        check_random_source(mixed, SHAPE, CPU)


def test_certify_stops_before_the_first_vote(monkeypatch):
    monkeypatch.setattr(selftest, "_passed", set())
    votes = []

    def model(images: Tensor) -> Tensor:
        votes.append(len(images))
        return torch.stack([images.mean((1, 2, 3)), torch.full((len(images),), 0.5)], dim=1)

    broken = Broken(certifl.PixelNoise(0.25), torch.zeros_like)
    with pytest.raises(RandomSourceBroken, match="cannot be trusted") as caught:
        certifl.certify(model, torch.rand(1, 1, 8, 8), broken, n=100, batch_size=100)
    assert isinstance(caught.value, WorkError)
    assert 100 not in votes
    assert not selftest._passed


def test_it_runs_once_for_a_device_a_perturbation_and_a_shape(monkeypatch):
    monkeypatch.setattr(selftest, "_passed", set())
    calls = []
    monkeypatch.setattr(selftest, "check_random_source", lambda *a: calls.append(a))
    for sigma, side in ((0.1, 8), (0.1, 8), (0.2, 8), (0.1, 9), (0.2, 8)):
        selftest.check_random_source_once(certifl.PixelNoise(sigma), (1, side, side), CPU)
    assert len(calls) == 3


def test_it_moves_no_global_generator():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    check_random_source(certifl.DenseFlow(0.1), SHAPE, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
