"""The paper in one file: four ways of training together, certified, in plain loops.

Slow and obvious on purpose: what the paper's equations say and nothing else. The library does the
same faster, resumably and for any data; `tests/federated/test_slow_twin.py` compares its models
with these.
Only random streams come from the library, so that both draw the same numbers. Equation and section
numbers are the paper's ("Certified Robustness in Federated Learning", Alfarra et al. 2022).

    python examples/paper_in_one_file.py
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from certifl.rng import generator, image_key, numpy_generator, vote_generator


@dataclass(frozen=True)
class Study:
    clients: int = 10
    rounds: int = 10
    local_epochs: int = 2
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_every: int = 12  # epochs of the whole training
    decay_factor: float = 0.1
    tuning_epochs: int = 2
    personalization: float = 0.5  # lambda of Eq. (4)
    sigma: float = 0.1 * math.pi  # rotations by at most 18 degrees
    n0: int = 100
    n: int = 400
    alpha: float = 0.001
    test_images: int = 10  # certified per client
    seed: int = 0


Images = tuple[Tensor, Tensor]  # uint8 (n, 1, 8, 8) and labels (n,)


def handwritten_digits() -> tuple[Images, Images]:
    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(numpy_generator(0, "twin split").permutation(len(labels)))
    train, test = order[:-400], order[-400:]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def partition(data: Images, study: Study, name: str) -> list[Images]:
    """Homogeneous and non-overlapping parts, one per client (section 4)."""
    images, labels = data
    order = numpy_generator(study.seed, "twin partition", name).permutation(len(labels))
    parts = np.array_split(order, study.clients)
    return [(images[part], labels[part]) for part in parts]


def network(study: Study) -> nn.Module:
    """f_theta; its initial weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 3 * 3, 10),
        )


def sample(n: int, sigma: float, draws: torch.Generator) -> Tensor:
    """Angles from the uniform law on [-sigma, sigma] (section 3.3)."""
    return (2 * torch.rand(n, 1, generator=draws) - 1) * sigma


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """I_T(x, p + nu_beta), bilinear, zeros outside: p + nu is the coordinate turned by beta."""
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.cat([cos, -sin, none, sin, cos, none], 1).reshape(-1, 2, 3)
    m = max(len(images), len(angles))
    grid = functional.affine_grid(
        matrices.expand(m, 2, 3), [m, *images.shape[1:]], align_corners=False
    )
    return functional.grid_sample(images.expand(m, -1, -1, -1), grid, align_corners=False)


