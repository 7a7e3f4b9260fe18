"""Before anything heavy is imported, wrong requests are refused; help and the list of names."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import tiny_study as tiny

# Runs each command line in one process, and writes after each what it ended with and imported.
_CALLED = """
import contextlib, io, json, sys
from certifl.cli import main
before = set()
for words in json.loads(sys.argv[1]):
    sys.argv, code, said = ["certifl", *words], 0, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as ended:
        code = ended.code
    heavy = {n for n in ("torch", "numpy", "scipy", "pyarrow", "pydantic", "matplotlib",
             "sklearn", "pandas") if n in sys.modules}
    print(json.dumps({"code": code, "heavy": sorted(heavy - before), "said": said.getvalue()}))
    before |= heavy
"""


WRONG = [
    ("nonsense",),
    *(("run", name) for name in ("missing.toml", "folder", "broken.toml")),
    *(("run", "fine.toml", "--nonsense"), ("run", "fine.toml", "--data-dir", "missing")),
    ("reproduce", "figure1", "--data-dir", "missing"),
    *((name, "missing") for name in ("report", "claims", "verify", "attack", "explore")),
    *(("plan", "missing.toml"), ("report", "folder"), ("merge", "missing.parquet")),
    *(("certify", option, "missing") for option in ("--run", "--weights")),
    ("certify", "--out", "certificates.csv"),
    *((name, "run", "--out", "page.txt") for name in ("report", "claims")),
    ("predict", "missing.png", "--run", "missing"),
    *(("deploy", name, "missing") for name in ("server", "client", "status", "renew")),
    *(("deploy", name, "missing.toml") for name in ("run", "check")),
    ("deploy", "nonsense"),
]
USAGE = {
    ("fly",): "No such command 'fly'",
    ("run", "--nope"): "No such option",
    ("run",): "Missing argument",
    ("predict", "x.png"): "--run",
    ("certify", "--n", "many"): "valid integer",
    ("predict", "x.png", "--run", "x", "--n", "0"): "'--n'",
}
COMMANDS = (
    "quickstart",
    "run",
    "plan",
    "report",
    "verify",
    "certify",
    "predict",
    "deploy",
    "list",
)
# Wrong keys, names and values of a spec, with a word of what is said.
VALUES = {
    "clients.cuont=3": "clients.cuont",
    "training.lr=0": "training.lr",
    "algorithm.name=fedavgg": "fedavg",
    "clients.split=unifrom": "uniform",
    "model.name=resnet19": "resnet18",
    "model.options={norm='layer'}": "norm",
    "certification.perturbation.family=rotaton": "rotation",
    "certification.perturbation.sigma=18grad": "sigma",
    "certification.estimator=best": "estimator",
    "objective.name=macre": "macer",
    "aggregation.rule=mode": "median",
}
HELP = [("--help",), *((name, "--help") for name in COMMANDS), ("deploy", "run", "--help")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, Any]]:
    specs = [("run", "study.toml", "--set", change) for change in VALUES]
    folder, asked = tmp_path_factory.mktemp("place"), [*WRONG, *USAGE, *HELP, *specs]
    for name in ("folder", "run"):
        (folder / name).mkdir()
    (folder / "run" / "run.json").write_text("{}")
    (folder / "broken.toml").write_text("sigma = 18deg\n")
    (folder / "fine.toml").write_text("[data]\nname = 'digits'\n")
    certification = "perturbation = { family = 'rotation', sigma = '18deg' }"
    (folder / "study.toml").write_text(f"data.name = 'digits'\n[certification]\n{certification}\n")
    done = subprocess.run(
        [sys.executable, "-c", _CALLED, json.dumps(asked)],
        cwd=folder, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_what_is_wrong_is_refused_at_once(arguments, outcomes):
    ended = outcomes[arguments]
    assert (ended["code"], ended["heavy"]) == (2, [])
    assert ended["said"].strip()
    assert "Traceback" not in ended["said"]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_is_shown_at_once(arguments, outcomes):
    ended = outcomes[arguments]
    assert (ended["code"], ended["heavy"]) == (0, [])
    assert all(word in ended["said"] for word in ("Usage: certifl", "--help"))
    assert all(f"  {name} " in outcomes["--help",]["said"] for name in COMMANDS)


@pytest.mark.parametrize("change", VALUES)
def test_a_wrong_spec_is_refused_without_what_computes(change, outcomes):
    ended = outcomes["run", "study.toml", "--set", change]
    assert ended["code"] == 2
    assert set(ended["heavy"]) <= {"pydantic", "numpy"}
    assert VALUES[change] in ended["said"]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage_errors_end_with_two(arguments, outcomes):
    assert outcomes[arguments]["code"] == 2
    assert USAGE[arguments] in outcomes[arguments]["said"]


def test_exit_codes_of_a_real_process(tmp_path):
    spec = tiny.write_spec(tmp_path)
    out = tmp_path / "run"
    wrong = tiny.process("run", spec, "--out", out, "--set", "trainign.lr=1")
    wrong.refused("trainign", "Did you mean 'training'?")  # others in tests/spec
    assert not out.exists()


# Wrong specs: one line that names the key and what is allowed; nothing is written.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "data.train_images=5000"), ["train_images", "1397"]),
        (("--set", "data.test_images=5000"), ["test_images", "400"]),
        (("--set", "data.name=./missing"), ["./missing", "train/CLASS/*.png"]),
        (("--set", "data.label_column=digit"), ["digits has no columns"]),
        (("--set", "model.name=no_such_module:make"), ["no_such_module", "PYTHONPATH"]),
        (("--set", "model.name=json:dumps"), ["json:dumps", "in_channels"]),
        (
            ("--set", "data.train_images=3", "--set", "clients.count=4"),
            ["4 clients", "3 training"],
        ),
        (("--device", "warp9"), ["'warp9'", "cuda:1"]),
    ],
)
def test_a_wrong_setting_is_one_clear_line_and_writes_nothing(options, words, tmp_path):
    spec = tiny.write_spec(tmp_path)
    out = tmp_path / "runs" / "wrong"
    tiny.cli("run", spec, "--out", out, *options).refused(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.toml"]


def test_files_that_are_no_spec(tmp_path):
    out = ("--out", tmp_path / "r")
    tiny.cli("run", tmp_path / "none.toml", *out).refused("no spec at", "examples")
    tiny.cli("run", tmp_path, *out).refused("is a folder", ".toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    tiny.cli("run", tmp_path / "bad.toml", *out).refused("TOML", "line 1")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    tiny.cli("run", tmp_path / "bytes.toml", *out).refused("TOML")
    assert not (tmp_path / "r").exists()


def test_a_missing_data_set_names_the_three_ways(tmp_path):
    spec = tiny.write_spec(tmp_path, "data.name=someones/mushrooms")
    out = ("--out", tmp_path / "r")
    (tmp_path / "data").mkdir()
    for place in ([], ["--data-dir", tmp_path / "data"]):
        answer = tiny.cli("run", spec, *out, *place)
        answer.refused("(1)", "--data-dir", "(2)", "certifl[hub]", "(3)", "digits")
    tiny.cli("run", spec, *out, "--data-dir", tmp_path / "none").refused("does not exist")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    spec = tiny.write_spec(tmp_path)
    below_a_file = spec / "run"
    tiny.cli("run", spec, "--out", below_a_file).refused("tiny.toml is a file", "--out")
    for asked in (("run", spec, "--out"), ("deploy", "init")):
        tiny.cli(*asked, spec).refused("is a file")
    assert "[data]" in spec.read_text()
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        tiny.cli("run", spec, "--out", closed / "r").refused("Cannot write", "--out", code=1)


def test_a_folder_with_strangers_is_left_alone(tmp_path):
    spec = tiny.write_spec(tmp_path)
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        tiny.cli("run", spec, "--out", place, *more).refused("thesis.tex", "--out")
    assert [p.name for p in place.iterdir()] == ["thesis.tex"]


def test_answer_within_without_workers_leaves_no_folder_in_the_way(tmp_path):
    spec, out = tiny.write_spec(tmp_path), tmp_path / "run"
    tiny.cli("run", spec, "--out", out, "--answer-within", "5").refused("needs --workers")
    assert not out.exists()


def test_what_clients_share_is_refused_before_any_of_them_is_asked(tmp_path):
    spec = tiny.write_spec(tmp_path)
    asked = ("deploy", "run", spec, "--kit", tmp_path / "none", "--share", "everything")
    tiny.cli(*asked).refused("share must be one of none, curve, rows")


def test_help_shows_whole_sentences_and_list_every_name():
    commands = tiny.cli("--help").out.partition("Studies:")[2]
    groups = [line[:-1] for line in commands.splitlines() if line.endswith(":")]
    assert groups == ["Models", "Federation", "Results", "Installation"]
    assert "quickstart" in commands
    assert "..." not in commands
    tiny.cli("list").fine(
        "digits", "small_cnn", "mixture", "smooth_flow", "sequential", "column", "trimmed-mean",
        "krum", "scan", "fedrep", "objectives augmented, consistency, smoothadv, macer, stability",
    )  # fmt: skip
