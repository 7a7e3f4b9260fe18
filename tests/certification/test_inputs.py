"""What cannot be certified is refused before the first vote, and the message says what can."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import certifl
from certifl.errors import InputError, ModelError

NOISE = certifl.PixelNoise(0.25)
X, Y = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)
PAIRS = DataLoader(TensorDataset(X, Y), batch_size=2)


def plain(pixels: int = 64) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 10)).eval()


NET = plain()


def certify(images: Any = X, labels: Any = None, model: Any = NET, noise: Any = NOISE, **options):
    return certifl.certify(model, images, noise, labels=labels, **{"n": 100, "n0": 20, **options})


def resampled(level: float) -> Tensor:
    images = X.clone()
    images[0, 0, 0, 0] = level
    return images


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (PAIRS, Y.split(2), r"labels= must be left out"),
        (DataLoader(TensorDataset(X, Y), shuffle=True), None, "shuffle=False"),
        ([(X, Y, Y)], None, r"pair or a longer tuple.*\(x for x, _ in loader\)"),
        ([{"pixel_values": X, "label": Y}], None, r"b\['pixel_values'\] for b in loader"),
        ({"image": X}, None, "iterable of such"),
        ((X, Y), None, "four axes.*labels="),
        ([X[0], X[1]], None, "four axes"),
        ([[X[0], X[1]]], None, r"torch\.stack"),
        (3, None, "iterable of such"),
        ([X[:2], X[2:]], Y, "images come in blocks.*labels=y.split"),
        ([X[:2], X[2:]], [0, 1, 2, 3], "images come in blocks"),
        ([X[:2], X[2:]], Y.numpy(), "images come in blocks"),
        ([X[:2], X[2:]], 3, "labels must be numbers of classes"),
        (X, [Y[:2], Y[2:]], r"labels of one tensor.*torch\.cat"),
        (X, iter([Y]), r"labels of one tensor.*torch\.cat"),
        (X, ["ash", "oak", "ash", "oak"], r"names\.index\(y\)"),
        (X, np.array(["ash", "oak", "ash", "oak"]), r"names\.index\(y\)"),
        (X, torch.eye(10)[:4], r"one number per image.*labels\.argmax\(1\)"),
        (X, Y[:, None], r"one number per image.*labels\[:, 0\]"),
        (X, Y.float(), r"whole numbers; got float32.*labels\.long\(\)"),
        (X, Y > 0, "whole numbers; got bool"),
        (X, Y[:3], r"one number per image, \(4,\); got \(3,\)"),
        (X, Y - 1, "found -1 to 2. A label of -1 usually marks"),
        (resampled(1 + 1e-7), None, r"found .* to 1\.00000012: .*clamp\(0, 1\)"),
        (resampled(-0.03), None, r"found -0\.0299.*clamp\(0, 1\)"),
        (resampled(2.6), None, r"to 2\.5\d+: .*Put normalization inside"),
        (resampled(float("nan")), None, "NaN"),
        (resampled(float("inf")), None, "infinity"),
        (X[:0], None, "nothing to certify"),
        (X * 255, None, "units of that range"),
        (X - 0.5, None, r"\[0, 1\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), None, "Divide 8-bit images by 255"),
        *((images, None, "images must be a tensor") for images in (None, "digits", ["digits"])),
        (X, Y + 7, "0 to 9"),
        (X, list("aboa"), "labels must be a tensor"),
        (X.to_sparse(), None, "images must be a tensor"),
        (X.to("meta"), None, "images must be a tensor"),
        (np.ma.array(X.numpy(), mask=X.numpy() > 0.9), None, "images has masked values"),
        (X, np.ma.array(Y.numpy(), mask=[0, 0, 0, 1]), "labels has masked values"),
        (list(X), Y, "images must have four axes"),
        (["a.png"], Y, "images must be a tensor"),
    ],
)
def test_what_cannot_be_used_says_what_can(images, labels, says):
    with pytest.raises(InputError, match=says):
        certify(images, labels)


def test_the_advice_works():
    whole = certify(X, Y)
    blocks = [X[:2], X[2:]]
    for images, labels in (
        ((x for x, _ in PAIRS), (y for _, y in PAIRS)),
        (PAIRS, None),
        (TensorDataset(X, Y), None),
        (blocks, Y.split([len(x) for x in blocks])),
        (blocks, [[0, 1], [2, 3]]),
        (resampled(float(X[0, 0, 0, 0])).clamp(0, 1), [0, 1, 2, 3]),
        (X.permute(0, 2, 3, 1).permute(0, 3, 1, 2), Y.int()),
        (X.numpy(), Y.numpy().astype(np.uint8)),
    ):
        assert certify(images, labels).same_results(whole)


def test_numbers_of_numpy_are_numbers(tmp_path):
    alpha = np.float32(0.25)
    usual = certify(seed=3, alpha=0.25, batch_size=16)
    found = certify(
        seed=np.int64(3), alpha=alpha, batch_size=np.int32(16), n=np.int16(100), n0=np.float64(20)
    )
    found.save(tmp_path / "c.parquet")
    back = certifl.Certificates.load(tmp_path / "c.parquet")
    assert back.same_results(usual)
    assert back.conditions == usual.conditions


@contextlib.contextmanager
def default(setter: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(usual)


@pytest.mark.parametrize("estimator", ["sequential", "scan"])
@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
        lambda: default(torch.set_default_device, "meta", None),
    ],
)
def test_settings_of_the_calling_program_change_nothing(surroundings, estimator):
    """In autocast a network voted in bfloat16, and the record said float32."""
    noise = certifl.Rotation(0.3)
    options = {"noise": noise, "estimator": estimator, "n": 500, "precision": "float32"}
    usual = certify(X, Y, **options)
    with surroundings():
        assert certify(X, Y, **options).same_results(usual)
        assert certify(TensorDataset(X, Y), **options).same_results(usual)


class Preprocessing(nn.Module):
    """A network behind what somebody does with intensities."""

    def __init__(self, steps: Any) -> None:
        super().__init__()
        self.net, self.steps = plain(), steps

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.steps(x))


def in_range(x: Tensor) -> Tensor:
    assert float(x.min()) >= 0, "outside"
    return x


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (lambda x: x**2.2, "answers with NaN on noisy images.*clamp"),
        (lambda x: x.sqrt(), "answers with NaN on noisy images"),
        (in_range, "fails on noisy images: AssertionError: outside.*clamp"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_model_of_intensities_from_0_alone_is_refused(steps, says, precision):
    """The class that `argmax` finds among NaN would be certified at the largest radius."""
    model = Preprocessing(steps).eval()
    for call in (certify, lambda **options: certifl.predict(model, X, NOISE, n=100)):
        with pytest.raises(ModelError, match=says):
            call(model=model, precision=precision)
    assert len(certify(model=Preprocessing(lambda x: steps(x.clamp(0, 1))).eval())) == 4


def test_nan_of_a_black_image_is_found_without_pixel_noise():
    model = Preprocessing(lambda x: x / x.sum((1, 2, 3), keepdim=True)).eval()
    with pytest.raises(ModelError, match="never divide by 0"):
        certify(model=model, noise=certifl.Translation(1.0), precision="float32")


def test_predict_takes_and_says_the_same():
    whole = certifl.predict(NET, X, NOISE, n=100).tolist()
    held: tuple[Any, ...] = (PAIRS, (x for x, _ in PAIRS), [X[:2], X[2:]], TensorDataset(X, Y))
    for images in held:
        assert certifl.predict(NET, images, NOISE, n=100).tolist() == whole
    with pytest.raises(InputError, match="channels last"):
        certifl.predict(NET, X.permute(0, 2, 3, 1), NOISE, n=100)
    with pytest.raises(ModelError, match="training mode"):
        certifl.predict(plain().train(), X, NOISE)
    with pytest.raises(InputError, match="alpha"):
        certifl.predict(NET, X, NOISE, alpha=2.0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("make", [torch.rand, lambda *shape: np.full(shape, 0.5)])
@pytest.mark.parametrize("noise", [NOISE, certifl.Rotation(0.3), certifl.Translation(0.2)])
def test_channels_last_is_refused(channels, make, noise):
    with pytest.raises(InputError, match=r"channels last.*permute\(0, 3, 1, 2\)"):
        certify(make(4, 8, 9, channels), noise=noise)


@pytest.mark.parametrize("shape", [(2, 3, 8, 4), (2, 4, 16, 3), (2, 1, 64, 1)])
def test_narrow_images_are_not_taken_for_channels_last(shape):
    assert len(certify(torch.rand(shape), model=plain(int(np.prod(shape[1:]))))) == 2


@pytest.mark.parametrize("noise", ["rotation", certifl.Rotation])
def test_perturbations(noise):
    with pytest.raises(InputError, match=r"such as certifl\.Rotation"):
        certify(noise=noise)
    with pytest.raises(InputError, match="Rotation"):
        certifl.predict(NET, X, noise)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n0": 0}, "n0 must lie between"),
        ({"n": 0}, "n must lie between"),
        ({"n": 10.5}, "whole number of votes"),
        ({"n": True}, "whole number of votes"),
        ({"alpha": 0.0}, "alpha"),
        ({"label_aware": "no"}, "label_aware must be True or False"),
        ({"device": None}, "device None cannot be used"),
        ({"batch_size": 10**9}, "batch_size must be 'auto' or a whole number from 1 to 1,048,576"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to"),
        ({"seed": np.uint64(2**63)}, "seed must be a whole number from 0 to"),
        ({"alpha": 0.7}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"estimator": "best"}, "top-class, runner-up, sequential"),
        ({"radii": []}, "radii"),
        ({"radii": [-1.0]}, "radii"),
        ({"precision": "float16"}, "bfloat16"),
        ({"device": "quantum"}, "choose auto, cpu"),
        ({"device": "meta"}, "choose auto, cpu"),
        ({"device": "cuda:99"}, "cannot be used here"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"radii": 0.5}, "radii must be a list"),
        ({"radii": ["far"]}, "radii must be a list"),
        (
            {"noise": certifl.Rotation(0.3), "estimator": "scan", "reach": "1"},
            "reach must be a po",
        ),
        ({"n": 10**8 + 1}, "n must lie between"),
        ({"n": 10**7 + 1}, "sequential.* takes n up to 10000000"),
        ({"n": 10**8, "estimator": "sequential-top-class"}, "class.* takes n up to 10000000"),
        ({"radii": [step / 1001 for step in range(1001)]}, "At most 1000 radii; got 1001"),
    ],
)
def test_settings(options, says):
    with pytest.raises(InputError, match=says):
        certify(**options)


def test_a_callable_with_noise_of_its_own():
    own = torch.Generator().manual_seed(0)
    with pytest.raises(ModelError, match="random"):
        certify(model=lambda x: NET(x + 0.01 * torch.randn(x.shape, generator=own)))


@pytest.mark.parametrize(
    ("model", "images", "says"),
    [
        (NET, X[..., :7], r"\(6, 1, 8, 7\).*size and chann"),
        (plain(192), X, r"RuntimeError.*was made for"),
        (lambda x: x, X, "logits"),
        (lambda x: "cat", X, "logits"),
        (lambda x: NET((x - x.mean(0)) / (x.std(0) + 1e-3)), X, "another batch"),
    ],
)
def test_models_that_do_not_fit(model, images, says):
    with pytest.raises(ModelError, match=says):
        certify(images, model=model)


def test_answers_on_the_logarithmic_scale_are_logits():
    logarithmic = nn.Sequential(NET, nn.LogSoftmax(dim=1)).eval()
    one, other = (certify(model=model, precision="float32") for model in (logarithmic, NET))
    assert abs(one.counts - other.counts).max() <= 2  # rounding may turn a vote at a tie


def test_exact_noise_needs_8_bit_images():
    exact = certifl.PixelNoise(0.25, exact=True)
    assert len(certify(torch.randint(0, 256, (1, 1, 8, 8)) / 255, noise=exact)) == 1
    with pytest.raises(InputError, match="multiples of 1/255"):
        certify(noise=exact)
