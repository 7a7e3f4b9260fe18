"""docs/algorithms.md: its table is that of the code, and its examples name what exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from certifl.federated import ALGORITHMS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_algorithms", DOCS / "make_algorithms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
