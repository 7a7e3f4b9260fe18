"""A test that CI must run does not pass there by being skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def pytest_on(place: Path, code: str, required: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on one file, with the plugin alone."""
    (place / "test_it.py").write_text(code)
    environment = {**os.environ, "CERTIFL_REQUIRE": required, "PYTHONPATH": str(HERE / "support")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "required", "test_it.py"]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("browser", FIXTURE, NO_CHROMIUM),
        ("flower", WHOLE_FILE, "Flower is not installed: pip install certifl[flower]"),
        ("privacy", WHOLE_FILE, "needs the extra [dp]"),
        ("privacy", ONE_TEST, "could not import 'opacus': No module named 'opacus'"),
    ],
    ids=["fixture", "file", "file of an extra", "test"],
)
def test_a_skipped_test_fails_where_its_kind_is_required(tmp_path, kind, code, reason):
    done = pytest_on(tmp_path, code.format(reason=reason), f"browser,{kind}")
    assert done.returncode in (1, 2), done.stdout  # 2: a whole file could not be collected
    assert f"CERTIFL_REQUIRE names {kind}, but: Skipped: {reason}" in done.stdout


@pytest.mark.parametrize(
    ("reason", "required"), [(NO_CHROMIUM, "flower,privacy"), ("there is no GPU", "browser")]
)
def test_other_tests_may_be_skipped(tmp_path, reason, required):
    done = pytest_on(tmp_path, ONE_TEST.format(reason=reason), required)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


def test_a_kind_that_does_not_exist_is_refused(tmp_path):
    done = pytest_on(tmp_path, ONE_TEST, "brwoser")
    assert done.returncode == 4
    assert "names brwoser; known are browser, flower, privacy" in done.stderr


def test_ci_requires_every_kind():
    assert f"CERTIFL_REQUIRE={','.join(KINDS)}" in (HERE.parent / ".ci" / "run").read_text()
