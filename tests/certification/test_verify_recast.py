"""Votes cast again: the same where they were cast, and invented ones found everywhere."""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import own_study
import tiny_study as tiny
from certifl.certification import counts as engine
from certifl.certification.counts import Votes
from certifl.errors import InputError
from certifl.experiments import recast as recasting
from certifl.experiments.recast import EXACT, FRESH, ROUNDING, Options, Recast, recast_votes
from certifl.experiments.run import Options as RunOptions
from certifl.experiments.run import run
from certifl.experiments.verify import verify_run
from certifl.runs.folder import RunFolder
from certifl.spec import Spec, load_stored
from certifl.study.opened_run import OpenRun
from report_factory import blank_certificates

STUDIES: dict[str, Callable[[], Spec]] = {
    "runner-up": lambda: tiny.spec("certification.estimator=runner-up"),
    "sequential": lambda: tiny.spec("certification.n=800"),
    "scan": lambda: tiny.spec("certification.estimator=scan", "certification.n=2000"),
    "own": lambda: own_study.spec(),
}


def recast_run(path: Path, options: Options) -> Recast:
    return recast_votes(OpenRun(path, code=options.code, offline=True), options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("honest")
    options = {name: RunOptions(place / name, explore=False) for name in STUDIES}
    return {name: run(study(), options[name]).path for name, study in STUDIES.items()}


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(runs["runner-up"], tmp_path / "run"))


@pytest.mark.parametrize("name", STUDIES)
def test_honest_votes_come_out_the_same(name, runs):
    answer = tiny.cli("verify", runs[name], "--recast", "2")
    answer.fine("certificates follow", "4 images", "same kind of machine: all as recorded")


def test_all_images_are_cast_again_where_more_are_asked_for(runs):
    found = recast_run(runs["runner-up"], Options(images=100))
    assert (found.images, found.votes, found.differing) == (12, 12 * 300, 0)
    assert found.how == EXACT


def test_the_images_are_chosen_by_a_secure_seed_that_is_told(runs):
    seeds = {recast_run(runs["runner-up"], Options(images=1)).seed for _ in range(2)}
    assert len(seeds) == 2
    answer = tiny.cli("verify", runs["runner-up"], "--recast", "1", "--recast-seed", "7")
    answer.fine("--recast-seed 7 repeats the choice")


def forged(place: Path) -> None:
    """All votes for the label, with everything that follows from votes: a perfect run."""
    folder = RunFolder(place)
    made = folder.load_certificates()
    spec = tiny.spec(
        *(f"certification.{key}={made.conditions[key]}" for key in ("estimator", "n"))
    )
    perturbation, settings = spec.perturbation(), spec.certification.settings()
    estimator = settings.estimator_for(perturbation)
    totals, scanned = estimator.looks, settings.estimator == "scan"
    rows, classes, n = len(made), made.counts.shape[1], totals[-1]
    chosen = np.eye(classes, dtype=np.int64)[made.label]
    votes = Votes(
        selection=chosen * settings.n0,
        estimation=chosen * n,
        looks=np.full(rows, len(totals)),
        done=np.ones(rows, np.bool_),
        seconds=made.seconds,
        path=np.repeat(made.label[:, None], n, axis=1).astype(np.uint8) if scanned else None,
    )
    best = engine.finalize(votes, estimator, made.label, made.index, conditions=made.conditions)
    dataclasses.replace(best, client=made.client).save(folder.certificates)
    cast = int(best.votes.sum()) + int(best.selection_counts.sum())
    folder.update({"votes": cast})


def from_elsewhere(place: Path, how: str) -> None:
    """As if another processor, or another version of torch, had cast the votes."""
    folder = RunFolder(place)
    manifest, made = folder.manifest(), folder.load_certificates()
    if how == ROUNDING:
        folder.update({"machine": {**manifest["machine"], "instructions": "others"}})
    if how == FRESH:
        versions = {"torch": "2.0.0"}
        folder.update({"versions": {**manifest["versions"], **versions}})
        metadata = {**made.conditions, "versions": {**made.conditions["versions"], **versions}}
        dataclasses.replace(made, conditions=metadata).save(folder.certificates)


@pytest.mark.parametrize("how", [EXACT, ROUNDING, FRESH])
@pytest.mark.parametrize("name", ["runner-up", "scan"])
def test_votes_invented_consistently_are_found_by_casting_them_again(name, how, runs, tmp_path):
    place = Path(shutil.copytree(runs[name], tmp_path / "run"))
    from_elsewhere(place, how)
    honest = recast_run(place, Options(images=6))
    assert (honest.problems, honest.how) == ((), how)
    forged(place)
    assert verify_run(place).problems == ()  # nothing else can see it
    answer = tiny.cli("verify", place, "--recast", "6")
    assert answer.code == 1
    assert "when cast again" in answer.err
    assert "follow from their votes" not in answer.out


def test_one_vote_is_found_on_the_same_machine(copied):
    made = copied.load_certificates()
    assert recast_run(copied.path, Options(images=6)).problems == ()
    counts, row = made.counts.copy(), int(made.radius.argmin())
    top = int(counts[row].argmax())
    counts[row, [top, (top + 1) % 10]] += [-1, 1]
    dataclasses.replace(made, counts=counts).save(copied.certificates)
    (problem,) = recast_run(copied.path, Options(images=6)).problems
    assert f"image {made.index[row]}: 1 of its 300 votes differ" in problem


def test_an_old_record_without_instructions_is_not_taken_for_the_same_machine(copied):
    machine = {k: v for k, v in copied.manifest()["machine"].items() if k != "instructions"}
    copied.update({"machine": machine})
    found = recast_run(copied.path, Options(images=1))
    assert (found.how, found.differing) == (ROUNDING, 0)


