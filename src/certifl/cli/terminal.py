"""Output of the command line: progress, tables, predictions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from certifl.certification.metadata import below_sigma
from certifl.perturbations import covers_received
from certifl.perturbations.units import format_amount
from certifl.progress import TerminalBars, clock
from certifl.safe_io import visible

if TYPE_CHECKING:
    from certifl.certification.certificates import Certificates
    from certifl.experiments.plan import Plan
    from certifl.experiments.predict import Prediction
    from certifl.experiments.sweep import Cost as SweepCost
    from certifl.paper.reproduce import Cost
    from certifl.study.environment import Check

_WIDEST = 400
_YEAR = 365.25  # days


class Board(TerminalBars):
    """Progress of a command on the error stream: a bar on a terminal, rare lines elsewhere.

    Ctrl-C is remembered, because code of other libraries may swallow the KeyboardInterrupt it
    raises (while torch imports parts of itself, for instance) or make another error of it (while
    a tensor is read). The next report raises it again, and an error that comes out after it is
    taken for what became of it.
    """

    def __init__(self) -> None:
        super().__init__(lines=True)
        self._interrupted = False
        self._handler_before: Any = None

    def __enter__(self) -> Board:
        self.bars.start()
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.bars.stop()
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)
        if self._interrupted and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def report(self, what: str, done: int, total: int, unit: str) -> None:
        """As `TerminalBars.report`; raises an interruption again that was swallowed."""
        if self._interrupted:
            raise KeyboardInterrupt
        super().report(what, done, total, unit)


def _console(*, soft_wrap: bool = False, width: int | None = None) -> Console:
    """Where results are printed; names in square brackets are text, not markup."""
    return Console(highlight=False, soft_wrap=soft_wrap, width=width, markup=False, emoji=False)


def _printable(value: Any) -> Any:
    """Rows as they come, with the control characters of names escaped."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {key: _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list | tuple) else value


def show_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """The regimes side by side: the numbers of the report page, one line each.

    Where clients certify perturbations of their own, a table for each of these.
    """
    rows, console = _printable(list(rows)), _console(soft_wrap=True)
    for noise in dict.fromkeys(row["perturbation"] for row in rows):
        part = [row for row in rows if row["perturbation"] == noise]
        if noise is not None:
            line = f"{noise}, certified by {_clients(part[0]['of_clients'])}"
            console.print(line, style="bold")
        _show_table(part)
    for line in dict.fromkeys(
        f"{row['label']}, client {one['client']} certifies nothing: plain accuracy "
        f"{100 * one['correct'] / one['images']:.1f} % of {one['images']} images"
        for row in rows
        for one in row["plain"]
    ):
        console.print(line)
    for line in dict.fromkeys(
        f"{row['label']}: {row['privacy']}" for row in rows if row.get("privacy")
    ):
        console.print(line)
    for warning in dict.fromkeys(
        f"Warning: {row['label']}: {row['left_out']}" for row in rows if row.get("left_out")
    ):
        console.print(warning)


