"""What is installed and its pages made from code; a required test is not passed by skipping."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

import certifl
from browser import NO_CHROMIUM
from certifl.federated import ALGORITHMS
from required import KINDS
from scripts import ROOT, load_script

HEAVY = ("torch", "pydantic", "pyarrow", "matplotlib", "scipy", "sklearn", "pandas")


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", certifl.__all__)
def test_every_public_name_exists(name):
    assert getattr(certifl, name) is not None
    assert name in dir(certifl)


def test_another_name_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="has no attribute 'certfy'"):
        certifl.certfy  # noqa: B018


def test_every_module_says_what_it_offers():
    package = ROOT / "src" / "certifl"
    for file in package.rglob("*.py"):
        if file.stem.startswith("_"):
            continue
        parts = file.relative_to(package.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_importing_loads_nothing_heavy():
    loaded = f"print([m for m in {HEAVY} if m in sys.modules])"
    assert python(f"import sys, certifl; certifl.__version__; {loaded}") == "[]"


def test_version_is_that_of_the_distribution_and_of_the_citation():
    assert metadata.version("certifl") == certifl.__version__
    assert f"\nversion: {certifl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_a_wheel_works_from_any_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    subprocess.run([*pip, "--wheel-dir", tmp_path, copy], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("certifl-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import certifl, pathlib; from certifl.report import __file__ as page;"
        "assets = pathlib.Path(page).parent / 'assets';"
        "print(certifl.__file__, sorted(p.suffix for p in assets.iterdir()))"
    )
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, **options, capture_output=True, text=True, check=True)
    assert str(tmp_path / "site") in done.stdout
    assert {".html", ".css", ".js"} <= set(ast.literal_eval(done.stdout.split(" ", 1)[1].strip()))


def test_types_and_assets_are_shipped():
    package = resources.files("certifl")
    assert (package / "py.typed").is_file()
    for asset in ("page.html", "page.css", "page.js"):
        assert (package / "report" / "assets" / asset).is_file()
    settings = (ROOT / "pyproject.toml").read_text()
    assert "py.typed" in settings
    assert "report/assets/*" in settings


def test_both_ways_of_calling_the_command():
    console = Path(sys.executable).with_name("certifl")
    for command in ([str(console)], [sys.executable, "-m", "certifl"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"certifl {certifl.__version__}"


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


REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages of docs/reference as the code makes them."""
    return load_script("docs/make_reference.py").pages()


def test_no_page_is_missing_or_left_over(made):
    assert {path.name for path in REFERENCE.iterdir()} == set(made)


@pytest.mark.parametrize("name", ["commands.md", "spec.md", "errors.md"])
def test_the_page_is_current(name, made):
    again = "docs/reference is not current: run python docs/make_reference.py"
    assert (REFERENCE / name).read_text() == made[name], again


# docs/algorithms.md: its table is that of the code, and its examples name what exists.


@pytest.fixture(scope="module")
def maker() -> Any:
    return load_script("docs/make_algorithms.py")


def test_the_page_is_what_the_code_makes(maker):
    text = maker.PAGE.read_text()
    made = maker.page(text, [maker.table(), "Sources:", maker.sources()])
    assert made == text, "run python docs/make_algorithms.py"


def test_the_table_counts_what_is_known(maker):
    rows = {}
    for line in maker.table().splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[name.strip("`")] = cells
    assert rows.keys() == ALGORITHMS.keys()
    sends, keeps, server, work = (
        {name: cells[column] for name, cells in rows.items()} for column in (2, 3, 4, 5)
    )
    assert sends["local"] == keeps["fedavg"] == "nothing"
    assert sends["fedavg"] == keeps["mixture"] == server["fedavg"] == "1 model"
    assert sends["scaffold"] == "1 model + 0.99 change of its control variate"
    assert keeps["fedrep"].endswith("head")
    assert (work["fedavg"], work["ditto"], work["fedrep"]) == ("1", "2", "1.5")


def test_every_algorithm_has_a_name_for_people_and_a_source(maker):
    assert all(row.label for row in ALGORITHMS.rows.values())
    for kind in ALGORITHMS.values():
        assert re.search(r"Deployed by client i:", kind.__doc__)
    assert maker.sources().count("\n- ") == len(ALGORITHMS) - 1
