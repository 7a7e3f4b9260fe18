"""Make docs/results/figure*.md, paper.md and README.md, from published runs or a computed study.

    make results                                   # from docs/results/data, without training
    python docs/results/figures.py STUDY [--commit HASH] [--into FOLDER]

Every word and number of the pages comes from the folder: equal studies give equal pages. Figures
of which runs are missing are listed as not computed yet. `--commit` names the code that computed a
study; published runs say it themselves.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mixture
import regime
from certifl.errors import CertiflError
from certifl.paper.claims import Report, check_claims, explanation
from certifl.paper.figures import EXTRA, FIGURES
from certifl.paper.pages import draw_paper_figure
from certifl.report.figures import image_bytes
from certifl.report.wording import markdown_table
from certifl.runs.atomic import read_json, write_text
from paging import command_words, head_commit, machine_words, picture
from study_numbers import COUNTED, Cost, comparison_tables, cost_of, manifest, setting_words
from verdicts import figure_claims, overview, paper_page, sentences, tally

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
OTHERS = {
    "regime.md": "When does training together pay?",
    "mixture.md": "The mixture and its steps",
    "algorithms.md": "All algorithms on MNIST",
    "objectives.md": "Training objectives beside each other",
    "privacy.md": "What privacy costs in certified accuracy",
}


@dataclass(frozen=True, eq=False)
class Shown:
    """One figure of a study.

    Attributes:
        name: "figure1". place: its folder. index: its `figure.json`.
        runs: folders of the runs it shows. cost: what they took.
    """

    name: str
    place: Path
    index: dict[str, Any] = field(repr=False)
    runs: tuple[Path, ...] = field(repr=False)
    cost: Cost

    @property
    def heading(self) -> str:
        """Name, title and scale: "Figure 1 at laptop scale: ..."."""
        number = self.name.removeprefix("figure")
        return f"Figure {number} at {self.index['scale']} scale: {self.index['title']}"

    @property
    def caption(self) -> str:
        """How to read its picture."""
        kinds = {panel["kind"] for panel in self.index["panels"]}
        mean = "Lines are means over clients; bands reach from the smallest to the largest client."
        return "A line for every client." if kinds == {"clients"} else mean


@dataclass(frozen=True)
class Missing:
    """A figure of which runs are missing.

    Attributes:
        name: "figure1". title: what it shows. runs: it needs so many. done: there are so many.
    """

    name: str
    title: str
    runs: int
    done: int

    @property
    def row(self) -> list[str]:
        """Its row among the figures."""
        number = self.name.removeprefix("figure")
        here = f"not computed yet ({self.done} of {self.runs} runs)"
        return [f"Figure {number}: {self.title}", here, *[""] * 4]


def figures_of(study: Path) -> tuple[list[Shown], list[Missing]]:
    """The finished figures of a study and the others, in their order."""
    found: list[Shown] = []
    missing: list[Missing] = []
    for path in sorted(study.glob("*/figure.json"), key=lambda p: (len(str(p)), str(p))):
        index = read_json(path)
        name, title = str(index["figure"]), str(index["title"])
        curves = [curve for panel in index["panels"] for curve in panel["curves"]]
        runs = tuple(dict.fromkeys((path.parent / curve["run"]).resolve() for curve in curves))
        done = sum(finished(run) for run in runs)
        if done == len(runs):
            found.append(Shown(name, path.parent, index, runs, cost_of(runs)))
        else:
            print(f"{name} is left out: {done} of its {len(runs)} runs are finished.")
            missing.append(Missing(name, title, len(runs), done))
    return found, missing


def finished(run: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (run / "run.json").is_file() and manifest(run)["status"] == "finished"


def commits_of(study: Path, runs: tuple[Path, ...], commit: str) -> str:
    """The commits of the code that computed these runs, as published; or the given one."""
    path = study / "commits.json"
    known = read_json(path) if path.is_file() else {}
    return ", ".join(sorted({str(known.get(run.name, commit)) for run in runs}))


def made_by(shown: Shown, commit: str) -> list[str]:
    """Command, code, machine and time."""
    metadata = [manifest(run) for run in shown.runs]
    machines = dict.fromkeys(machine_words(one) for one in metadata)
    return [
        "## How it was made",
        f"```\n{command_words(shown.index['command'])}\n```",
        f"- code: commit `{commit}`",
        *(f"- machine: {words}" for words in machines),
        f"- time: {shown.cost.words}",
        *setting_words(shown.runs),
        f"\n{COUNTED}",
    ]


def page(shown: Shown, report: Report, commit: str) -> str:
    """A figure's page."""
    made, *rest = made_by(shown, commit)
    figure = {**FIGURES, **EXTRA}.get(shown.name)
    words, comparisons = figure_claims(report, shown.name, shown.runs)
    parts = [
        f"# {shown.heading}",
        f"Made by `python docs/results/figures.py`. {shown.caption}",
        f"![{shown.index['title']}]({shown.name}.png)",
        "## What the paper says",
        figure.says if figure is not None else "",
        sentences(report, shown.name),
        "## What is seen here",
        words,
        "\n".join(f"- {line}" for line in explanation(report)),
        "## Numbers",
        "ACR (average certified radius), mean over clients, with its 95 % interval over test "
        "images; then certified accuracies, mean over clients, at some radii. Radii are rounded "
        "down, intervals outward.",
        *comparison_tables(shown.place, shown.index),
        made,
        rest[0],
        "\n".join(rest[1:]),
        *(("## Every comparison", comparisons) if comparisons else ()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def index_page(
    figures: list[Shown],
    missing: list[Missing],
    report: Report,
    study: Path,
    commit: str,
) -> str:
    """The page of the whole study."""
    runs = [mark.parent for mark in study.glob("runs/*/run.json") if finished(mark.parent)]
    pages = {shown.name: f"{shown.name}.md" for shown in figures}
    rows = [[f"[{shown.heading}]({shown.name}.md)", *_cost_cells(shown.cost)] for shown in figures]
    rows += [one.row for one in missing]
    rows.append(["all runs, each once", *_cost_cells(cost_of(runs))])
    machines = dict.fromkeys(machine_words(manifest(run)) for run in runs)
    commands = dict.fromkeys(command_words(shown.index["command"]) for shown in figures)
    code = commits_of(study, tuple(runs), commit)
    parts = [
        "# Results",
        "Made by `python docs/results/figures.py`.",
        "## The paper's claims",
        f"{tally(report)} [Does the paper hold?](paper.md) has them on one page. "
        "[What is measured, and when a claim counts as supported](../claims.md).",
        overview(report, pages),
        "\n".join(f"- {line}" for line in explanation(report)),
        "## The figures",
        markdown_table(
            ("figure", "runs", "trainings", "training", "certification", "on the clock"), rows
        ),
        COUNTED,
        "```\n" + "\n".join(commands) + "\n```" if commands else "",
        "\n".join([f"- code: commit `{code}`", *(f"- machine: {words}" for words in machines)]),
        "## Other pages",
        "\n".join(
            f"- [{title}]({name})" for name, title in OTHERS.items() if (HERE / name).is_file()
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cost_cells(cost: Cost) -> list[str]:
    return [str(cost.runs), str(cost.trainings), *cost.durations]


def write_pages(study: Path, into: Path, commit: str) -> list[Path]:
    """Pages and pictures of all finished figures, the claims on one page, and the index.

    Returns:
        The pages. None where the folder holds no finished run of a figure.

    Raises:
        CertiflError: a run or an index is damaged.
    """
    figures, missing = figures_of(study)
    runs = [mark.parent for mark in sorted(study.glob("runs/*/run.json")) if finished(mark.parent)]
    if not runs or not (figures or missing):
        return []
    report = check_claims(runs)
    into.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for shown in figures:
        drawing = draw_paper_figure(shown.place)
        picture(image_bytes(drawing, "png"), into / f"{shown.name}.png")
        code = commits_of(study, shown.runs, commit)
        written[f"{shown.name}.md"] = page(shown, report, code)
    written["paper.md"] = paper_page(report, [one.name for one in missing])
    written["README.md"] = index_page(figures, missing, report, study, commit)
    pairs, mixtures = regime.pairs(study), mixture.panels(study)
    if len(pairs) > 2:
        written["regime.md"] = regime.page(pairs)
        picture(image_bytes(regime.drawing_of(pairs), "png"), into / "regime.png")
    if mixtures:
        written["mixture.md"] = mixture.page(mixtures)
        picture(image_bytes(mixture.drawing_of(mixtures), "png"), into / "mixture.png")
    for name, text in written.items():
        write_text(into / name, text)
    return [into / name for name in written]


def main() -> None:
    """Write the pages of a folder; without one, those of the published runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", type=Path, nargs="?", default=DATA)
    parser.add_argument("--commit", default="")
    parser.add_argument("--into", type=Path, default=HERE)
    options = parser.parse_args()
    if options.study == DATA and not DATA.is_dir():
        print(f"No runs are published in {DATA.name}/: the pages stay as they are.")
        return
    try:
        pages = write_pages(options.study, options.into, options.commit or head_commit())
    except CertiflError as error:
        parser.exit(2, f"{error}\n")
    if not pages:
        parser.exit(2, f"{options.study} holds no finished figure.\n")
    print("\n".join(map(str, pages)))


if __name__ == "__main__":
    main()
