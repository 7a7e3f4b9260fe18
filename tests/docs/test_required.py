"""A test that CI must run does not pass there by being skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from browser import NO_CHROMIUM
from required import KINDS

HERE = Path(__file__).parents[1]
WHOLE_FILE = 'import pytest\npytest.importorskip("no_such", reason="{reason}")\n'
ONE_TEST = 'import pytest\ndef test_one():\n    pytest.skip("{reason}")\n'
FIXTURE = """
import pytest

@pytest.fixture(scope="session")
def missing():
    pytest.skip("{reason}")

def test_one(missing):
    pass
"""


def pytest_on(place: Path, required: str, files: Mapping[str, str]) -> Any:
    """Run pytest on some files, with the plugin alone."""
    for name, code in files.items():
        (place / f"test_{name}.py").write_text(code)
    environment = {**os.environ, "CERTIFL_REQUIRE": required, "PYTHONPATH": str(HERE / "support")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "required"]
    command.append("--continue-on-collection-errors")
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_a_skipped_test_fails_where_its_kind_is_required(tmp_path):
    cases = {
        "fixture": ("browser", FIXTURE, NO_CHROMIUM),
        "file": ("flower", WHOLE_FILE, "Flower is not installed: pip install certifl[flower]"),
        "extra": ("privacy", WHOLE_FILE, "needs the extra [dp]"),
        "test": ("privacy", ONE_TEST, "could not import 'opacus': No module named 'opacus'"),
    }
    files = {name: code.format(reason=reason) for name, (_, code, reason) in cases.items()}
    files["other"] = ONE_TEST.format(reason="there is no GPU")
    done = pytest_on(tmp_path, "browser,flower,privacy", files)
    assert done.returncode == 1, done.stdout
    assert "1 skipped" in done.stdout
    for kind, _, reason in cases.values():
        assert f"CERTIFL_REQUIRE names {kind}, but: Skipped: {reason}" in done.stdout


def test_a_kind_that_is_not_required_may_be_skipped(tmp_path):
    done = pytest_on(tmp_path, "flower,privacy", {"it": ONE_TEST.format(reason=NO_CHROMIUM)})
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    done = pytest_on(tmp_path, "brwoser", {})
    assert done.returncode == 4
    assert "names brwoser; known are browser, flower, privacy" in done.stderr


def test_ci_requires_every_kind():
    assert f"CERTIFL_REQUIRE={','.join(KINDS)}" in (HERE.parent / ".ci" / "run").read_text()
