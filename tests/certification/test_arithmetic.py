"""What "auto" stands for: measured once with an injected clock, and then the same everywhere."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import certifl
import tiny_study as tiny
from certifl.certification import arithmetic
from certifl.certification.arithmetic import Arithmetic, Trial, bears_rounding, choose_arithmetic
from certifl.certification.network import Network, prepare
from certifl.experiments.predict import certify_image
from certifl.experiments.verify import verify_run

NOISE = certifl.PixelNoise(0.1)
IMAGES = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
TRIAL = Trial(NOISE, 0, n0=100, planned=1_000_000)
Seconds = Callable[[Network], float]


class Coordinates(nn.Module):
    """Compares a place with another a quarter below it: eight bits may not tell them apart."""

    def forward(self, x: Tensor) -> Tensor:
        place = 100.0 + (x[:, 0].mean((1, 2)) - 0.25)
        return torch.stack([100.0 - place, place - 100.0], 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Seconds], None]:
    """Sets how many seconds an image costs, in a cache of this test alone."""
    monkeypatch.setenv("CERTIFL_CACHE", str(tmp_path))
    monkeypatch.setattr(arithmetic, "computes_bfloat16", lambda _device: True)

    def set_to(seconds: Seconds) -> None:
        monkeypatch.setattr(
            arithmetic, "seconds_of_call", lambda network, noisy: seconds(network) * len(noisy)
        )

    return set_to


def rounded_at(share: float) -> Seconds:
    return lambda network: 1e-5 * (share if network.precision == "bfloat16" else 1.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


class OfShapes(nn.Module):
    """Computes with sizes alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0) * 1, x.shape[1], x.shape[2] * x.shape[3] // x.shape[3], -1)


class Products(nn.Module):
    """Products of activations may need more digits than bfloat16 has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


class OfItsOwn(nn.Identity):
    """A known layer by its class alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0, 1, x.shape[-1])


@pytest.mark.parametrize(("share", "chosen"), [(0.86, "bfloat16"), (0.88, "float32")])
def test_bfloat16_has_to_be_faster_by_fifteen_percent(clock, share, chosen):
    clock(rounded_at(share))
    assert choose_arithmetic(net(), IMAGES, TRIAL, "cpu").precision == chosen


def test_a_choice_is_the_same_for_certify_and_predict_whatever_the_clock_says_later(clock):
    model = net()
    clock(rounded_at(0.1))
    made = certifl.certify(model, IMAGES, NOISE, n=100_000, device="cpu", alpha=0.4)
    assert made.conditions["precision"] == "bfloat16"
    clock(rounded_at(9.0))
    again = certifl.certify(model, IMAGES, NOISE, n=2000, device="cpu", alpha=0.4)
    assert again.conditions["precision"] == "bfloat16"
    assert (
        choose_arithmetic(model, IMAGES, Trial(NOISE, 1, 100, 100), "cpu").precision == "bfloat16"
    )
    assert (certifl.predict(model, IMAGES, NOISE, device="cpu", alpha=0.4) >= -1).all()


def test_few_votes_are_cast_in_float32_and_settle_nothing(clock, tmp_path):
    clock(rounded_at(0.1))
    few = Trial(NOISE, 0, n0=100, planned=39_999)
    assert choose_arithmetic(net(), IMAGES, few, "cpu").precision == "float32"
    assert not list(tmp_path.rglob("*.json"))


def test_networks_that_compute_with_coordinates_or_cannot_be_traced_stay_in_float32():
    assert bears_rounding(net())
    for name in ("small_cnn", "small_resnet", "resnet18"):
        assert bears_rounding(certifl.models.build(name, 3, 10, seed=0)), name
    assert not bears_rounding(Coordinates())
    assert not bears_rounding(nn.Sequential(net(), nn.Softmax(1)))
    assert not bears_rounding(nn.Sequential(net(), OfItsOwn()))
    assert bears_rounding(nn.Sequential(OfShapes(), net()))
    assert not bears_rounding(nn.Sequential(net(), Products()))
    hooked = nn.Linear(5, 5)
    hooked.register_forward_hook(lambda _layer, _inputs, logits: logits.softmax(1))
    assert not bears_rounding(nn.Sequential(net(), hooked))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    assert bears_rounding(nn.Sequential(net(), normed))


