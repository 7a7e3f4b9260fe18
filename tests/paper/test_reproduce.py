"""A study folder: figures end to end, shared runs, interruption and resumption, plans."""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from certifl.errors import StoreMismatch
from certifl.experiments import parallel as module
from certifl.experiments.run import Options
from certifl.paper.figures import EXTRA, FIGURES, Figure, Panel, Regime, Setting
from certifl.paper.pages import COLUMNS, claims_of, complete, write_paper_figure
from certifl.paper.reproduce import costs, make_plan, reproduce
from certifl.paper.scales import SCALES
from certifl.report import load_run
from certifl.report.summary import client_acr, client_curves
from certifl.runs.folder import RunFolder
from report_pages import without_drawings
from tiny_study import cli, files

# One process computes what its tests share.
pytestmark = pytest.mark.xdist_group("reproduce")

SMOKE, WHOLE = SCALES["smoke"], dict(FIGURES)
ROTATION = Setting("cifar10", 4, "rotation", "0.1pi")
NOMINAL = Regime("FedAvg (nominal)", "fedavg", "nominal")
TUNED = Regime("Personalized (nominal start)", "personalized", "nominal")
MINI = {"mini": Figure("Mini", ((Panel("curves", (ROTATION,), (NOMINAL, TUNED)),),))}


def mini(out: Path, report=None, overwrite: bool = False, stage=None):
    options = Options(out, device="cpu", overwrite=overwrite, report=report, command="mini")
    return list(reproduce(make_plan(MINI, SMOKE, out), options, stage))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mini")
    assert mini(out) == [(out / "mini", True)]
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "mini"))


