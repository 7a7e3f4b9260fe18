"""Sweeps: which runs they have, shared trainings, resumption, one table over seeds."""

import csv
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from certifl.errors import SpecError, TrainingDiverged
from certifl.experiments import parallel, plan
from certifl.experiments.sweep import Sweep, make_sweep, read_axis, read_seeds
from certifl.report import load_runs
from certifl.report.compare import own_interval
from certifl.report.results import by_seed
from certifl.report.table import summary_rows
from certifl.runs.folder import RunFolder
from tiny_study import VALUES, cli, files, write_spec

# One process computes what its tests share.
pytestmark = [pytest.mark.xdist_group("sweep"), pytest.mark.usefixtures("undrawn")]

GRID = (
    *("--grid", "algorithm.name=local,personalized"),
    *("--grid", "personalized:algorithm.epochs=1,2", "--jobs", "1"),
)

SMALL = ("training.rounds=1", "certification.n=100")


def asked(*axes: str, seeds: str = "0", **values: object) -> Sweep:
    return make_sweep(
        {**VALUES, **values}, [], [read_axis(axis) for axis in axes], read_seeds(seeds), Path("x")
    )


def tables(sweep: Sweep) -> list[dict]:
    return [variant.specs[0].algorithm for variant in sweep.variants]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    out = folder / "out"
    command = ("sweep", write_spec(folder, *SMALL), "--seeds", "0,1", *GRID, "--out", out)
    cli(*command).fine("behind the best", "Personalized (epochs = 1)", "table.txt", "figure.png")
    return out


def test_an_axis_of_one_algorithm_and_keys_that_others_lack():
    sweep = asked(
        "algorithm.name=local,fedavg,mixture",
        "mixture:algorithm.personalization=0.1,0.5",
        "algorithm.weighting=uniform,size",
        seeds="0,1,2",
    )
    assert tables(sweep) == [
        {"name": "local"},
        {"name": "fedavg", "weighting": "uniform"},
        {"name": "fedavg", "weighting": "size"},
        {"name": "mixture", "personalization": 0.1},
        {"name": "mixture", "personalization": 0.5},
    ]
    labels = [variant.label for variant in sweep.variants]
    assert labels[1:3] == ["FedAvg (weighting = uniform)", "FedAvg (weighting = size)"]
    assert labels[3:] == ["Mixture, λ = 0.1", "Mixture, λ = 0.5"]
    assert [spec.seed for spec in sweep.variants[0].specs] == [0, 1, 2]
    assert len(sweep.jobs) == 15


def test_the_sweep_of_the_documentation_has_twelve_runs():
    root = Path(__file__).resolve().parents[2]
    command = (root / "docs" / "sweep.md").read_text().split("```\n")[1]
    words = shlex.split(command.splitlines()[0])
    grids = [words[at + 1] for at, word in enumerate(words) if word == "--grid"]
    seeds = words[words.index("--seeds") + 1]
    values = tomllib.loads((root / words[2]).read_text())
    sweep = asked(*grids, seeds=seeds, **values)
    assert len(sweep.jobs) == 12
    assert [v.label for v in sweep.variants][2:] == ["Mixture, λ = 0.1", "Mixture, λ = 0.5"]


def test_keys_of_the_file_that_an_algorithm_lacks_are_left_out():
    own = {
        "algorithm": {"name": "personalized", "base": {"name": "fedavg"}, "epochs": 3},
        "augmentation": {"federated": "none", "personalized": {"family": "pixel", "sigma": 0.1}},
    }
    local, tuned = asked("algorithm.name=local,personalized", **own).variants
    assert local.specs[0].augmentation.personalized == "same"
    assert tuned.specs[0].algorithm["epochs"] == 3


def test_equal_specs_and_trainings_are_one():
    sweep = asked("certification.n=200,300,2e2")
    assert [variant.specs[0].certification.n for variant in sweep.variants] == [200, 300]
    sizes = {"name": "fedavg", "weighting": "size"}
    axes = ("algorithm.name=personalized", "algorithm.epochs=1,2")
    sweep = asked(*axes, algorithm=sizes)
    assert [job.support for job in sweep.jobs] == [True, False, False]
    assert sweep.jobs[0].spec.algorithm == sizes
    own = asked(*axes, model={"name": "mine:network"})
    assert not any(job.support for job in own.jobs)  # a user's network is always trained


