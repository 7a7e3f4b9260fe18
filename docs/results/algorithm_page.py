"""The page docs/results/algorithms.md from the finished runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from algorithm_numbers import Numbers, Paired, Row, Section, section
from algorithm_study import (
    CLEAN,
    OPTIONS,
    PERTURBATIONS,
    SECONDS,
    SEEDS,
    SPLITS,
    Disturbance,
    label,
    studies,
)
from certifl.federated import ALGORITHMS
from certifl.report.wording import markdown_table
from certifl.runs.atomic import read_json
from certifl.runs.folder import RunFolder
from paging import duration, machine_words
from study_numbers import cost_of, manifest

INTRODUCTION = """
# All algorithms on MNIST

Made by `python docs/results/algorithms.py --data-dir DATA`, which resumes after an interruption.

What each algorithm is: [docs/algorithms.md](../algorithms.md). 10 clients with 60 training images
each on average, `small_cnn`, rounds of 2 local epochs, batches of 10, momentum 0.9. Networks are
trained and certified against one of two perturbations, each with a schedule that is the same for
all algorithms:

- rotation, sigma 18 degrees, radii in degrees: 14 rounds with learning rate 0.05;
- pixel noise, sigma 0.25 where intensities go from 0 to 1, radii in l2 over all pixels: 20 rounds
  with learning rate 0.02, since with 14 rounds of 0.05 FedAvg hardly began to learn with seed 1;
  chosen by FedAvg's training loss with seeds that are not reported.

Certificates are sequential, n = 1000, alpha = 0.001, for 10 test images a client, or all it has.
The algorithms' own hyper-parameters are named below the tables, defaults where none are; where
several values were tried, they were compared by accuracy against rotation with a seed that is not
reported, and pixel noise took them over.

## How to read the tables

Means and standard deviations over training seeds. Clean: the deployed networks' accuracy on
undisturbed test images, in percent. At a radius: certified accuracy of the smoothed networks. ACR:
average certified radius. Spread: ACR of the best minus that of the worst client, and in brackets
what it would be, on average, if a run's images were assigned to its clients at random: with ten
images per client, that much is chance.

**Differences to FedAvg**, in ACR and in certified accuracy at the middle radius, are paired:
within a seed both algorithms start from the same weights, hold the same training images and
certify the same test images with the same noise, and are subtracted image by image. In brackets:
Student's 95 % interval of the mean over seeds. A seed draws the training images, the test images,
the split, the first weights and the noise anew, so the interval is about repeating the whole study
with another seed, on other images of MNIST split in the same way; it says nothing about other
data, other schedules or other hyper-parameters. Seeds are the only repetition, hence few degrees
of freedom and wide intervals; an interval is never narrower than the variation of the images alone
would make it, nor than unsampled kinds of images could move the mean
([mathematics](../mathematics.md); by the rules of the version named below). It assumes that the
differences of the seeds are about normally
distributed, which cannot be checked with so few, and is least reliable for an algorithm that fails
with some seeds.

Each interval is at 95 % by itself, and each table compares 16 algorithms: an interval that
excludes 0 is no more than a hint. **Bold** differences are those shown after Holm's correction for
the 16 of their column; there is no correction for several columns and tables.
"""
OUTLOOK = """
Read it as a small study: few images, few rounds, one schedule with a large step for all. It ranks
the algorithms in this setting and nowhere else; one that takes small steps on purpose (`mixture`
scales its step by lambda, the adaptive server optimizers warm up) may need more of them.
"""


def label_of(row: Row) -> str:
    """The algorithm's name for people."""
    return ALGORITHMS.rows[row.algorithm].label


def page(runs: Path) -> str:
    """The whole page.

    Raises:
        StoreMismatch: a folder of runs holds something else.
    """
    sections = [section(runs, p, split) for p in PERTURBATIONS for split in SPLITS]
    parts = [
        INTRODUCTION.strip(),
        "## In words",
        "\n".join(verdict(one) for one in sections),
        OUTLOOK.strip(),
        *(part for one in sections for part in section_lines(one)),
        "Hyper-parameters: " + "; ".join(label(name) for name in OPTIONS) + ".",
        made(runs),
    ]
    return "\n\n".join(parts) + "\n"


def heading(one: Section) -> str:
    """Of one table."""
    return f"{PERTURBATIONS[one.perturbation].title}, {one.split} split"


def verdict(one: Section) -> str:
    """What one table shows and what it does not, as an item of a list."""
    compared = [(row, row.acr) for row in one.rows if row.acr is not None]
    if not compared:
        return f"- {heading(one)}: too few seeds are finished."
    groups = {
        "shown after correction": [(row, acr) for row, acr in compared if row.acr_shown],
        "by their own interval alone": [
            (row, acr) for row, acr in compared if acr.apart and not row.acr_shown
        ],
    }
    first, last = (
        label_of(one.rows[0]),
        label_of(one.rows[-1]),
    )
    said = [f"- **{heading(one)}**, {len(one.seeds)} seeds. Mean ACR is largest for {first}"]
    said[0] += f" and smallest for {last}. Compared with FedAvg:"
    said += [f"    - {words}{_sides(found)};" for words, found in groups.items()]
    rest = [label_of(row) for row, acr in compared if not (acr.apart or row.acr_shown)]
    said.append(f"    - no difference shown: {', '.join(rest) or 'none'}.")
    return "\n".join([*said, f"    - {_spreads(one)}"])


