"""Labels and radii of new images: those of `certify`, and right as often as they promise."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import certifl
from certifl.certification import arithmetic
from certifl.certification.arithmetic import Arithmetic
from certifl.errors import InputError, ModelError
from certifl.smoothing.bounds import top_class_bounds
from known_models import HalfSpace

NOISE = certifl.PixelNoise(0.25)
SHAPE = (1, 4, 4)


def half_space() -> HalfSpace:
    weight = torch.ones(SHAPE)
    return HalfSpace(weight, -0.5 * weight.numel()).eval()


def some_images(count: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.5 + spread * (torch.rand(count, *SHAPE, generator=generator) - 0.5)


def test_predict_with_radius_is_certify():
    model, images = half_space(), some_images(40, 1.0)
    settings = {"n": 300, "alpha": 0.01, "seed": 3}
    certificates = certifl.certify(model, images, NOISE, **settings)
    labels, radii = certifl.predict(model, images, NOISE, radius=True, **settings)
    assert np.array_equal(labels, certificates.predicted)
    assert np.array_equal(radii, certificates.radius)
    smoothed = certifl.SmoothedClassifier(model, NOISE, **settings)
    answer = smoothed.predict(images)
    assert np.array_equal(answer.labels, labels)
    assert np.array_equal(answer.radii, radii)
    assert smoothed.certify(images).same_results(certificates)
    some = smoothed.predict(images[5:6])  # an image has its answer whatever comes with it
    assert (some.labels[0], some.radii[0]) == (labels[5], radii[5])
    assert (labels == -1).any()
    assert (radii[labels == -1] == 0.0).all()


def test_calls_at_the_same_time_have_the_same_answers():
    smoothed, images = certifl.SmoothedClassifier(half_space(), NOISE, n=200), some_images(8, 1.0)
    alone = smoothed.predict(images)
    with ThreadPoolExecutor(4) as pool:
        for labels, radii in pool.map(smoothed.predict, [images] * 4):
            assert np.array_equal(labels, alone.labels)
            assert np.array_equal(radii, alone.radii)


def test_the_first_call_fixes_the_arithmetic(tmp_path, monkeypatch):
    """A call of many images measures what "auto" stands for; one image had its answer before."""
    measured = Arithmetic("bfloat16", 32, 1)
    monkeypatch.setattr(arithmetic, "_measured", lambda *_: measured)
    monkeypatch.setenv("CERTIFL_CACHE", str(tmp_path))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    smoothed, images = certifl.SmoothedClassifier(model, NOISE, n=200), some_images(400, 1.0)
    alone = smoothed.certify(images[:1]).conditions
    assert alone["precision"] == "float32"
    for part in (images, images[:1]):
        metadata = smoothed.certify(part).conditions
        assert (metadata["precision"], metadata["batch_size"]) == ("float32", alone["batch_size"])
    many = certifl.SmoothedClassifier(model, NOISE, n=200)
    for part in (images, images[:1]):
        metadata = many.certify(part).conditions
        found = [metadata[key] for key in ("precision", "batch_size", "threads")]
        assert found == ["bfloat16", 32, 1]


def test_it_votes_in_int8():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 4), torch.nn.Flatten()).eval()
    images = some_images(20, 1.0)
    options = {"n": 200, "precision": "int8", "calibration": images}
    made = certifl.SmoothedClassifier(model, NOISE, **options).certify(images[:2])
    assert made.same_results(certifl.certify(model, images[:2], NOISE, **options))


def test_it_moves_with_its_model():
    smoothed = certifl.SmoothedClassifier(half_space(), NOISE)
    assert smoothed.to("cpu") is smoothed
    assert smoothed.device == "cpu"
    assert "HalfSpace" in repr(smoothed)
    assert "0.25" in repr(smoothed)


def test_what_cannot_answer_is_refused_at_once():
    with pytest.raises(InputError, match="take n = 11"):
        certifl.SmoothedClassifier(half_space(), NOISE, n=5)
    with pytest.raises(InputError, match="precision must be"):
        certifl.SmoothedClassifier(half_space(), NOISE, precision="int9")
    with pytest.raises(InputError, match="seed"):
        certifl.SmoothedClassifier(half_space(), NOISE, seed=-1)
    with pytest.raises(InputError, match="alpha"):
        certifl.SmoothedClassifier(half_space(), NOISE, alpha=2.0)
    with pytest.raises(ModelError, match="training mode"):
        certifl.SmoothedClassifier(half_space().train(), NOISE).predict(some_images(1, 1.0))


ALPHA, IMAGES, VOTES = 0.2, 1000, 200


def too_many(wrong: np.ndarray) -> bool:
    """Whether more answers are wrong than alpha allows, beyond four standard deviations."""
    return float(wrong.mean()) > ALPHA + 4 * np.sqrt(ALPHA * (1 - ALPHA) / len(wrong))


@pytest.mark.statistical
def test_answers_are_wrong_as_often_as_alpha_allows_at_most():
    """Images beside the boundary, where a class is as likely as the other: the hardest case.

    The true radius is next to nothing there, so every certificate is wrong.
    """
    model, images = half_space(), some_images(IMAGES, 1e-5)
    truth = model.true_radius(images).numpy()
    options = {"n": VOTES, "alpha": ALPHA, "precision": "float32", "seed": 5}
    smoothed = certifl.SmoothedClassifier(model, NOISE, **options)
    labels, radii = smoothed.predict(images)
    wrong = (labels >= 0) & (radii > truth)
    assert wrong.any()  # the test has the power to see errors
    assert not too_many(wrong)
    # Choosing the class by the votes that bound it is the mistake to avoid, and this finds it.
    certificates = certifl.certify(model, images, NOISE, estimator="top-class", **options)
    lower, upper = top_class_bounds(certificates.counts.max(axis=1), VOTES, ALPHA)
    assert too_many(np.asarray(lower > upper))
