"""docs/results/figures.py: pages out of a study whose numbers and effects are known."""

import io
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import claims_factory as factory
from certifl.paper.claims import CLAIMS
from certifl.paper.claims.catalogue import check_runs
from certifl.paper.figures import FIGURES
from certifl.report import load_run
from certifl.report.summary import client_acr, client_curves, largest_radius
from certifl.report.wording import scales
from scripts import RESULTS, results_scripts

paging, study_numbers, figures, verdicts = results_scripts(
    "paging", "study_numbers", "figures", "verdicts"
)
REGIMES = (("Local", factory.LOCAL, 0.3), ("FedAvg", factory.FEDAVG, 0.6))
SETTINGS = [(p, n) for p in (factory.ROTATION, factory.LARGE_ROTATION) for n in (4, 10)]
COMMAND = "/opt/bin/certifl reproduce figure1 --data-dir /home/me/data --out /tmp/study"


def round_line(number: int, seconds: float) -> str:
    return json.dumps({"round": number, "seconds": seconds, "clients": {}}) + "\n"


def finish(folder: Path, number: int, rounds: str) -> None:
    """What a real run knows of itself beyond its certificates."""
    facts = json.loads((folder / "run.json").read_text())
    begun, ended = (f"2026-01-01T10:{number + more:02d}" for more in (0, 1))
    times = {"created": f"{begun}:00Z", "finished": f"{ended}:30Z"}
    facts |= {"certification_seconds": 10.0, "votes": 1000, "training_hash": "t", **times}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "history.jsonl").write_text(rounds)
    text = (folder / "spec.toml").read_text()
    text = text.replace("[training]\n", "[training]\nbatch_size = 16\n")
    text = text.replace("[certification]\n", '[certification]\nestimator = "sequential"\n')
    (folder / "spec.toml").write_text(text)


