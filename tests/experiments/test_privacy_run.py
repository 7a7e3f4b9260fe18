"""Privacy in a spec and in a run: what is refused, what is recorded, what is kept secret."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest

from certifl.errors import ModelError, SpecError, StoreError, StoreMismatch
from certifl.experiments.hub import push
from certifl.experiments.run import Options, run
from certifl.experiments.verify import verify_run
from certifl.federated.privacy import epsilon
from certifl.report.page.page import write_report
from certifl.report.results import load_run
from certifl.report.summary import left_out_words
from certifl.report.table import summary_rows
from certifl.runs.folder import RunFolder
from certifl.spec import load
from certifl.study.privacy import rounded_up
from certifl.study.setup import label_of
from tiny_study import spec, weights

pytest.importorskip("opacus", reason="needs the extra [dp]")

EXAMPLE = ("privacy.kind=example", "privacy.noise_multiplier=1.1", "certification.n=100")
CLIENT = ("privacy.kind=client", "privacy.noise_multiplier=2.0", "certification.n=100")
SECRET = "privacy.noise_key=secret"


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A finished run of each kind, which no test changes."""
    folder = tmp_path_factory.mktemp("private")
    return {
        k: run(spec(*k), Options(folder / k[0].partition("=")[2])).path for k in (EXAMPLE, CLIENT)
    }


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["privacy.kind=example"], "needs either noise_multiplier or target_epsilon"),
        ([*EXAMPLE, "privacy.target_epsilon=8.0"], "not both"),
        (["privacy.noise_multiplier=1.0"], 'noise_multiplier has no effect with kind = "none"'),
        (["privacy.max_norm=2.0"], 'max_norm has no effect with kind = "none"'),
        ([*EXAMPLE, "privacy.max_norm=0.0"], "privacy.max_norm: "),
        ([*EXAMPLE, "privacy.delta=1.0"], "privacy.delta: "),
        ([*EXAMPLE, "privacy.noise=1.0"], "no such key. Did you mean 'noise_key'"),
        (["privacy.kind=both"], "privacy.kind: "),
        ([*CLIENT, "algorithm.name=local"], "clients send nothing"),
        ([*CLIENT, "algorithm.weighting=size"], "fixed denominator"),
        ([*CLIENT, "aggregation.rule=median"], "remove the section [aggregation]"),
        ([*CLIENT, "aggregation.clip=1.0"], "remove the section [aggregation]"),
        ([*CLIENT, "clients.min_clients=1"], "remove clients.min_clients"),
        ([*EXAMPLE, "certification.precision=int8"], 'choose "auto", "float32" or "bfloat16"'),
        ([*CLIENT, "certification.precision=int8"], "no epsilon of [privacy] bounds them"),
        ([*CLIENT, "privacy.delta=0.5"], "guarantees nothing to 2 clients"),
    ],
)
def test_impossible_privacy_is_refused_with_the_spec(settings, words):
    with pytest.raises(SpecError) as refused:
        spec(*settings)
    assert words in str(refused.value)


def test_kind_none_changes_no_study():
    plain, said = spec(), spec("privacy.kind=none")
    assert said.hash() == plain.hash()
    assert said.training_hash() == plain.training_hash()
    assert spec(*EXAMPLE).training_hash() != plain.training_hash()


def test_a_spec_with_privacy_is_written_and_read(tmp_path):
    asked = spec(*EXAMPLE, SECRET)
    (tmp_path / "spec.toml").write_text(asked.to_toml())
    assert load(tmp_path / "spec.toml") == asked


def test_labels_distinguish_private_runs():
    assert label_of(spec(*EXAMPLE)) == "FedAvg, noise 1.1 per image"
    target = ("privacy.kind=client", "privacy.target_epsilon=8.0")
    assert label_of(spec(*target)) == "FedAvg, ε = 8 per client"
    personal = spec(*target, "algorithm.name=fedrep")
    assert label_of(personal) == "FedRep, ε = 8 per client, own models without"


def test_networks_and_data_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match="BatchNorm"):
        run(spec(*EXAMPLE, "model.name=small_resnet"), Options(tmp_path / "a"))
    with pytest.raises(SpecError, match="guarantees nothing to 30 images"):
        run(spec(*EXAMPLE, "privacy.delta=0.04"), Options(tmp_path / "b"))
    assert not any(tmp_path.iterdir())


def test_a_run_records_what_every_client_spent(private):
    out = private[EXAMPLE]
    facts = RunFolder(out).manifest()["privacy"]
    wanted = epsilon(1.1, 0.5, 4, 1e-5)  # 30 images in batches of 16: 2 steps in each of 2 rounds
    assert facts["epsilon"] == facts["epsilon_messages"] == [wanted, wanted]
    assert (facts["kind"], facts["delta"], facts["max_norm"]) == ("example", 1e-5, 1.0)
    assert facts["accountant"].startswith("rdp, opacus ")
    rounds = history(out)
    assert rounds[0]["epsilon"] == epsilon(1.1, 0.5, 2, 1e-5)
    for entry in rounds:
        for row in entry["clients"].values():
            assert set(row) == {"seconds", "private_steps", "epsilon"}


