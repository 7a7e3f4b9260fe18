"""The numbers of a figure: results, settings and cost of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from certifl.paper.claims.rules import interval_words
from certifl.report import RunResults, load_run
from certifl.report.compare import compare, difference, own_interval
from certifl.report.results import Row, by_seed
from certifl.report.summary import (
    client_acr,
    client_curves,
    first_unit,
    mean_acr,
    noise_words,
    possible_radius,
    selected_radii,
)
from certifl.report.wording import RadiusScale, markdown_table, percent, range_of
from certifl.runs.atomic import read_json
from certifl.safe_io import parse_json, read_text, read_toml
from paging import duration

COUNTED = (
    "How time is counted: training is the sum of its rounds, each counted once however many runs "
    "continue from it; certification is the sum over images. Both are seconds of one process, and "
    "several processes may run in parallel. Wall clock is the time during which at least one of "
    "the runs was in progress, pauses and other work on the machine included. A run that several "
    "figures show counts in full for each of them, and once for the study."
)


@dataclass(frozen=True)
class Cost:
    """Cost of some runs.

    Attributes:
        runs: distinct ones. trainings: those from the beginning; others continue from them.
        training, certification: seconds of one process. wall: seconds of wall clock.
        votes: cast, selection included.
    """

    runs: int
    trainings: int
    training: float
    certification: float
    wall: float
    votes: int

    @property
    def durations(self) -> tuple[str, str, str]:
        """Training, certification and wall clock."""
        return duration(self.training), duration(self.certification), duration(self.wall)

    @property
    def words(self) -> str:
        """The cost in a sentence."""
        training, certification, wall = self.durations
        return (
            f"{self.runs} runs from {self.trainings} trainings, {self.votes:,} votes: {training} "
            f"of training and {certification} of certification, {wall} of wall clock"
        )


def manifest(run: Path) -> dict[str, Any]:
    """The run's own record."""
    return read_json(run / "run.json")


def cost_of(runs: Iterable[Path]) -> Cost:
    """Cost of distinct runs, each round of training counted once."""
    folders = sorted(set(runs))
    manifests = [manifest(run) for run in folders]
    lines = dict.fromkeys(line for run in folders for line in _rounds(run))
    rounds = [parse_json(line) for line in lines]
    return Cost(
        runs=len(folders),
        trainings=sum(entry["round"] == 0 for entry in rounds),
        training=sum(float(entry["seconds"]) for entry in rounds),
        certification=sum(float(one["certification_seconds"]) for one in manifests),
        wall=_union([(one["created"], one["finished"]) for one in manifests]),
        votes=sum(int(one["votes"]) for one in manifests),
    )


def _rounds(run: Path) -> list[str]:
    """A run's rounds; one that was taken over has the same line, to the last digit of its time."""
    return [line for line in read_text(run / "history.jsonl").splitlines() if line.strip()]


def _union(times: Iterable[tuple[str, str]]) -> float:
    """Seconds covered by at least one of some intervals."""
    spans = sorted((_stamp(begin), _stamp(end)) for begin, end in times)
    covered, reached = 0.0, float("-inf")
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def comparison_tables(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """One heading and table for each set of runs that can be compared."""
    parts = []
    for page in index["pages"]:
        runs = [
            dataclasses.replace(load_run(folder / one["run"]), label=str(one["label"]))
            for one in page["runs"]
        ]
        parts += [f"### {_heading(runs[0])}", _table(by_seed(runs))]
    return parts


def _heading(run: RunResults) -> str:
    return f"{run.data_name}, {len(run.clients)} clients, {noise_words(run)}"


def _table(runs: Sequence[Row]) -> str:
    scale = first_unit(runs)
    radii = selected_radii(runs, scale)
    head = ["algorithm", "ACR", "95 %", "clients, smallest to largest"]
    head += [f"at {text}" for text, _ in radii]
    return markdown_table(
        head, [_row(run, scale, [radius for _, radius in radii]) for run in runs]
    )


def _row(run: Row, scale: RadiusScale, radii: Sequence[float]) -> list[str]:
    acr, interval = client_acr(run), own_interval(run)
    return [
        run.label,
        scale.text(mean_acr(run)),
        "too few images" if interval is None else scale.interval(*interval),
        f"{scale.number(float(acr.min()))} to {scale.text(float(acr.max()))}",
        *(percent(float(share)) for share in client_curves(run, radii).mean(axis=0)),
    ]


def setting_words(runs: Sequence[Path]) -> list[str]:
    """How the runs were set up: what they share, and the range of what they do not."""
    specs = [read_toml(run / "spec.toml") for run in runs]
    manifests = [manifest(run) for run in runs]
    training = [spec["training"] for spec in specs]
    certified = [spec["certification"] for spec in specs]
    sets = [
        f"{name} ({range_of(_of(manifests, name))} training images, over all clients)"
        for name in sorted({one["data"]["name"] for one in manifests})
    ]
    return [
        f"- data: {', '.join(sets)}; {range_of(one['clients'] for one in manifests)} clients",
        f"- network: {_named(one['model'] for one in manifests)}",
        f"- training: {_named(one['rounds'] for one in training)} rounds of "
        f"{_named(one['local_epochs'] for one in training)} local epochs, batches of "
        f"{_named(one['batch_size'] for one in training)}, learning rate "
        f"{_named(one['lr'] for one in training)}; seed {_named(spec['seed'] for spec in specs)}",
        f"- certification: {_named(one['estimator'] for one in certified)}, n0 = "
        f"{_named(one['n0'] for one in certified)}, n = {_named(one['n'] for one in certified)}, "
        f"α = {_named(one['alpha'] for one in certified)}; "
        f"{range_of(int(one['images']) for one in certified)} test images of every client",
    ]


def _of(manifests: Iterable[Mapping[str, Any]], data: str) -> list[int]:
    return [one["data"]["train_images"] for one in manifests if one["data"]["name"] == data]


def _named(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in sorted(set(values), key=lambda v: (str(type(v)), v)))


# The difference of two runs, in points.


@dataclass(frozen=True)
class Gap:
    """A difference of average certified radii, as a share of the largest possible radius.

    Attributes:
        share: first minus second. low, high: its 95 % interval over test images, paired.
    """

    share: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """In points, the interval rounded outward."""
        return f"{100 * self.share:+.1f} ({interval_words((self.low, self.high))})"

    @classmethod
    def between(cls, first: RunResults, second: RunResults) -> Gap:
        """Of two runs on the same images."""
        rows = by_seed([first, second])
        found, largest = difference(compare(rows).pairs, 0, 1), possible_radius(rows)
        return cls(found.estimate / largest, found.low / largest, found.high / largest)


def draw_gaps(axes: Any, places: Sequence[float], gaps: Sequence[Gap], **look: Any) -> None:
    """Points and their intervals over some places of the horizontal axis."""
    middle, low, high = (
        [100 * getattr(gap, name) for gap in gaps] for name in ("share", "low", "high")
    )
    margins = [
        [value - end for value, end in zip(middle, low, strict=True)],
        [end - value for value, end in zip(middle, high, strict=True)],
    ]
    axes.errorbar(places, middle, margins, capsize=3, **look)


def fit(result: RunResults) -> float:
    """Mean accuracy of clients on their augmented training images in the last round."""
    clients = result.history[-1]["clients"].values()
    return sum(float(one["accuracy"]) for one in clients) / len(clients)
