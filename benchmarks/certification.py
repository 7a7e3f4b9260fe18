"""Votes per second: `certify` against a straightforward loop, in turn, in one run.

The loop is what one writes first: float32, contiguous, a sampling grid built afresh for every
batch, `grid_sample`, counting on the host. Both cast the same number of votes of one ResNet-18 on
images of 3 x 32 x 32 under rotation; pairs alternate so that a drift of the machine cancels.

    python benchmarks/certification.py [--votes 2000] [--pairs 5] [--precisions bfloat16]
    python benchmarks/certification.py --device cuda --votes 200000
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import torch
from torch.nn import functional

import certifl
from certifl.certification.counts import advance, fresh
from certifl.certification.network import choose_device, prepare
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import PRECISIONS, Settings
from certifl.rng import image_key


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def straightforward(
    model: torch.nn.Module, image: torch.Tensor, sigma: float, votes: int
) -> float:
    """Seconds of the plain loop with batches of 400, as in published code."""
    side, device = image.shape[-1], image.device
    started = clock(device)
    counts = torch.zeros(10, dtype=torch.long)
    with torch.no_grad():
        for start in range(0, votes, 400):
            size = min(400, votes - start)
            batch = image.repeat(size, 1, 1, 1)
            angles = (torch.rand(size, device=device) * 2 - 1) * sigma
            line = torch.linspace(-1 + 1 / side, 1 - 1 / side, side, device=device)
            y, x = torch.meshgrid(line, line, indexing="ij")
            cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
            grid = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
            noisy = functional.grid_sample(batch, grid, align_corners=False)
            for answer in model(noisy).argmax(1).cpu().numpy():
                counts[answer] += 1
    return clock(device) - started


def ours(counter: VoteCounter, image: torch.Tensor, votes: int) -> float:
    settings = Settings("top-class", n0=100, n=votes - 100)
    estimator = settings.estimator_for(counter.perturbation)
    started = clock(image.device)
    state, key = fresh(1, counter.network.classes), [image_key(image[0])]
    while not state.done.all():
        advance(counter, image, key, None, estimator, state)
    return clock(image.device) - started


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--votes", type=int, default=2400)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    model = certifl.models.build(options.model, 3, 10, seed=0).eval().to(device)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, 3, 32, 32), generator=generator).to(device)
    rotation = certifl.Rotation("0.1pi")
    print(
        f"# {name_of(device)}, {options.threads} threads, torch "
        f"{torch.__version__}, {options.model}, {options.votes} votes, {options.pairs} pairs"
    )
    print(
        f"{'precision':17} {'batch':>5} {'loop votes/s':>13} {'certifl votes/s':>16} "
        f"{'ratio (median, min-max)':>26}"
    )
    for precision in options.precisions:
        network = prepare(model, image, precision=precision, device=device)
        counter = VoteCounter(network, rotation, 0)
        ours(counter, image, options.votes)
        straightforward(model, image, rotation.sigma, options.votes // 4)
        pairs = [
            (
                straightforward(model, image, rotation.sigma, options.votes),
                ours(counter, image, options.votes),
            )
            for _ in range(options.pairs)
        ]
        ratios = sorted(slow / fast for slow, fast in pairs)
        slow, fast = (statistics.median(p[k] for p in pairs) for k in (0, 1))
        print(
            f"{precision:17} {network.batch_size:5d} {options.votes / slow:13.0f} "
            f"{options.votes / fast:16.0f} {statistics.median(ratios):14.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
