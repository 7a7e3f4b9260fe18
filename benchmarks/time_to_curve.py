"""Time to the same certified-accuracy curve: `certify` against a plain loop with fixed votes.

A ResNet-18 is trained on CIFAR-10 under pixel noise; then the same random test images are
certified, on a grid of radii with labels given, in blocks of images, one after the other, by

    plain     float32, contiguous, batches of 400, n votes for every image
    auto      `certify` as it is: prepared network, sequential, arithmetic by measurement
    int8      the same with precision="int8", calibrated on training images

`certify` is timed whole, calibration and the choice of arithmetic included. The plain loop's time
for a block is that of `--plain-votes` votes, half before and half after the block, times the
votes that it would cast: it does nothing but cast votes. All times are those of the processor, on
one thread, since other programs may use the machine. The interval of a ratio is a bootstrap over
blocks.

    OMP_NUM_THREADS=1 python benchmarks/time_to_curve.py --data-dir DATA --out build/time_to_curve

Weights and blocks are saved in `--out`; stopped, it is resumed by the same command.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import certifl
from arithmetic import instruction_sets
from certifl.data import Dataset, load, random_part, to_float

N0 = 100
NOISE = certifl.PixelNoise(0.25)
GRID = (0.0, 0.25, 0.5, 0.75)
BATCH = 128
# Divisor of the width of the images, epochs: most steps are made on images of half the width.
STAGES = ((2, 5), (1, 2))


def noisy_batches(pixels: torch.Tensor, generator: torch.Generator, shrink: int) -> Any:
    """Index and shifted, mirrored, noisy images of every batch of an epoch."""
    for rows in torch.randperm(len(pixels), generator=generator).split(BATCH):
        batch = functional.pad(pixels[rows], (2, 2, 2, 2))
        top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
        batch = batch[:, :, top : top + 32, left : left + 32]
        mirror = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(mirror, batch.flip(3), batch)
        batch = batch + NOISE.sigma * torch.randn(batch.shape, generator=generator)
        yield rows, functional.avg_pool2d(batch, shrink)


def trained(dataset: Dataset, images: int) -> nn.Module:
    """A ResNet-18 in bfloat16, one cycle of the learning rate for each size of the images."""
    pixels, labels = to_float(dataset.train.images[:images]), dataset.train.labels[:images].long()
    model = certifl.models.build("resnet18", 3, 10, seed=0).train()
    model = model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    for shrink, epochs in STAGES:
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        steps = epochs * -(-images // BATCH)
        peak = 0.2 / shrink
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
        for epoch in range(epochs):
            started, right = time.process_time(), 0
            for rows, batch in noisy_batches(pixels, generator, shrink):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = model(batch.contiguous(memory_format=torch.channels_last))
                optimizer.zero_grad()
                functional.cross_entropy(logits.float(), labels[rows]).backward()
                optimizer.step()
                schedule.step()
                right += int((logits.argmax(1) == labels[rows]).sum())
            spent = time.process_time() - started
            print(
                f"# width {32 // shrink}, epoch {epoch + 1}/{epochs}: {right / images:.1%} of "
                f"noisy training images, {spent:.0f} s",
                flush=True,
            )
    return model.to(memory_format=torch.contiguous_format).eval()


def plain_seconds(model: nn.Module, image: torch.Tensor, votes: int) -> float:
    """Seconds of the plain loop for so many votes of one image."""
    started = time.process_time()
    counts = np.zeros(10, dtype=np.int64)
    with torch.no_grad():
        for start in range(0, votes, 400):
            batch = image.repeat(min(400, votes - start), 1, 1, 1)
            answers = model(batch + NOISE.sigma * torch.randn_like(batch)).argmax(1)
            for answer in answers.numpy():
                counts[answer] += 1
    return time.process_time() - started


def measured_block(
    model: nn.Module, dataset: Dataset, index: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds and votes of every way for one block of test images."""
    part = dataset.test.take(index)
    images = to_float(part.images)
    training = dataset.train.take(random_part(len(dataset.train), 128, 0, "calibration"))
    plain = plain_seconds(model, images[:1], options.plain_votes // 2)
    block: dict[str, Any] = {}
    for precision in ("auto", "int8"):
        started = time.process_time()
        certificates = certifl.certify(
            model,
            images,
            NOISE,
            labels=part.labels,
            n0=N0,
            n=options.n,
            radii=GRID,
            precision=precision,
            device="cpu",
            calibration=to_float(training.images) if precision == "int8" else None,
        )
        block[precision] = {
            "seconds": time.process_time() - started,
            "votes": int(certificates.votes.sum()),
            "precision": certificates.conditions["precision"],
            "certified": [round(a * len(index)) for a in certificates.certified_accuracy(GRID)],
        }
    plain += plain_seconds(model, images[-1:], options.plain_votes // 2)
    votes = len(index) * (options.n + N0)
    return {"images": len(index), "plain": plain * votes / options.plain_votes, **block}


def interval(plain: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """95 % of the ratio of sums over blocks drawn anew."""
    drawn = np.random.default_rng(0).integers(0, len(plain), (20_000, len(plain)))
    low, high = np.quantile(plain[drawn].sum(1) / ours[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def table(blocks: list[dict[str, Any]], n: int) -> str:
    """One row for each precision, from the blocks measured so far."""
    images = sum(block["images"] for block in blocks)
    plain = np.array([block["plain"] for block in blocks])
    lines = [
        f"# {images} images, n = {n}; the plain loop takes {plain.sum():.0f} s",
        "| precision | certified at 0 / .25 / .5 / .75 | votes an image | s | plain / certifl |",
        "|---|---|---|---|---|",
    ]
    for precision in ("auto", "int8"):
        rows = [block[precision] for block in blocks]
        seconds = np.array([row["seconds"] for row in rows])
        certified = np.sum([row["certified"] for row in rows], axis=0) / images
        took = sorted({row["precision"] for row in rows})
        low, high = interval(plain, seconds)
        lines.append(
            f"| {precision} ({', '.join(took)}) | {' / '.join(f'{a:.1%}' for a in certified)} "
            f"| {sum(row['votes'] for row in rows) / images:.0f} | {seconds.sum():.0f} "
            f"| {plain.sum() / seconds.sum():.1f} ({low:.1f}-{high:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/time_to_curve"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--block", type=int, default=20, help="images of a block")
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--train-images", type=int, default=50_000)
    parser.add_argument("--plain-votes", type=int, default=1600, help="of a block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    dataset = load("cifar10", options.data_dir)
    weights = options.out / "resnet18.safetensors"
    if not weights.exists():
        save_file(trained(dataset, options.train_images).state_dict(), weights)
    model = certifl.models.build("resnet18", 3, 10, seed=0)
    model.load_state_dict(load_file(weights))
    model.eval()
    print(f"# resnet18, one thread; {instruction_sets()}; torch {torch.__version__}", flush=True)
    index = random_part(len(dataset.test), options.images, 0, "test")
    log = options.out / "blocks.jsonl"
    blocks = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for start in range(len(blocks) * options.block, options.images, options.block):
        part = index[start : start + options.block]
        blocks.append(measured_block(model, dataset, part, options))
        with log.open("a") as file:
            file.write(json.dumps(blocks[-1]) + "\n")
        print(table(blocks, options.n), flush=True)
    print(table(blocks, options.n))


if __name__ == "__main__":
    main()
