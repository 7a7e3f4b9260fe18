"""What cannot be certified is refused before the first vote, and the message helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certifl
from certifl.errors import InputError, ModelError

NOISE = certifl.PixelNoise(0.25)


IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


class Plain(nn.Module):
    def __init__(self, pixels: int = 64) -> None:
        super().__init__()
        self.head = nn.Linear(pixels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Pair(Plain):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def certify(model: Any = None, images: Any = IMAGES, noise: Any = NOISE, **options: Any) -> Any:
    made = Plain().eval() if model is None else model
    return certifl.certify(made, images, noise, **{"n": 100, **options})


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.rand(1, 8, 8), "four axes"),
        (torch.rand(0, 1, 8, 8), "nothing to certify"),
        (torch.full((1, 1, 8, 8), float("nan")), "NaN"),
        (torch.full((1, 1, 8, 8), float("inf")), "infinity"),
        (torch.rand(1, 1, 8, 8) * 255, "units of that range"),
        (torch.rand(1, 1, 8, 8) - 0.5, r"\[0, 1\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "Divide 8-bit images by 255"),
        (None, "images must be a tensor"),
        ("digits", "images must be a tensor"),
        (["digits"], "images must be a tensor"),
    ],
)
def test_images(images: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        certify(images=images)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0], "one number per image"),
        ([[0, 1]], "one number per image"),
        ([0, 3], "0 to 2"),
        ([-1, 0], "0 to 2"),
        ([0.5, 1.0], "whole numbers"),
        (["a", "b"], "labels must be a tensor"),
    ],
)
def test_labels(labels: list[Any], says: str) -> None:
    numbers = labels if isinstance(labels[0], str) else np.array(labels)
    with pytest.raises(InputError, match=says):
        certify(labels=numbers)


@pytest.mark.parametrize("noise", ["rotation", certifl.Rotation])
def test_perturbations(noise: Any) -> None:
    with pytest.raises(InputError, match=r"such as certifl\.Rotation"):
        certify(noise=noise)
    with pytest.raises(InputError, match="Rotation"):
        certifl.predict(Plain().eval(), IMAGES, noise)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n0": 0}, "n0 must lie between"),
        ({"n": 0}, "n must lie between"),
        ({"n": 10.5}, "whole number of votes"),
        ({"n": True}, "whole number of votes"),
        ({"alpha": 0.0}, "alpha"),
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
        ({"n": 9}, "n = 11 or more"),
        ({"n": 10**8 + 1}, "n must lie between"),
        ({"n": 10**7 + 1}, "sequential.* takes n up to 10000000"),
        ({"n": 10**8, "estimator": "sequential-top-class"}, "class.* takes n up to 10000000"),
        ({"radii": [step / 1001 for step in range(1001)]}, "At most 1000 radii; got 1001"),
    ],
)
def test_settings(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        certify(**options)


def test_a_model_in_training_mode() -> None:
    with pytest.raises(ModelError, match=r"model.eval\(\)"):
        certify(Plain())


def test_one_module_left_in_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Plain()).eval()
    model[0].train()
    with pytest.raises(ModelError, match=r"'0' .Dropout. is in training mode"):
        certify(model)


def test_batch_statistics_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), Plain()).eval()
    with pytest.raises(ModelError, match="statistics of its batch"):
        certify(model)


def test_a_callable_that_normalises_over_its_batch() -> None:
    head = Plain().eval()
    with pytest.raises(ModelError, match="another batch"):
        certify(lambda x: head((x - x.mean(0)) / (x.std(0) + 1e-3)))


def test_a_callable_with_noise_of_its_own() -> None:
    head = Plain().eval()
    own = torch.Generator().manual_seed(0)
    with pytest.raises(ModelError, match="random"):
        certify(lambda x: head(x + 0.01 * torch.randn(x.shape, generator=own)))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: x, "logits"),
        (lambda x: torch.zeros(3), "logits"),
        (lambda x: torch.zeros(len(x), 1), "one class"),
        (lambda x: torch.full((len(x), 2), float("nan")), "NaN"),
        (lambda x: "cat", "logits"),
    ],
)
def test_answers_that_are_no_logits(answer: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        certify(answer)


@pytest.mark.parametrize(
    ("model", "images", "says"),
    [
        (Plain(), IMAGES[..., :7], r"\(6, 1, 8, 7\).*size and chann"),
        (Plain(192), IMAGES, r"RuntimeError.*was made for"),
        (Pair(), IMAGES, "got tuple"),
    ],
)
def test_models_that_do_not_fit(model: nn.Module, images: Tensor, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        certify(model.eval(), images)


def test_the_least_number_of_votes_that_is_named_is_enough() -> None:
    always = certify(lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3)) - 9], 1), n=11)
    assert (always.radius > 0).all()


def test_answers_on_the_logarithmic_scale_are_logits() -> None:
    plain = Plain().eval()
    logarithmic = nn.Sequential(plain, nn.LogSoftmax(dim=1)).eval()
    one, other = (certify(model, precision="float32") for model in (logarithmic, plain))
    assert abs(one.counts - other.counts).max() <= 2  # rounding may turn a vote at a tie


@pytest.mark.parametrize("text", ["", "1\t2\n", HEADER + "1\t2\n", HEADER + "a\tb\tc\td\te\tf\n"])
def test_a_damaged_tsv(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text(text)
    with pytest.raises(InputError, match="holds no certificates"):
        certifl.Certificates.load(tmp_path / "c.tsv")


def test_predict_refuses_the_same() -> None:
    with pytest.raises(ModelError, match="training mode"):
        certifl.predict(Plain(), torch.rand(1, 1, 8, 8), NOISE)
    with pytest.raises(InputError, match="alpha"):
        certifl.predict(Plain().eval(), torch.rand(1, 1, 8, 8), NOISE, alpha=2.0)


def test_exact_noise_needs_8_bit_images() -> None:
    exact = certifl.PixelNoise(0.25, exact=True)
    images = torch.randint(0, 256, (1, 1, 8, 8)) / 255
    assert len(certifl.certify(Plain().eval(), images, exact, n=100)) == 1
    with pytest.raises(InputError, match="multiples of 1/255"):
        certifl.certify(Plain().eval(), torch.rand(1, 1, 8, 8), exact, n=100)
