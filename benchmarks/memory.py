"""Memory of a federation: peak resident memory of one process against the number of clients.

Every client holds a few images; what could grow with the clients is their models, optimisers and
updates. `mixture` is the hard case: every client keeps a model of its own between rounds.

    python benchmarks/memory.py [--model resnet18] [--clients 10 100] [--algorithm mixture]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import certifl
from certifl.federated import ClientData, LocalTraining, Schedule, from_description, train
from certifl.runs.checkpoints import Checkpoints

ALGORITHMS = {"mixture": {"name": "mixture", "personalization": 0.5}}


def measure(model_name: str, algorithm: str, count: int) -> None:
    """One round (two for what clients keep) in this process; prints its peak memory in MB."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    clients = [
        ClientData(
            c,
            torch.randint(0, 256, (8, 3, 32, 32), generator=generator).to(torch.uint8),
            torch.randint(0, 10, (8,), generator=generator),
        )
        for c in range(count)
    ]
    model = certifl.models.build(model_name, 3, 10, seed=0)
    schedule = Schedule(rounds=2, local_epochs=1, batch_size=8, lr=0.01, momentum=0.9)
    with tempfile.TemporaryDirectory() as folder:
        training = LocalTraining(model, schedule, seed=0)
        chosen = from_description(ALGORITHMS.get(algorithm, algorithm))
        train(chosen, model, clients, training, Checkpoints(Path(folder)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--algorithm", default="mixture")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.model, options.algorithm, options.inside)
        return
    print(f"# {options.model}, {options.algorithm}, torch {torch.__version__}")
    for count in options.clients:
        call = [sys.executable, __file__, "--inside", str(count)]
        call += ["--model", options.model, "--algorithm", options.algorithm]
        answer = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        print(f"{count:5d} clients  peak {int(answer):6d} MB", flush=True)


if __name__ == "__main__":
    main()
