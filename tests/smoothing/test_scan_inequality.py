"""The scan's inequality, its geometry, and its intervals against a slow twin."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from certifl.smoothing.scan import BETS, SHARES, Cells, Scan, log_weight, passes_of, read_scan


def weight(bet: float, x: int, y: int) -> float:
    gap = abs(x - y)
    return float(np.exp(log_weight(bet, max(x, y), gap == 1, gap == 2)))


def expected_weight(bet: float, a: np.ndarray, c: np.ndarray) -> np.ndarray:
    """E w of a pair of independent votes, for c_A with probability a, for the rival with c."""
    share = {1: a, 0: 1 - a - c, -1: c}
    return sum(share[x] * share[y] * weight(bet, x, y) for x, y in itertools.product(share, share))


def simplex(steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
    a, c = np.meshgrid(np.arange(steps + 1) / steps, np.arange(steps + 1) / steps)
    inside = a + c <= 1 + 1e-12
    return a[inside], np.minimum(c[inside], 1 - a[inside])


@pytest.mark.parametrize("bet", [*BETS, 1e-6, 0.1, 0.5, 0.999999])
def test_the_expected_weight_never_exceeds_that_of_the_mean(bet):
    a, c = simplex()
    assert np.all(expected_weight(bet, a, c) <= np.exp(bet * (a - c)) * (1 + 1e-12))


def test_no_weight_of_pairs_that_differ_could_be_larger():
    """As the share of c_A goes to 1 the inequality becomes an equality to first order."""
    for bet, rival in itertools.product((0.1, 0.5, 0.9), (0, -1)):
        a = 1 - 1e-5
        c = 1 - a if rival == -1 else 0.0
        slack = math.exp(bet * (a - c)) - expected_weight(bet, np.array(a), np.array(c))
        one_percent = 0.01 * 2 * a * (1 - a) * weight(bet, 1, rival)
        assert 0 <= slack < one_percent


def mean_e_value(shares: list[tuple[float, float]], discrepancy: float, best: bool) -> float:
    """The exact expectation of E over all outcomes of one pair in each of some strata.

    Args:
        shares: probabilities of A and B in each stratum.
        best: take A for the chosen class or B, whichever the same votes favor.
    """
    total = 0.0
    for outcome in itertools.product(itertools.product((1, 0, -1), repeat=2), repeat=len(shares)):
        z = np.array(outcome)
        chance = math.prod(
            {1: a, 0: 1 - a - b, -1: b}[int(v)]
            for (a, b), pair in zip(shares, z, strict=True)
            for v in pair
        )
        gaps = np.abs(z[:, 0] - z[:, 1])

        def e_value(z: np.ndarray, gaps: np.ndarray = gaps) -> float:
            tops = z.max(axis=1).sum() - discrepancy
            logs = [log_weight(b, tops, (gaps == 1).sum(), (gaps == 2).sum()) for b in BETS]
            return float(SHARES @ np.exp(logs))

        total += chance * (max(e_value(z), e_value(-z)) if best else e_value(z))
    return total


@pytest.mark.parametrize(
    ("shares", "discrepancy"),
    [
        ([(0.5, 0.5)], 0.0),
        ([(0.5, 0.5), (0.5, 0.5)], 0.0),
        ([(0.2, 0.2), (0.0, 0.0)], 0.0),
        ([(0.9, 0.1), (0.1, 0.9), (0.5, 0.5)], 0.0),
        ([(0.99, 0.0), (0.005, 0.995)], 0.0),
        ([(0.95, 0.05), (0.55, 0.45)], 1.0),  # the lead is exactly the discrepancy
        ([(0.8, 0.0), (0.3, 0.1), (0.0, 0.0)], 1.0),
    ],
)
def test_the_expectation_is_at_most_one_where_c_a_does_not_lead(shares, discrepancy):
    assert sum(a - b for a, b in shares) <= discrepancy + 1e-12
    assert 0.2 < mean_e_value(shares, discrepancy, best=False) <= 1.0


def test_choosing_the_class_from_the_same_votes_breaks_it():
    """The planted defect: c_A from the votes of the scan. Hence the selection votes apart."""
    assert mean_e_value([(0.5, 0.5)], 0.0, best=True) > 1.05


def test_shares_and_bets_are_fixed_and_spend_no_more_than_one():
    assert math.fsum(SHARES) <= 1.0
    assert np.all((BETS > 0) & (BETS < 1))
    assert len(BETS) == len(SHARES)


def test_every_stratum_of_every_pass_gets_two_votes_uniform_in_it():
    scan = Scan(0.5, -1.0, 2.0, False, (6, 6, 10))
    v = np.arange(scan.totals[-1])
    low, high = scan.parameters(v, np.zeros(len(v))), scan.parameters(v, np.ones(len(v)))
    start = 0
    for strata in scan.passes:
        part = slice(start, start + 2 * strata)
        edges = np.repeat(np.linspace(-1.0, 2.0, strata + 1), 2)
        assert np.allclose(low[part], edges[:-2])
        assert np.allclose(high[part], edges[2:])
        start += 2 * strata
    assert np.allclose(scan.parameters(v, np.full(len(v), 0.25)), 0.75 * low + 0.25 * high)


def test_passes_double_the_votes_and_use_them_all():
    turn = 2 * math.pi
    assert passes_of(20_000, 1.0, turn) == (500, 500, 1000, 2000, 6000)
    assert passes_of(1000, 1.0, turn) == (500,)
    assert passes_of(1001, 1.0, turn) == (500,)
    assert passes_of(7, 1.0, turn) == (3,)
    for n in (999, 1400, 1600, 12_345, 100_000):
        assert n - 2 * len(passes_of(n, 1.0, turn)) <= 2 * sum(passes_of(n, 1.0, turn)) <= n
    # A window of a small sigma needs a finer first pass: 20 strata in it.
    assert passes_of(100_000, 0.01, turn)[0] * 0.02 / turn >= 20


GEOMETRIES = {
    "line": Scan(0.7, -1.9, 2.4, False, (40, 40, 97)),
    "circle": Scan(1.0, -math.pi, math.pi, True, (50, 101, 150)),
    "whole window": Scan(math.pi, -math.pi, math.pi, True, (16, 32)),
    "scaling to the end": Scan(0.4, -1.0, 1.6, False, (60, 60, 120)),
}


def windows_of(scan: Scan) -> list[tuple[float, float, Cells]]:
    """Some deltas of every cell after every pass: (delta, cell number, cells)."""
    found = []
    for passes in range(1, len(scan.passes) + 1):
        cells = Cells(scan, passes)
        for number, (low, high) in enumerate(zip(cells.lows, cells.highs, strict=True)):
            inside = [low + share * (high - low) for share in (0.0, 0.3, 0.8, 1.0)]
            found += [(delta, number, cells) for delta in inside]
    return found


@pytest.mark.parametrize("name", GEOMETRIES)
def test_cells_cover_everything_and_carry_the_whole_difference(name):
    """Length of what lies in the run or in the window and not in both, in strata."""
    scan = GEOMETRIES[name]
    cells = Cells(scan, len(scan.passes))
    assert np.array_equal(cells.lows[1:], cells.highs[:-1])
    assert (cells.lows[0], cells.highs[-1]) == scan.ends
    assert cells.lows[cells.zero] <= 0 < cells.highs[cells.zero]
    for delta, number, cells in windows_of(scan):
        apart = 0.0
        for runs, starts in zip(cells.runs, cells.starts, strict=True):
            first = scan.low + starts[number] * runs.width
            last = first + runs.length * runs.width
            edges = abs(first - delta + scan.sigma) + abs(last - delta - scan.sigma)
            apart += edges / runs.width
            assert runs.length <= runs.strata
            if not scan.periodic:
                assert scan.low - 1e-12 <= first < last <= scan.high + 1e-12
        assert apart <= cells.discrepancy[number]
        assert cells.discrepancy[number] <= 2.01 * len(cells.runs) + 1e-6


@pytest.mark.parametrize("name", GEOMETRIES)
def test_later_passes_never_change_the_runs_of_a_delta(name):
    """Otherwise E would be no product of fixed factors, and stopping would not be free."""
    scan = GEOMETRIES[name]
    every = [Cells(scan, passes) for passes in range(1, len(scan.passes) + 1)]
    for delta in np.random.default_rng(0).uniform(*scan.ends, 500):
        chosen = [c.starts[0][np.searchsorted(c.highs, delta)] for c in every]
        assert len(set(chosen)) == 1
        second = [c.starts[1][np.searchsorted(c.highs, delta)] for c in every[1:]]
        assert len(set(second)) == 1


def slow_e_value(scan: Scan, votes: np.ndarray, chosen: int, rival: int, delta: float) -> float:
    """E(delta) by its definition, pair by pair, with the run and difference of this delta."""
    logs, start = np.zeros(len(BETS)), 0
    for strata in scan.passes:
        width = (scan.high - scan.low) / strata
        runs = Cells(dataclasses.replace(scan, passes=(strata,)), 1).runs[0]
        options = range(-strata, 2 * strata) if scan.periodic else range(strata - runs.length + 1)
        first = min(options, key=lambda i: abs(scan.low + (i + runs.length / 2) * width - delta))
        left = scan.low + first * width
        apart = abs(left - delta + scan.sigma) / width
        apart += abs(left + runs.length * width - delta - scan.sigma) / width
        for k, bet in enumerate(BETS):
            logs[k] -= bet * apart
            for i in range(first, first + runs.length):
                x, y = votes[start + 2 * (i % strata) : start + 2 * (i % strata) + 2]
                z = [(v == chosen) * 1 - (v == rival) * 1 for v in (x, y)]
                logs[k] += math.log(weight(bet, z[0], z[1]))
        start += 2 * strata
    return float(SHARES @ np.exp(np.minimum(logs, 500)))


@pytest.mark.parametrize("scan", [Scan(0.7, -1.9, 2.4, False, (40, 60)),
                                  Scan(1.0, -math.pi, math.pi, True, (51, 80))])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_the_definition(scan, seed):
    rng, alpha = np.random.default_rng(seed), 0.05
    edges = np.sort(rng.uniform(-1.6, 2.0, 6))
    t = scan.parameters(np.arange(scan.totals[-1]), rng.random(scan.totals[-1]))
    kinds = rng.integers(0, 3, 7)
    kinds[np.searchsorted(edges, 0.0)] = 0
    votes = np.where((np.abs(t - 0.1) < 0.7) & (rng.random(len(t)) < 0.95), 0,
                     kinds[np.searchsorted(edges, t)])  # fmt: skip
    made = read_scan(scan, votes[None], [0], alpha)
    low, high = made.interval[0]
    assert low < 0 < high
    width = scan.width / max(scan.passes)

    def passes(delta: float) -> bool:
        values = [slow_e_value(scan, votes, 0, rival, delta) for rival in (1, 2)]
        return min(values) >= 2 / alpha

    for delta in np.linspace(low, high, 15):
        assert passes(float(delta))
    # The cell beyond an end fails; a single delta of it passes at most where it is kinder.
    for end, way in ((low, -1), (high, 1)):
        if abs(end) < abs(scan.ends[way > 0]) - 1e-9:
            assert not all(passes(end + way * k * width / 2) for k in (1, 2, 3, 4, 5, 6))