def write_figure(study: Path, name: str, pages: list[dict[str, Any]]) -> None:
    place = study / name
    place.mkdir()
    panels = [
        {"kind": "curves", "row": 0, "column": column, "curves": page["runs"]}
        for column, page in enumerate(pages)
    ]
    index = {"figure": name, "title": "Planted", "scale": "smoke", "settings": []}
    index |= {"panels": panels, "pages": pages, "command": COMMAND}
    (place / "figure.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figure 1 with Local far behind FedAvg; every second training goes on from the one before."""
    place, pages, count = tmp_path_factory.mktemp("study"), [], 0
    for perturbation, clients in SETTINGS:
        shown = []
        for label, algorithm, acr in REGIMES:
            values = factory.spec(algorithm, perturbation, clients=clients)
            folder = factory.write(place, factory.run(values, acr, images=20))
            first = round_line(0, 100.0 + count // 2)
            finish(folder, count, first + (round_line(1, 7.0 + count) if count % 2 else ""))
            shown.append({"run": f"../runs/{folder.name}", "label": label})
            count += 1
        pages.append({"name": f"{perturbation['sigma']}-{clients}", "runs": shown})
    write_figure(place, "figure1", pages)
    return place


@pytest.fixture(scope="module")
def made(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(study, tmp_path_factory.mktemp("pages"))


def start(study: Path, into: Path) -> Path:
    words = ["figures.py", str(study), "--into", str(into), "--commit", "c0ffee"]
    with mock.patch("sys.argv", words):
        figures.main()
    return into


def cells(page: str, heading: str) -> list[list[str]]:
    table = page.split(heading, 1)[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_numbers_are_those_of_the_runs(study, made):
    page = (made / "figure1.md").read_text()
    index = json.loads((study / "figure1/figure.json").read_text())
    rows = cells(page, "### cifar10, 4 clients, rotation, σ = 18°")
    assert [row[0] for row in rows[2:]] == ["Local", "FedAvg"]
    runs = [load_run(study / "figure1" / one["run"]) for one in index["pages"][0]["runs"]]
    scale = scales(runs[0].conditions, largest_radius(runs))[0]
    for run, row in zip(runs, rows[2:], strict=True):
        acr = client_acr(run)
        assert row[1] == scale.text(float(acr.mean()))
        assert row[3] == f"{scale.number(float(acr.min()))} to {scale.text(float(acr.max()))}"
        low, high = (float(end) for end in row[2].removesuffix("°").split(" to "))
        assert low < scale.shown(float(acr.mean())) < high
        degrees = [float(head.removeprefix("at ").removesuffix("°")) for head in rows[0][4:]]
        shares = client_curves(run, [scale.stored(d) for d in degrees]).mean(axis=0)
        assert [float(cell.removesuffix(" %")) for cell in row[4:]] == pytest.approx(
            100 * shares, abs=0.051
        )


def test_a_planted_effect_is_reported_and_undecided_ones_are_called_that(made):
    page = (made / "figure1.md").read_text()
    paper, _, rest = page.partition("## What is seen here")
    assert f"\n\n{FIGURES['figure1'].says}\n\n- 4.1 (i): " in paper
    words = rest.split("## Numbers")[0]
    assert "**4.1 (i): not supported.**" in words
    assert "**4.1 (ii): supported.**" in words
    verdict = next(line for line in words.splitlines() if "4.1 (ii):" in line)
    assert "In this figure: of 2 comparisons, supported in 2" in verdict
    assert "Not all runs that the claim is about were computed." in verdict  # rotation alone
    ends = re.findall(r"between ([+-]\d+\.\d) and ([+-]\d+\.\d) points", verdict)
    low, high = map(float, ends[0])
    assert 0 < low < 30 < high
    assert "More images would decide them" in words
    assert "**4.2" not in page
    assert "4.1 (iii): not tested" in words


def test_time_is_counted_once(study):
    cost = study_numbers.cost_of(study.glob("runs/*"))
    assert (cost.runs, cost.trainings, cost.votes) == (8, 4, 8000)
    # Four first rounds of 100 to 103 s, each in two runs, and four second rounds of 8, 10, 12, 14.
    assert cost.training == pytest.approx(100 + 101 + 102 + 103 + 8 + 10 + 12 + 14)
    assert cost.certification == 80.0
    # Runs of 90 s, one begun every minute: 10:00:00 to 10:08:30.
    assert cost.wall == 8 * 60 + 30


def test_pauses_between_runs_are_not_counted():
    union = study_numbers._union
    spans = [("10:00", "10:05"), ("10:01", "10:02"), ("10:04", "10:06"), ("11:00", "11:01")]
    stamped = [(f"2026-01-01T{a}:00Z", f"2026-01-01T{b}:00Z") for a, b in reversed(spans)]
    assert union(stamped) == 7 * 60


def test_the_index_names_every_claim_and_links_pages_that_exist(made):
    index = (made / "README.md").read_text()
    rows = cells(index, "## The paper's claims\n\nOf")
    assert [row[0] for row in rows[2:]] == [claim.name for claim in CLAIMS]
    linked = {row[0] for row in rows[2:] if "(figure1.md)" in row[-1]}
    assert linked == {claim.name for claim in CLAIMS if re.search(r"\b1\b", claim.figure)}
    tally = index.split("## The paper's claims")[1].split("[What")[0].split("claims:")[1]
    counts = [int(n) for n in re.findall(r"(\d+) (?:not )?(?:supported|undecided|tested)", tally)]
    assert sum(counts) == len(CLAIMS)


def test_pages_name_no_folder_of_the_machine(study, made):
    for page in made.glob("*.md"):
        text = page.read_text()
        assert "/home/" not in text
        assert "/opt/" not in text
        assert str(study) not in text
        if page.name != "paper.md":
            assert "certifl reproduce figure1 --data-dir DATA --out runs/paper" in text
            assert "c0ffee" in text


def test_equal_studies_give_equal_pages(study, made, tmp_path):
    start(study, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in made.iterdir()
    }


def test_a_figure_that_is_not_finished_is_left_out(tmp_path, capsys):
    values = factory.spec(factory.LOCAL, clients=4)
    folder = factory.write(tmp_path, factory.run(values, 0.5, images=5), status="running")
    finish(folder, 0, round_line(0, 1.0))
    one = {"run": f"../runs/{folder.name}", "label": "Local"}
    write_figure(tmp_path, "figure6", [{"name": "one", "runs": [one]}])
    with pytest.raises(SystemExit) as ended:
        start(tmp_path, tmp_path / "pages")  # no run is finished at all
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "figure6 is left out" in said.out
    assert "no finished figure" in said.err
    assert not (tmp_path / "pages").exists()


def test_pictures_are_light(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (120, 180, 3), dtype=np.uint8)
    noise = io.BytesIO()
    Image.fromarray(pixels).save(noise, "PNG")
    paging.picture(noise.getvalue(), tmp_path / "light.png", most_bytes=12_000)
    assert (tmp_path / "light.png").stat().st_size <= 12_000
    with Image.open(io.BytesIO((tmp_path / "light.png").read_bytes())) as light:
        assert light.width / light.height == pytest.approx(1.5, abs=0.03)
        assert light.width < 180


def test_durations():
    texts = [paging.duration(s) for s in (0.4, 89, 91, 3569, 3600, 7500)]
    assert texts == ["0 s", "89 s", "2 min", "59 min", "1 h 00 min", "2 h 05 min"]


def test_the_committed_pages_are_whole():
    """Links lead somewhere, pictures are light, and every page says what made it."""
    pages = sorted(RESULTS.glob("*.md"))
    assert {"README.md", "paper.md", "algorithms.md"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text()
        assert "Made by `python docs/results/" in text
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (page.parent / link).exists(), (page.name, link)
    for picture in RESULTS.glob("*.png"):
        assert picture.stat().st_size < 300_000, picture.name


def test_a_claim_is_only_so_far_supported_while_its_figures_are_missing():
    report = check_runs(factory.pair(0.2, 0.7), draws=200)
    whole, partly = (verdicts.paper_page(report, missing) for missing in ([], ["figure6"]))
    row = r"\| 4\.1 \(ii\) \| .* \| {} \|"
    assert re.search(row.format(r"\*\*yes\*\*"), whole)
    assert re.search(row.format(r"so far \*\*yes\*\*"), partly)
    assert "FedAvg certifies more in every setting" in whole
    assert "FedAvg certifies more in every setting" not in partly
    assert "4.1 (ii) supported so far" in partly
    assert re.search(r"\| 4\.1 \(ii\) by over 20 points \| .* \| \*\*yes\*\* \|", partly)
