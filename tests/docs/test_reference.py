"""The pages of the documentation that are made from the code say what it says today."""

from __future__ import annotations

import re
from typing import Any

import pytest

from certifl.federated import ALGORITHMS
from scripts import ROOT, load_script

REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages of docs/reference as the code makes them."""
    return load_script("docs/make_reference.py").pages()


def test_no_page_is_missing_or_left_over(made: dict[str, str]) -> None:
    assert {path.name for path in REFERENCE.iterdir()} == set(made)


@pytest.mark.parametrize("name", ["commands.md", "spec.md", "errors.md"])
def test_the_page_is_current(name: str, made: dict[str, str]) -> None:
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