def train(
    model: nn.Module,
    data: Images,
    client: int,
    round: int,
    rates: list[float],
    study: Study,
    lam: float = 1.0,
    bar: nn.Module | None = None,
) -> None:
    """One client's local steps, in place: Eq. (5), which for lambda = 1 is SGD on L_i.

    g = lambda (grad L_i(theta) + decay theta) + 2 (1 - lambda) (theta - theta_bar)
    v <- momentum v + g;  theta <- theta - gamma v;  v = 0 at the beginning of every round.

    Each image is rotated by one random angle per step: Eq. (3) estimated with one sample.
    """
    images, labels = data
    theta = list(model.parameters())
    theta_bar = theta if bar is None else list(bar.parameters())
    velocity = [torch.zeros_like(value) for value in theta]
    shuffle = generator(study.seed, "shuffle", client, round)
    draws = generator(study.seed, "augmentation", client, round)
    model.train()
    for gamma in rates:
        batches = list(torch.randperm(len(labels), generator=shuffle).split(study.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # BatchNorm cannot normalize one image
            batches[-2:] = [torch.cat(batches[-2:])]
        for batch in batches:
            x = images[batch].float() / 255
            x = rotate(x, sample(len(batch), study.sigma, draws))
            loss = functional.cross_entropy(model(x), labels[batch])
            gradients = torch.autograd.grad(loss, theta)
            with torch.no_grad():
                for value, g, v, mean in zip(theta, gradients, velocity, theta_bar, strict=True):
                    g = lam * g.add(value, alpha=study.weight_decay) + 2 * (1 - lam) * (
                        value - mean
                    )
                    v.mul_(study.momentum).add_(g)
                    value.add_(v, alpha=-gamma)


def rates(study: Study, round: int) -> list[float]:
    """The learning rate of each local epoch of a round; decays count over the whole training."""
    epochs = range(round * study.local_epochs, (round + 1) * study.local_epochs)
    return [study.lr * study.decay_factor ** (e // study.decay_every) for e in epochs]


def average(models: list[nn.Module]) -> nn.Module:
    """theta_bar = 1/n sum_i theta_i (Eq. 4); of BatchNorm's step counters the largest."""
    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, value in mean.state_dict().items():
        stacked = torch.stack([state[name] for state in states])
        value.copy_(stacked.double().mean(0) if value.is_floating_point() else stacked.amax(0))
    return mean


def local_training(parts: list[Images], study: Study) -> list[nn.Module]:
    """Eq. (4) with lambda = 1; every client deploys its own model."""
    models = [network(study) for _ in parts]
    for t in range(study.rounds):
        for i, data in enumerate(parts):
            train(models[i], data, i, t, rates(study, t), study)
    return models


def federated_averaging(parts: list[Images], study: Study) -> list[nn.Module]:
    """Local steps (lambda = 1), then the average (lambda = 0); all deploy the last one."""
    global_model = network(study)
    for t in range(study.rounds):
        models = [copy.deepcopy(global_model) for _ in parts]
        for i, data in enumerate(parts):
            train(models[i], data, i, t, rates(study, t), study)
        global_model = average(models)
    return [global_model for _ in parts]


def personalized_training(parts: list[Images], study: Study) -> list[nn.Module]:
    """Federated averaging, then each client fine-tunes the global model on its own data."""
    models = [copy.deepcopy(model) for model in federated_averaging(parts, study)]
    tuning = [rates(study, study.rounds - 1)[-1]] * study.tuning_epochs
    for i, data in enumerate(parts):
        train(models[i], data, i, study.rounds, tuning, study)
    return models


def mixture_of_models(parts: list[Images], study: Study) -> list[nn.Module]:
    """Eq. (5), theta_bar fixed during local steps; every client deploys its own theta_i."""
    models = [network(study) for _ in parts]
    for t in range(study.rounds):
        bar = average(models) if t > 0 else copy.deepcopy(models[0])
        for i, data in enumerate(parts):
            train(models[i], data, i, t, rates(study, t), study, study.personalization, bar)
    return models


@torch.no_grad()
def votes(model: nn.Module, image: Tensor, n: int, purpose: str, study: Study) -> Tensor:
    """How often f predicts each class on n rotated copies: the counts behind Eq. (3)."""
    draws = vote_generator(study.seed, purpose, image_key(image), 0)
    predicted = model(rotate(image[None], sample(n, study.sigma, draws))).argmax(1)
    return predicted.bincount(minlength=10)


def certify(model: nn.Module, image: Tensor, study: Study) -> tuple[int, float]:
    """CERTIFY (section 4): the smoothed class and its radius in radians; -1 = abstained.

    With probability at least 1 - alpha, g_phi predicts this class for every rotation of the image
    by at most the radius (Corollary 1, uniform law); p_A is bounded from below by Clopper-Pearson,
    Beta(alpha; k, n - k + 1), and p_B = 1 - p_A.
    """
    top = int(votes(model, image, study.n0, "selection", study).argmax())
    k = int(votes(model, image, study.n, "estimation", study)[top])
    p_a = float(beta.ppf(study.alpha, k, study.n - k + 1)) if k else 0.0
    return (top, study.sigma * (p_a - (1 - p_a))) if p_a > 0.5 else (-1, 0.0)


REGIMES = {
    "local": local_training,
    "fedavg": federated_averaging,
    "personalized": personalized_training,
    "mixture": mixture_of_models,
}


def main(study: Study) -> None:
    train_data, test_data = handwritten_digits()
    parts, tests = partition(train_data, study, "train"), partition(test_data, study, "test")
    print(f"{study.clients} clients, rotations of up to {math.degrees(study.sigma):.0f} degrees")
    print(f"{'regime':14}{'certified accuracy at 0':>24}{'5':>7}{'10 degrees':>12}{'ACR':>10}")
    for name, regime in REGIMES.items():
        certified = []  # the radius of each image, -1 where the prediction is wrong
        for model, (images, labels) in zip(regime(parts, study), tests, strict=True):
            model.eval()
            for image, label in zip(images[: study.test_images] / 255, labels, strict=False):
                predicted, radius = certify(model, image, study)
                certified.append(math.degrees(radius) if predicted == label else -1.0)
        radii = np.array(certified)
        at = [float(np.mean(radii >= r)) for r in (0, 5, 10)]
        acr = float(np.maximum(radii, 0).mean())
        print(f"{name:14}{at[0]:24.2f}{at[1]:7.2f}{at[2]:12.2f}{acr:10.2f}")


if __name__ == "__main__":
    main(Study())
