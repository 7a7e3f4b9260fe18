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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[detail]}"),
    )
    console, pace = Console(stderr=True), Pace()
    with Progress(*columns, console=console, transient=not console.is_terminal) as shown:

        def report(what: str, done: int, total: int, unit: str) -> None:
            if pace.begins(what, done):
                shown.add_task(what, total=None, detail="", left="")
            detail, left = f"{done:,}/{total:,} {unit}", pace.left(done, total)
            current = shown.task_ids[-1]
            shown.update(current, completed=done, total=total, detail=detail, left=left)

        yield report


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
        seconds = math.ceil(spent * (total - done) / gone)
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"about {hours} h {minutes} min left" if hours else f"about {short(seconds)} left"


def short(seconds: int) -> str:
    """A time below an hour: 40 s, or 3 min 5 s."""
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


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
