"""What is installed: public names, version, types, and what importing costs."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

import certifl

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "pydantic", "pyarrow", "matplotlib", "scipy", "sklearn", "pandas")


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", certifl.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(certifl, name) is not None
    assert name in dir(certifl)


def test_another_name_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'certfy'"):
        certifl.certfy  # noqa: B018  # pyright: ignore


def test_every_module_says_what_it_offers() -> None:
    package = ROOT / "src" / "certifl"
    for file in package.rglob("*.py"):
        if file.stem.startswith("_"):
            continue
        parts = file.relative_to(package.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_importing_loads_nothing_heavy() -> None:
    loaded = f"print([m for m in {HEAVY} if m in sys.modules])"
    assert python(f"import sys, certifl; certifl.__version__; {loaded}") == "[]"


def test_version_is_the_distributions() -> None:
    assert metadata.version("certifl") == certifl.__version__


def test_the_version_of_the_citation_is_the_packages() -> None:
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {certifl.__version__}\n" in cited


@pytest.mark.slow
def test_a_wheel_works_from_any_folder(tmp_path: Path) -> None:
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
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in done.stdout
    assert {".html", ".css", ".js"} <= set(ast.literal_eval(done.stdout.split(" ", 1)[1].strip()))


def test_types_and_assets_are_shipped() -> None:
    package = resources.files("certifl")
    assert (package / "py.typed").is_file()
    for asset in ("page.html", "page.css", "page.js"):
        assert (package / "report" / "assets" / asset).is_file()
    settings = (ROOT / "pyproject.toml").read_text()
    assert "py.typed" in settings
    assert "report/assets/*" in settings


def test_both_ways_of_calling_the_command() -> None:
    console = Path(sys.executable).with_name("certifl")
    for command in ([str(console)], [sys.executable, "-m", "certifl"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"certifl {certifl.__version__}"
