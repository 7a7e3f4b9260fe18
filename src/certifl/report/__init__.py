"""Reads stored results and shows them: figures, tables, one self-contained page."""

from certifl.report.page.page import page_beside, write_figures, write_report
from certifl.report.results import RunResults, load_model, load_run, load_runs
from certifl.report.style import FigureStyle, arranged, assignments, known_names, listed_names
from certifl.report.table import class_rows, summary_rows

__all__ = [
    "FigureStyle",
    "RunResults",
    "arranged",
    "assignments",
    "class_rows",
    "known_names",
    "listed_names",
    "load_model",
    "load_run",
    "load_runs",
    "page_beside",
    "summary_rows",
    "write_figures",
    "write_report",
]
