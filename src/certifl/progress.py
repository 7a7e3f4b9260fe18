"""Progress with the time left, on the error stream; silent where nobody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

ProgressCallback = Callable[[int, int], None]
"""Called with (done, total) of the work under way."""

StageCallback = Callable[[str, int, int, str], None]
"""Called with (what is under way, done, total, unit)."""


@contextlib.contextmanager
def bar(what: str, unit: str) -> Iterator[ProgressCallback]:
    """A progress bar for one piece of work; yields the function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=not console.is_terminal) as shown:
        task = shown.add_task(what, total=None, detail="")

        def report(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total, detail=f"{done:,}/{total:,} {unit}")

        yield report