def test_a_value_may_be_a_list_or_a_table():
    noise = '{ family = "rotation", sigma = "9deg" }'
    sweep = asked(f"augmentation.federated=none,{noise}", "certification.radii=[0.1,0.2],[0.2]")
    assert len(sweep.variants) == 4
    assert sweep.variants[3].specs[0].certification.radii == [0.2]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("training.rate=0.1",), ("training.rate", "no such key")),
        (("training.lr=0.1,fast",), ("training.lr",)),
        (("algorithm.name=fedavg,fedvag",), ("fedvag", "fedavg")),
        (("mixtur:algorithm.personalization=0.1",), ("mixtur", "Did you mean 'mixture'")),
        (("mixture:algorithm.personalization=0.1",), ("no run has that algorithm",)),
        (("algorithm.mu=0.1",), ("no algorithm of the sweep has it",)),
        (("training.lr=0.1", "training.lr=0.2"), ("given twice",)),
        (("training.lr",), ("KEY=VALUE",)),
        (("training.lr=0.1,,0.2",), ("KEY=VALUE",)),
        (("seed=1,2",), ("--seeds",)),
        (("local:algorithm.name=fedavg",), ("restricted",)),
        (("data.name=digits,mnist",), ("differ in data.name", "--set")),
        (
            (
                'certification.perturbation={family="rotation",sigma=0.1},{family="pixel",sigma=1.0}',
            ),
            ("differ in certification.perturbation",),
        ),
    ],
)
def test_a_wrong_grid_is_refused(axes, words):
    with pytest.raises(SpecError) as refused:
        asked(*axes)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_refusals_come_before_anything_runs(tmp_path):
    spec, out = write_spec(tmp_path), tmp_path / "out"
    cli("sweep", spec, "--seeds", "0,x", "--out", out).refused("--seeds", "whole numbers")
    cli("sweep", spec, "--grid", "training.lr=fast", "--out", out).refused("training.lr")
    # Only the images say that this crop is too large.
    cli("sweep", spec, "--grid", "training.crop=0,9", "--out", out).refused("training.crop")
    assert not out.exists()


def test_the_table_has_the_numbers_of_the_page(swept):
    with (swept / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seeds"] for row in rows] == ["0 1"] * 3
    runs = [mark.parent for mark in (swept / "runs").glob("*/run.json")]
    local = [run for run in load_runs(runs) if run.label.startswith("Local")]
    low, high = own_interval(by_seed(local)[0])
    assert (float(rows[0]["acr_low"]), float(rows[0]["acr_high"])) == (low, high)
    columns = [name for name in rows[0] if re.fullmatch(r"accuracy_[0-9.e-]+", name)]
    shown = [share["radius"] for share in summary_rows(local)[0]["accuracy"]]
    named = [float(name.removeprefix("accuracy_")) for name in columns]
    assert all(name <= radius < name + 1e-6 for name, radius in zip(named, shown, strict=True))
    best = max(rows, key=lambda row: float(row["acr"]))
    assert best["behind"] == ""
    assert best["leads"] == "1"
    behind = [float(row["behind"]) for row in rows if row is not best]
    wanted = [float(best["acr"]) - float(row["acr"]) for row in rows if row is not best]
    assert behind == pytest.approx(wanted)


def test_the_table_as_markdown_and_latex(swept):
    markdown, latex = ((swept / f"table.{kind}").read_text() for kind in ("md", "tex"))
    assert markdown.startswith("| algorithm | seeds | ACR |")
    assert r"\toprule" in latex
    assert r"95 \%" in latex
    assert not set("°≥λσ–") & set(latex.split(r"\begin")[1])
    columns = {len(line.split(" & ")) for line in latex.splitlines() if " & " in line}
    assert columns == {len(markdown.splitlines()[0].split(" | "))}


def test_bases_are_trained_once_and_the_same_command_changes_nothing(swept, monkeypatch):
    trained = {}
    for mark in (swept / "runs").glob("*/run.json"):
        manifest = RunFolder(mark.parent).manifest()
        trained.setdefault(manifest["training_hash"], []).append(manifest)
    assert len(trained) == 2 * 3 + 2  # with two bases that no row shows
    before = files(swept / "runs")
    monkeypatch.setattr(plan, "_SECONDS", 0.0)
    spec = write_spec(swept.parent, *SMALL)
    command = ("sweep", spec, "--seeds", "0,1", *GRID, "--out", swept)
    cli(*command, "--plan").fine("finished")
    cli(*command).fine("behind the best")
    assert files(swept / "runs") == before
    again = ("--grid", "algorithm.name=fedavg,personalized", "--out", swept, "--plan")
    cli("sweep", spec, *again).fine("FedAvg 1 0", "one run after the other")
    assert files(swept / "runs") == before


def test_a_run_that_fails_leaves_the_others(tmp_path, monkeypatch):
    whole = parallel.run

    def run(spec, options):
        if spec.training.lr == 0.1:
            raise TrainingDiverged(None, 0, "weights are not finite")
        return whole(spec, options)

    monkeypatch.setattr(parallel, "run", run)
    out = tmp_path / "out"
    spec = write_spec(tmp_path, *SMALL)
    command = ("sweep", spec, "--grid", "training.lr=0.05,0.1", "--out", out)
    done = cli(*command, "--jobs", "1")
    done.refused("1 of 2 runs failed", "not finite", code=1)
    assert "FedAvg (lr = 0.05)" in done.out
    assert "FedAvg (lr = 0.1)" not in done.out
