"""docs/reference is what the code says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def made() -> dict[str, str]:
    """The pages as the code makes them."""
    found = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.pages()


def test_no_page_is_missing_or_left_over() -> None:
    assert {path.name for path in (DOCS / "reference").iterdir()} == set(made())


@pytest.mark.parametrize("name", ["commands.md", "spec.md", "errors.md"])
def test_the_page_is_current(name: str) -> None:
    again = "docs/reference is not current: run python docs/make_reference.py"
    assert (DOCS / "reference" / name).read_text() == made()[name], again