def test_a_target_is_met_and_fine_tuning_is_extra(tmp_path):
    settings = ("privacy.kind=example", "privacy.target_epsilon=3.0", "certification.n=100")
    base = run(spec(*settings), Options(tmp_path / "base")).path
    asked = spec(
        *settings,
        'algorithm={name = "personalized", base = {name = "fedavg"}, epochs = 1}',
        "clients.split=quantity",
    )
    out = run(asked, Options(tmp_path / "uneven")).path
    facts = RunFolder(out).manifest()["privacy"]
    for messages, total in zip(facts["epsilon_messages"], facts["epsilon"], strict=True):
        assert 2.9 < messages <= 3.0 < total
    said = str(summary_rows([out])[0]["privacy"])
    assert f"ε = {rounded_up(max(facts['epsilon']))} at δ = 1e-05 for all that clients" in said
    assert "3.00 for the messages of training alone" in said
    assert label_of(asked).endswith("ε = 3 per image before fine-tuning")
    assert len(set(facts["noise_multiplier"])) == 2
    assert RunFolder(base).manifest()["privacy"]["epsilon"] == pytest.approx([3.0, 3.0], rel=0.02)


def test_results_of_clients_that_train_alone_cost_all_their_training(tmp_path):
    out = run(spec(*EXAMPLE, "algorithm.name=local"), Options(tmp_path / "run")).path
    facts = RunFolder(out).manifest()["privacy"]
    assert facts["epsilon_messages"] == [0.0, 0.0]
    assert min(facts["epsilon"]) > 1
    said = str(summary_rows([out])[0]["privacy"])
    assert said.startswith(f"private per image, ε = {rounded_up(max(facts['epsilon']))} at")
    assert "and all results, 0.00 for the messages of training alone" in said


@pytest.mark.parametrize("kind", [EXAMPLE, CLIENT])
def test_a_personalized_run_takes_over_the_private_rounds_of_its_base(kind, private, tmp_path):
    base = private[kind]
    personal = 'algorithm={name = "personalized", base = {name = "fedavg"}, epochs = 1}'
    alone = run(spec(*kind, personal), Options(tmp_path / "alone")).path
    after = run(spec(*kind, personal), Options(tmp_path / "after", siblings=(base,))).path
    assert weights(after).items() == weights(alone).items()
    facts = [RunFolder(f).manifest()["privacy"] for f in (base, alone, after)]
    assert facts[1] == facts[2]
    assert facts[1]["epsilon_messages"] == facts[0]["epsilon"]
    assert not verify_run(alone).problems
    page = write_report([alone], tmp_path / "page.html", figures=False).read_text()
    card = pushed(alone, tmp_path / "personal")
    if kind == CLIENT:
        assert facts[1]["epsilon"] is None
        assert "no epsilon covers results about them" in facts[1]["covers"]
        assert "none: own models without noise" in page
        assert "no ε covers their results" in str(summary_rows([alone])[0]["privacy"])
        assert '(kind = "client") | no ε: ' in card
        assert "ε = " not in card
    else:
        total = rounded_up(facts[1]["epsilon"][1])
        assert min(facts[1]["epsilon"]) > max(facts[0]["epsilon"])
        assert f"<td>{total}</td>" in page
        assert f'(kind = "example") | ε = {total} at δ = 1e-05 for each training image' in card
        assert "anyone with the spec can remove it" in card
    common = rounded_up(max(facts[0]["epsilon"]))
    assert f"| ε = {common} at δ = 1e-05 for each" in pushed(base, tmp_path / "common")
    # A record of 0.1.0 is verified as it was.
    old = {**facts[1], "epsilon_sent": facts[1].pop("epsilon_messages")}
    del old["covers"]
    RunFolder(alone).update({"privacy": old | {"epsilon": old["epsilon"] or old["epsilon_sent"]}})
    assert not verify_run(alone).problems
    words = str(summary_rows([alone])[0]["privacy"])
    assert ("no ε covers their results" in words) == (kind == CLIENT)


def pushed(run_folder: Path, target: Path) -> str:
    """The card of the model of client 1."""
    push(run_folder, str(target), client=1)
    return (target / "README.md").read_text()


@pytest.mark.parametrize("kind", [EXAMPLE, CLIENT])
def test_a_run_repeats_with_its_seed(kind, private, tmp_path):
    again = run(spec(*kind), Options(tmp_path / "again")).path
    assert weights(again) == weights(private[kind])


def test_a_secret_stays_in_its_run_and_differs_between_runs(tmp_path):
    first, second = (run(spec(*EXAMPLE, SECRET), Options(tmp_path / name)).path for name in "ab")
    assert weights(first) != weights(second)
    keys = [(folder / "privacy.key").read_bytes() for folder in (first, second)]
    assert keys[0] != keys[1]
    assert len(keys[0]) == 32
    assert stat.S_IMODE(os.stat(first / "privacy.key").st_mode) == 0o600
    text = "".join(
        path.read_text(errors="replace")
        for path in first.rglob("*")
        if path.suffix != ".key" and path.is_file()
    )
    assert keys[0].hex() not in text
    # Another run's finished training has another key: it is not taken over.
    third = run(spec(*EXAMPLE, SECRET), Options(tmp_path / "c", siblings=(first,))).path
    assert weights(third) != weights(first)


