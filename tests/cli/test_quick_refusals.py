"""Wrong paths, commands and options are refused before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Runs the command line, and tells afterwards what was imported.
_ASKED = """
import sys
from certifl.cli import main
sys.argv = ["certifl", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
heavy = [n for n in ("torch", "numpy", "scipy", "pyarrow", "pydantic") if n in sys.modules]
print("code", code, "heavy", *heavy)
"""


def asked(folder: Path, *arguments: str) -> tuple[str, str]:
    """The last line of the output, and the error stream."""
    done = subprocess.run(
        [sys.executable, "-c", _ASKED, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout.splitlines()[-1], done.stderr


WRONG = [
    ("nonsense",),
    ("run", "missing.toml"),
    ("run", "folder"),
    ("run", "broken.toml"),
    ("run", "fine.toml", "--nonsense"),
    ("run", "fine.toml", "--data-dir", "missing"),
    ("plan", "missing.toml"),
    ("reproduce", "figure1", "--data-dir", "missing"),
    ("report", "missing"),
    ("report", "folder"),
    ("claims", "missing"),
    ("verify", "missing"),
    ("attack", "missing"),
    ("explore", "missing"),
    ("certify", "--run", "missing"),
    ("certify", "--weights", "missing"),
    ("certify", "--out", "certificates.csv"),
    ("merge", "missing.parquet"),
    ("predict", "missing.png", "--run", "missing"),
    ("deploy", "nonsense"),
    ("deploy", "run", "missing.toml"),
    ("deploy", "check", "missing.toml"),
    ("deploy", "server", "missing"),
    ("deploy", "client", "missing"),
    ("deploy", "status", "missing"),
    ("deploy", "renew", "missing"),
]
COMMANDS = ("run", "plan", "report", "certify", "predict", "deploy", "list")
HELP = [("--help",), *((name, "--help") for name in COMMANDS), ("deploy", "run", "--help")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "folder").mkdir()
    (folder / "broken.toml").write_text("sigma = 18deg\n")
    (folder / "fine.toml").write_text("[data]\nname = 'digits'\n")
    return folder


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_what_is_wrong_is_refused_at_once(arguments: tuple[str, ...], place: Path) -> None:
    last, said = asked(place, *arguments)
    assert last == "code 2 heavy"
    assert said.strip()
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_is_shown_at_once(arguments: tuple[str, ...], place: Path) -> None:
    assert asked(place, *arguments)[0] == "code 0 heavy"
