"""Certified accuracy in int8 against float32, for one trained network.

A small_resnet is trained on CIFAR-10 under pixel noise of sigma .25, then the same test images are
certified in both precisions with common noise. What is reported is the difference of certified
accuracies, its mean over radii with a paired interval over images, and the agreement in votes.

    OMP_NUM_THREADS=1 nice python benchmarks/int8_accuracy.py --data-dir ../shared/data
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import certifl
from arithmetic import instruction_sets
from certifl.data import Dataset, load, random_part, to_float
from certifl.report.intervals import mean_interval

RADII = (0.0, 0.25, 0.5, 0.75)
NOISE = certifl.PixelNoise(0.25)
ERROR = 0.05  # of the interval


def trained(dataset: Dataset, images: int, epochs: int) -> nn.Module:
    """A small_resnet trained on noisy, mirrored images with one cycle of the learning rate."""
    torch.manual_seed(0)
    part = dataset.train.take(random_part(len(dataset.train), images, 0, "train"))
    pixels, labels = to_float(part.images), part.labels.long()
    model = certifl.models.small_resnet(3, 10).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (images // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(images)[: images // 128 * 128].split(128):
            batch = pixels[rows]
            mirrored = torch.where(torch.rand(128, 1, 1, 1) < 0.5, batch.flip(3), batch)
            noisy = mirrored + NOISE.sigma * torch.randn_like(batch)
            optimizer.zero_grad()
            functional.cross_entropy(model(noisy), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def certified(
    model: nn.Module, dataset: Dataset, index: np.ndarray, n: int, precision: str
) -> certifl.Certificates:
    part = dataset.test.take(index)
    training = dataset.train.take(random_part(len(dataset.train), 128, 0, "calibration"))
    started = time.perf_counter()
    certificates = certifl.certify(
        model,
        to_float(part.images),
        NOISE,
        labels=part.labels,
        n=n,
        radii=RADII,
        precision=precision,
        device="cpu",
        label_aware=False,
        calibration=to_float(training.images) if precision == "int8" else None,
    )
    seconds = time.perf_counter() - started
    accuracies = ", ".join(f"{100 * a:.1f}" for a in certificates.certified_accuracy(RADII))
    votes = int(certificates.votes.sum())
    print(f"{precision}: {accuracies} % at {RADII}; {votes} votes, {seconds:.0f} s", flush=True)
    return certificates


def per_image(certificates: certifl.Certificates) -> np.ndarray:
    """(m,) share of the radii at which an image is certified correctly."""
    reaches = certificates.radius[:, None] >= np.array(RADII)
    return (certificates.correct[:, None] & reaches).mean(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--n", type=int, default=10_000)
    options = parser.parse_args()
    print(f"# {instruction_sets()}; torch {torch.__version__}")
    dataset = load("cifar10", options.data_dir)
    started = time.perf_counter()
    model = trained(dataset, options.train_images, options.epochs)
    print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    index = random_part(len(dataset.test), options.images, 0, "test")
    plain, rounded = (
        certified(model, dataset, index, options.n, precision) for precision in ("float32", "int8")
    )
    gain = 100 * (per_image(rounded) - per_image(plain))
    low, high = mean_interval([gain], ERROR, 100.0)
    print(
        f"int8 - float32, mean over radii: {gain.mean():+.2f} points ({low:+.2f} to {high:+.2f})"
    )
    print(f"images that differ: {(gain != 0).sum()} of {len(gain)}")
    same = np.minimum(plain.selection_counts, rounded.selection_counts).sum()
    share = same / plain.selection_counts.sum()
    agreement = rounded.conditions["agreement_with_float32"]
    print(f"agreement: {agreement:.4f} of noisy training images; selection votes {share:.4f}")


if __name__ == "__main__":
    main()
