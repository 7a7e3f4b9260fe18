"""When does training together pay? Images of a client and epochs; docs/results/regime.md.

    env OMP_NUM_THREADS=1 python docs/results/regime.py --data-dir DATA

FedAvg and training alone at overnight scale, rotation 18 degrees, with fewer and more images of a
client, and with fewer epochs; the decay keeps its shape. The pairs of Figure 1 are taken from the
study. Finished runs are published in docs/results/data/regime; the same command resumes. The page
is made by `make results`.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from algorithm_pool import run_jobs
from certifl.errors import CertiflError
from certifl.experiments.run import Options, run
from certifl.paper.figures import FEDAVG, LOCAL, Regime, Setting
from certifl.paper.scales import scale_named
from certifl.report import RunResults, load_run
from certifl.report.figures import Drawing
from certifl.report.results import by_seed
from certifl.report.summary import first_unit, mean_acr
from certifl.report.wording import markdown_table
from certifl.runs.folder import RunFolder, StoredRun
from certifl.runs.published import publish
from certifl.spec import Spec
from publish import require_verified
from study_numbers import Gap, draw_gaps, fit

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
CELLS = ((250, 8), (250, 24), (250, 48), (1000, 8), (1000, 24), (2500, 8), (2500, 24))
"""(images of a client, rounds) with 10 clients; 48 rounds and 500, 1000, 2500 are in Figure 1."""
CERTIFIED = 100
CLIENTS = (4, 10, 20)
TITLE = "FedAvg minus training alone"


def spec(images: int, rounds: int, regime: Regime) -> Spec:
    """The study's spec with other numbers of images and rounds, the decay stretched alike."""
    training = scale_named("overnight").training
    settings = [
        f"data.train_images={10 * images}",
        f"training.rounds={rounds}",
        f"training.decay_every={training['decay_every'] * rounds // training['rounds']}",
        f"certification.images={CERTIFIED}",
        f'name="{regime.label}: {images} images of a client, {rounds} rounds"',
    ]
    return scale_named("overnight", settings).spec(_setting(10), regime)


def _setting(clients: int) -> Setting:
    return Setting("cifar10", clients, "rotation", "0.1pi")


@dataclass(frozen=True, eq=False)
class Pair:
    """FedAvg and training alone on the same images.

    Attributes:
        fedavg, alone: their runs.
        clients, images, epochs: of both; images of one client.
        gap: of the average certified radius, FedAvg minus alone.
    """

    fedavg: RunResults
    alone: RunResults
    clients: int
    images: int
    epochs: int
    gap: Gap

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Pair:
        """From the two run folders."""
        fedavg, alone = map(load_run, folders)
        training = tomllib.loads(fedavg.spec)["training"]
        clients = len(fedavg.clients)
        return cls(
            fedavg,
            alone,
            clients,
            int(fedavg.manifest["data"]["train_images"]) // clients,
            training["rounds"] * training["local_epochs"],
            Gap.between(fedavg, alone),
        )


def pairs(data: Path) -> list[Pair]:
    """Finished pairs: of Figure 1 in `data`/runs, and the others in `data`/regime."""
    scale = scale_named("overnight")
    specs = [
        (data / "runs", [scale.spec(_setting(clients), r) for r in (FEDAVG, LOCAL)])
        for clients in CLIENTS
    ]
    specs += [
        (data / "regime", [spec(images, rounds, r) for r in (FEDAVG, LOCAL)])
        for images, rounds in CELLS
    ]
    folders = [[within / one.hash() for one in both] for within, both in specs]
    found = [Pair.of(both) for both in folders if all(RunFolder(f).finished() for f in both)]
    return sorted(found, key=lambda pair: (pair.epochs, pair.images))


