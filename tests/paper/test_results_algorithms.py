"""docs/results/algorithms.py: its intervals cover, its pairs are pairs, its processes end."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import report_factory as factory
from certifl.errors import StoreMismatch
from certifl.federated import ALGORITHMS
from scripts import RESULTS, results_scripts

numbers, page, algorithm_study, pool = results_scripts(
    "algorithm_numbers", "algorithm_page", "algorithm_study", "algorithm_pool"
)
SLEEPER = """
import os, sys, time
from pathlib import Path

def work(job):
    folder, number = job
    Path(folder, f"{number}.tmp").write_text(str(os.getpid()))
    os.replace(Path(folder, f"{number}.tmp"), Path(folder, f"{number}.pid"))
    time.sleep(300)
"""
STARTER = """
import sys
sys.path[:0] = [{results!r}, {folder!r}]
from algorithm_pool import run_jobs
from sleeper import work

if __name__ == "__main__":
    run_jobs([({folder!r}, n) for n in range(2)], 1, work, print)
"""


def studies(
    rng: np.random.Generator, seeds: int, of_seeds: float, of_images: float, images: int = 40
) -> list[np.ndarray]:
    """Differences whose true mean is 1: something every seed adds, and something of each image."""
    return [
        1.0 + of_seeds * rng.normal() + of_images * rng.normal(size=images) for _ in range(seeds)
    ]


@pytest.mark.statistical
def test_holm_is_wrong_about_any_of_sixteen_in_at_most_five_percent():
    paired, holm = numbers.paired, numbers.holm
    rng, repeats = np.random.default_rng(6), 60
    corrected = alone = 0
    for _ in range(repeats):
        base = studies(rng, 5, 1.0, 0.5, 10)
        p = []
        for _ in range(16):
            other = studies(rng, 5, 1.0, 0.5, 10)
            p.append(paired([a - b for a, b in zip(other, base, strict=True)]).p)
        corrected += any(holm(p))
        alone += min(p) <= 0.05
    assert corrected <= stats.binom.ppf(0.999, repeats, 0.05)
    assert alone / repeats > 0.2, "without correction the table would be wrong far too often"


def test_interval_is_that_of_students_paired_test():
    rng = np.random.default_rng(1)
    one = [rng.normal(3.0 * seed, 0.1, 30) for seed in range(4)]
    base = [values - rng.normal(0.5 * seed, 0.1, 30) for seed, values in enumerate(one)]
    found = numbers.paired([a - b for a, b in zip(one, base, strict=True)])
    known = stats.ttest_rel([v.mean() for v in one], [v.mean() for v in base])
    interval = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(known.pvalue)
    assert found.apart == (found.p < 0.05)


def test_equal_shares_are_not_taken_for_certainty():
    paired = numbers.paired
    differences = [np.repeat([1.0, -1.0, 0.0], [4, 2, 94]) for _ in range(3)]  # all 2 points
    found = paired(differences)
    assert found.low < 0.0 < found.high
    assert found.estimate == pytest.approx(0.02)
    same = paired([np.zeros(100)] * 3)
    hidden = 1 - 0.025 ** (1 / 100)  # no image differs, and yet others may
    assert (same.low, same.high) == pytest.approx((-hidden, hidden))
    assert (same.p, same.apart) == (1.0, False)
    with pytest.raises(ValueError, match="two seeds"):
        paired([np.ones(100)])


def test_clients_that_differ_do_not_switch_the_floor_off():
    observed, paired = numbers.Observed, numbers.paired
    values, owner = np.repeat([0.52, -0.10], 20), np.repeat([0, 1], 20)
    found = paired([observed(values, owner, np.arange(40) + 40 * seed) for seed in range(3)])
    assert found.high - found.estimate >= 1 - 0.025 ** (1 / 40)


def test_p_agrees_with_the_interval():
    paired = numbers.paired
    rng = np.random.default_rng(4)
    for shift in (0.0, 0.2, 0.4):
        differences = [rng.normal(shift, 0.3, 40) for _ in range(4)]
        p = paired(differences).p
        for error in (0.9 * p, min(1.0, 1.1 * p)):
            assert paired(differences, error).apart == (error > p)


def test_holm_on_a_worked_example():
    assert numbers.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert numbers.holm([0.04, 0.001, 0.04]) == [False, True, False]


def test_all_runs_are_made_once_and_fine_tuning_after_its_base():
    study = algorithm_study
    wanted = study.studies()
    jobs = study.jobs(wanted)
    flat = [one for job in jobs for one in job]
    assert sorted(map(repr, flat)) == sorted(map(repr, wanted))
    assert len({one.folder(Path()) for one in wanted}) == len(wanted)
    assert len(wanted) == len(ALGORITHMS) * 2 * 2 * len(study.SEEDS)
    longer = [[one.algorithm for one in job] for job in jobs if len(job) > 1]
    assert longer == [["fedavg", "personalized"]] * (4 * len(study.SEEDS))
    assert study.jobs([one for one in wanted if one.algorithm == "personalized"])
    assert flat[0].seed == 1
    assert flat[-1].seed == study.SEEDS[-1]


def write(runs: Path, qualities: dict[str, float], seed: int) -> None:
    """Runs of one seed on the same images, with the spec that the table wants."""
    for number, (algorithm, quality) in enumerate(qualities.items()):
        study = algorithm_study.Study("rotation", algorithm, "uniform", seed)
        certificates = factory.make_certificates(quality, images=10, seed=100 * seed + number)
        facts = factory.make_manifest(algorithm, ALGORITHMS.rows[algorithm].label) | {
            "spec_hash": study.spec().hash()
        }
        folder = factory.write_run(study.folder(runs), certificates, facts)
        (folder / "clean.json").write_text(json.dumps({"right": 150 + number, "images": 200}))


QUALITIES = {"local": 0.5, "fedavg": 0.8, "fedprox": 0.8}


def table(runs: Path):
    return numbers.section(runs, "rotation", "uniform", (1, 2, 3, 4), tuple(QUALITIES))


def test_a_planted_difference_is_shown_and_no_other(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, QUALITIES, seed)
    found = table(tmp_path)
    rows = {row.algorithm: row for row in found.rows}
    assert found.seeds == (1, 2, 3)
    assert rows["local"].acr_shown
    assert rows["local"].middle_shown
    assert not rows["fedprox"].acr_shown
    assert [row.mean_acr for row in found.rows] == sorted(
        (row.mean_acr for row in found.rows), reverse=True
    )
    for row in (rows["local"], rows["fedprox"]):
        for paired, value in (
            (row.acr, lambda run: run.acr),
            (row.middle, lambda run: run.certified[1]),
        ):
            apart = [
                value(a) - value(b) for a, b in zip(row.runs, rows["fedavg"].runs, strict=True)
            ]
            assert paired.estimate == pytest.approx(np.mean(apart), abs=1e-12)
    words = page.verdict(found)
    assert "shown after correction, below: Local;" in words
    assert "no difference shown: FedProx." in words
    lines = "\n".join(page.section_lines(found))
    assert lines.count("**") == 4
    assert "Training seeds: 1, 2, 3" in lines


def test_a_seed_counts_when_all_its_runs_are_there(tmp_path):
    assert table(tmp_path).rows == ()
    write(tmp_path, QUALITIES, 1)
    alone = table(tmp_path)
    assert {row.acr for row in alone.rows} == {None}
    assert "too few seeds" in page.verdict(alone)
    write(tmp_path, {"local": 0.5, "fedavg": 0.8}, 2)
    assert table(tmp_path).seeds == (1,)
    write(tmp_path, QUALITIES, 2)
    assert table(tmp_path).seeds == (1, 2)


def test_other_studies_and_other_images_are_refused(tmp_path):
    write(tmp_path, QUALITIES, 1)
    mark = tmp_path / "local-uniform-1" / "run.json"
    mark.write_text(mark.read_text().replace('"spec_hash": "', '"spec_hash": "0'))
    with pytest.raises(StoreMismatch):
        table(tmp_path)
    one = factory.make_run(factory.make_certificates(0.8, images=10))
    part = one.certificates
    fewer = dataclasses.replace(one, certificates=factory.make_certificates(0.8, 9, 10))
    shifted = dataclasses.replace(
        one, certificates=dataclasses.replace(part, index=part.index + 10_000)
    )
    for other in (fewer, shifted):
        with pytest.raises(StoreMismatch):
            numbers.differences(one, other, 0.1)


def test_random_spread_is_that_of_equal_clients():
    rng = np.random.default_rng(3)
    owner = np.repeat(np.arange(10), 10)
    equal = [rng.normal(size=100) for _ in range(20)]
    chance = numbers.chance_spread
    seen = np.mean([np.ptp(values.reshape(10, 10).mean(axis=1)) for values in equal])
    expected = np.mean([chance(values, owner, 0) for values in equal])
    assert seen == pytest.approx(expected, rel=0.12)
    apart = equal[0] + 3.0 * owner
    assert chance(apart, owner, 0) < 0.7 * np.ptp(apart.reshape(10, 10).mean(axis=1))


def test_differences_are_rounded_outward():
    found = numbers.Paired(0.1234, 0.1191, 0.1291, 0.001)
    cell = page.difference_cell
    assert cell(found, False, 100.0, 1) == "+12.3 (+11.9 to +13.0)"
    assert cell(found, True, 1.0, 2) == "**+0.12 (+0.11 to +0.13)**"
    assert cell(None, False, 1.0, 2) == "-"


def test_a_failed_job_is_reported_and_the_others_are_done():
    reported: list[str] = []
    failures = pool.run_jobs([1, 2, 0, 4], 1, math.log, reported.append)
    assert failures == ["0 FAILED: ValueError: math domain error"]
    assert len(reported) == 4


def test_the_page_is_linked_by_its_heading():
    heading = (RESULTS / "algorithms.md").read_text().splitlines()[0].removeprefix("# ")
    assert f"[{heading}](algorithms.md)" in (RESULTS / "README.md").read_text()
    assert f'"algorithms.md": "{heading}"' in (RESULTS / "figures.py").read_text()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(reached: Callable[[], bool], seconds: float = 180.0) -> bool:
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.05)
    return reached()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("ended", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_outlives_the_command(tmp_path, ended, code):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    starter = tmp_path / "starter.py"
    starter.write_text(STARTER.format(results=str(RESULTS), folder=str(tmp_path)))
    command = subprocess.Popen([sys.executable, str(starter)], stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: len(list(tmp_path.glob("*.pid"))) == 1)
        workers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        os.kill(command.pid, ended)
        assert command.wait(60) == code
        assert until(lambda: not any(map(alive, workers)))
    finally:
        command.kill()
        command.wait()
