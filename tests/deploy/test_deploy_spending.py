"""A client's own ledger of privacy, against servers that ask for more than they say."""

import dataclasses
import os

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")
pytest.importorskip("opacus", reason="accounting needs opacus: pip install certifl[dp]")

import torch
from test_deploy_rounds import LIGHT, described

from certifl.deploy.bundle import init
from certifl.deploy.client.privacy_budget import LEDGER, PrivacyLedger, ledger_lines
from certifl.deploy.client.settings import Settings, open_local_data
from certifl.deploy.client.state import NEVER, ClientStateStore
from certifl.deploy.messages import Content, fingerprint_of
from certifl.deploy.status import status_lines
from certifl.experiments.hub import push
from certifl.federated.privacy import epsilon
from certifl.federated.privacy import mechanisms as example
from certifl.spec import Spec
from certifl.study.privacy import rounded_up
from deploy_factory import ID, ask, clients_of, coordinated, dealt, model, options
from deploy_network import free_port
from tiny_federation import assert_same

Z, DELTA, STEPS = 1.1, 1e-5, 2  # 30 images in batches of 16
PRIVATE = ('privacy.kind="example"', f"privacy.noise_multiplier={Z}", 'privacy.noise_key="secret"')


def study(case: str = "fedavg", *settings: str) -> Spec:
    return described(case, *PRIVATE, *settings)


def refused(answer: Content, words: str) -> None:
    assert not answer.parts
    assert answer.fields["fault"]["kind"] == "wrong"
    assert words in answer.fields["fault"]["reason"]


def fine(answer: Content) -> Content:
    assert "fault" not in answer.fields, answer.fields
    return answer


def spent(folder, delta: float = DELTA) -> str:
    return ledger_lines(folder, None, delta)[0].partition("ledger: ")[2]


def worth(steps: int, answers: int) -> str:
    plural = "answer" if answers == 1 else "answers"
    loss = epsilon(Z, 1 / STEPS, steps, DELTA)
    return f"ε = {rounded_up(loss)} at δ = 1e-05 ({steps} private steps in {answers} {plural})"


def test_with_an_honest_server_both_ledgers_agree(tmp_path):
    spec, at = study(), clients_of(tmp_path)
    folder = coordinated(spec, at, tmp_path / "run")
    told = folder.manifest()["privacy"]["epsilon"]
    assert told == [epsilon(Z, 1 / STEPS, 2 * STEPS, DELTA)] * 2
    for client in range(2):
        assert spent(tmp_path / f"client-{client}") == worth(2 * STEPS, 2)


def test_a_round_requested_with_two_models_is_answered_once(tmp_path):
    spec, own = study(), dealt(tmp_path)  # it planned two rounds
    fine(ask(own, spec))
    refused(ask(own, spec, parts=model(0.1)), "a round is answered once")
    refused(ask(dealt(tmp_path), spec, parts=model(0.1)), "a round is answered once")
    assert spent(tmp_path) == worth(STEPS, 1)
    fine(ask(own, spec, model(0.2), round=1, counted=0))
    refused(
        ask(own, spec, model(0.3), round=2, counted=1), "more privacy of its images than the study"
    )
    assert spent(tmp_path) == worth(2 * STEPS, 2)


def test_a_repeated_request_gets_the_same_bits_and_counts_once(tmp_path):
    spec = study("mixture", "training.rounds=1", 'training.momentum_between_rounds="keep"')
    first = fine(ask(dealt(tmp_path), spec))
    stored = (tmp_path / LEDGER).read_bytes()
    again = fine(ask(dealt(tmp_path), spec))  # started again, with nothing left to spend
    assert_same(again.parts, first.parts)
    assert again.fields["update"] == first.fields["update"]
    assert (tmp_path / LEDGER).read_bytes() == stored
    assert spent(tmp_path) == worth(STEPS, 1)


class Killed(BaseException):
    pass


def test_an_answer_lost_by_a_kill_is_counted_and_repeated(tmp_path, monkeypatch):
    spec = study("mixture", "training.rounds=1")
    calm = fine(ask(dealt(tmp_path / "calm"), spec))

    def killed(*_):
        raise Killed

    with monkeypatch.context() as at:
        at.setattr(ClientStateStore, "save", killed)
        with pytest.raises(Killed):
            ask(dealt(tmp_path), spec)
    assert spent(tmp_path) == worth(STEPS, 1)
    stored = (tmp_path / LEDGER).read_bytes()
    key = tmp_path / "studies" / ID / "privacy.key"
    after = fine(ask(dealt(tmp_path), spec))
    assert (tmp_path / LEDGER).read_bytes() == stored
    # The same secret without the kill gives the same bits.
    (tmp_path / "calm" / "studies" / ID / "privacy.key").write_bytes(key.read_bytes())
    for name in (LEDGER, f"studies/{ID}/state-00000.safetensors"):
        (tmp_path / "calm" / name).unlink()
    assert_same(fine(ask(dealt(tmp_path / "calm"), spec)).parts, after.parts)
    assert fingerprint_of(calm.parts) != fingerprint_of(after.parts)


