"""In CI, tests that were skipped because something is missing there count as failed.

CERTIFL_REQUIRE names what must be there, separated by commas; see `.ci/run`.
"""

import os
from collections.abc import Generator
from typing import TypeVar

import pytest

__all__ = ["KINDS"]

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

KINDS = {
    "browser": ("Chromium", "playwright"),
    "flower": ("Flower", "flwr"),
    "privacy": ("opacus", "[dp]"),
}
"""Words in the reason of a skip for each kind of test that can be required."""


def pytest_configure(config: pytest.Config) -> None:
    unknown = set(_required()) - set(KINDS)
    if unknown:
        raise pytest.UsageError(
            f"CERTIFL_REQUIRE names {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}."
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _judged((yield))


def _required() -> list[str]:
    return [kind for kind in os.environ.get("CERTIFL_REQUIRE", "").split(",") if kind]


def _judged(report: Report) -> Report:
    """The report, failed where it tells of a skip that is not allowed."""
    if report.outcome != "skipped" or not isinstance(report.longrepr, tuple):
        return report
    reason = report.longrepr[2]
    kind = next((k for k in _required() if any(word in reason for word in KINDS[k])), None)
    if kind is not None:
        report.outcome = "failed"
        report.longrepr = f"CERTIFL_REQUIRE names {kind}, but: {reason}"
    return report