def test_votes_lost_on_unanimous_images_keep_float32(clock, monkeypatch):
    clock(rounded_at(0.1))
    monkeypatch.setattr(arithmetic, "bears_rounding", lambda _model: True)
    model = Coordinates().eval()
    plain, rounded = (prepare(model, IMAGES, "cpu", p) for p in ("float32", "bfloat16"))
    gray = 0.5 + 0.01 * (IMAGES - IMAGES.mean((2, 3), keepdim=True))
    assert arithmetic.loses(plain, rounded, gray, TRIAL)
    assert not arithmetic.loses(plain, plain, gray, TRIAL)
    assert choose_arithmetic(model, gray, TRIAL, "cpu").precision == "float32"


def test_batch_size_and_threads_are_chosen_in_the_same_measurement(clock, monkeypatch):
    clock(lambda network: 1e-5 / network.batch_size**0.5 * (2 - network.one_thread))
    made = choose_arithmetic(net(), IMAGES, TRIAL, "cpu")
    own = prepare(net(), IMAGES, "cpu").batch_size
    assert (made.batch_size, made.threads) == (4 * own, 0)  # small: on one thread in any case
    assert choose_arithmetic(net(), IMAGES, TRIAL, "cpu", batch_size=7).batch_size == 7
    monkeypatch.setattr(arithmetic, "_threads_matter", lambda _network: True)
    wider = torch.rand((4, 3, 8, 8))  # other images, other noise: a choice of its own
    trial = Trial(certifl.PixelNoise(0.2), 0, n0=100, planned=1_000_000)
    assert choose_arithmetic(net(), wider, trial, "cpu", 5) == Arithmetic("float32", 5, 1)


def test_a_batch_size_that_takes_too_long_to_be_timed_is_not_chosen(clock):
    own = prepare(net(), IMAGES, "cpu").batch_size
    clock(lambda network: 0.15 / own * (1 if network.batch_size == own else 0.1))
    assert choose_arithmetic(net(), IMAGES, TRIAL, "cpu").batch_size == own


def test_a_choice_that_cannot_be_cached_is_reported(clock, tmp_path, caplog):
    clock(rounded_at(1.0))
    (tmp_path / "arithmetic").write_text("a file where the folder would be")
    choose_arithmetic(net(), IMAGES, TRIAL, "cpu")
    assert "cannot be cached" in caplog.text


@pytest.mark.parametrize(
    "stored", [None, 3, {}, {"precision": "half", "batch_size": 1, "threads": 0}]
)
def test_a_damaged_choice_is_measured_anew(stored):
    assert Arithmetic.read(stored) is None


def test_a_run_keeps_its_choice_for_shards_predictions_and_verification(copied, tmp_path):
    manifest = json.loads((copied / "run.json").read_text())
    (choice,) = manifest["arithmetic"].values()
    assert Arithmetic.read(choice) is not None
    choice["precision"] = "bfloat16"
    (copied / "run.json").write_text(json.dumps(manifest))
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    predicted = certify_image(tmp_path / "x.png", copied, None, 50, False, "cpu")
    assert predicted.certificates.conditions["precision"] == "bfloat16"
    (problem,) = verify_run(copied).problems
    assert "in run.json auto stands for bfloat16" in problem
    choice["precision"] = "float32"
    (copied / "run.json").write_text(json.dumps(manifest))
    options = ("--images", "4", "--n", "200", "--out", tmp_path / "part.parquet")
    tiny.cli("certify", "--run", copied, *options, "--shard", "1/2").fine()
    del manifest["arithmetic"]
    (copied / "run.json").write_text(json.dumps(manifest))
    options = (*options, "--overwrite")
    tiny.cli("certify", "--run", copied, *options, "--shard", "1/2").refused("--precision")