def _sides(found: Sequence[tuple[Row, Paired]]) -> str:
    """Names, those above the baseline apart from those below."""
    sides = {
        "above": [label_of(row) for row, acr in found if acr.estimate > 0],
        "below": [label_of(row) for row, acr in found if acr.estimate < 0],
    }
    parts = [f"{side}: {', '.join(names)}" for side, names in sides.items() if names]
    return f", {'; '.join(parts)}" if parts else ": none"


def _spreads(one: Section) -> str:
    """Between which values mean spreads lie, beside those of images dealt by lot."""
    disturbance = PERTURBATIONS[one.perturbation]
    ranges = []
    for value in (lambda run: run.spread, lambda run: run.chance):
        means = [statistics.mean(map(value, row.runs)) / disturbance.size for row in one.rows]
        digits = disturbance.digits - 1
        ranges.append(f"{min(means):.{digits}f} to {max(means):.{digits}f}{disturbance.unit}")
    return f"Best minus worst client: {ranges[0]}; if images were assigned at random: {ranges[1]}."


def section_lines(one: Section) -> list[str]:
    """One table with its heading."""
    if not one.rows:
        return [f"## {heading(one)}", "Not computed yet."]
    disturbance = PERTURBATIONS[one.perturbation]
    unit = f" ({disturbance.unit})" if disturbance.unit else ""
    middle = f"at {disturbance.radii[1]:g}{disturbance.unit}"
    head = [
        "algorithm",
        "clean",
        *(f"at {radius:g}{disturbance.unit}" for radius in disturbance.radii),
        f"ACR{unit}",
        "ACR minus FedAvg's",
        f"{middle} minus FedAvg's",
        f"spread{unit}",
    ]
    seeds = ", ".join(map(str, one.seeds))
    missing = "" if len(one.seeds) == len(SEEDS) else f" (of {len(SEEDS)}; the rest is not made)"
    lines = markdown_table(head, [_cells(row, disturbance) for row in one.rows])
    return [f"## {heading(one)}", f"Training seeds: {seeds}{missing}.", lines]


def _cells(row: Row, disturbance: Disturbance) -> list[str]:
    scale, digits = 1.0 / disturbance.size, disturbance.digits

    def mean(value: Callable[[Numbers], float], scale: float = 100.0, digits: int = 1) -> str:
        return spread_cell([scale * value(run) for run in row.runs], digits)

    chance = statistics.mean(scale * run.chance for run in row.runs)
    return [
        label_of(row),
        mean(lambda run: run.clean),
        *(mean(lambda run, i=i: run.certified[i]) for i in range(len(disturbance.radii))),
        mean(lambda run: run.acr, scale, digits),
        difference_cell(row.acr, row.acr_shown, scale, digits),
        difference_cell(row.middle, row.middle_shown, 100.0, 1),
        f"{mean(lambda run: run.spread, scale, digits - 1)} ({chance:.{digits - 1}f})",
    ]


def spread_cell(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def difference_cell(found: Paired | None, shown: bool, scale: float, digits: int) -> str:
    """A difference with its interval rounded outward; bold where it is shown."""
    if found is None:
        return "-"
    places = 10.0**digits
    low = math.floor(found.low * scale * places) / places
    high = math.ceil(found.high * scale * places) / places
    text = f"{found.estimate * scale:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if shown else text


def made(runs: Path) -> str:
    """Machine and time."""
    folders = [study.folder(runs) for study in studies()]
    folders = [folder for folder in folders if RunFolder(folder).finished()]
    machines = "; ".join(dict.fromkeys(machine_words(manifest(folder)) for folder in folders))
    return "\n".join(
        [
            "## How it was made",
            "",
            "```",
            "python docs/results/algorithms.py --data-dir DATA",
            "```",
            "",
            f"- machine: {machines}",
            f"- time by the clock, beside other work on the machine: {cost_of(folders).words}",
            f"- {processor_words(folders)}",
        ]
    )


def processor_words(folders: Sequence[Path]) -> str:
    """What a run takes of a core, and so all of them of two."""
    records = [read_json(f / CLEAN) for f in folders if (f / CLEAN).exists()]
    seconds = [record[SECONDS] for record in records if SECONDS in record]
    if not seconds:
        return "processor time: not recorded"
    each, runs = statistics.mean(seconds), len(studies())
    return (
        f"processor time: {each:.0f} s a run (mean of the {len(seconds)} that recorded it, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s), so all {runs} runs take about "
        f"{duration(each * runs / 2)} of two cores that do nothing else"
    )