def show_classes(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of classes for each row of the summary."""
    rows = _printable(list(rows))
    for label, noise in dict.fromkeys((row["label"], row["perturbation"]) for row in rows):
        part = [row for row in rows if (row["label"], row["perturbation"]) == (label, noise)]
        radii = [one["radius_text"] for one in part[0]["accuracy"]]
        cells = []
        for row in part:
            shares = [*(one["text"] for one in row["accuracy"]), row["abstained_text"]]
            shares = [text.replace(" %", "%") for text in shares]
            cells.append([row["name"], f"{row['images']:,}", row["acr_text"], *shares])
        title = f"{label}, by class" + (f": {noise}" if noise else "")
        _print_table(("class", "images", "ACR", *radii, "abstained"), cells, title=title)


def _print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    caption: str = "",
    texts: int = 1,
) -> None:
    """A table whose first columns, `texts` of them, are not numbers.

    One that is wider than the terminal is wrapped by it; rich would cut names and numbers off.
    """
    table = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=caption or None,
        caption_justify="left",
    )
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = _console()
    needed = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    _console(width=max(console.width, needed)).print(table)


def _clients(numbers: Sequence[int]) -> str:
    return f"client{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    unit = str(rows[0]["acr_text"]).partition(" ")[2]  # "" where a sign such as ° says it

    def number(text: str) -> str:
        return text.removesuffix(f" {unit}") if unit else text

    caption = (
        (f"Radii in {unit}. " if unit else "")
        + "Columns of radii: share of all images, correct with at least that radius."
        "\nACR: average certified radius, with a 95 % interval over images, and over seeds where "
        "a row has several.\nSpread: best minus worst client."
    )
    radii = [number(share["radius_text"]) for share in rows[0]["accuracy"]]
    cells = []
    for row in rows:
        low, high, seeds = row["acr_low_text"], row["acr_high_text"], len(row["seeds"])
        label = f"{row['label']}, {seeds} seeds" if seeds > 1 else str(row["label"])
        interval = f"{number(low)}-{number(high)}" if low else ""
        shares = [share["text"].replace(" %", "%") for share in row["accuracy"]]
        acr, spread = number(row["acr_text"]), number(row["spread_text"])
        cells.append([label, acr, interval, *shares, spread])
    _print_table(("algorithm", "ACR", "95 %", *radii, "spread"), cells, caption=caption)


def show_claims(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """A line for each claim with its verdict, then each verdict in words."""
    from certifl.paper.claims.rules import NOT_TESTED  # other commands need not wait for it

    rows = _printable(list(rows))
    keys = ("claim", "verdict", "effect", "interval", "images", "clients")
    head = ("claim", "verdict", "effect, points", "95 %", "images", "clients")
    _print_table(head, [[str(row[key]) for key in keys] for row in rows], texts=2)
    console = _console()
    tested = [row for row in rows if row["verdict"] != NOT_TESTED]
    for row in tested:
        console.print(f"{row['claim']}  {row['sentence']}")
        console.print(f"    {row['words']}\n", style="dim")
    if left := len(rows) - len(tested):
        console.print(
            f"{left} of {len(rows)} claims were not tested: each compares runs that are not among "
            "these. --out claims.md names them.\n"
        )
    for note in notes:
        console.print(note, style="dim")


def show_certificates(certificates: Certificates) -> None:
    """A few lines about certificates."""
    metadata, console = certificates.conditions, _console()
    acr, unit = certificates.average_certified_radius(), str(metadata["unit"])
    stopped = ""
    if metadata.get("radii") is None and "boundaries" in metadata:
        stopped = " (no radii given: stopped where the average radius gains little)"
    lines = {
        "images": f"{len(certificates)}",
        "abstained": f"{int(certificates.abstained.sum())}",
        "certified accuracy": f"{certificates.certified_accuracy([0.0])[0]:.3f} at radius 0",
        "average radius": f"{format_amount(acr, unit)} (ACR)",
        "votes per image": f"{certificates.votes.mean():,.0f} of at most "
        f"{int(metadata['n']):,}{stopped}",
    }
    for title, text in lines.items():
        console.print(f"{title:20}{text}")
    console.print(_meaning(metadata), style="dim")


def show_prediction(prediction: Prediction) -> None:
    """Label or abstention, radius and what they mean."""
    certificates, console = prediction.certificates, _console()
    metadata = certificates.conditions
    if certificates.abstained[0]:
        console.print("abstained: no class is certain enough")
    else:
        radius = format_amount(float(certificates.radius[0]), str(metadata["unit"]))
        console.print(
            f"label   {visible(prediction.class_name)} (class {int(certificates.predicted[0])})"
        )
        console.print(f"radius  {radius} in {metadata['norm']} norm, {metadata['family']}")
    whose = "" if prediction.client is None else f"client {prediction.client} uses "
    console.print(f"model   {whose}{visible(prediction.deploys)}")
    if prediction.changed:
        console.print(
            f"image   {prediction.changed}: the certificate holds for the converted image"
        )
    console.print(_meaning(metadata), style="dim")


def _meaning(metadata: Mapping[str, Any]) -> str:
    limit = ""
    if below_sigma(metadata):
        limit = "Radii of this law stay below sigma; the scan estimator has no such limit. "
    return (
        f"Each radius ({metadata['norm']} norm, {metadata['unit']}) is wrong with probability at "
        f"most {metadata['alpha']}. {limit}{metadata['threat']}"
    )


def show_attack(result: Mapping[str, Any]) -> None:
    """What attacks on certificates came to: inside their promise, and beyond it."""
    result = _printable(result)
    for part in result.get("perturbations", [result]):
        if part is not result:
            line = f"{part['family']}, certified by {_clients(part['clients'])}"
            _console().print(line, style="bold")
        _show_attack(part)


def _show_attack(result: Mapping[str, Any]) -> None:
    inside, beyond = result["parameters"], result["deformed_first"]
    console = _console(soft_wrap=True)
    for case in inside["violations"]:
        console.print(
            f"WRONG  client {case['client']}, image {case['index']}: class {case['rival']} is "
            f"likelier than class {case['predicted']} at length {case['length']:.6g}, inside the "
            f"radius {case['radius']:.6g} ({case['votes']:,} votes, p = {case['p_value']:.2g})"
        )
    closest, of_all = inside["smallest_lead"], f"of {beyond['images']} images"
    lines = {
        "class changes inside certificates": f"{len(inside['violations'])} of {inside['images']} "
        f"images ({inside['deltas']:,} parameters tried, {inside['votes']:,} votes)",
        "smallest lead found": "none was attacked"
        if closest is None
        else f"{100 * closest['lead']:.1f} % of {closest['votes']:,} votes "
        f"(client {closest['client']}, image {closest['index']})",
        "certified correctly": f"{100 * beyond['certified']:.1f} % {of_all}",
        "predicted correctly": f"{100 * beyond['clean']:.1f} %",
        "deformed first, at random": f"{100 * beyond['random']:.1f} %",
        f"deformed first, worst of {beyond['deltas']}": f"{100 * beyond['worst']:.1f} %",
        "changed by that, beyond doubt": f"{beyond['changed']} of {beyond['promised']} certified",
    }
    for title, text in lines.items():
        console.print(f"{title:35}{text}")
    second = (
        "Images that arrive changed are covered too, up to rounding and clipping; both are "
        "measured here."
        if covers_received(result["family"])
        else "An image that arrives deformed and is smoothed then is interpolated twice: measured "
        "here, not guaranteed."
    )
    console.print(f"Certificates guarantee that no class changes inside. {second}", style="dim")


def show_plan(name: str, plan: Plan) -> None:
    """The cost of a study, and the assumptions of the estimate."""
    console = _console(soft_wrap=True)
    console.print(f"Plan of {visible(name)}: nothing was trained or written.")
    early = plan.votes_expected < plan.votes_at_most
    at_most = f" (at most {clock(plan.certification_seconds_at_most)})" if early else ""
    lines = {
        **plan.setting,
        "votes at most": f"{plan.votes_at_most:,}",
        "votes expected": f"{plan.votes_expected:,}",
        "votes per second": f"{plan.votes_per_second:,.0f}",
        "training": f"about {clock(plan.training_seconds)}",
        "certification": f"about {clock(plan.certification_seconds)}{at_most}",
        "peak memory": f"about {_bytes(plan.memory_bytes)}",
        "disk": f"about {_bytes(plan.disk_bytes)}",
    }
    if plan.device_bytes:
        lines["memory of the device"] = f"about {_bytes(plan.device_bytes)}"
    for title, text in lines.items():
        console.print(f"{title:26}{text}")
    for sentence in plan.assumptions:
        console.print(f"- {sentence}", style="dim")


def show_sweep(name: str, costs: Sequence[SweepCost], at_once: int) -> None:
    """What the variants of a sweep will take."""
    console = _console(soft_wrap=True)
    console.print(f"Plan of the sweep {visible(name)}: nothing was trained or written.")
    rows = [
        (visible(c.label), f"{c.runs}", f"{c.done}", f"{c.votes:,}", _left(c.seconds))
        for c in costs
    ]
    runs, done, votes = (sum(getattr(c, key) for c in costs) for key in ("runs", "done", "votes"))
    seconds = sum(c.seconds for c in costs)
    rows.append(("all", f"{runs}", f"{done}", f"{votes:,}", _left(seconds)))
    _print_table(("variant", "runs", "done", "votes expected", "time"), rows)
    several = f"; {at_once} at a time (--jobs) at best {_roughly(seconds / at_once)}"
    console.print(
        f"Times are those of one run after the other{several if at_once > 1 and seconds else ''}. "
        "Each variant was measured on random images for a few seconds; a training that several "
        "runs share is counted once. Not counted are a few seconds for each run: its start, the "
        "images of the explorer, the page. `certifl plan` says more about one of them.",
        style="dim",
    )


def _left(seconds: float) -> str:
    return _roughly(seconds) if seconds else "finished"


def show_study(costs: Mapping[str, Cost], scale: str, words: str) -> None:
    """What figures will take: runs they share are counted in each, and once in the last line."""
    console = _console(soft_wrap=True)
    console.print(f"Plan at scale {scale}: nothing was computed or written.")
    console.print(f"This scale is {words}.", style="dim")
    rows = [
        (
            name,
            f"{cost.runs}",
            f"{cost.done}",
            f"{cost.trainings}",
            f"{cost.votes_at_most:,}",
            "not measured" if cost.unknown else _left(cost.seconds),
        )
        for name, cost in costs.items()
    ]
    _print_table(("figure", "runs", "done", "trainings left", "votes at most", "rough time"), rows)
    measured = list(costs.values())[-1].measured
    if any(cost.unknown for cost in costs.values()):
        console.print(
            "No GPU's speed is known before it has finished a run of each network of this study.",
            style="dim",
        )
    console.print(
        f"Speeds are measured in finished runs of this study for {100 * measured:.0f} % of the "
        "runs left, otherwise orders of magnitude. A figure's runs are counted in its line even "
        "where it shares them; the time is that of one run after the other (--jobs).",
        style="dim",
    )


def _roughly(seconds: float) -> str:
    days = seconds / 86_400
    if days < 2:
        return clock(seconds)
    return f"{days:,.0f} days" if days < _YEAR else f"{days / _YEAR:,.1f} years"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(0.1, count / 1e6):.1f} MB"


def show_checks(checks: Sequence[Check]) -> None:
    """What `certifl doctor` found, and what is missing."""
    console = _console()
    for check in checks:
        console.print(f"{check.topic:18}{check.found}", soft_wrap=True)
    missing = [check for check in checks if check.missing]
    if missing:
        console.print("\nNot possible here:")
        for check in missing:
            console.print(f"  {check.topic}: {check.missing}", soft_wrap=True)


def show_names(rows: Mapping[str, Sequence[str]]) -> None:
    """Registered components, a line for each kind."""
    console = _console()
    for title, names in rows.items():
        console.print(f"{title:14}{', '.join(names)}", soft_wrap=True)
