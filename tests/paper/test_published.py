"""Runs published as data: what is written, what of it is checked, and pages made from it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from certifl.certification import Certificates
from certifl.errors import InputError, StoreMismatch
from certifl.experiments.run import Options, run
from certifl.paper.claims import CLAIMS
from certifl.paper.figures import (
    EXTRA,
    FEDAVG,
    FIGURES,
    LOCAL,
    PERSONALIZED,
    Figure,
    Panel,
    Setting,
)
from certifl.paper.reproduce import make_plan
from certifl.paper.scales import SCALES
from certifl.runs.folder import RunFolder, StoredRun
from certifl.runs.published import publish, without_folders
from certifl.spec import Spec
from scripts import results_scripts
from tiny_study import cli, files

publishing, figures, power, pilot = results_scripts("publish", "figures", "power", "pilot")
ROTATION = Setting("cifar10", 4, "rotation", "0.1pi")
LATER = Setting("cifar10", 4, "translation", 0.1)
WAYS = (LOCAL, FEDAVG, PERSONALIZED)
FIGURES_HERE = {
    "figure1": Figure("One panel", ((Panel("curves", (ROTATION,), WAYS),),)),
    "figure6": Figure("Not computed", ((Panel("curves", (LATER,), (LOCAL,)),),)),
}
SCALE = SCALES["smoke"]


@pytest.fixture(scope="module", autouse=True)
def two_figures() -> Iterator[None]:
    with mock.patch.multiple(publishing, FIGURES=FIGURES_HERE, EXTRA={}):
        yield


def spec(regime) -> Spec:
    return SCALE.spec(ROTATION, regime)


def compute(study: Path, *regimes) -> None:
    for regime in regimes:
        beside = tuple(sorted((study / "runs").glob("*")))
        own = study / "runs" / spec(regime).hash()
        command = f"/opt/bin/certifl reproduce figure1 --out {study}"
        options = Options(own, device="cpu", siblings=beside, command=command, explore=False)
        run(spec(regime), options)


def start(script: ModuleType, *words: str | Path) -> None:
    with mock.patch("sys.argv", [script.__name__, *map(str, words)]):
        script.main()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local and FedAvg; the fine-tuning comes later."""
    out = tmp_path_factory.mktemp("study")
    compute(out, LOCAL, FEDAVG)
    return out


