"""Commands run inside a folder that somebody sent import nothing from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tiny_study as tiny
from certifl.errors import ModelError
from certifl.experiments.attack import Options as AttackOptions
from certifl.experiments.attack import attack_run
from certifl.experiments.explore import explore_run
from certifl.experiments.run import Options, run
from certifl.models import allow_code, build, require_code
from certifl.study.opened_run import OpenRun

# What torch and others import if they find it, what Python's own start imports, and packages.
HOSTILE = [
    *("dill", "pynvml", "cuda", "triton", "cupy", "onnx", "optree", "pandas", "numpy", "torch"),
    *("pyarrow", "matplotlib", "datasets", "typing", "dataclasses", "struct", "multiprocessing"),
    *("tomllib", "__future__", "usercustomize"),
]
NET = """
from torch import nn
def make(in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
"""


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and an image, among modules that leave a trace when they are imported."""
    folder = tmp_path_factory.mktemp("received")
    run(tiny.spec("training.rounds=1", "certification.n=100"), Options(folder / "run"))
    Image.new("L", (8, 8), 90).save(folder / "gray.png")
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'hit')!r}, 'a').write({name!r})")
    return folder


# The commands in one process, with the import path that `python -m certifl` leaves.
COMMANDS = (
    ("list",),
    ("verify", "run"),
    ("report", "run", "--out", "page.html", "--format", "svg"),
    ("claims", "run"),
    ("plan", "run/spec.toml"),
    ("predict", "gray.png", "--run", "run"),
)
DRIVER = """
import sys
sys.path.remove("")
import runpy
for line in sys.argv[1:]:
    sys.argv = ["certifl", *line.split()]
    if line.startswith("plan"):
        import certifl.experiments.plan
        certifl.experiments.plan._SECONDS = 0.0  # one call of everything that is measured
    try:
        runpy.run_module("certifl", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        assert not exit.code, (line, exit.code)
"""
SCRIPT = Path(sys.executable).with_name("certifl")
# How a process is started decides about its import path, whatever the command is.
STARTS = {
    "module": (sys.executable, "-m", "certifl", "list"),
    "script": (str(SCRIPT), "--version"),
    "every command": (sys.executable, "-c", DRIVER, *map(" ".join, COMMANDS)),
}


@pytest.mark.parametrize("start", STARTS)
def test_nothing_of_the_folder_is_imported(received, start):
    if start == "script" and not SCRIPT.is_file():
        pytest.skip("certifl is not installed here")
    done = subprocess.run(
        STARTS[start], cwd=received, env=tiny.environment(), capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert not (received / "hit").exists(), (received / "hit").read_text()


def test_a_network_of_the_spec_brings_its_package_and_nothing_else(received):
    """Nor do the worker processes that the command starts."""
    package = received / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(NET)
    (package / "net.py").write_text("from own_package.parts import make\n")
    own = ("model.name=own_package.net:make", "training.rounds=1", "certification.n=100")
    spec = tiny.write_spec(received, *own)
    asked = ("run", spec, "--out", "../other", "--workers", "1")
    tiny.process(*asked, cwd=received).fine("FedAvg")
    assert not (received / "hit").exists(), (received / "hit").read_text()
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_module_beside_the_named_one_is_not_importable(tmp_path):
    (tmp_path / "lonely_net.py").write_text("import beside_it\n" + NET)
    (tmp_path / "beside_it.py").touch()
    allow_code("lonely_net:make", tmp_path)
    with pytest.raises(ModelError, match=r"beside_it.*one package with it"):
        build("lonely_net:make", 1, 10, seed=0)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a network of its own; what it recorded points into the working directory."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "code").mkdir()
    (folder / "code" / "sent_net.py").write_text(NET)
    allow_code("sent_net:make", folder / "code")
    study = tiny.spec("model.name=sent_net:make", "training.rounds=1", "certification.n=100")
    run(study, Options(folder / "run"))
    manifest = json.loads((folder / "run" / "run.json").read_text())
    (folder / "run" / "run.json").write_text(json.dumps({**manifest, "code": "/proc/self/cwd"}))
    Image.new("L", (8, 8), 90).save(folder / "gray.png")
    return folder


def test_a_run_never_says_what_code_runs(own_run):
    place = own_run / "run"
    tiny.cli("predict", own_run / "gray.png", "--run", place).refused("--code DIR", "sent_net")
    tiny.cli("attack", place).refused("--code DIR")
    tiny.cli("explore", place).refused("--code DIR")
    out = own_run / "again.parquet"
    tiny.cli("certify", "--run", place, "--out", out, "--n", 100).refused("--code DIR")
    tiny.cli("verify", place).fine("certificates follow")


def test_code_that_its_user_names_is_run(own_run):
    place, code = own_run / "run", own_run / "code"
    asked = ("predict", own_run / "gray.png", "--run", place, "--code")
    tiny.cli(*asked, code).fine("client 0")
    tiny.cli(*asked, own_run).refused("holds no module 'sent_net'")
    out = own_run / "again.parquet"
    tiny.cli("certify", "--run", place, "--out", out, "--n", 100, "--code", code).fine()
    attack_run(place, AttackOptions(images=1, directions=2, code=code))
    explore_run(place, code=code)
    assert OpenRun(place, code=code).model(0)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "torch:load", "builtins:dict"])
def test_a_module_of_python_itself_is_not_a_network(name, tmp_path):
    with pytest.raises(ModelError, match="holds no module"):
        require_code(name, tmp_path)


def test_a_folder_cannot_replace_a_module(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match="Python finds the module 'json'"):
        require_code("json:loads", tmp_path)
