"""Scan certificates: how near they come to the truth, and what they add to Corollary 1.

    python benchmarks/scan.py [--votes 10000] [--images 60] [--sigma 0.1pi]

First table: sigma = 1, f right on |t| <= edge and nowhere else, so that the truth is known.
Columns are radii, means over repetitions: Corollary 1 (runner-up bounds, all votes at delta = 0);
the scan as one would first write it (votes uniform on the circle, binomial bounds in each window
at level alpha over the number of grid points); the same with windows tested outwards at full
level; and the scan of this package, votes in pairs.

Second table: a network trained on the embedded digits with rotations up to sigma; mean certified
angle over test images, 0 where wrong or abstained, and its ratio to that of Corollary 1 with as
many votes. Both are of one smoothed classifier, with the same selected classes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import certifl
from certifl.data import load, to_float
from certifl.smoothing import UNIFORM, clopper_pearson_lower, runner_up_bounds
from certifl.smoothing.scan import Scan, passes_of, read_scan

ALPHA = 1e-3
GRID = 400


def right_within(edge: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: np.abs((t + np.pi) % (2 * np.pi) - np.pi) <= edge


def corollary_1(h: Callable, n: int, rng: np.random.Generator) -> float:
    k = h(rng.uniform(-1, 1, n)).sum()
    return float(UNIFORM.radius(1.0, *runner_up_bounds(k, n - k, n, ALPHA)))


def histogram_scan(h: Callable, n: int, rng: np.random.Generator, union: bool) -> float:
    """Independent votes, one-sided Clopper-Pearson in each window, Lipschitz loss in between."""
    t = rng.uniform(-np.pi, np.pi, n)
    hit, step, radius = h(t), np.pi / GRID, 0.0
    level = ALPHA / (2 * GRID + 1) if union else ALPHA / 2
    for j in range(GRID + 1):
        for delta in (j * step, -j * step):
            inside = np.abs((t - delta + np.pi) % (2 * np.pi) - np.pi) <= 1.0
            bound = clopper_pearson_lower(hit[inside].sum(), inside.sum(), level)
            if bound - step / 4 <= 0.5:
                return radius
        radius = (j + 0.5) * step
    return np.pi


def paired_scan(h: Callable, n: int, rng: np.random.Generator) -> float:
    scan = Scan(1.0, -np.pi, np.pi, True, passes_of(n, 1.0, 2 * np.pi))
    spent = int(scan.totals[-1])
    votes = h(scan.parameters(np.arange(spent), rng.random(spent))).astype(np.int8)
    low, high = read_scan(scan, votes[None], [1], ALPHA).interval[0]
    return min(-low, high)


def known_truth(repetitions: int) -> None:
    print("truth   votes   Corollary 1   histogram, union   histogram, in order   pairs")
    for edge in (0.7, 2.0):
        h = right_within(edge)
        for n in (1000, 4000, 20_000):
            rows = []
            for seed in range(repetitions):
                rng = np.random.default_rng([seed, n])
                rows.append(
                    [
                        corollary_1(h, n, rng),
                        histogram_scan(h, n, rng, union=True),
                        histogram_scan(h, n, rng, union=False),
                        paired_scan(h, n, rng),
                    ]
                )
            one, union, order, pairs = np.mean(rows, axis=0)
            print(
                f"{edge:5.2f} {n:7d} {one:13.3f} {union:18.3f} {order:21.3f} {pairs:7.3f}",
                flush=True,
            )


def digits_model(
    perturbation: certifl.Rotation | certifl.Translation,
) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network on the embedded digits, trained under the perturbation; test images."""
    data = load("digits")
    images, labels = to_float(data.train.images), data.train.labels
    model = certifl.models.build("small_cnn", data.in_channels, data.num_classes, seed=0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    for _ in range(15):
        for batch in torch.randperm(len(images), generator=generator).split(32):
            shape = (data.in_channels, *data.image_size)
            params = perturbation.sample(len(batch), shape, generator)
            loss = functional.cross_entropy(
                model(perturbation.apply(images[batch], params)), labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), to_float(data.test.images), data.test.labels


def on_digits(most: int, images: int, sigma: str) -> None:
    rotation = certifl.Rotation(sigma)
    model, x, y = digits_model(rotation)
    x, y = x[:images], y[:images]
    print(f"\ndigits, sigma = {sigma}, {len(x)} test images, alpha = {ALPHA}")
    print("estimator       n   mean votes   mean angle   median   full circle   seconds   ratio")
    for votes in sorted({1000, 2000, 5000, most}):
        base = None
        for name in ("runner-up", "scan"):
            started = time.perf_counter()
            made = certifl.certify(model, x, rotation, labels=y, n=votes, estimator=name)
            spent = time.perf_counter() - started
            angles = np.degrees(made.radius * made.correct)
            base = angles.mean() if base is None else base
            full = "-" if made.interval is None else f"{(made.radius > 3.1415).mean():.2f}"
            print(
                f"{name:10}{votes:7d}{made.votes.mean():13.0f}{angles.mean():13.2f}"
                f"{np.median(angles):9.2f}{full:>14}{spent:10.1f}{angles.mean() / base:8.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--votes", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--sigma", default="0.1pi")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    known_truth(options.repetitions)
    on_digits(options.votes, options.images, options.sigma)


if __name__ == "__main__":
    main()
