"""One table of algorithms over seeds, as text, CSV, Markdown and LaTeX.

The numbers are those of the page: `summary_rows`, and the differences of `compare`, paired image
by image within each seed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.report.compare import Difference, compare, difference, standing
from certifl.report.figures import certified_accuracy_figure, save
from certifl.report.page.page import write_report
from certifl.report.results import Row, RunResults, by_perturbation, by_seed, load_runs
from certifl.report.summary import first_unit, group_words, noise_words
from certifl.report.table import summary_rows
from certifl.report.wording import markdown_table
from certifl.runs.atomic import write_text

_NUMBERS = (
    *("perturbation", "algorithm", "seeds", "images", "unit", "acr", "acr_low", "acr_high"),
    *("spread", "behind", "behind_low", "behind_high", "leads"),
)


@dataclass(frozen=True)
class TableOfGroup:
    """The rows about one group of clients, which certify one perturbation.

    Attributes:
        title: which group; "" where there is one. head: titles of the columns of `rows`.
        rows: texts; radii are rounded down and intervals outward.
        leading: whether each row leads, or is not shown to be behind the row that does.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    leading: tuple[bool, ...]

    def text(self) -> str:
        """Columns side by side."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.head))]
        shown = [
            "  ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        shown.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*([self.title] if self.title else []), *shown])

    def markdown(self) -> str:
        """A Markdown table; rows that lead are bold."""
        rows = [self._emphasized(row, at, "**{}**") for at, row in enumerate(self.rows)]
        title = f"{self.title}:\n\n" if self.title else ""
        return title + markdown_table(self.head, rows, numbers=True)

    def latex(self) -> str:
        """A tabular with the rules of the package booktabs; rows that lead are bold."""
        head = " & ".join(cell.translate(_LATEX) for cell in self.head)
        rows = [
            self._emphasized([cell.translate(_LATEX) for cell in row], at, r"\textbf{{{}}}")
            for at, row in enumerate(self.rows)
        ]
        lines = [
            *([f"% {self.title}"] if self.title else []),
            rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *(rf"{' & '.join(row)} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines)

    def _emphasized(self, row: Sequence[str], at: int, form: str) -> list[str]:
        name, *rest = row
        return [form.format(name) if self.leading[at] else name, *rest]


@dataclass(frozen=True)
class SeedTable:
    """The table: one part for each group of clients that is reported apart.

    Attributes:
        parts: usually one. notes: what the columns mean, in sentences.
        numbers: by column of the CSV, one mapping for each row.
    """

    parts: tuple[TableOfGroup, ...]
    notes: tuple[str, ...]
    numbers: tuple[Mapping[str, Any], ...]

    def text(self) -> str:
        """Columns side by side, and the notes below."""
        return "\n\n".join([*(part.text() for part in self.parts), "\n".join(self.notes)]) + "\n"

    def csv(self) -> str:
        """Unrounded numbers, in the units in which they are stored."""
        columns = list(dict.fromkeys([*_NUMBERS, *(key for row in self.numbers for key in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.numbers)  # None is written as an empty cell
        return text.getvalue()

    def markdown(self) -> str:
        """Markdown tables with the notes below."""
        parts = [part.markdown() for part in self.parts]
        return "\n\n".join([*parts, "\n".join(self.notes)]) + "\n"

    def latex(self) -> str:
        """Tabulars, with the notes as comments above."""
        notes = "\n".join(f"% {note}" for note in self.notes)
        return "\n\n".join([notes, *(part.latex() for part in self.parts)]) + "\n"


def write_comparison(runs: Sequence[RunResults], folder: Path, title: str) -> SeedTable:
    """Write the table, the figure of certified accuracy and the page of some runs.

    ```
    table.txt, .csv, .md, .tex   figure.png, .pdf, .svg, .csv   report.html
    ```
    Where clients certify different perturbations, or some took no part in training, each group
    has a figure: `figure`, `figure-2` and so on.

    Raises:
        StoreMismatch: runs that cannot be compared. StoreError: the folder cannot be written.
    """
    table = seed_table(runs)
    write_text(folder / "table.txt", table.text())
    write_text(folder / "table.csv", table.csv())
    write_text(folder / "table.md", table.markdown())
    write_text(folder / "table.tex", table.latex())
    groups = by_perturbation(load_runs(runs))
    for number, group in enumerate(groups, start=1):
        stem = "figure" if number == 1 else f"figure-{number}"
        save(certified_accuracy_figure(by_seed(group)), folder, stem)
    write_report(runs, folder / "report.html", title, figures=False)
    return table


def seed_table(runs: Sequence[str | Path | RunResults]) -> SeedTable:
    """The table of some runs; those that differ in their seed alone are one row.

    Raises:
        StoreMismatch, StoreError: as `load_runs`.
    """
    groups = [by_seed(group) for group in by_perturbation(load_runs(runs))]
    summaries = iter(summary_rows(runs))
    one_noise = len({noise_words(*group) for group in groups}) == 1
    parts: list[TableOfGroup] = []
    numbers: list[Mapping[str, Any]] = []
    for group in groups:
        own = [next(summaries) for _ in group]
        title = group[0].runs[0].group if one_noise else group_words(*group)
        part, more = _of_group(title, group, own)
        parts.append(part)
        numbers += more
    several = any(len(row.runs) > 1 for group in groups for row in group)
    over, seeds = ("images and seeds", " and seeds") if several else ("images", "")
    notes = (
        f"ACR: average certified radius, mean over clients{seeds}, with a 95 % interval over "
        f"{over}.",
        "Columns of radii: share of all images, correct with at least that radius. Spread: best "
        "minus worst client.",
        "Behind the best: difference of ACR to the leading row, paired image by image within "
        "each seed; all these intervals hold together with 95 %. Bold (Markdown, LaTeX): the row "
        "that leads, and those that are not shown to be behind it.",
    )
    return SeedTable(tuple(parts), notes, tuple(numbers))


def _of_group(
    title: str, rows: Sequence[Row], summaries: Sequence[Mapping[str, Any]]
) -> tuple[TableOfGroup, list[dict[str, Any]]]:
    compared, scale, several = compare(rows), first_unit(rows), len(rows) > 1
    behind: list[Difference | None] = [None] * len(rows)  # the leading row
    leaders: set[int] = set()
    if several:
        result = standing(compared.acr, compared.pairs)
        leaders = {result.best, *result.tied}
        for at in range(len(rows)):
            pair = None if at == result.best else difference(compared.pairs, result.best, at)
            behind[at] = pair if pair is not None and compared.paired and pair.stated else None
    radii = [f"≥ {share['radius_text']}" for share in summaries[0]["accuracy"]]
    last = ["behind the best", "95 %"] if several else []
    head = ("algorithm", "seeds", "ACR", "95 %", *radii, "spread", *last)
    texts, numbers = [], []
    for at, (row, summary) in enumerate(zip(rows, summaries, strict=True)):
        low, high, pair = summary["acr_low_text"], summary["acr_high_text"], behind[at]
        cells = [
            str(summary["label"]),
            str(len(row.runs)),
            summary["acr_text"],
            f"{low} to {high}" if low else "–",
            *(share["text"] for share in summary["accuracy"]),
            summary["spread_text"],
        ]
        if several and pair is None:
            cells += ["–", "–"]
        elif pair is not None:
            cells += [scale.text(pair.estimate), scale.interval(pair.low, pair.high)]
        texts.append(tuple(cells))
        numbers.append(_numbers(summary, row, pair, at in leaders))
    leading = tuple(at in leaders for at in range(len(rows)))
    return TableOfGroup(title, head, tuple(texts), leading), numbers


def _not_above(radius: float) -> str:
    """A radius in six digits, or in all where these would round it up."""
    text = f"{radius:.6g}"
    return text if float(text) <= radius else repr(float(radius))


def _numbers(
    summary: Mapping[str, Any], row: Row, behind: Difference | None, leads: bool
) -> dict[str, Any]:
    shares = {
        f"accuracy_{_not_above(share['radius'])}{end}": share[key]
        for share in summary["accuracy"]
        for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
    }
    return {
        "perturbation": summary["perturbation"],
        "algorithm": summary["label"],
        "seeds": " ".join(str(run.seed) for run in row.runs),
        "images": summary["images"],
        "unit": row.conditions["unit"],
        **{key: summary[key] for key in ("acr", "acr_low", "acr_high", "spread")},
        "behind": None if behind is None else behind.estimate,
        "behind_low": None if behind is None else behind.low,
        "behind_high": None if behind is None else behind.high,
        "leads": int(leads),
        **shares,
    }


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "°": r"$^{\circ}$",
        "≥": r"$\geq$",
        "–": "--",
        "λ": r"$\lambda$",
        "μ": r"$\mu$",
        "σ": r"$\sigma$",
        "π": r"$\pi$",
        "α": r"$\alpha$",
        "\N{NO-BREAK SPACE}": "~",
    }
)
