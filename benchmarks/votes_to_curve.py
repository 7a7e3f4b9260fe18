"""Votes to the same certified-accuracy curve: fixed n against sequential certification.

    python benchmarks/votes_to_curve.py --golden cifar10_counts_sigma_0.25.txt

The golden file holds, per image, vote counts that sum to n and then the label. Its shares are
taken for the true vote probabilities; every repetition draws 100 selection votes, then n
estimation votes in one path, on which fixed n (all votes at level alpha) and the sequential rule
are compared. So both sides of a ratio come from the same votes. Per row of the table:

    votes     mean votes an image of the sequential rule
    ratio     n / votes
    oracle    the ratio of a rule that knows the future: each image stops at the first look whose
              radius already reaches the grid step of its last look; no rule that gives up nothing
              beats it
    lost      images that reach fewer grid steps than with fixed n (mean over repetitions)
    gained    images that reach more
    drop      certified accuracy lost, in percentage points: mean over the grid / worst radius

"Labels known" stops an image at its first look when c_A is not its label; `keep` is the option of
`certify` of that name.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certifl.certification.estimators import KEEPS, Estimator
from certifl.certification.record import RecordedNoise
from certifl.certification.settings import Settings
from certifl.smoothing import BOUNDS, GAUSSIAN, UNIFORM, Law, finished, grid_steps

N0 = 100


@dataclass(frozen=True)
class Setting:
    """One row of the table: a grid of radii under a law, and how to stop."""

    title: str
    law: Law
    sigma: float
    grid: np.ndarray
    rule: str
    labels: bool
    keep: str

    def schedule(self, alpha: float, n: int) -> Estimator:
        estimator = {"runner-up": "sequential", "top-class": "sequential-top-class"}[self.rule]
        noise = RecordedNoise("", self.sigma, self.law, "")
        return Settings(estimator, N0, n, alpha, keep=self.keep).estimator_for(noise)


def rows_of_the_table() -> list[Setting]:
    wide = ("pixel, grid 0.25", GAUSSIAN, 0.25, np.arange(1, 5) * 0.25)
    fine = ("pixel, grid 0.1", GAUSSIAN, 0.25, np.arange(1, 11) * 0.1)
    turn = ("rotation, 20 radii", UNIFORM, 0.1 * np.pi, np.arange(1, 21) / 20 * 0.1 * np.pi)
    rows = []
    for place in (wide, fine, turn):
        for rule in BOUNDS:
            for keep in KEEPS:
                rows += [Setting(*place, rule, labels, keep) for labels in (False, True)]
    return rows


def path(shares: np.ndarray, counts_at: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Class counts at every look, (looks, images, classes), of one stream of votes an image."""
    steps = np.diff(np.asarray((0, *counts_at)))
    return np.cumsum([rng.multinomial(step, shares) for step in steps], axis=0)


def top_and_runner(counts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the chosen class and the largest count among the others, over the last axis."""
    mine = np.arange(counts.shape[-1]) == chosen[:, None]
    return np.where(mine, counts, 0).sum(-1), np.where(mine, -1, counts).max(-1)


def repetition(
    setting: Setting, shares: np.ndarray, labels: np.ndarray, n: int, alpha: float, seed: int
) -> np.ndarray:
    """One repetition: votes, oracle's votes, lost, gained, then the drop at every grid step."""
    rng = np.random.default_rng(seed)
    chosen = rng.multinomial(N0, shares).argmax(1)
    wrong = chosen != labels
    estimator = setting.schedule(alpha, n)
    schedule, level = estimator.looks, estimator.levels
    price = estimator.futility(setting.grid)
    top, runner = top_and_runner(path(shares, schedule, rng), chosen)
    bound, law, sigma = BOUNDS[setting.rule], setting.law, setting.sigma
    counted = np.asarray(schedule)[:, None], np.asarray(level)[:, None]
    steps = grid_steps(law.radius(sigma, *bound(top, runner, *counted)), setting.grid)
    stop = np.array(
        [
            finished(top[j], runner[j], j, schedule, level, setting.grid, law, sigma, bound,
                     wrong=wrong if setting.labels else None, futility=price)
            for j in range(len(schedule))
        ]
    ).argmax(0)  # fmt: skip
    ideal = (steps >= steps[-1]).argmax(0)
    if setting.labels:
        ideal = np.where(wrong, 0, ideal)
    fixed = grid_steps(law.radius(sigma, *bound(top[-1], runner[-1], n, alpha)), setting.grid)
    got = steps[stop, np.arange(len(shares))]
    if setting.labels:
        fixed, got = np.where(wrong, 0, fixed), np.where(wrong, 0, got)
    rungs = np.arange(1, len(setting.grid) + 2)[:, None]
    drop = ((fixed >= rungs) & ~wrong).mean(1) - ((got >= rungs) & ~wrong).mean(1)
    votes = np.asarray(schedule)
    return np.array(
        [votes[stop].mean(), votes[ideal].mean(), (got < fixed).sum(), (got > fixed).sum(), *drop]
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
    shares = counts / n
    print(
        f"{len(table)} images, n = {n}, alpha = {options.alpha}, {options.repetitions} repetitions"
    )
    print(
        f"{'grid':20}{'bound':11}{'labels':8}{'keep':13}"
        f"{'votes':>8}{'ratio':>7}{'oracle':>8}{'lost':>7}{'gained':>7}{'drop':>14}"
    )
    for row in rows_of_the_table():
        runs = [
            repetition(row, shares, labels, n, options.alpha, options.seed + i)
            for i in range(options.repetitions)
        ]
        votes, ideal, lost, gained, *drop = np.mean(runs, axis=0)
        print(
            f"{row.title:20}{row.rule:11}{'known' if row.labels else '-':8}"
            f"{row.keep:13}{votes:8.0f}{n / votes:7.2f}{n / ideal:8.2f}"
            f"{lost:7.2f}{gained:7.2f}{100 * np.mean(drop):8.3f}/{100 * np.max(drop):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