@pytest.fixture(scope="module")
def data(study: Path, two_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study as it is published in two goes."""
    into = tmp_path_factory.mktemp("published") / "data"
    words = (study, "--scale", "smoke", "--into", into, "--commit", "c0ffee")
    start(publishing, *words)
    # FedAvg waits for what continues its training.
    assert {path.name for path in (into / "runs").iterdir()} == {spec(LOCAL).hash()}
    compute(study, PERSONALIZED)
    start(publishing, *words)
    assert {path.name for path in (into / "runs").iterdir()} == {spec(w).hash() for w in WAYS}
    return into


def copied(data: Path, regime, into: Path) -> Path:
    return Path(shutil.copytree(data / "runs" / spec(regime).hash(), into / "run"))


def test_what_is_published_is_the_run_without_its_models_and_folders(study, data):
    for regime in WAYS:
        name = spec(regime).hash()
        whole, own = study / "runs" / name, data / "runs" / name
        assert sorted(path.name for path in own.iterdir()) == [
            *("certificates.parquet", "history.jsonl", "run.json", "spec.toml")
        ]
        stored = Certificates.load(own / "certificates.parquet")
        assert stored.same_results(Certificates.load(whole / "certificates.parquet"))
        for path in own.iterdir():
            assert str(study).encode() not in path.read_bytes()
        manifest = json.loads((own / "run.json").read_text())
        assert manifest["command"] == "certifl reproduce figure1 --out OUT"
        assert manifest["spec_hash"] == name
    assert set(json.loads((data / "commits.json").read_text()).values()) == {"c0ffee"}


def test_publishing_again_writes_nothing(study, data, tmp_path):
    before = files(data / "runs")
    start(publishing, study, "--scale", "smoke", "--into", data)
    assert files(data / "runs") == before
    one = data / "runs" / spec(LOCAL).hash()
    assert publish(StoredRun(one), tmp_path / "again")
    assert {k: v[0] for k, v in files(tmp_path / "again").items()} == {
        k: v[0] for k, v in files(one).items()
    }


def test_publishing_completes_what_was_interrupted(study, tmp_path):
    run_ = StoredRun(study / "runs" / spec(LOCAL).hash())
    publish(run_, tmp_path / "run")
    for name in ("run.json", "certificates.parquet"):
        (tmp_path / "run" / name).unlink()
        assert publish(run_, tmp_path / "run")
        assert RunFolder(tmp_path / "run").complete()


def test_only_sound_finished_runs_without_paths_are_published(study, tmp_path):
    source = Path(shutil.copytree(study / "runs" / spec(LOCAL).hash(), tmp_path / "run"))
    folder = RunFolder(source)
    folder.update({"client_names": ["/home/me/a"]})
    with pytest.raises(InputError, match=r"run.json names a folder .*/home/me/a"):
        publish(StoredRun(source), tmp_path / "into")
    folder.update({"client_names": [], "status": "running"})
    with pytest.raises(StoreMismatch, match="not finished"):
        publish(StoredRun(source), tmp_path / "into")
    folder.update({"client_names": [], "status": "finished", "votes": 3})
    with pytest.raises(SystemExit, match="is not published: "):
        publishing.add([source], tmp_path / "into", None)
    assert not (tmp_path / "into").exists()


def test_commands_lose_their_folders():
    command = "/a/b/certifl run '/x y/s.toml' --out=/c/d --data-dir D --out rel"
    assert without_folders(command).startswith("certifl run ")
    assert without_folders(command).endswith("--out=d --data-dir DATA --out OUT")
    assert without_folders("") == ""


def test_verify_says_what_it_could_not_check_and_ends_with_2(data, tmp_path):
    seen = cli("verify", data / "runs" / spec(FEDAVG).hash())
    assert seen.code == 2
    assert "certificates follow from their votes" in seen.out
    assert "models, which are not published" in seen.out
    assert "which images the clients certified" in seen.out
    assert "published without its models" in seen.err
    assert cli("verify", data / "runs" / spec(LOCAL).hash(), "--recast", "1").code == 2


def test_verify_finds_what_was_changed(data, tmp_path):
    own = copied(data, LOCAL, tmp_path)
    lines = (own / "history.jsonl").read_text().splitlines(keepends=True)
    (own / "history.jsonl").write_text("".join(lines[:-1]))
    seen = cli("verify", own)
    assert seen.code == 1
    assert "has other rounds than the spec gives" in seen.err
    rows = Certificates.load(own / "certificates.parquet")
    moved = replace(rows, index=rows.index + 1, radius=rows.radius + 0.01)
    moved.save(own / "certificates.parquet")
    seen = cli("verify", own)
    assert seen.code == 1
    assert "not among those that spec and partition choose" in seen.err
    assert "radius" in seen.err


@pytest.mark.parametrize(
    "invented",
    [
        {"unseen": [0]},
        {"plain": {"1": {"images": 10, "correct": 10}}},
        {"privacy": {"epsilon": [0.1, 0.1]}},
        {"client_names": ["a", "b"]},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_invented_entries_of_a_published_record_are_found(invented, data, tmp_path):
    own = RunFolder(copied(data, LOCAL, tmp_path))
    own.update(invented)
    assert cli("verify", own.path).code == 1


def test_what_was_changed_after_publishing_is_not_published_over_it(study, tmp_path):
    source = Path(shutil.copytree(study / "runs" / spec(LOCAL).hash(), tmp_path / "run"))
    into = tmp_path / "into"
    assert publishing.add([source], into, None) == ["run"]
    assert publishing.add([source], into, None) == []
    path = source / "certificates.parquet"
    honest = Certificates.load(path)
    replace(honest, radius=honest.radius * 1.5).save(path)
    with pytest.raises(SystemExit, match="is not published: "):
        publishing.add([source], into, None)
    assert Certificates.load(into / "run" / path.name).same_results(honest)


def test_claims_read_published_runs(data):
    cli("claims", data).fine("4.1 (i)")


def test_a_study_continues_from_published_runs(study, data, tmp_path):
    out = Path(shutil.copytree(data, tmp_path / "study"))
    plan = make_plan(FIGURES_HERE, SCALE, out)
    assert [job.spec.hash() for job in plan.jobs if not job.done()] == [
        SCALE.spec(LATER, LOCAL).hash()
    ]


def test_a_fine_tuning_beside_a_published_base_trains_it_again(study, data, tmp_path):
    """There are no rounds to start from, and the certificates are the same."""
    out = tmp_path / "study"
    shutil.copytree(data / "runs" / spec(FEDAVG).hash(), out / "runs" / spec(FEDAVG).hash())
    compute(out, PERSONALIZED)
    file = Path("runs", spec(PERSONALIZED).hash(), "certificates.parquet")
    first, again = (Certificates.load(place / file) for place in (study, out))
    assert again.same_results(first)


def test_pages_are_made_from_published_runs(data, tmp_path):
    start(figures, data, "--into", tmp_path)
    page = (tmp_path / "figure1.md").read_text()
    assert (tmp_path / "figure1.png").stat().st_size > 1000
    for heading in ("What the paper says", "What is seen here", "Numbers", "How it was made"):
        assert f"\n## {heading}\n" in page
    assert "commit `c0ffee`" in page
    index = (tmp_path / "README.md").read_text()
    later = next(line for line in index.splitlines() if line.startswith("| Figure 6"))
    assert "not computed yet (0 of 1 runs)" in later
    rows = [line.split(" | ") for line in (tmp_path / "paper.md").read_text().splitlines()]
    rows = [
        row for row in rows if row[0].startswith("| ") and row[0][2:] in {c.name for c in CLAIMS}
    ]
    assert len(rows) == len(CLAIMS) == 17
    assert all(row[-1].strip("| ") for row in rows)  # an interval, or why there is none


def test_without_published_runs_the_pages_stay(tmp_path, capsys):
    with mock.patch.object(figures, "DATA", tmp_path / "none"):
        start(figures, "--into", tmp_path / "pages")
    assert "the pages stay as they are" in capsys.readouterr().out
    assert not (tmp_path / "pages").exists()


def test_damaged_data_end_with_2_and_one_line(data, tmp_path, capsys):
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    (broken / "runs" / spec(LOCAL).hash() / "certificates.parquet").write_bytes(b"no table")
    with pytest.raises(SystemExit) as ended:
        start(figures, broken, "--into", tmp_path / "pages")
    assert ended.value.code == 2
    assert "certificates.parquet" in capsys.readouterr().err


def test_widths_go_with_the_root_of_the_images(tmp_path):
    pilot = tmp_path / "pilot.csv"
    pilot.write_text(
        "claim,setting,difference,of,half,images\n"
        '4.1 (i),"cifar10, rotation σ = 18°, 4 clients",Local minus FedAvg,ACR,9.0,160\n'
        '4.1 (i),"cifar10, rotation σ = 18°, 7 clients",Local minus FedAvg,ACR,1.0,160\n'
        '4.1 (ii),"cifar10, rotation σ = 18°, 4 clients",Local minus FedAvg,ACR,2.0,160\n'
    )
    found = power.widths(pilot, "4.1 (i)", SCALES["overnight"])  # it has no images for 7 clients
    (width,) = found
    assert (width.half, width.images, width.planned) == (9.0, 160, 4000)
    assert width.expected == pytest.approx(9.0 * (160 / 4000) ** 0.5)
    row = power.row(CLAIMS[0], found)
    assert row[-1] == "equal below 1.2, different above 4.8 points"
    assert all(power.widths(power.PILOT, claim.name, SCALES["overnight"]) for claim in CLAIMS)


def test_the_pilot_measures_both_criteria_and_resumes(tmp_path, capsys):
    words = ("--scale", "smoke", "--out", tmp_path, "--set", "training.local_epochs=1")
    start(pilot, *words, "--part", "alone")
    start(pilot, *words)
    said = capsys.readouterr().out
    assert "(a) a client alone fits " in said
    assert "(b) 3 rounds instead of 2: " in said


def test_every_figure_is_published_at_the_scale():
    """One training is shared by several figures: its fine-tunings are all in the plan."""
    plan = make_plan({**FIGURES, **EXTRA}, SCALES["overnight"], Path("nowhere"))
    bases = {job.spec.training_hash() for job in plan.jobs}
    assert all(job.spec.training_hash(of_base=True) in bases for job in plan.jobs)