def drawing_of(found: Sequence[Pair]) -> Drawing:
    """Difference against images of a client; a line for each number of epochs."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    styles = (("#b35900", "s", ":"), ("#00707a", "^", "--"), ("#3b4cc0", "o", "-"))
    epochs = sorted({pair.epochs for pair in found})
    for (color, marker, dash), count in zip(styles[-len(epochs) :], epochs, strict=False):
        own = [pair for pair in found if pair.epochs == count]
        look = {"color": color, "marker": marker, "linestyle": dash, "label": f"{count} epochs"}
        draw_gaps(axes, [pair.images for pair in own], [pair.gap for pair in own], **look)
    axes.set_xscale("log")
    images = sorted({pair.images for pair in found})
    axes.set_xticks(images, [f"{count:,}" for count in images])
    axes.minorticks_off()
    axes.set_xlabel("training images of a client")
    axes.set_ylabel("points of average certified radius")
    axes.set_title(f"{TITLE}, rotation 18°, CIFAR-10", fontsize=11)
    axes.legend(frameon=False)
    return Drawing(figure, (), ())


def page(found: Sequence[Pair]) -> str:
    """The page about these pairs."""
    rows = [
        [
            str(pair.clients),
            f"{pair.images:,}",
            str(pair.epochs),
            _radius(pair.fedavg),
            _radius(pair.alone),
            pair.gap.words,
            f"{fit(pair.alone):.0%}",
        ]
        for pair in found
    ]
    head = (
        "clients", "images of a client", "epochs", "FedAvg", "alone",
        "difference in points (95 %)", "alone fits",
    )  # fmt: skip
    parts = [
        "# When does training together pay?",
        "Made by `python docs/results/figures.py`, from runs of `python docs/results/regime.py` "
        "and of Figure 1.",
        "![Difference between FedAvg and training alone](regime.png)",
        "The paper compares three numbers of clients, which share the same images: the more "
        "clients, the fewer images each has. Here the number of images of a client and the number "
        "of epochs are varied separately. Where a client fits its own images (last column: its "
        "accuracy on rotated training images in the last round) their number is what limits it, "
        "and training together adds images. Where it does not fit them, steps are missing, and "
        "averaging adds none. Pairs of 4 and 20 clients are those of Figure 1.",
        _seen(found),
        "## Numbers",
        "FedAvg, alone: average certified radius, mean over clients. A point is a "
        "hundredth of the largest possible radius. Intervals: over test images, paired, each row "
        "by itself. One training seed.",
        markdown_table(head, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _seen(found: Sequence[Pair]) -> str:
    """In how many pairs a difference is shown, and for which."""
    ahead = [pair for pair in found if pair.gap.low > 0.0]
    behind = [pair for pair in found if pair.gap.high < 0.0]
    words = [
        f"Of {len(found)} pairs, FedAvg is ahead in {len(ahead)}, training alone in "
        f"{len(behind)}, and {len(found) - len(ahead) - len(behind)} show no difference."
    ]
    for name, some in (("FedAvg", ahead), ("Training alone", behind)):
        if some:
            listed = "; ".join(f"{p.images:,} images, {p.epochs} epochs" for p in some)
            words.append(f"{name} is ahead with {listed}.")
    return " ".join(words)


def _radius(result: RunResults) -> str:
    """Its average certified radius, rounded down."""
    rows = by_seed([result])
    return first_unit(rows).text(mean_acr(rows[0]))


def compute(job: tuple[int, int], runs: Path, data_dir: Path, into: Path) -> None:
    """One pair, published together."""
    torch.set_num_threads(1)
    folders = []
    for regime in (FEDAVG, LOCAL):
        one = spec(*job, regime)
        folders.append(runs / one.hash())
        options = Options(folders[-1], data_dir, device="cpu", explore=False)
        run(one, options)
    check = partial(require_verified, data_dir=data_dir)
    for folder in folders:
        publish(StoredRun(folder), into / folder.name, check)


def main() -> None:
    """Compute the missing pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/regime"))
    parser.add_argument("--into", type=Path, default=DATA / "regime")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    missing = [
        cell
        for cell in CELLS
        if not all(
            RunFolder(options.into / spec(*cell, r).hash()).finished() for r in (FEDAVG, LOCAL)
        )
    ]
    begin = partial(compute, runs=options.runs, data_dir=options.data_dir, into=options.into)
    try:
        failures = run_jobs(missing, options.jobs, begin, lambda words: print(words, flush=True))
    except CertiflError as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped; the same command resumes.\n")
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        parser.exit(1)


if __name__ == "__main__":
    main()