def interrupted(folder: Path, client_round: int) -> Path:
    """A run with a secret key, stopped after so many client rounds."""

    def stop(what: str, done: int, *_: object) -> None:
        if (what, done) == ("training", client_round):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec(*EXAMPLE, SECRET), Options(folder, report=stop))
    return folder


def test_an_interrupted_run_resumes_with_its_secret(tmp_path):
    private, out = spec(*EXAMPLE, SECRET), interrupted(tmp_path / "run", 3)
    key = (out / "privacy.key").read_bytes()
    run(private, Options(out))
    # The same key in another folder, without an interruption.
    again = interrupted(tmp_path / "again", 1)
    (again / "privacy.key").write_bytes(key)
    shutil.rmtree(again / "checkpoints")
    run(private, Options(again))
    assert weights(again) == weights(out)


def test_a_lost_or_damaged_secret_is_reported(tmp_path):
    asked, out = spec(*EXAMPLE, SECRET), interrupted(tmp_path / "run", 3)
    (out / "privacy.key").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"privacy.key is damaged"):
        run(asked, Options(out))
    (out / "privacy.key").unlink()
    with pytest.raises(StoreMismatch, match="another training"):
        run(asked, Options(out))


def test_the_report_says_what_was_spent(private, tmp_path):
    plain = run(spec("certification.n=100"), Options(tmp_path / "plain")).path
    spent = RunFolder(private[EXAMPLE]).manifest()["privacy"]["epsilon"][0]
    rounded = math.ceil(100 * spent) / 100
    row, other = summary_rows([private[EXAMPLE], plain])
    assert row["privacy"].startswith(f"private per image, ε = {rounded:.2f} at δ = 1e-05;")
    assert other["privacy"] is None
    page, without = (
        write_report([folder], tmp_path / f"{folder.name}.html", figures=False).read_text()
        for folder in (private[EXAMPLE], plain)
    )
    assert 'id="privacy"' in page
    assert f"{rounded:.2f}" in page
    assert "epsilon per round" in page
    assert 'id="privacy"' not in without


@pytest.mark.parametrize("kind", [("privacy.kind=example", "privacy.target_epsilon=9.0"), CLIENT])
def test_an_unseen_client_is_fine_tuned_with_privacy_of_its_own(kind, tmp_path):
    settings = ("clients.count=3", "clients.unseen=1", "training.rounds=1", *kind)
    base = run(spec(*settings), Options(tmp_path / "base", explore=False)).path
    tuned = 'algorithm={name="personalized",base="fedavg",epochs=1}'
    options = Options(tmp_path / "tuned", siblings=(base,), explore=False)
    path = run(spec(*settings, tuned), options).path
    shared = {k: v for k, v in weights(base).items() if k.startswith("round-00001")}
    assert weights(path).items() >= shared.items()
    spent = RunFolder(path).manifest()["privacy"]
    if "privacy.kind=example" in kind:
        assert spent["epsilon_messages"][2] == 0.0 < spent["epsilon"][2]
        assert max(spent["epsilon_messages"]) <= 9.0 < max(spent["epsilon"])
        assert RunFolder(base).manifest()["privacy"]["epsilon"][2] == 0.0
    assert not verify_run(path, None, None).problems


def test_a_private_network_with_options_is_verified(tmp_path):
    model = 'model={name = "small_resnet", options = {norm = "group"}}'
    asked = spec(*CLIENT, model, "training.rounds=1", "certification.images=2")
    path = run(asked, Options(tmp_path / "run", explore=False)).path
    found = verify_run(path)
    assert not found.problems
    assert not any("privacy" in words for words in found.unchecked)
    # Without the option it has BatchNorm, which no private training can have had.
    text = (path / "spec.toml").read_text()
    assert 'norm = "group"' in text
    (path / "spec.toml").write_text(text.replace('norm = "group"', 'norm = "batch"'))
    problems = " ".join(verify_run(path).problems)
    assert "the network of the spec cannot have been trained" in problems
    assert "BatchNorm" in problems


def test_nobody_reads_on_the_page_who_took_part(private, tmp_path):
    failed = {"round": 0, "clients": {"0": {}}, "left_out": [{"client": 7, "reason": "raised"}]}
    found = dataclasses.replace(load_run(private[CLIENT]), history=(failed,))
    assert "client 7" in str(left_out_words(found))  # everybody takes part
    some = spec(*CLIENT, "clients.participation=0.5").to_toml()
    words = str(left_out_words(dataclasses.replace(found, spec=some)))
    assert "in 1 of 1 rounds clients failed" in words
    assert "7" not in words
    assert "raised" not in words
    of_images = dataclasses.replace(load_run(private[EXAMPLE]), history=(failed,), spec=some)
    assert "client 7" in str(left_out_words(of_images))
