"""Votes to the same certified-accuracy curve: fixed n against sequential certification.

    python benchmarks/votes_to_curve.py --golden cifar10_counts_sigma_0.25.txt

The golden file holds, per image, vote counts that sum to n and then the label. Its shares are
taken for the true vote probabilities; every repetition draws 100 selection votes, then n
estimation votes in one path, on which fixed n (all votes at level alpha) and the sequential rule
are compared. So both sides of a ratio come from the same votes. Per row of the table:

    ratio     n / votes an image of the sequential rule, labels unknown / known
    lost      images that reach fewer grid steps than with fixed n (mean over repetitions)
    drop      certified accuracy lost, in percentage points: mean over the grid / worst radius
    ACR       average certified radius lost, of radii that are not floored to the grid

"Labels known" stops an image at its first look when c_A is not its label; `keep` is the option of
`certify` of that name. In the row "no radii" none are given, and the grid of 50 is only measured.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certifl.certification.estimators import PRICES, Estimator
from certifl.certification.recompute import RecordedNoise
from certifl.certification.settings import Settings
from certifl.smoothing import BOUNDS, GAUSSIAN, UNIFORM, Law, even_grid, grid_steps

N0 = 100


@dataclass(frozen=True)
class Setting:
    """One row of the table: a grid of radii under a law, and how to stop."""

    title: str
    law: Law
    sigma: float
    grid: tuple[float, ...]
    asked: bool
    rule: str
    keep: str

    def estimator(self, alpha: float, n: int) -> Estimator:
        name = {"runner-up": "sequential", "top-class": "sequential-top-class"}[self.rule]
        noise = RecordedNoise("", self.sigma, self.law, "")
        radii = self.grid if self.asked else None
        return Settings(name, N0, n, alpha, radii=radii, keep=self.keep).estimator_for(noise)


def rows_of_the_table(n: int, alpha: float) -> list[Setting]:
    turn, largest = 0.1 * np.pi, GAUSSIAN.largest_radius(0.25, n, alpha)
    grids = (
        ("pixel, grid 0.25", GAUSSIAN, 0.25, np.arange(1, 5) * 0.25, True),
        ("pixel, grid 0.1", GAUSSIAN, 0.25, np.arange(1, 11) * 0.1, True),
        ("rotation, 20 radii", UNIFORM, turn, np.arange(1, 21) / 20 * turn, True),
        ("pixel, no radii", GAUSSIAN, 0.25, even_grid(float(largest)), False),
    )
    return [
        Setting(title, law, sigma, tuple(grid.tolist()), asked, rule, keep)
        for title, law, sigma, grid, asked in grids
        for rule in BOUNDS
        for keep in PRICES
    ]


def path(shares: np.ndarray, counts_at: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Class counts at every look, (looks, images, classes), of one stream of votes an image."""
    steps = np.diff(np.asarray((0, *counts_at)))
    return np.cumsum([rng.multinomial(step, shares) for step in steps], axis=0)


def top_and_runner(counts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the chosen class and the largest count among the others, over the last axis."""
    mine = np.arange(counts.shape[-1]) == chosen[:, None]
    return np.where(mine, counts, 0).sum(-1), np.where(mine, -1, counts).max(-1)


def stopping_looks(estimator: Estimator, top: np.ndarray, runner: np.ndarray) -> np.ndarray:
    """The look at which each image stops, whatever its label."""
    stop, active = np.full(top.shape[1], -1), np.arange(top.shape[1])
    for j in range(len(top)):
        done = estimator.finished(top[j, active], runner[j, active], np.full(len(active), j))
        stop[active[done]] = j
        active = active[~done]
    return stop


def repetition(
    setting: Setting, shares: np.ndarray, labels: np.ndarray, n: int, alpha: float, seed: int
) -> np.ndarray:
    """One repetition: votes with labels unknown and known, lost, ACR, the drop at each step."""
    rng = np.random.default_rng(seed)
    chosen = rng.multinomial(N0, shares).argmax(1)
    right, images = chosen == labels, np.arange(len(shares))
    estimator = setting.estimator(alpha, n)
    law, sigma, grid = setting.law, setting.sigma, np.array(setting.grid)
    top, runner = top_and_runner(path(shares, estimator.looks, rng), chosen)
    stop = stopping_looks(estimator, top, runner)
    got = law.radius(sigma, *estimator.limits(top[stop, images], runner[stop, images], stop))
    fixed = law.radius(sigma, *BOUNDS[setting.rule](top[-1], runner[-1], n, alpha))
    steps, fixed_steps = grid_steps(got, grid), grid_steps(fixed, grid)
    rungs = np.arange(1, len(np.unique(grid[grid > 0])) + 2)[:, None]
    drop = ((fixed_steps >= rungs) & right).mean(1) - ((steps >= rungs) & right).mean(1)
    votes = np.asarray(estimator.looks)
    return np.array(
        [
            votes[stop].mean(),
            votes[np.where(right, stop, 0)].mean(),
            (steps < fixed_steps).sum(),
            ((steps < fixed_steps) & right).sum(),
            1.0 - (got * right).sum() / (fixed * right).sum(),
            *drop,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--golden", type=Path, required=True, help="counts per image, then label")
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = np.loadtxt(options.golden, dtype=np.int64)
    counts, labels = table[:, :-1], table[:, -1]
    n = int(counts[0].sum())
    print(
        f"{len(table)} images, n = {n}, alpha = {options.alpha}, {options.repetitions} repetitions"
    )
    print(
        f"{'grid':20}{'bound':11}{'keep':13}{'ratio unknown/known':>20}{'lost':>14}"
        f"{'drop':>14}{'ACR %':>7}{'s':>7}"
    )
    for row in rows_of_the_table(n, options.alpha):
        started = time.process_time()
        runs = [
            repetition(row, counts / n, labels, n, options.alpha, options.seed + i)
            for i in range(options.repetitions)
        ]
        unknown, known, lost, lost_known, acr, *drop = np.mean(runs, axis=0)
        print(
            f"{row.title:20}{row.rule:11}{row.keep:13}{n / unknown:12.2f}/{n / known:7.2f}"
            f"{lost:8.2f}/{lost_known:5.2f}{100 * np.mean(drop):8.3f}/{100 * np.max(drop):5.2f}"
            f"{100 * acr:7.2f}{(time.process_time() - started) / options.repetitions:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