@pytest.mark.parametrize("size", [0, -5, 10**9, "all", None, True])
def test_a_batch_size_that_was_altered_cannot_fill_the_memory(size, copied):
    made = copied.load_certificates()
    metadata = {**made.conditions, "batch_size": size, "threads": size}
    dataclasses.replace(made, conditions=metadata).save(copied.certificates)
    assert recast_run(copied.path, Options(images=1)).how == ROUNDING


def test_the_threads_of_this_process_stay_what_they_were(runs):
    before = torch.get_num_threads()
    recast_run(runs["runner-up"], Options(images=1))
    assert torch.get_num_threads() == before


def _case(
    flips: np.ndarray, votes: int, how: str, shares: tuple[float, float] = (0.001, 0.01)
) -> list[str]:
    """What is found where so many of each image's votes flipped from class 0 to 1."""
    m = len(flips)
    counts = np.zeros((m, 3), np.int64)
    counts[:, 0] = votes
    moved = counts.copy()
    moved[:, 0] -= flips
    moved[:, 1] += flips
    selection = np.zeros((m, 3), np.int64)
    selection[:, 0] = 100
    part = blank_certificates(m, counts=counts, selection_counts=selection)
    stored = Votes.of(part)
    again = dataclasses.replace(stored, estimation=moved)
    cast = recasting._Cast(how, stored, again, shares)
    flipped, total = recasting._flipped(cast)
    assert flipped.tolist() == flips.tolist()
    return recasting.flips_problems(part, cast, flipped, total, recasting.LEVEL)


def test_flips_of_rounding_pass_and_more_do_not():
    votes, m = 10_000, 10
    rng = np.random.default_rng(0)
    for _ in range(50):
        # Twice the mean in half the images: it is the mean over all that is bounded.
        rates = np.where(np.arange(m) < m // 2, 0.002, 0.0)
        assert _case(rng.binomial(votes, rates), votes, ROUNDING) == []
    assert _case(np.full(m, 10), votes, ROUNDING) == []
    (problem,) = _case(np.full(m, 30), votes, ROUNDING)
    assert "300 of 101000 votes" in problem
    alone = np.array([300, *[0] * (m - 1)])
    assert len(_case(alone, votes, ROUNDING)) == 1
    assert len(_case(np.array([1, 0]), votes, EXACT)) == 1


def test_other_noise_passes_and_another_distribution_does_not():
    rng = np.random.default_rng(1)
    for p in (0.5, 0.9, 0.999):
        draws = rng.binomial(10_000, p, (2, 200))
        p_values = [
            recasting._p_value(np.array([a, 10_000 - a]), np.array([b, 10_000 - b]), 0.0)
            for a, b in draws.T
        ]
        assert np.mean(np.array(p_values) <= 0.05) <= 0.1
    assert recasting._p_value(np.array([9_900, 100]), np.array([9_000, 1_000]), 0.01) < 1e-9
    assert recasting._p_value(np.array([9_900, 100]), np.array([9_850, 150]), 0.01) == 1.0


NETWORK = """
from torch import nn

def make(in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
"""


@pytest.mark.usefixtures("own_modules")
def test_a_network_of_ones_own_needs_its_code(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "recast_network.py").write_text(NETWORK)
    sys.path.append(str(code))
    study = tiny.spec("model.name=recast_network:make", "certification.n=100")
    place = run(study, RunOptions(tmp_path / "run", explore=False)).path
    sys.path.remove(str(code))
    sys.modules.pop("recast_network")
    tiny.cli("verify", place).fine("12 certificates")
    tiny.cli("verify", place, "--recast", "1").refused("recast_network:make", "--code DIR")
    assert "recast_network" not in sys.modules
    empty = tmp_path / "empty"
    empty.mkdir()
    answer = tiny.cli("verify", place, "--recast", "1", "--code", empty)
    answer.refused("recast_network")
    answer = tiny.cli("verify", place, "--recast", "1", "--code", tmp_path / "none")
    answer.refused("not a folder")
    path = list(sys.path)
    tiny.cli("verify", place, "--recast", "1", "--code", code).fine("all as recorded")
    assert sys.path == path


def test_what_cannot_be_cast_again_is_refused(runs, copied):
    file = runs["runner-up"] / "certificates.parquet"
    tiny.cli("verify", file, "--recast", "1").refused("needs the run folder")
    copied.update({"deployment": {"id": "x"}})
    tiny.cli("verify", copied.path, "--recast", "1").refused("images are with its clients")
    with pytest.raises(InputError, match="at least 1"):
        recast_run(runs["runner-up"], Options(images=0))


def test_findings_come_before_casting_again(copied):
    made = copied.load_certificates()
    dataclasses.replace(made, index=made.index + 10**6).save(copied.certificates)
    answer = tiny.cli("verify", copied.path, "--recast", "1")
    assert answer.code == 1
    assert "cast again" not in answer.err


def test_votes_of_compiled_networks_are_verified_but_not_cast_again(copied):
    name, text = "float32-compiled", copied.spec.read_text()
    copied.spec.write_text(text.replace('precision = "auto"', f'precision = "{name}"'))
    copied.update({"spec_hash": load_stored(copied.spec).hash(), "precision": name})
    made = copied.load_certificates()
    changed = {**made.conditions, "precision": name}
    dataclasses.replace(made, conditions=changed).save(copied.certificates)
    tiny.cli("verify", copied.path).fine("certificates follow")
    said = tiny.cli("verify", copied.path, "--recast", "1")
    said.refused("'float32-compiled'", "removed in 0.2.0", "without --recast")
