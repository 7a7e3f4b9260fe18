"""The examples that choose and compare: what they print follows from what they computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from certifl.report.compare import Difference
from certifl.runs.folder import RunFolder
from scripts import load_script
from tiny_study import cli

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FEW = ("training.rounds=1", "certification.n=100")

pytestmark = pytest.mark.usefixtures("undrawn")


def test_choosing_lambda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose = load_script("examples/choose_lambda.py")
    choose.QUICK = (*choose.QUICK, *FEW)
    choose.main(["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    mean = [float(value) for value in rows["mean"][1:]]
    best = choose.QUICK_LAMBDAS[mean.index(max(mean))]
    assert len(mean) == 3
    assert f"\nlambda = {best:g} is " in said
    assert "By client, each by itself: " in said
    held = sorted(tmp_path.rglob("run.json"))
    before = [path.stat().st_mtime_ns for path in held]
    choose.main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out == said
    assert [path.stat().st_mtime_ns for path in held] == before


def test_what_is_recommended() -> None:
    """The best, and exactly those whose interval to it contains 0."""
    choose, lambdas = load_script("examples/choose_lambda.py"), (0.1, 0.5, 0.9)
    acr = (0.2, 0.3, 0.1)

    def pairs(low: float) -> dict[tuple[int, int], Difference]:
        return {
            (0, 1): Difference(0, 1, -0.1, -0.2, -low),
            (0, 2): Difference(0, 2, 0.1, 0.05, 0.2),
            (1, 2): Difference(1, 2, 0.2, 0.1, 0.3),
        }

    clear = choose.recommended(lambdas, acr, pairs(0.05))
    assert clear == "lambda = 0.5 is better than all others."
    tied = choose.recommended(lambdas, acr, pairs(-0.05))
    assert tied == "lambda = 0.5 is ahead; no difference shown to 0.1. It is better than the rest."


def test_comparing_regimes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = load_script("examples/compare_regimes.py")
    compare.QUICK = (*compare.QUICK, *FEW)
    compare.main(["fedavg", "local", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 + 4  # a line for every run, then the comparison
    folders = {path.parent.name for path in tmp_path.rglob("run.json")}
    assert folders == {"fedavg-0", "fedavg-1", "local-0", "local-1"}
    acr = {
        name: RunFolder(tmp_path / "quick" / name).load_certificates().average_certified_radius()
        for name in folders
    }
    gain = sum(acr[f"fedavg-{seed}"] - acr[f"local-{seed}"] for seed in range(2))
    words = said[5].split()
    shown = float(next(word for word in words if word[0] in "+-"))
    assert shown == 0.0 or (shown > 0) == (gain > 0)
    low, high = said[5].split("[")[1].split("]")[0].split(", ")
    assert float(low) <= shown <= float(high)
    zero = float(low) <= 0.0 <= float(high)
    assert said[5].endswith("no difference shown") == zero
    assert said[7].endswith("too few images for an interval")


def test_a_natural_federation_of_images_of_unlike_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTIFL_CACHE", str(tmp_path / "cache"))
    isic = load_script("examples/fed_isic2019.py")
    isic.main([str(tmp_path / "data"), "--train", "12", "--test", "3"])
    study = EXAMPLES / "fed_isic2019.toml"
    quick = [
        "training.rounds=1",
        "training.local_epochs=1",
        "certification.n=100",
        "certification.images=2",
    ]
    settings = [word for setting in quick for word in ("--set", setting)]
    cli("run", study, "--data-dir", tmp_path / "data", *settings, "--out", tmp_path / "run").fine()
    run = RunFolder(tmp_path / "run")
    certificates = run.load_certificates()
    assert set(certificates.client.tolist()) == set(range(6))
    assert certificates.conditions["unit"] == "log factor"
    assert run.manifest()["data"]["image_size"] == [32, 32]
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(isic.lesion(np.random.default_rng(0), 1, 3))
    cli("predict", photo, "--run", tmp_path / "run", "--n", "100").fine("crop = center", "factor")