@pytest.fixture(scope="module", autouse=True)
def smaller_figures() -> Iterator[None]:
    """Figure 1 for 4 and 10 clients, Figure 5 for one sigma: every kind of run, one of each."""
    few, many = (panel for panel in FIGURES["figure1"].rows[0][:2])
    curves, _, mixture = FIGURES["figure5"].rows[0]
    ways = tuple(way for way in mixture.regimes if way.personalization in (None, 0.5, 1.0))
    rows = {
        "figure1": (replace(few, regimes=few.regimes[:1]), many),
        "figure5": (
            replace(curves, regimes=ways),
            replace(mixture, settings=mixture.settings[:1], regimes=ways),
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, panels in rows.items():
            patch.setitem(FIGURES, name, replace(FIGURES[name], rows=(panels,)))
        patch.setattr("certifl.experiments.run.explore", lambda *_: None)
        without_drawings(patch)
        yield


@pytest.fixture(scope="module")
def study(smaller_figures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    cli("reproduce", "figure1", "--scale", "smoke", "--out", out).fine("figure1", "report.html")
    before = files(out / "runs")
    cli("reproduce", "figure5", "--scale", "smoke", "--out", out).fine("figure5", "report.html")
    after = files(out / "runs")
    assert {name: after[name] for name in before} == before  # shared runs were left alone
    return out


def rows(study: Path, figure: str) -> list[dict[str, str]]:
    with (study / figure / f"{figure}.csv").open() as source:
        return list(csv.DictReader(source))


def test_shared_runs_are_computed_once(study):
    folders = list((study / "runs").iterdir())
    assert len(folders) == 4 + 3 - 2  # local and FedAvg of 10 clients
    assert all(RunFolder(folder).complete() for folder in folders)


@pytest.mark.parametrize(("figure", "pages"), [("figure1", 2), ("figure5", 1)])
def test_a_figure_is_there_as_pictures_numbers_and_pages(study, figure, pages):
    place = study / figure
    names = {path.name for path in place.iterdir()}
    kinds = {f"{figure}.{kind}" for kind in ("png", "pdf", "svg", "csv")}
    assert names == kinds | {"figure.json", "report.html", "pages"}
    assert complete(place)
    written = list((place / "pages").iterdir())
    assert len(written) == pages
    index = (place / "report.html").read_text()
    assert all(f'href="pages/{page.name}"' in index for page in written)
    assert all(page.stat().st_size < 5e6 for page in written)


def test_the_numbers_of_a_panel_are_those_of_its_runs(study):
    held = json.loads((study / "figure1/figure.json").read_text())
    panel = held["panels"][1]
    name = "rotation, σ = 18° · 3 clients"
    for curve in panel["curves"]:
        run = load_run(study / "figure1" / curve["run"])
        mine = [
            r
            for r in rows(study, "figure1")
            if (r["panel"], r["regime"]) == (name, curve["label"])
        ]
        radii = [float(r["x"]) for r in mine if r["client"] == "mean"]
        curves = client_curves(run, radii)
        expected = {"0": curves[0], "2": curves[2], "mean": curves.mean(0), "max": curves.max(0)}
        for client, values in expected.items():
            found = [float(r["value"]) for r in mine if r["client"] == client]
            assert found == pytest.approx(values.tolist(), abs=1e-12)
    assert tuple(rows(study, "figure1")[0]) == COLUMNS


def test_average_radii_against_lambda(study):
    held = json.loads((study / "figure5/figure.json").read_text())
    panel = next(p for p in held["panels"] if p["kind"] == "mixture")
    shown = [r for r in rows(study, "figure5") if r["panel"] == "rotation · ACR"]
    means = [r for r in shown if r["client"] == "mean"]
    assert len(means) == len(panel["curves"]) == 3
    found = {(r["measure"], r["regime"], r["x"]): float(r["value"]) for r in means}
    for curve in panel["curves"]:
        run = load_run(study / "figure5" / curve["run"])
        sigma = f"ACR, sigma = {run.conditions['sigma']:.6g}"
        x = "" if curve["personalization"] is None else str(curve["personalization"])
        assert found[sigma, curve["label"], x] == pytest.approx(np.mean(client_acr(run)))


def test_a_finished_figure_is_left_as_it_is(study):
    before = files(study)
    cli("reproduce", "figure1", "--scale", "smoke", "--out", study).fine("report.html")
    assert files(study) == before


def test_drawing_again_gives_the_same_files(study, tmp_path):
    shutil.copytree(study, tmp_path / "copy")
    place = tmp_path / "copy" / "figure5"
    before = {name: held[0] for name, held in files(place).items()}
    write_paper_figure(place)
    assert {name: held[0] for name, held in files(place).items()} == before


def test_another_scale_does_not_mix_into_a_study(study):
    before = files(study)
    refused = cli("reproduce", "figure1", "--scale", "laptop", "--out", study)
    refused.refused("smoke", "laptop", "--out")
    fewer = cli(
        *("reproduce", "figure1", "--scale", "smoke", "--out", study),
        *("--set", "certification.images=2"),
    )
    fewer.refused("certification.images=2")
    assert files(study) == before


def test_a_plan_writes_nothing(study, tmp_path):
    place = tmp_path / "none"
    with pytest.MonkeyPatch.context() as patch:
        for name, figure in WHOLE.items():
            patch.setitem(FIGURES, name, figure)
        cli("reproduce", "all", "--plan", "--out", place).fine("figure10", "46,018,100")
    assert not place.exists()
    before = files(study)
    cli("reproduce", "figure1", "--scale", "smoke", "--plan", "--out", study).fine("finished")
    cli("reproduce", "figure6", "--scale", "smoke", "--plan", "--out", study).fine("100 %")
    assert files(study) == before


def test_costs_count_shared_runs_once_and_use_speeds_of_finished_runs(study):
    both = {name: FIGURES[name] for name in ("figure1", "figure6", "figure8")}
    found = costs(make_plan(both, SMOKE, study), "cpu")
    # Figure 8 needs a FedAvg of every setting; Figure 6 has those against translation.
    assert [c.runs for c in found.values()] == [4, 12, 10, 21]
    # Its local run against the small rotation is that of Figure 1.
    assert [c.done for c in found.values()] == [4, 0, 1, 4]
    assert found["figure1"].seconds == 0
    left = found["figure6"]
    assert left.measured == 1.0
    assert left.trainings == 8
    assert left.votes_at_most == (2 * 3 * 2 * 6 + 2 * 3 * 3 * 5) * 210
    assert 0 < left.seconds < found["all"].seconds


def test_no_time_is_named_for_a_gpu_that_was_not_measured(study, tmp_path, monkeypatch):
    monkeypatch.setattr("certifl.paper.reproduce.choose_device", lambda name: torch.device("cuda"))
    figure = {"figure6": FIGURES["figure6"]}
    unknown = costs(make_plan(figure, SMOKE, tmp_path), "cpu")["figure6"]
    assert (unknown.unknown, unknown.seconds) == (12, 0.0)
    assert costs(make_plan(figure, SMOKE, study), "cpu")["figure6"].unknown == 0
    cli("reproduce", "figure6", "--plan", "--out", tmp_path / "none").fine("not measured")
    monkeypatch.undo()
    cli("reproduce", "all", "--scale", "paper", "--plan", "--out", tmp_path / "no").fine("years")


def test_a_figure_says_what_the_paper_says_beside_what_is_seen(study):
    page = (study / "figure1" / "report.html").read_text()
    assert "What the paper says of it, and what is seen here" in page
    assert "With 4 clients, whose data are plenty" in page
    assert page.count("<li><b>digits, ") == 2  # one finding for each comparison
    for name, figure in {**WHOLE, **EXTRA}.items():
        assert figure.says, name
        assert claims_of(name), name


def test_unknown_figures_and_scales_are_refused(tmp_path):
    out = tmp_path / "none"
    cli("reproduce", "figure11", "--out", out).refused("figure11", "figure10", "all")
    cli("reproduce", "figure1", "--scale", "big", "--out", out).refused("big", "laptop")
    cli("reproduce", "figure1", "--set", "seed=-1", "--out", out).refused("seed")
    assert not out.exists()


def test_a_stopped_study_resumes_and_ends_with_the_same_certificates(whole, tmp_path):
    seen: list[str] = []

    def stop(what: str, done: int, total: int, unit: str) -> None:
        seen.append(what)
        if what == "certifying":
            raise KeyboardInterrupt

    for expected in (["training", "certifying"], ["certifying"]):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            mini(tmp_path, stop)
        assert list(dict.fromkeys(seen)) == expected
        assert not (tmp_path / "mini").exists()
    mini(tmp_path)
    for folder in (whole / "runs").iterdir():
        expected = RunFolder(folder).load_certificates()
        resumed = RunFolder(tmp_path / "runs" / folder.name).load_certificates()
        assert np.array_equal(resumed.counts, expected.counts)
        assert np.array_equal(resumed.radius, expected.radius)


def test_a_damaged_run_is_computed_again(copied):
    plan = make_plan(MINI, SMOKE, copied)
    plan.jobs[1].path.joinpath("certificates.parquet").write_bytes(b"no table")
    assert mini(copied) == [(copied / "mini", True)]
    assert all(job.done() for job in plan.jobs)
    assert mini(copied) == [(copied / "mini", False)]


def test_personalization_continues_the_training_beside_it(copied):
    spent: dict[str, int] = {}
    stages: list[str] = []

    def count(what: str, done: int, total: int, unit: str) -> None:
        if what == "training":
            spent[stages[-1]] = spent.get(stages[-1], 0) + 1

    mini(copied, count, stage=stages.append)
    assert stages == []
    mini(copied, count, overwrite=True, stage=stages.append)
    assert len(stages) == 2  # each run once more, in the order in which they build on each other
    # Two clients: two rounds of FedAvg, then one of fine-tuning alone.
    assert list(spent.values()) == [4, 2]


def test_a_run_of_another_process_is_waited_for(copied, monkeypatch):
    plan = make_plan(MINI, SMOKE, copied)
    shutil.rmtree(plan.jobs[1].path)
    other = RunFolder(plan.jobs[1].path).locked()
    other.__enter__()
    naps: list[float] = []

    def nap(seconds: float) -> None:
        """The other process gives up in the middle."""
        naps.append(seconds)
        other.__exit__(None, None, None)

    monkeypatch.setattr(module.time, "sleep", nap)
    stages: list[str] = []
    assert mini(copied, stage=stages.append) == [(copied / "mini", True)]
    assert len(naps) == 1
    assert any("another process" in text for text in stages)
    assert all(job.done() for job in plan.jobs)


def test_a_folder_of_strangers_is_refused(tmp_path):
    plan = make_plan(MINI, SMOKE, tmp_path)
    plan.jobs[0].path.mkdir(parents=True)
    (plan.jobs[0].path / "notes.txt").write_text("mine")
    with pytest.raises(StoreMismatch, match=r"notes\.txt"):
        mini(tmp_path)


def test_figures_need_finished_runs(copied):
    plan = make_plan(MINI, SMOKE, copied)
    RunFolder(plan.jobs[0].path).update({"status": "running"})
    with pytest.raises(StoreMismatch, match="not finished"):
        write_paper_figure(copied / "mini")
