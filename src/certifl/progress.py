"""Progress with the time left: on the error stream, in a notebook, silent where nobody looks."""

from __future__ import annotations

import contextlib
import html
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

ProgressCallback = Callable[[int, int], None]
"""Called with (done, total) of the work under way."""

StageCallback = Callable[[str, int, int, str], None]
"""Called with (what is under way, done, total, unit)."""

_BETWEEN_UPDATES = 0.25
_QUIET_SECONDS = 10.0


@contextlib.contextmanager
def bar(what: str, unit: str) -> Iterator[ProgressCallback]:
    """A progress bar for one piece of work; yields the function to call with (done, total)."""
    with stages() as report:
        yield lambda done, total: report(what, done, total, unit)


@contextlib.contextmanager
def stages() -> Iterator[StageCallback]:
    """A progress bar for each piece of work, one after the other; yields the function to call."""
    if _in_notebook():
        yield NotebookBars().report
        return
    shown = TerminalBars()
    with shown.bars:
        yield shown.report


class TerminalBars:
    """A bar for each piece of work on the error stream; elsewhere than on a terminal, rare lines.

    Args:
        lines: whether there are any.
    """

    def __init__(self, lines: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._lines = Console(stderr=True), lines
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._stage, self._pace, self._said = "", Pace(), 0.0

    def stage(self, name: str) -> None:
        """What the next reports belong to."""
        self._stage, self._pace = f"{name}: ", Pace()

    def report(self, what: str, done: int, total: int, unit: str) -> None:
        """Progress of one piece of work, with the time left as its pace so far suggests."""
        title, now = f"{self._stage}{what}", time.monotonic()
        if self._pace.begins(what, done):
            self._said = now
            self.bars.add_task(title, total=None, detail="", left="")
        detail, left = f"{done:,}/{total:,} {unit}", self._pace.left(done, total)
        current = self.bars.task_ids[-1]
        self.bars.update(current, completed=done, total=total, detail=detail, left=left)
        quiet = self._console.is_terminal or not self._lines
        if not quiet and (now - self._said > _QUIET_SECONDS or done == total):
            self._said = now
            line = f"{title} {detail} {left}".rstrip()
            self._console.print(line, highlight=False, soft_wrap=True)


class Pace:
    """How fast the work under way is done, and the time left that this suggests."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._first, self._started = 0, 0.0

    def begins(self, what: str, done: int) -> bool:
        """Whether this is another piece of work than before; its clock starts now."""
        if what == self._what:
            return False
        self._what, self._first, self._started = what, done, time.monotonic()
        return True

    def left(self, done: int, total: int) -> str:
        """The time left in words; "" where it is not known or nothing is left."""
        spent, gone = time.monotonic() - self._started, done - self._first
        if gone <= 0 or done >= total:
            return ""
        return f"about {clock(spent * (total - done) / gone)} left"


def clock(seconds: float) -> str:
    """A time, rounded up: 40 s, 3 min 5 s, or 2 h 3 min."""
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


class NotebookBars:
    """Bars below a cell of a notebook, which need no extension of it.

    Each is one output that is replaced; where HTML is not shown, its text is.
    """

    def __init__(self) -> None:
        self._pace, self._name, self._shown = Pace(), "", 0.0

    def report(self, what: str, done: int, total: int, unit: str) -> None:
        """Show how far a piece of work is, a few times a second at most."""
        new, now = self._pace.begins(what, done), time.monotonic()
        if not new and done < total and now - self._shown < _BETWEEN_UPDATES:
            return
        if new:
            self._name = uuid4().hex
        self._shown = now
        left = self._pace.left(done, total)
        text = f"{what}: {done:,}/{total:,} {unit} {left}".rstrip()
        drawn = f'<progress value="{done}" max="{total}"></progress> {html.escape(text)}'
        self._display({"text/plain": text, "text/html": drawn}, update=not new)

    def _display(self, formats: dict[str, str], update: bool) -> None:
        from IPython.display import display  # there, since this runs in a notebook

        display(formats, raw=True, display_id=self._name, update=update)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
