"""The documentation's site builds without a warning: every link, anchor and page is there."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_THERE = all(importlib.util.find_spec(name) for name in ("mkdocs", "material"))

pytestmark = pytest.mark.skipif(
    not _THERE, reason="mkdocs is not installed: pip install 'certifl[docs]'"
)


def test_the_site_builds_strictly_and_a_link_to_nowhere_is_noticed(tmp_path):
    for name in ("docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(file, tmp_path)
    page = tmp_path / "docs" / "model.md"
    page.write_text(page.read_text() + "\n[nowhere](data.md#no-such-place)\n")
    # Not --quiet, with which mkdocs counts no warnings and nothing is strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "site"]
    options = {"cwd": tmp_path, "env": {**os.environ, "NO_MKDOCS_2_WARNING": "1"}}
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Aborted with 1 warning" in said, said
    (warning,) = (line for line in said.splitlines() if "no-such-place" in line)
    assert "model.md" in warning
    for name in ("index", "data", "model", "troubleshooting", "comparison", "extending"):
        assert (tmp_path / "site" / f"{name}.html").is_file(), name
