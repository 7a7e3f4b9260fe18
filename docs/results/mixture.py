"""Why a mixture wins or does not: lambda with the paper's steps and with steps divided by lambda.

Made by `make results` from the runs of Figures 5 and 5-matched; docs/results/mixture.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from certifl.paper.figures import MATCHED, MIXTURES, ROTATION, TRANSLATION, Regime, Setting
from certifl.paper.scales import scale_named
from certifl.report import load_run
from certifl.report.figures import Drawing
from certifl.report.summary import noise_words
from certifl.report.wording import markdown_table
from certifl.runs.folder import RunFolder
from study_numbers import Gap, draw_gaps, fit

KINDS = (("the paper's steps", MIXTURES), ("steps divided by λ", MATCHED))
_LOOKS = (("#3b4cc0", "o", "-"), ("#b35900", "s", "--"))


@dataclass(frozen=True, eq=False)
class Point:
    """A mixture beside FedAvg.

    Attributes:
        value: lambda. gap: of its average certified radius to FedAvg's.
        fit: accuracy of clients on their own augmented images in the last round.
    """

    value: float
    gap: Gap
    fit: float


@dataclass(frozen=True, eq=False)
class Panel:
    """One perturbation: points for each kind of steps, and how well FedAvg fits."""

    title: str
    points: tuple[tuple[Point, ...], ...] = field(repr=False)
    fedavg_fit: float


def panels(data: Path) -> list[Panel]:
    """The perturbations of which all mixtures are finished."""
    settings = [
        Setting("cifar10", 10, family, sigma)
        for family, sigmas in (ROTATION, TRANSLATION)
        for sigma in sigmas
    ]
    found = (_panel(data, setting) for setting in settings)
    return [panel for panel in found if panel is not None]


def _panel(data: Path, setting: Setting) -> Panel | None:
    scale = scale_named("overnight")

    def folder(regime: Regime) -> Path:
        return data / "runs" / scale.spec(setting, regime).hash()

    regimes = dict.fromkeys(regime for _, kind in KINDS for regime in kind)
    if not all(RunFolder(folder(regime)).finished() for regime in regimes):
        return None
    runs = {regime: load_run(folder(regime)) for regime in regimes}
    fedavg = runs[MIXTURES[0]]
    points = tuple(
        tuple(
            Point(regime.personalization, Gap.between(runs[regime], fedavg), fit(runs[regime]))
            for regime in kind
            if regime.personalization is not None
        )
        for _, kind in KINDS
    )
    return Panel(noise_words(fedavg), points, fit(fedavg))


def drawing_of(found: Sequence[Panel]) -> Drawing:
    """Above: difference to FedAvg against lambda. Below: how well clients fit their images."""
    figure = Figure(figsize=(3.2 * len(found) + 0.6, 5.6), layout="constrained")
    axes: Any = figure.subplots(2, len(found), squeeze=False, sharex=True, sharey="row")
    for column, panel in enumerate(found):
        above, below = axes[0, column], axes[1, column]
        above.axhline(0.0, color="0.5", linewidth=0.8)
        below.axhline(100 * panel.fedavg_fit, color="0.5", linewidth=0.8, label="FedAvg")
        for (color, marker, dash), (name, _), points in zip(
            _LOOKS, KINDS, panel.points, strict=True
        ):
            look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": dash}
            values = [p.value for p in points]
            draw_gaps(above, values, [p.gap for p in points], **look)
            below.plot(values, [100 * p.fit for p in points], label=name, **look)
        above.set_title(panel.title, fontsize=10)
        below.set_xlabel("λ")
    axes[0, 0].set_ylabel("mixture minus FedAvg (points)")
    axes[1, 0].set_ylabel("clients fit their images (%)")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return Drawing(figure, (), ())


def page(found: Sequence[Panel]) -> str:
    """The page about these perturbations."""
    rows = [
        [
            panel.title,
            name,
            f"{point.value:g}",
            point.gap.words,
            f"{point.fit:.0%}",
        ]
        for panel in found
        for (name, _), points in zip(KINDS, panel.points, strict=True)
        for point in points
    ]
    head = ("perturbation", "steps", "λ", "minus FedAvg, points (95 %)", "clients fit")
    parts = [
        "# The mixture and its steps",
        "Made by `python docs/results/figures.py`, from the runs of Figures 5 and 5-matched.",
        "![Mixtures minus FedAvg, and how well clients fit their images](mixture.png)",
        "Eq. (5) of the paper multiplies the learning rate by λ: with λ = 0.1 clients are kept "
        "close to their mean, and take a tenth of FedAvg's steps as well. With steps divided by "
        "λ only the pull to the mean differs. Where the two lines meet, the size of steps does "
        "not matter; where they part, it explains that much of the difference to FedAvg. Below: "
        "the accuracy of clients on their own perturbed training images in the last round (gray: "
        "FedAvg), which shows whether small steps leave a model unfinished.",
        _seen(found),
        "## Numbers",
        "Average certified radius, mixture minus FedAvg; a point is a hundredth of the largest "
        "possible radius. Intervals: over test images, paired, each row by itself. λ = 1 is "
        "training alone. One training seed.",
        markdown_table(head, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _seen(found: Sequence[Panel]) -> str:
    """How often mixtures are shown ahead of FedAvg or behind it, for both kinds of steps."""
    words = []
    for kind, (name, _) in enumerate(KINDS):
        points = [p for panel in found for p in panel.points[kind] if p.value < 1.0]
        ahead = sum(p.gap.low > 0.0 for p in points)
        behind = sum(p.gap.high < 0.0 for p in points)
        words.append(
            f"With {name}, {ahead} of {len(points)} mixtures are ahead of FedAvg, {behind} are "
            f"behind, and {len(points) - ahead - behind} show no difference."
        )
    return " ".join(words)
