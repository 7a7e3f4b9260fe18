"""The documentation's site builds without a warning: every link, anchor and page is there."""

from __future__ import annotations

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


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet, with which mkdocs counts no warnings and nothing is strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--site-dir", str(site)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index", "data", "model", "troubleshooting", "comparison", "extending"):
        assert (tmp_path / "site" / f"{page}.html").is_file(), page


def test_a_link_to_nowhere_is_noticed(tmp_path: Path) -> None:
    for name in ("docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(file, tmp_path)
    page = tmp_path / "docs" / "model.md"
    page.write_text(page.read_text() + "\n[nowhere](data.md#no-such-place)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "no-such-place" in done.stdout + done.stderr
