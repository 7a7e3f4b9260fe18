"""Some of the clients in every round; clients that fail, as a reader sees them."""

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import pytest

import tiny_study as tiny
from certifl.cli import terminal
from certifl.errors import SpecError
from certifl.experiments.run import Options, run
from certifl.federated import FedAvg, Personalized, train
from certifl.federated.aggregation import Clip, TrimmedMean
from certifl.federated.trainer import RandomShare
from certifl.report import load_run, load_runs, summary_rows
from certifl.report.compare import compare
from certifl.report.page.context import ReportContext
from certifl.report.page.results import training_section
from certifl.report.summary import largest_radius, left_out_words
from certifl.report.wording import scales
from certifl.runs.checkpoints import Checkpoints
from certifl.study.setup import label_of
from report_factory import make_certificates, make_history, make_manifest, write_run
from tiny_federation import TinyNet, clients, training

HALF = ("clients.count=5", "clients.participation=0.4", "training.rounds=3")


@pytest.mark.parametrize(
    ("share", "count", "size"),
    [(1.0, 7, 7), (0.1, 1000, 100), (0.1, 3, 1), (0.001, 10, 1), (0.5, 5, 2), (0.3, 10, 3)],
)
def test_so_many_clients_take_part_in_every_round(share, count, size):
    chosen = RandomShare(share, count, seed=3)
    assert chosen.size == size
    for round in range(20):
        drawn = chosen(round)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == size
        assert set(drawn) <= set(range(count))


def test_the_choice_depends_on_seed_and_round_alone():
    chosen = RandomShare(0.3, 50, seed=1)
    assert [chosen(r) for r in (4, 2, 4)] == [chosen(4), RandomShare(0.3, 50, 1)(2), chosen(4)]
    assert chosen(0) != chosen(1)
    assert chosen(0) != RandomShare(0.3, 50, seed=2)(0)


def test_every_client_is_as_likely_as_any_other():
    """Counts over 4000 rounds are Binomial(4000, 0.2): 6 standard deviations are 152."""
    counts = Counter(c for round in range(4000) for c in RandomShare(0.2, 20, seed=5)(round))
    assert len(counts) == 20
    assert all(abs(count - 800) < 152 for count in counts.values())


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "all"])
def test_wrong_shares_are_refused(share):
    with pytest.raises(SpecError, match="participation"):
        RandomShare(share, 10, 0)


def test_another_share_is_another_training(tmp_path):
    def go(share):
        local, folder = training(rounds=1), Checkpoints(tmp_path)
        chosen = RandomShare(share, 3, 0)
        return train(FedAvg(), TinyNet(), clients(), local, folder, participation=chosen)

    go(0.4)
    with pytest.raises(Exception, match=r"participation: .*'share': 0\.4.* stored"):
        go(0.7)


def test_a_study_names_its_participants_and_its_rules():
    plain = tiny.spec("clients.count=5")
    some = ("clients.count=8", "clients.participation=0.4")
    spec = tiny.spec(*some, "aggregation.rule=trimmed-mean", "aggregation.trim=0.2")
    assert spec.clients.participants == 3
    assert spec.aggregation.build() == TrimmedMean(0.2)
    assert plain.aggregation.build() is None
    clipped = tiny.spec("clients.count=5", "aggregation.clip=2.0")
    assert isinstance(clipped.aggregation.build(), Clip)
    assert label_of(plain) == "FedAvg"
    assert label_of(spec) == "FedAvg, trimmed mean, 40 % a round"
    assert label_of(clipped) == "FedAvg, clipped at 2"
    assert len({one.training_hash() for one in (plain, spec, clipped, tiny.spec(*HALF))}) == 4


