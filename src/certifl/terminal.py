"""What the command line shows: progress, tables, one prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from certifl.certification.certificates import Certificates
from certifl.experiments.standalone import Answer
from certifl.perturbations.units import format_amount

__all__ = ["Board", "show_certificates", "show_names", "show_prediction", "show_summary"]

_QUIET_SECONDS = 10.0


class Board:
    """Progress of a command on the error stream: a bar on a terminal, rare lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._stage, self._what = "", ""
        self._task: TaskID | None = None
        self._started = self._said = 0.0
        self._first = 0

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def stage(self, name: str) -> None:
        """What the next reports belong to."""
        self._stage, self._what = name, ""

    def report(self, what: str, done: int, total: int, unit: str) -> None:
        """Progress of one piece of work, with the time left as its pace so far suggests."""
        if what != self._what:
            self._begin(what, done)
        left = self._time_left(done, total)
        detail = f"{done:,}/{total:,} {unit}"
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, detail=detail, left=left)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._said > _QUIET_SECONDS or done == total):
            self._said = now
            self._console.print(f"{self._stage}: {what} {detail} {left}".rstrip(), highlight=False)

    def _begin(self, what: str, done: int) -> None:
        self._what, self._first = what, done
        self._started = self._said = time.monotonic()
        title = f"{self._stage}: {what}"
        self._task = self._bars.add_task(title, total=None, detail="", left="")

    def _time_left(self, done: int, total: int) -> str:
        spent, gone = time.monotonic() - self._started, done - self._first
        if gone <= 0 or done >= total:
            return ""
        seconds = math.ceil(spent * (total - done) / gone)
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"about {hours} h {minutes} min left" if hours else f"about {_short(seconds)} left"


def _short(seconds: int) -> str:
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


def show_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """The regimes side by side: the numbers of the report page, one line each."""
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Columns of radii: share of all images, correct with at least that radius."
        "\nACR: average certified radius, with a 95 % interval over images. Spread: best minus "
        "worst client.",
        caption_justify="left",
    )
    table.add_column("regime", no_wrap=True)
    titles = ["ACR", "95 %", *(s["radius_text"] for s in rows[0]["accuracy"])]
    for title in (*titles, "spread"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["acr_low_text"], row["acr_high_text"]
        table.add_row(
            str(row["label"]),
            str(row["acr_text"]),
            f"{low}-{high}" if low else "",
            *(share["text"].replace(" %", "%") for share in row["accuracy"]),
            str(row["spread_text"]),
        )
    Console().print(table)


def show_certificates(certificates: Certificates) -> None:
    """A few lines about certificates."""
    facts, unit = certificates.conditions, str(certificates.conditions["unit"])
    console = Console(highlight=False)
    acr = certificates.average_certified_radius()
    console.print(f"images              {len(certificates)}")
    console.print(f"abstained           {int(certificates.abstained.sum())}")
    console.print(
        f"certified accuracy  {certificates.certified_accuracy([0.0])[0]:.3f} at radius 0"
    )
    console.print(f"average radius      {format_amount(acr, unit)} (ACR)")
    mean, most = certificates.votes.mean(), int(facts["n"])
    console.print(f"votes per image     {mean:,.0f} of at most {most:,}")
    console.print(_meaning(facts), style="dim")


def show_prediction(answer: Answer) -> None:
    """Label or abstention, radius and what they mean."""
    certificates, console = answer.certificates, Console(highlight=False)
    facts = certificates.conditions
    unit = str(facts["unit"])
    if certificates.abstained[0]:
        console.print("abstained: the votes do not single out a class")
    else:
        radius = format_amount(float(certificates.radius[0]), unit)
        console.print(f"label   {answer.class_name} (class {int(certificates.predicted[0])})")
        console.print(f"radius  {radius} in {facts['norm']} norm, {facts['family']}")
    console.print(f"model   client {answer.client} uses {answer.deploys}")
    console.print(_meaning(facts), style="dim")


def _meaning(facts: Mapping[str, Any]) -> str:
    return (
        f"Each radius ({facts['norm']} norm, {facts['unit']}) is wrong with probability at most "
        f"{facts['alpha']}. {facts['threat']}"
    )


def show_names() -> None:
    """Everything that has a name in a spec."""
    from certifl.certification import ESTIMATORS
    from certifl.data import EMBEDDED, PARTITIONS
    from certifl.federated import ALGORITHMS
    from certifl.models import MODELS
    from certifl.perturbations import PERTURBATIONS

    console = Console(highlight=False)
    rows = {
        "data sets": [*EMBEDDED, "mnist", "cifar10", "fashion_mnist", "owner/name", "a folder"],
        "splits": list(PARTITIONS),
        "models": [*MODELS, "module:function"],
        "algorithms": list(ALGORITHMS),
        "perturbations": list(PERTURBATIONS),
        "estimators": list(ESTIMATORS),
    }
    for title, names in rows.items():
        console.print(f"{title:14}{', '.join(names)}", soft_wrap=True)