def test_an_answer_that_cannot_be_recorded_does_not_leave(tmp_path, monkeypatch):
    spec, own, real = study(), dealt(tmp_path), os.replace

    def full(source, target):
        if str(target).endswith(LEDGER):
            raise OSError("no space left")
        real(source, target)

    with monkeypatch.context() as at:
        at.setattr(os, "replace", full)
        answer = ask(own, spec)
    assert answer.fields["fault"]["reason"] == "its disk failed"
    assert not answer.parts
    assert not list((tmp_path / "studies" / ID).glob("state-*"))
    fine(ask(own, spec))
    assert spent(tmp_path) == worth(STEPS, 1)


@pytest.mark.parametrize("how", ["changed", "cut", "emptied", "removed", "an old copy"])
def test_a_damaged_ledger_stops_training(how, tmp_path, caplog, monkeypatch):
    spec, own, ledger = study(), dealt(tmp_path), tmp_path / LEDGER
    fine(ask(own, spec))
    old = ledger.read_bytes()
    fine(ask(own, spec, model(0.1), round=1, counted=0))
    whole = ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = {
        "changed": whole.replace(b'"steps": 2', b'"steps": 1', 1),
        "cut": b"".join(lines[:-1]),
        "emptied": b"",
        "an old copy": old,
    }
    if how == "removed":
        ledger.unlink()
    else:
        ledger.write_bytes(damaged[how])
    monkeypatch.setattr(example, "clipped_sum", None)  # no image is looked at
    refused(ask(own, spec, model(0.2), round=2, counted=1), "privacy ledger is lost or damaged")
    assert LEDGER in caplog.text
    assert "newest" in caplog.text
    monkeypatch.undo()
    ledger.write_bytes(whole)
    fine(ask(own, spec, model(0.1), round=1, counted=0))


def test_one_sample_answers_one_request(tmp_path, monkeypatch):
    """Equal sums have equal noise, so a second answer would show whether sums differ."""
    spec = study("fedavg", "training.rounds=5", 'training.momentum_between_rounds="keep"')
    own = dealt(tmp_path)
    fine(ask(own, spec))
    fine(ask(own, spec, round=1, counted=0))
    monkeypatch.setattr(example, "clipped_sum", None)  # no image is looked at
    words = "one sample may answer only one request"
    refused(ask(own, spec, round=1, counted=NEVER), words)  # the same model, with other momentum
    monkeypatch.undo()
    assert spent(tmp_path) == worth(2 * STEPS, 2)
    # So do images that changed in between.
    monkeypatch.setattr("certifl.deploy.client.client.open_local_data", other_images)
    changed = dealt(tmp_path)
    refused(ask(changed, spec, round=1, counted=0), words)
    fine(ask(changed, spec, round=2, counted=1))


def other_images(spec: Spec, settings: Settings):
    stored = open_local_data(spec, settings)
    labels = stored.train.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    return dataclasses.replace(stored, train=dataclasses.replace(stored.train, labels=labels))


def test_a_clients_own_limit_covers_all_studies(tmp_path):
    most = epsilon(Z, 1 / STEPS, 3 * STEPS, DELTA)
    own, spec, other = dealt(tmp_path, max_epsilon=most), study(), study("fedavg", "seed=1")
    fine(ask(own, spec))
    fine(ask(own, other, id="fedcba9876543210"))
    fine(ask(own, spec, round=1, counted=0))
    refused(ask(own, other, round=1, counted=0, id="fedcba9876543210"), "than this client allows")
    lines = ledger_lines(tmp_path, most, None)
    assert worth(3 * STEPS, 3) in lines[0]
    assert [worth(2 * STEPS, 2) in lines[1], worth(STEPS, 1) in lines[2]] == [True, True]
    assert f"up to ε = {most:g}, all studies together" in lines[-1]
    refused(
        ask(dealt(tmp_path, max_epsilon=8.0, delta=0.5), spec), "as large as one of its images"
    )


