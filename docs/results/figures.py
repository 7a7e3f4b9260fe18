"""Make docs/results/figure*.md and docs/results/README.md from a computed study.

    certifl reproduce all --scale laptop --data-dir DATA --out STUDY
    python docs/results/figures.py STUDY [--commit HASH] [--into docs/results]

Every word and number of the pages comes from the study folder: equal studies give equal pages.
A study of some figures gives the pages of those. `--commit` names the code that computed the
study; by default it is the one this script belongs to.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certifl.paper.claims import Report, check_claims, explanation
from certifl.runs.atomic import read_json, write_text
from paging import command_words, machine_words, picture, table
from study_numbers import COUNTED, Cost, comparison_tables, cost_of, manifest, setting_words
from verdict_words import figure_claims, overview, tally

HERE = Path(__file__).resolve().parent
OTHERS = {
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


def figures_of(study: Path) -> list[Shown]:
    """The figures of a study that are finished, in their order."""
    found = []
    for path in study.glob("*/figure.json"):
        index = read_json(path)
        curves = [curve for panel in index["panels"] for curve in panel["curves"]]
        runs = tuple(dict.fromkeys((path.parent / curve["run"]).resolve() for curve in curves))
        resampled = (path.parent / f"{index['figure']}.png").is_file()
        if resampled and all(finished(run) for run in runs):
            found.append(Shown(str(index["figure"]), path.parent, index, runs, cost_of(runs)))
        else:
            print(f"{index['figure']} is left out: it is not finished.")
    return sorted(found, key=lambda shown: (len(shown.name), shown.name))


def finished(run: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (run / "run.json").is_file() and manifest(run)["status"] == "finished"


def made_by(shown: Shown, commit: str) -> list[str]:
    """Command, code, machine and time."""
    metadata = [manifest(run) for run in shown.runs]
    machines = dict.fromkeys(machine_words(held) for held in metadata)
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
    words, comparisons = figure_claims(report, shown.name, shown.runs)
    parts = [
        f"# {shown.heading}",
        f"Made by `python docs/results/figures.py`. {shown.caption}",
        f"![{shown.index['title']}]({shown.name}.png)",
        "## In words",
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
    return "\n\n".join(parts) + "\n"


def index_page(figures: list[Shown], report: Report, study: Path, commit: str) -> str:
    """The page of the whole study."""
    runs = [mark.parent for mark in study.glob("runs/*/run.json") if finished(mark.parent)]
    pages = {shown.name: f"{shown.name}.md" for shown in figures}
    rows = [[f"[{shown.heading}]({shown.name}.md)", *_cost_cells(shown.cost)] for shown in figures]
    whole = cost_of(runs)
    rows.append(["all runs, each once", *_cost_cells(whole)])
    machines = dict.fromkeys(machine_words(manifest(run)) for run in runs)
    commands = dict.fromkeys(command_words(shown.index["command"]) for shown in figures)
    parts = [
        "# Results",
        "Made by `python docs/results/figures.py`.",
        "## The paper's claims",
        f"{tally(report)} [What is measured, and when a claim counts as supported](../claims.md).",
        overview(report, pages),
        "\n".join(f"- {line}" for line in explanation(report)),
        "## The figures",
        table(("figure", "runs", "trainings", "training", "certification", "on the clock"), rows),
        COUNTED,
        "```\n" + "\n".join(commands) + "\n```",
        "\n".join([f"- code: commit `{commit}`", *(f"- machine: {words}" for words in machines)]),
        "## Other pages",
        "\n".join(f"- [{title}]({name})" for name, title in OTHERS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _cost_cells(cost: Cost) -> list[str]:
    return [str(cost.runs), str(cost.trainings), *cost.durations]


def head_commit() -> str:
    """The commit of the checkout this script lies in."""
    call = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Write the pages and pictures of all finished figures, then the index."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--into", type=Path, default=HERE)
    options = parser.parse_args()
    commit = options.commit or head_commit()
    figures = figures_of(options.study)
    if not figures:
        parser.exit(2, f"{options.study} holds no finished figure.\n")
    runs = sorted(mark.parent for mark in options.study.glob("runs/*/run.json"))
    report = check_claims([run for run in runs if finished(run)])
    options.into.mkdir(parents=True, exist_ok=True)
    for shown in figures:
        picture(shown.place / f"{shown.name}.png", options.into / f"{shown.name}.png")
        write_text(options.into / f"{shown.name}.md", page(shown, report, commit))
        print(options.into / f"{shown.name}.md")
    index = index_page(figures, report, options.study, commit)
    write_text(options.into / "README.md", index)
    print(options.into / "README.md")


if __name__ == "__main__":
    main()
