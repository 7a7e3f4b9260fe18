"""How time and memory grow with votes, images and clients.

Every size runs in a fresh process; sizes take turns, so that a drift of the machine meets all of
them. A cost that is proportional to the size has the same time per unit at every size: the table
shows it as a ratio to that of the smallest size of the same turn, and the process's peak memory.

    python benchmarks/growth.py [--turns 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import certifl
from certifl.federated import ClientData, FedAvg, LocalTraining, Schedule, train
from certifl.runs.checkpoints import Checkpoints

MODEL, SIDE, SIGMA = "small_resnet", 32, "0.1pi"


@dataclass(frozen=True)
class Growth:
    """What grows, in which unit, over which sizes, and the job of one size."""

    title: str
    unit: str
    sizes: tuple[int, ...]
    job: Callable[[int], None]


def votes(size: int) -> None:
    """Fixed votes for two images."""
    _certify(images=2, votes=size)


def images(size: int) -> None:
    """A thousand fixed votes for each image."""
    _certify(images=size, votes=1000)


def _certify(images: int, votes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand((images, 3, SIDE, SIDE), generator=generator)
    model = certifl.models.build(MODEL, 3, 10, seed=0).eval()
    rotation = certifl.Rotation(SIGMA)
    certifl.certify(model, pictures, rotation, n0=100, n=votes, estimator="top-class")


def clients(size: int) -> None:
    """Two rounds of federated averaging; every client has 50 images."""
    generator = torch.Generator().manual_seed(0)
    federation = [
        ClientData(
            client,
            # Not by way of 8 bytes a pixel: what that leaves behind would count as memory.
            torch.randint(0, 256, (50, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (50,), generator=generator),
        )
        for client in range(size)
    ]
    model = certifl.models.build(MODEL, 3, 10, seed=0)
    schedule = Schedule(rounds=2, local_epochs=1, batch_size=25, lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        training = LocalTraining(model, schedule, seed=0)
        train(FedAvg(), model, federation, training, Checkpoints(Path(folder)))


GROWTHS = {
    "votes": Growth("certification, votes an image", "vote", (1000, 4000, 16000), votes),
    "images": Growth("certification, images", "image", (2, 8, 32), images),
    "clients": Growth("federated averaging, clients", "client", (5, 20, 80), clients),
}


def inside(what: str, size: int) -> None:
    """The job of one size in this process: its seconds, and the peak of memory."""
    growth = GROWTHS[what]
    started = time.perf_counter()
    growth.job(size)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, peak]))


def measured(what: str, size: int, threads: int) -> tuple[float, float]:
    """Seconds and megabytes of one size in a process of its own."""
    call = [sys.executable, __file__, "--inside", what, str(size), "--threads", str(threads)]
    answer = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = json.loads(answer.splitlines()[-1])
    return seconds, peak


def table(what: str, turns: int, threads: int) -> None:
    """One growth as a Markdown table."""
    growth = GROWTHS[what]
    taken = [{size: measured(what, size, threads) for size in growth.sizes} for _ in range(turns)]
    print(f"\n## {growth.title}\n")
    print(f"| {growth.unit}s | s | time of one / in the smallest size | peak MB |")
    print("|---|---|---|---|")
    smallest = growth.sizes[0]
    for size in growth.sizes:
        units = [(turn[size][0] / size) / (turn[smallest][0] / smallest) for turn in taken]
        seconds = statistics.median(turn[size][0] for turn in taken)
        peak = statistics.median(turn[size][1] for turn in taken)
        ratio = f"{statistics.median(units):.2f} ({min(units):.2f}-{max(units):.2f})"
        print(f"| {size} | {seconds:.2f} | {ratio} | {peak:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.inside:
        inside(options.inside[0], int(options.inside[1]))
        return
    machine = platform.processor() or platform.machine()
    print(f"# {machine}, {options.threads} threads, {MODEL}, {options.turns} turns")
    print(f"# Python {platform.python_version()}, torch {torch.__version__}")
    for what in GROWTHS:
        table(what, options.turns, options.threads)


if __name__ == "__main__":
    main()