def test_a_larger_own_limit_replaces_the_plan_but_adds_no_rounds(tmp_path):
    spec, own = study("fedavg", "training.rounds=1"), dealt(tmp_path, max_epsilon=100.0)
    fine(ask(own, spec))
    refused(ask(own, spec, round=1, counted=0), "has 1 rounds")
    for number, id in enumerate(("fedcba9876543210", "0011223344556677"), 2):
        fine(ask(own, spec, id=id))  # another study: within the limit of all of them together
        assert spent(tmp_path) == worth(number * STEPS, number)


@pytest.mark.parametrize("kind", ["none", "client"])
def test_with_a_limit_only_studies_with_clients_noise_are_answered(kind, tmp_path):
    settings = ('privacy.kind="client"', "privacy.noise_multiplier=1.0")
    spec = described("fedavg", *(settings if kind == "client" else LIGHT))
    refused(ask(dealt(tmp_path, max_epsilon=8.0), spec), 'privacy.kind = "example"')
    fine(ask(dealt(tmp_path), spec))
    assert not (tmp_path / LEDGER).exists()


def test_a_failed_round_counts_until_its_answer_does(tmp_path, monkeypatch):
    spec, own, taken = study(), dealt(tmp_path), []
    real = example.clipped_sum

    def fails(*arguments, **named):
        taken.append(not named)  # the model is tried on made-up images first
        if sum(taken) == STEPS:
            raise ArithmeticError("in the second step")
        return real(*arguments, **named)

    monkeypatch.setattr(example, "clipped_sum", fails)
    answer = ask(own, spec)
    assert "ArithmeticError" in answer.fields["fault"]["reason"]
    assert spent(tmp_path) == worth(1, 1)
    fine(ask(own, spec))
    assert spent(tmp_path) == worth(STEPS, 1)
    sick = {"model": {name: value * torch.inf for name, value in model()["model"].items()}}
    assert ask(own, spec, sick, round=1, counted=0).fields["fault"]["kind"] == "diverged"
    assert spent(tmp_path) == worth(2 * STEPS, 2)


@pytest.mark.parametrize(
    ("share", "sent"), [("none", [True, False]), ("curve", [True, True]), ("rows", [True, True])]
)
def test_fine_tuning_is_extra_and_leaves_with_certificates(share, sent, tmp_path):
    spec = study("personalized", "training.rounds=1")
    tuning = spec.algorithm["epochs"] * STEPS
    own = dealt(tmp_path, share=share)
    fine(ask(own, spec))
    assert not fine(ask(own, spec, model(0.1), round=1, counted=0)).parts
    assert spent(tmp_path) == worth(STEPS + tuning, 2)
    assert [entry.release.sent for entry in PrivacyLedger(tmp_path).entries()] == sent
    # No further round is answered instead of fine-tuning.
    other = dealt(tmp_path / "other", share=share)
    fine(ask(other, spec))
    words = "than the study planned" if share == "none" else "a round is answered once"
    refused(ask(other, spec, model(0.1), round=0), words)


@pytest.mark.parametrize(("share", "sent"), [("none", [False] * 2), ("curve", [True] * 2)])
def test_local_training_leaves_with_its_certificates_alone(share, sent, tmp_path):
    folder = tmp_path / "client-0"
    spec = study("local", "training.rounds=1", "certification.n=100", "certification.images=2")
    at = clients_of(tmp_path, share=share)
    run = coordinated(spec, at, options(tmp_path / "run", share=share))
    facts = run.manifest()["privacy"]
    assert facts["epsilon_messages"] == [0.0, 0.0]
    assert facts["epsilon"] == [epsilon(Z, 1 / STEPS, STEPS, DELTA)] * 2
    assert [entry.release.sent for entry in PrivacyLedger(folder).entries()] == sent[:1]
    # The card of the client's own model states what its own ledger says.
    store = folder / "studies" / run.manifest()["deployment"]["id"]
    push(store, str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    total = rounded_up(facts["epsilon"][0])
    assert f"ε = {total} at δ = 1e-05 for each training image of the client" in card
    assert "remove it" not in card


def test_the_status_of_a_client_reports_what_was_spent(tmp_path):
    init(tmp_path / "kit", 1, f"127.0.0.1:{free_port()}", insecure=True)
    folder = tmp_path / "kit" / "client-0"
    fine(ask(dealt(folder), study()))
    said = "\n".join(status_lines(folder)[0])
    assert f"by its own ledger: {worth(STEPS, 1)}" in said
    assert f"in 'tiny' ({ID[:8]}): {worth(STEPS, 1)}" in said
    (folder / LEDGER).write_text("{}")
    lines, whole = status_lines(folder)
    assert "cannot be trusted" in lines[-1]
    assert not whole
