"""Requests that once ended in a traceback, too late, or in words that told nobody what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import certifl
import tiny_study as tiny
from certifl.errors import CertiflError, InputError, ModelError

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
ROTATION: Any = "rotation"
IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Linear(nn.Module):
    def __init__(self, pixels: int = 64, classes: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


class Pair(Linear):
    def forward(self, images: torch.Tensor) -> Any:
        return super().forward(images), images


def certify(model: Any = None, images: Any = IMAGES, noise: Any = None, **options: Any) -> Any:
    made = Linear().eval() if model is None else model
    asked = certifl.PixelNoise(0.25) if noise is None else noise
    return certifl.certify(made, images, asked, **{"n": 200, **options})


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        (lambda: certify(images=IMAGES[..., :7]), ModelError, r"\(6, 1, 8, 7\).*size and chann"),
        (lambda: certify(Linear(192).eval()), ModelError, r"RuntimeError.*was made for"),
        (lambda: certify(Pair().eval()), ModelError, "got tuple"),
        (lambda: certify(Linear(classes=1).eval()), ModelError, "one class only"),
        (lambda: certify(Linear()), ModelError, r"model\.eval\(\)"),
        (lambda: certify(noise="rotation"), InputError, "such as certifl.Rotation"),
        (lambda: certify(noise=certifl.Rotation), InputError, "such as certifl.Rotation"),
        (lambda: certify(images=None), InputError, "images must be a tensor"),
        (lambda: certify(images="digits"), InputError, "images must be a tensor"),
        (lambda: certify(images=["digits"]), InputError, "images must be a tensor"),
        (lambda: certify(images=(IMAGES * 255).to(torch.uint8)), InputError, "by 255"),
        (lambda: certify(labels=["a", "b", "c"]), InputError, "labels must be a tensor"),
        (lambda: certify(seed=1.5), InputError, "seed must be a whole number"),
        (lambda: certify(seed="x"), InputError, "seed must be a whole number"),
        (lambda: certify(radii=0.5), InputError, "radii must be a list"),
        (lambda: certify(radii=["far"]), InputError, "radii must be a list"),
        (lambda: certify(noise=certifl.Rotation(0.3), estimator="scan", reach="1"), InputError,
         "reach must be a positive"),
        (lambda: certify(n=9), InputError, "n = 11 or more"),
        (lambda: certifl.predict(Linear().eval(), IMAGES, ROTATION), InputError, "Rotation"),
    ],
)  # fmt: skip
def test_the_library_refuses_with_what_why_and_what_to_do(
    request_: Callable[[], object], kind: type[CertiflError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        request_()


def test_the_least_number_of_votes_that_is_named_is_enough() -> None:
    always = certify(lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3)) - 9], 1), n=11)
    assert (always.radius > 0).all()


def test_answers_on_the_logarithmic_scale_are_logits() -> None:
    plain = Linear().eval()
    logarithmic = nn.Sequential(plain, nn.LogSoftmax(dim=1)).eval()
    one, other = (certify(model, precision="float32") for model in (logarithmic, plain))
    assert abs(one.counts - other.counts).max() <= 2  # rounding may turn a vote at a tie


@pytest.mark.parametrize("text", ["", "1\t2\n", HEADER + "1\t2\n", HEADER + "a\tb\tc\td\te\tf\n"])
def test_a_damaged_tsv_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text(text)
    with pytest.raises(InputError, match="holds no certificates"):
        certifl.Certificates.load(tmp_path / "c.tsv")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("certification.n=5", "n = 11 or more"),
        ("training.flip=yes", "must be true or false"),
        ("certification.radii=0.1", "must be a list"),
        ("training.lr=-1", "must be greater than 0"),
        ("privacy.kind=dp", "must be 'none', 'example' or 'client'"),
    ],
)
def test_a_study_that_cannot_be_done_is_refused_before_anything_is_written(
    setting: str, says: str, tmp_path: Path
) -> None:
    spec = tiny.write_spec(tmp_path)
    outcome = tiny.cli("run", spec, "--out", tmp_path / "run", "--set", setting)
    assert outcome.code == 2
    assert says in outcome.err
    assert not (tmp_path / "run").exists()


def test_answer_within_without_workers_leaves_no_folder_in_the_way(tmp_path: Path) -> None:
    spec, out = tiny.write_spec(tmp_path), tmp_path / "run"
    outcome = tiny.cli("run", spec, "--out", out, "--answer-within", "5")
    assert outcome.code == 2
    assert "needs --workers" in outcome.err
    assert not out.exists()


def test_a_file_in_the_place_of_a_folder_is_a_wrong_request(tmp_path: Path) -> None:
    spec = tiny.write_spec(tmp_path)
    (tmp_path / "file").write_text("mine")
    for asked in (("run", spec, "--out"), ("deploy", "init")):
        tiny.cli(*asked, tmp_path / "file").refused("is a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_clients_share_is_refused_before_any_of_them_is_asked(tmp_path: Path) -> None:
    spec = tiny.write_spec(tmp_path)
    asked = ("deploy", "run", spec, "--kit", tmp_path / "none", "--share", "everything")
    tiny.cli(*asked).refused("share must be one of none, curve, rows")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_that_are_none_are_a_wrong_request(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("no weights")
    outcome = tiny.cli(
        "certify", "--model", "small_cnn", "--weights", tmp_path / name, "--data", "digits",
        "--out", tmp_path / "c.parquet",
    )  # fmt: skip
    assert outcome.code == 2
    assert "model.state_dict()" in outcome.err


def test_help_shows_whole_sentences_and_list_every_name() -> None:
    commands = tiny.cli("--help").out.partition("Studies:")[2]
    groups = [line[:-1] for line in commands.splitlines() if line.endswith(":")]
    assert groups == ["Models", "Federation", "Results", "Installation"]
    assert "quickstart" in commands
    assert "..." not in commands
    listed = tiny.cli("list").out
    assert all(name in listed for name in ("column", "trimmed-mean", "krum", "scan", "fedrep"))
