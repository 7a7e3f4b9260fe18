"""Wrong paths, commands and options are refused before anything heavy is imported."""

import json
import subprocess
import sys
from typing import Any

import pytest

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
    ("predict", "missing.png", "--run", "missing"),
    *(("deploy", name, "missing") for name in ("server", "client", "status", "renew")),
    *(("deploy", name, "missing.toml") for name in ("run", "check")),
    ("deploy", "nonsense"),
]
COMMANDS = ("run", "plan", "report", "certify", "predict", "deploy", "list")
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
    folder, asked = tmp_path_factory.mktemp("place"), [*WRONG, *HELP, *specs]
    (folder / "folder").mkdir()
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
    assert (outcomes[arguments]["code"], outcomes[arguments]["heavy"]) == (0, [])


@pytest.mark.parametrize("change", VALUES)
def test_a_wrong_spec_is_refused_without_what_computes(change, outcomes):
    ended = outcomes["run", "study.toml", "--set", change]
    assert ended["code"] == 2
    assert set(ended["heavy"]) <= {"pydantic", "numpy"}
    assert VALUES[change] in ended["said"]