def test_the_least_number_of_clients_changes_no_result_and_no_hash():
    for base in ((), HALF):
        plain, fewer = tiny.spec(*base), tiny.spec(*base, "clients.min_clients=1")
        assert fewer.clients.min_clients == 1
        assert plain.hash() == fewer.hash()
        assert plain.training_hash() == fewer.training_hash()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("clients.participation=0",), "clients.participation"),
        (("clients.participation=1.1",), "clients.participation"),
        ((*HALF, "clients.min_clients=3"), "min_clients = 3 is more than the 2 clients"),
        (("clients.min_clients=0",), "clients.min_clients"),
        (("aggregation.rule=medain",), "aggregation: rule name = 'medain' is unknown"),
        (("aggregation.trim=0.1",), "aggregation: mean has no parameter 'trim'"),
        (("aggregation.rule=krum",), "krum needs the parameter 'malicious'"),
        (("aggregation.rule=krum", "aggregation.malicious=0.2"), "at least 5 clients"),
        (("aggregation.clip=0",), "aggregation.clip"),
        (("aggregation.rules=mean",), "no such key. Did you mean 'rule'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, said):
    with pytest.raises(SpecError, match=said):
        tiny.spec(*settings)


def test_a_study_trains_the_chosen_clients_and_counts_them(tmp_path):
    told = []
    algorithm = "algorithm={name='personalized', base={name='fedavg'}, epochs=1}"
    spec = tiny.spec(*HALF, algorithm, "data.test_images=50")
    assert isinstance(spec.build_algorithm(), Personalized)
    options = Options(
        tmp_path / "run", report=lambda what, done, all_, _: told.append((what, done, all_))
    )
    folder = run(spec, options)
    lines = (folder.path / "history.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    chosen = RandomShare(0.4, 5, spec.seed)
    assert [entry["participants"] for entry in rounds[:3]] == [chosen(r) for r in range(3)]
    assert rounds[3]["participants"] == [0, 1, 2, 3, 4]  # fine-tuning is everybody's own
    steps = [entry[1:] for entry in told if entry[0] == "training"]
    assert steps == [(done, 11) for done in range(1, 12)]


def test_training_in_which_all_diverge_ends_with_advice(tmp_path):
    file = tiny.write_spec(tmp_path, "training.lr=1e30")
    asked = ("run", file, "--out", tmp_path / "run")
    tiny.cli(*asked).refused(
        "Round 0 cannot be finished", "diverged", "Lower training.lr", "same command", code=1
    )
    again = tiny.cli(*asked, "--set", "clients.min_clients=1")
    again.refused("2 of its 2 clients failed and at least 1 must remain", code=1)


def story_of(place: Path) -> ReportContext:
    runs = load_runs([place])
    units = scales(runs[0].conditions, largest_radius(runs))
    return ReportContext(tuple(runs), units, compare(runs))


def failing(place: Path, faults) -> Path:
    history = make_history(3, 0.8, rounds=4)
    for round, client, reason in faults:
        history[round].setdefault("left_out", []).append({"client": client, "reason": reason})
        del history[round]["clients"][str(client)]
    manifest = make_manifest("fedavg", "FedAvg", 3, 60)
    return write_run(place, make_certificates(0.9, clients=3, images=20), manifest, history)


def test_the_page_and_the_table_warn_of_clients_that_were_left_out(tmp_path):
    silent, broken = "it did not answer within 5 seconds", "it raised <OSError>: & more"
    place = failing(tmp_path / "run", [(0, 2, silent), (2, 2, silent), (2, 0, broken)])
    words = left_out_words(load_run(place))
    assert words == (
        "3 of 12 rounds of clients failed and were left out, in 2 of 4 rounds: client 0 (once: "
        f"{broken}); client 2 (2 times; first: {silent})."
    )
    assert summary_rows([place])[0]["left_out"] == words
    page = str(training_section(story_of(place)))
    assert 'class="notice"' in page
    assert "client 0 (once: it raised &lt;OSError&gt;: &amp; more)" in page


def test_the_terminal_warns_below_the_table(tmp_path):
    place = failing(tmp_path / "run", [(0, 2, "it raised OSError: [Errno 5] gone")])
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        terminal.show_summary(summary_rows([place]))
    last = told.getvalue().splitlines()[-1]
    assert last.startswith("Warning: FedAvg: 1 of 12 rounds of clients failed")
    assert "[Errno 5] gone" in last  # no markup


def test_without_faults_nobody_is_warned(tmp_path):
    place = failing(tmp_path / "run", [])
    assert summary_rows([place])[0]["left_out"] is None
    assert "notice" not in str(training_section(story_of(place)))


def test_many_clients_that_failed_are_counted(tmp_path):
    history = [{"round": 0, "clients": {}, "left_out": []}]
    history[0]["left_out"] = [{"client": c, "reason": "it raised"} for c in range(9)]
    certificates = make_certificates(0.9, clients=2, images=20)
    place = write_run(tmp_path / "r", certificates, make_manifest("fedavg", "F", 2, 40), history)
    assert str(left_out_words(load_run(place))).endswith("client 4 (once: it raised); and 4 more.")
