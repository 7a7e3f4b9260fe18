"""Training: `certifl`'s federated engine against a bare PyTorch loop of the same steps.

Both train the same clients with the same network, batch size and number of SGD steps; the bare
loop indexes tensors and does nothing else: no checkpoints, no history, no random streams. Pairs
alternate so that a drift of the machine cancels. The ratio is engine time / bare time, the engine
with everything it does in a run (checkpoints on disk included).

With `--workers 2`, the same rounds in worker processes against one process are compared instead:
whole trainings (starting the processes included), and rounds once they are running.

With `--formats`, arithmetic and layouts in memory are compared with each other instead: images a
second of local training with rotations, all in turns within one run, each beside float32 in the
contiguous layout.

    python benchmarks/training.py [--pairs 5] [--model small_cnn] [--threads 1] [--workers 0]
    python benchmarks/training.py --formats --model small_resnet --shape 3 32 32 --batch-size 32
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


FORMATS = [(p, f) for p in ("float32", "bfloat16") for f in ("contiguous", "channels-last")]


def speed(
    model: nn.Module, data: ClientData, batch_size: int, precision: str, memory_format: str
) -> float:
    """Images a second of one epoch of local training with rotations."""
    schedule = Schedule(1, 1, batch_size, lr=0.01, momentum=0.9, weight_decay=5e-4)
    training = LocalTraining(
        model,
        schedule,
        seed=0,
        augmentation=certifl.Rotation(sigma="18deg"),
        precision=precision,
        memory_format=memory_format,
    )
    start = certifl.models.state_of(model)
    started = time.perf_counter()
    training.train_epochs(start, data, 0)
    return len(data) / (time.perf_counter() - started)


def compare_formats(model: nn.Module, data: ClientData, batch_size: int, turns: int) -> None:
    """Print images a second of every format, and the ratio to the first within the same turn."""
    found: dict[tuple[str, str], list[float]] = {way: [] for way in FORMATS}
    for turn in range(turns + 1):  # the first warms up
        for way in FORMATS:
            rate = speed(model, data, batch_size, *way)
            found[way] += [rate] if turn else []
    for way, rates in found.items():
        ratios = sorted(r / first for r, first in zip(rates, found[FORMATS[0]], strict=True))
        print(
            f"{way[0]:9} {way[1]:14} {statistics.median(rates):6.0f} images/s, "
            f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f}-{ratios[-1]:.2f})"
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
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    clients = [
        ClientData(
            c,
            torch.randint(0, 256, (options.images, *options.shape), generator=generator).to(
                torch.uint8
            ),
            torch.randint(0, 10, (options.images,), generator=generator),
        )
        for c in range(options.clients)
    ]
    size = options.batch_size
    schedule = Schedule(options.rounds, 1, size, lr=0.01, momentum=0.9, weight_decay=1e-4)
    model = certifl.models.build(options.model, options.shape[0], 10, seed=0)
    print(
        f"# {platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.model}, {options.clients} clients x {options.images} images, "
        f"{options.rounds} rounds"
    )
    if options.formats:
        compare_formats(model, clients[0], size, options.pairs)
        return
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
