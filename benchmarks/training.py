"""Training: `certifl`'s federated engine against a bare PyTorch loop of the same steps.

Both train the same clients with the same network, batch size and number of SGD steps; the bare
loop indexes tensors and does nothing else: no checkpoints, no history, no random streams. Pairs
alternate so that a drift of the machine cancels. The ratio is engine time / bare time, the engine
with everything it does in a run (checkpoints on disk included).

With `--workers 2`, the same rounds in worker processes against one process are compared instead:
whole trainings (starting the processes included), and rounds once they are running.

    python benchmarks/training.py [--pairs 5] [--model small_cnn] [--threads 1] [--workers 0]
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import certifl
from certifl.federated import ClientData, FedAvg, LocalTraining, Schedule, train
from certifl.runs.checkpoints import Checkpoints


def bare(model: nn.Module, clients: list[ClientData], schedule: Schedule) -> float:
    """Seconds of FedAvg in plain loops."""
    started = time.perf_counter()
    glob = copy.deepcopy(model).train()
    for _ in range(schedule.rounds):
        states = []
        for data in clients:
            net = copy.deepcopy(glob)
            optimizer = torch.optim.SGD(
                net.parameters(), schedule.lr, schedule.momentum, weight_decay=1e-4
            )
            for _ in range(schedule.local_epochs):
                for rows in torch.randperm(len(data)).split(schedule.batch_size):
                    optimizer.zero_grad()
                    images = data.images[rows].float() / 255
                    functional.cross_entropy(net(images), data.labels[rows]).backward()
                    optimizer.step()
            states.append(net.state_dict())
        mean = {
            k: torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype)
            for k, v in states[0].items()
        }
        glob.load_state_dict(mean)
    return time.perf_counter() - started


def engine(
    model: nn.Module, clients: list[ClientData], schedule: Schedule, workers: int = 0
) -> tuple[float, float]:
    """Seconds of the same rounds in the engine, checkpoints included, and of a later round."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        training = LocalTraining(model, schedule, seed=0)
        done = train(
            FedAvg(), model, clients, training, Checkpoints(Path(folder)), workers=workers
        )
        seconds = time.perf_counter() - started
        later = done.history[len(done.history) // 2 :]
        return seconds, statistics.median(entry["seconds"] for entry in later)


def compare_workers(
    model: nn.Module, clients: list[ClientData], schedule: Schedule, workers: int, pairs: int
) -> None:
    """Print the ratios of trainings with workers to those in one process, pairs in alternation."""
    whole, later = [], []
    for _ in range(pairs):
        alone, shared = (engine(model, clients, schedule, count) for count in (0, workers))
        whole.append(shared[0] / alone[0])
        later.append(shared[1] / alone[1])
    for what, ratios in (("whole training", sorted(whole)), ("a later round", sorted(later))):
        print(
            f"{workers} workers / one process, {what}: {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f}-{ratios[-1]:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--images", type=int, default=600, help="per client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    clients = [
        ClientData(
            c,
            torch.randint(0, 256, (options.images, 1, 28, 28), generator=generator).to(
                torch.uint8
            ),
            torch.randint(0, 10, (options.images,), generator=generator),
        )
        for c in range(options.clients)
    ]
    schedule = Schedule(options.rounds, 1, 64, lr=0.01, momentum=0.9, weight_decay=1e-4)
    model = certifl.models.build(options.model, 1, 10, seed=0)
    print(
        f"# {platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.model}, {options.clients} clients x {options.images} images, "
        f"{options.rounds} rounds"
    )
    bare(model, clients[:1], schedule)
    engine(model, clients[:1], schedule)
    if options.workers:
        compare_workers(model, clients, schedule, options.workers, options.pairs)
        return
    pairs = [
        (bare(model, clients, schedule), engine(model, clients, schedule)[0])
        for _ in range(options.pairs)
    ]
    ratios = sorted(ours / plain for plain, ours in pairs)
    print(f"bare loop {statistics.median(p[0] for p in pairs):.2f} s")
    print(f"engine    {statistics.median(p[1] for p in pairs):.2f} s")
    print(f"ratio     {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
