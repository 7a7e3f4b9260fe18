"""One run of docs/results/algorithms.md, computed if missing."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from algorithm_study import BASELINE, Study
from certifl.data import to_float
from certifl.experiments.run import Options, run
from certifl.runs.atomic import write_json
from certifl.runs.folder import RunFolder
from certifl.study.opened_run import OpenRun

__all__ = ["CLEAN", "SECONDS", "compute", "ready"]

CLEAN = "clean.json"
SECONDS = "processor_seconds"


def ready(study: Study, runs: Path) -> bool:
    """Whether a run is finished, with its accuracy on undisturbed images.

    Raises:
        StoreMismatch: its folder contains something else.
    """
    folder = RunFolder(study.folder(runs))
    folder.check(study.spec().hash())
    return folder.finished() and (folder.path / CLEAN).exists()


def compute(study: Study, runs: Path, data_dir: Path) -> None:
    """Compute the run, and the accuracy of its deployed networks on undisturbed images.

    A run computed without interruption also records its seconds of processor time, which other
    work on the machine hardly changes.
    """
    started = time.process_time()
    folder, spec = study.folder(runs), study.spec()
    base = Study(study.perturbation, BASELINE, study.split, study.seed).folder(runs)
    whole = not folder.exists()
    siblings = (base,) if study.algorithm == "personalized" else ()
    options = Options(folder, data_dir, device="cpu", siblings=siblings, explore=False)
    finished = run(spec, options)
    if not (folder / CLEAN).exists():
        right, images = _clean(finished.path, data_dir)
        spent = {SECONDS: round(time.process_time() - started, 3)} if whole else {}
        write_json(folder / CLEAN, {"right": right, "images": images, **spent})


@torch.no_grad()
def _clean(path: Path, data_dir: Path) -> tuple[int, int]:
    """Clean test images that the clients' networks classify correctly, and all of them."""
    run = OpenRun(path, data_dir)
    right = images = 0
    for client, part in enumerate(run.partition.clients):
        if len(part.test):
            test = run.dataset.test.take(part.test)
            logits = run.model(client)(to_float(test.images))
            right += int((logits.argmax(1) == test.labels).sum())
            images += len(test.labels)
    return right, images
