"""docs/new_study.md: every file and every command in it, as a reader would take them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import certifl.notebook
import tiny_study as tiny
from certifl.runs.folder import RunFolder
from certifl.spec import load
from certifl.study.setup import label_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "new_study.md").read_text()
MOST_LINES = 30
# The same studies, small: data that is built in, few images, rounds and votes.
SMALL = (
    *("data.name=digits", "data.train_images=40", "data.test_images=20", "clients.count=2"),
    *("training.rounds=1", "training.batch_size=16"),
    *("certification.images=2", "certification.n=100"),
)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.M | re.S)
    return [text for named, text in found if named == language]


STUDIES = {block.split("\n", 1)[0].removeprefix("# "): block for block in blocks("toml")}
COMMANDS = [shlex.split(line) for block in blocks("") for line in block.splitlines()]


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a reader has the page's files."""
    place = tmp_path_factory.mktemp("reader")
    for name, text in STUDIES.items():
        (place / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


def test_the_page_has_both_examples():
    assert list(STUDIES) == ["fashion.toml", "fedprox.toml"]
    used = {word for command in COMMANDS for word in command if word.endswith(".toml")}
    assert used == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_one_file_of_at_most_thirty_lines(name, folder):
    assert len(STUDIES[name].splitlines()) <= MOST_LINES
    spec = load(folder / name, [])
    written = tomllib.loads(STUDIES[name])
    assert spec.data.name == written["data"]["name"]
    assert spec.certification.n == written["certification"]["n"]
    # What a run stores is the same study, with everything that was left out spelled out.
    (folder / "stored.toml").write_text(spec.to_toml())
    assert load(folder / "stored.toml", []).hash() == spec.hash()


def test_the_commands_do_what_the_page_says(folder, monkeypatch):
    for program, verb, *rest in COMMANDS:
        assert program == "certifl"
        given = [str(folder) if word == "DATA" else word for word in rest]
        with monkeypatch.context() as patch:
            if verb == "run":
                given += [word for setting in SMALL for word in ("--set", setting)]
                # A run's own page has tests of its own; those of the comparisons are written.
                patch.setattr(certifl.notebook, "write_report", lambda *_, **__: None)
            tiny.cli(verb, *given).fine()
    regimes = {
        place.name: RunFolder(place).manifest()["regime"]
        for place in sorted((folder / "runs").iterdir())
        if place.is_dir()
    }
    assert regimes["together"] == regimes["fedavg"] == "fedavg"
    assert regimes["alone"] == "local"
    assert regimes["fedprox"] == "fedprox"
    assert (folder / "fashion/report.html").is_file()
    assert (folder / "fedprox/report.html").is_file()


def test_the_examples_are_other_data_and_another_algorithm():
    data = tomllib.loads(STUDIES["fashion.toml"])
    assert data["data"]["name"] not in ("cifar10", "mnist")
    algorithm = tomllib.loads(STUDIES["fedprox.toml"])["algorithm"]["name"]
    assert algorithm not in ("local", "fedavg", "personalized", "mixture")


def test_labels_tell_the_runs_of_an_example_apart(folder):
    plain = load(folder / "fedprox.toml", ["algorithm={name='fedavg'}"])
    assert label_of(plain) != label_of(load(folder / "fedprox.toml", []))
