"""Many clients of which few take part: peak memory and time of a round, 100 clients against 1000.

Every client holds a few images of the size of digits, and a tenth of the clients takes part in a
round. `mixture` is the hard case: each client keeps a model of its own between its rounds, so a
round of 1000 clients writes 100 states and carries up to 900 over. Memory is that of a process
that trains; seconds are medians over the later rounds, with what is not training (reading states,
averaging, writing and committing) apart.

    python benchmarks/participation.py [--clients 100 1000] [--rounds 30] [--algorithm mixture]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import certifl
from certifl.federated import ClientData, LocalTraining, Schedule, from_description, train
from certifl.federated.trainer import RandomShare
from certifl.runs.checkpoints import Checkpoints

ALGORITHMS = {"mixture": {"name": "mixture", "personalization": 0.5}}
IMAGES = 32


class Federation:
    """Clients whose images are drawn when asked for: what grows with them is not their data."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, client: int) -> ClientData:
        drawn = torch.Generator().manual_seed(client)
        images = torch.randint(0, 256, (IMAGES, 1, 8, 8), generator=drawn).to(torch.uint8)
        return ClientData(client, images, torch.randint(0, 10, (IMAGES,), generator=drawn))


def measure(options: argparse.Namespace, count: int) -> None:
    """Train in this process; print its peak memory and what rounds took."""
    torch.set_num_threads(1)
    model = certifl.models.build(options.model, 1, 10, seed=0)
    schedule = Schedule(options.rounds, 1, 32, lr=0.01, momentum=0.9)
    algorithm = from_description(ALGORITHMS.get(options.algorithm, options.algorithm))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        last = train(
            algorithm,
            model,
            Federation(count),
            LocalTraining(model, schedule, seed=0),
            Checkpoints(Path(folder)),
            participation=RandomShare(options.share, count, 0),
        )
    later = last.history[len(last.history) // 2 :]
    seconds = statistics.median(entry["seconds"] for entry in later)
    worked = statistics.median(sum(r["seconds"] for r in e["clients"]) for e in later)
    print(
        json.dumps(
            {
                "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "participants": len(later[-1]["participants"]),
                "kept": len(last.clients),
                "round": seconds,
                "training": worked,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--algorithm", default="mixture")
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", help="where checkpoints are written")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options, options.inside)
        return
    print(f"# {options.model}, {options.algorithm}, {options.share:g} of the clients a round")
    found = []
    for count in options.clients:
        call = [sys.executable, __file__, *sys.argv[1:], "--inside", str(count)]
        answer = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        one = json.loads(answer)
        found.append(one)
        each = 1000 * (one["round"] - one["training"]) / one["participants"]
        print(
            f"{count:6d} clients  peak {one['memory_mb']:5d} MB  {one['kept']} states kept  "
            f"round {one['round']:.2f} s, of it training {one['training']:.2f} s; the rest is "
            f"{each:.1f} ms a participant",
            flush=True,
        )
    print(f"memory ratio {found[-1]['memory_mb'] / found[0]['memory_mb']:.3f}")


if __name__ == "__main__":
    main()
