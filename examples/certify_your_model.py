"""Certify a PyTorch model you already have: the library alone, no study and no files.

    python examples/certify_your_model.py

A few seconds: a small network learns handwritten digits in a plain loop, as yours did elsewhere,
and fifty test images are certified against rotation by up to 18 degrees.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import certifl
from certifl.perturbations import Perturbation

SEED, EPOCHS, BATCH, TESTED = 0, 15, 64, 50
IMAGE = (1, 8, 8)  # channels, height, width


def digits() -> tuple[Tensor, Tensor]:
    """1797 images (n, 1, 8, 8) in [0, 1] and their labels, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(labels))
    images = torch.tensor(pixels[order] / 16.0, dtype=torch.float32).reshape(-1, *IMAGE)
    return images, torch.tensor(labels[order])


def train(images: Tensor, labels: Tensor, noise: Perturbation) -> nn.Module:
    """Your training. The one thing to keep: it must have seen the noise it will vote under."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            batch = images[chosen]
            parameters = noise.sample(len(batch), IMAGE, generator)
            loss = functional.cross_entropy(model(noise.apply(batch, parameters)), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)  # the network is too small to share
    rotation = certifl.Rotation(sigma="18deg")
    images, labels = digits()
    model = train(images[TESTED:], labels[TESTED:], rotation)

    certificates = certifl.certify(
        model, images[:TESTED], rotation, labels=labels[:TESTED], n=10_000, seed=SEED
    )

    print(certificates)
    for degrees in (0, 5, 10, 15):
        share = certificates.certified_accuracy([np.deg2rad(degrees)])[0]
        print(f"certified correct up to {degrees:2d} degrees: {share:.0%}")
    print(f"average certified radius: {certificates.average_certified_radius():.3f} rad")
    print(f"votes per image: {certificates.votes.mean():,.0f} of at most 10,000")
    print(rotation.threat)
    # certificates.save("certificates.parquet") keeps the votes too; `certifl verify` reads it.


if __name__ == "__main__":
    main()
