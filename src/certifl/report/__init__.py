"""Reads stored results and shows them: figures, tables, one self-contained page."""

from certifl.report.page.page import page_beside, write_figures, write_report
from certifl.report.results import RunResults, load_run, load_runs
from certifl.report.table import summary_rows

__all__ = [
    "RunResults",
    "load_run",
    "load_runs",
    "page_beside",
    "summary_rows",
    "write_figures",
    "write_report",
]
