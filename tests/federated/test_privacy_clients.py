"""Privacy of clients: what the server sums, how noisy it is, who takes part, what epsilon is."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from certifl.errors import InputError, ModelError, SpecError
from certifl.federated import (
    ALGORITHMS,
    ClientState,
    FedAvg,
    LocalTraining,
    Mixture,
    ModelState,
    Personalized,
    ServerState,
    Update,
    deployed_model,
    describe,
    server_state,
    state_of,
    train,
)
from certifl.federated.algorithms import UNKNOWN
from certifl.federated.privacy import (
    Budget,
    ClientLedger,
    ClientLevel,
    ExampleLedger,
    ExampleLevel,
    check_algorithm,
    epsilon,
    noise_for,
    plan_examples,
)
from certifl.federated.privacy.accounting import _ORDERS, _divergences, steps_per_epoch
from certifl.federated.privacy.mechanisms import PrivatePasses
from certifl.federated.privacy.planning import allowed
from certifl.runs.checkpoints import Checkpoints
from private_federation import (
    BUDGET,
    KEY,
    SCHEDULE,
    PlainNet,
    algorithm_of,
    client_training,
    example_training,
    models,
    plain_training,
)
from tiny_federation import TinyNet, assert_same, client_data, clients, differ, without_seconds
from tiny_study import spec

pytest.importorskip("opacus", reason="needs the extra [dp]")

RULE = ClientLevel(max_norm=0.5, noise_multiplier=0.0, rate=0.25, clients=8, key=KEY)
START = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.ones(4)}


def moved(client: int, length: float) -> Update:
    """A client whose model lies so far from the start, in a direction of its own."""
    drawn = torch.Generator().manual_seed(client)
    change = {
        n: torch.randn(v.shape, generator=drawn, dtype=torch.float64) for n, v in START.items()
    }
    scale = length / math.sqrt(sum(float(v.square().sum()) for v in change.values()))
    return Update(client, 1.0, {n: (START[n] + scale * v).float() for n, v in change.items()}, {})


def result(rule: ClientLevel, updates: list[Update], round: int = 0) -> ModelState:
    made = list(rule(ServerState(round, {"model": START}), iter(updates)))
    assert len(made) == 1
    return made[0].model


def distance(left: ModelState, right: ModelState) -> float:
    return math.sqrt(sum(float((left[n] - right[n]).double().square().sum()) for n in left))


def test_changes_are_clipped_summed_and_divided_by_a_fixed_number():
    updates = [moved(1, 0.2), moved(4, 3.0)]
    wanted = {}
    for name, start in START.items():
        near, far = (update.model[name].double() - start for update in updates)
        wanted[name] = start + (near + far * (0.5 / 3.0)) / (0.25 * 8)
    found = result(RULE, updates)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0.1, 0.5, 7.0, 1e6])
def test_one_client_more_moves_the_model_by_no_more_than_its_share(length):
    others = [moved(client, 2.0) for client in range(3)]
    change = distance(result(RULE, [*others, moved(3, length)]), result(RULE, others))
    share = 0.5 / (0.25 * 8)
    assert change <= share * (1 + 1e-5)
    assert change == pytest.approx(min(length, 0.5) / (0.25 * 8), rel=1e-3)


def test_a_client_whose_model_is_not_finite_counts_as_none():
    others, broken = [moved(0, 0.3)], moved(1, 1.0)
    broken.model["b"][2] = math.nan
    assert_same(result(RULE, [*others, broken]), result(RULE, others))


def test_noise_is_added_also_where_nobody_took_part():
    # 100 000 coordinates: the standard deviation is known to about 0.3 per cent.
    start = {"a": torch.zeros(100_000)}
    rule = replace(RULE, noise_multiplier=1.3)
    (update,) = rule(ServerState(0, {"model": start}), iter([]))
    noise = update.model["a"].double()
    assert float(noise.std()) == pytest.approx(1.3 * 0.5 / (0.25 * 8), rel=0.012)
    (later,) = rule(ServerState(1, {"model": start}), iter([]))
    correlation = np.corrcoef(noise.numpy(), later.model["a"].numpy())[0, 1]
    assert abs(correlation) < 4.4 / math.sqrt(100_000)


def test_everybody_takes_part_with_the_same_probability():
    rule = replace(RULE, rate=0.3, clients=40)
    drawn = np.zeros((3000, 40))
    for round in range(3000):
        drawn[round, rule.participants(round)] = 1
    # Binomial(40, 0.3): mean 12, variance 8.4.
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - 12) < 4.4 * math.sqrt(8.4 / 3000)
    assert abs(sizes.var() - 8.4) < 4.4 * 8.4 * math.sqrt(2 / 3000)
    assert np.abs(drawn.mean(0) - 0.3).max() < 4.6 * math.sqrt(0.21 / 3000)
    assert replace(rule, rate=1.0).participants(7) == list(range(40))
    assert replace(rule, key=b"other").participants(0) != rule.participants(0)


def test_without_noise_and_clipping_it_is_federated_averaging(tmp_path):
    free = Budget(max_norm=1e6, delta=1e-3, noise_multiplier=0.0)
    private = client_training(FedAvg(), tmp_path / "a", budget=free, rate=1.0)
    plain = plain_training(tmp_path / "b")
    for name, value in server_state(plain).parts["model"].items():
        found = server_state(private).parts["model"][name]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", [Mixture(0.4), Personalized(FedAvg(), epochs=1)])
def test_training_is_the_same_after_an_interruption(algorithm, tmp_path):
    whole = client_training(algorithm, tmp_path / "whole")
    stops = [0]

    def stop(now):
        stops[0] += 1
        if stops[0] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_training(algorithm, tmp_path / "cut", progress=stop)
    cut = client_training(algorithm, tmp_path / "cut")
    assert_same(models(algorithm, cut), models(algorithm, whole))
    assert without_seconds(cut.history) == without_seconds(whole.history)


def test_fine_tuning_adds_no_noise_and_is_not_counted(tmp_path):
    base = client_training(FedAvg(), tmp_path / "a")
    tuned = client_training(Personalized(FedAvg(), epochs=1), tmp_path / "b")
    assert_same(server_state(tuned).parts, server_state(base).parts)
    assert tuned.history[-1]["epsilon"] == base.history[-1]["epsilon"]
    own = deployed_model(Personalized(FedAvg(), epochs=1), tuned, 0)
    assert differ(own, server_state(base).parts["model"])


def test_the_history_holds_nothing_that_clients_measured(tmp_path):
    stored = client_training(FedAvg(), tmp_path)
    rows = [row for entry in stored.history for row in entry["clients"]]
    assert rows
    assert all(set(row) == {"client", "seconds", "epsilon"} for row in rows)


def test_participants_are_those_that_are_accounted_for(tmp_path):
    stored = client_training(FedAvg(), tmp_path / "a", rate=0.4)
    rule = ClientLevel(0.5, 1.2, 0.4, 3, KEY)
    assert [e["participants"] for e in stored.history] == [rule.participants(r) for r in range(3)]
    with pytest.raises(InputError, match="draws the participants itself"):
        client_training(FedAvg(), tmp_path / "b", participation=lambda round: [0])


def test_batchnorm_is_refused(tmp_path):
    training = LocalTraining(TinyNet(), SCHEDULE, seed=1)
    with pytest.raises(ModelError, match="running statistics that would be averaged without"):
        train(FedAvg(), TinyNet(), clients(2), training, Checkpoints(tmp_path), rule=RULE)


def test_more_than_a_model_is_refused():
    more = replace(moved(0, 0.1), extra={"control": {"a": torch.zeros(1)}})
    for update in (more, Update(0, 1.0, None, {}), Update(0, 1.0, {"a": START["a"]}, {})):
        with pytest.raises(InputError, match="Client 0 sent something other"):
            result(RULE, [update])


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ({"name": "local"}, "send nothing"),
        ({"name": "scaffold"}, "control variates"),
        ({"name": "fedavg", "weighting": "size"}, "fixed denominator"),
        ({"name": "personalized", "base": {"name": "local"}}, "send nothing"),
    ],
)
def test_algorithms_that_would_not_be_protected_are_refused(algorithm, reason):
    with pytest.raises(SpecError, match=reason):
        check_algorithm(algorithm, "client")


pytest.importorskip("opacus", reason="needs the extra [dp]")


@pytest.mark.parametrize("kind", ["example", "client"])
def test_somebody_looked_at_every_algorithm(kind):
    wraps = {name for name, row in ALGORITHMS.rows.items() if row.wraps}
    refused = set(ALGORITHMS) - set(allowed(kind)) - wraps
    assert len(refused) == {"example": 4, "client": 2}[kind]
    for name in refused:
        with pytest.raises(SpecError, match=f"is not available with '{name}': ") as error:
            check_algorithm(describe(algorithm_of(name)), kind)
        assert UNKNOWN not in str(error.value)


@pytest.mark.parametrize("name", allowed("example"))
def test_no_noisy_sum_goes_uncounted(name, monkeypatch):
    algorithm, data, model = algorithm_of(name), client_data(0), PlainNet()
    _, ledger = plan_examples(BUDGET, describe(algorithm), SCHEDULE, [len(data)], KEY)
    taken, keys = [], []
    noisy_gradient, begun = PrivatePasses.noisy_gradient, PrivatePasses.__init__

    def counted(self, sum_of):
        taken.append(self)
        return noisy_gradient(self, sum_of)

    def noted(self, images, steps, max_norm, std, key):
        keys.append(key)
        begun(self, images, steps, max_norm, std, key)

    monkeypatch.setattr(PrivatePasses, "noisy_gradient", counted)
    monkeypatch.setattr(PrivatePasses, "__init__", noted)
    training = LocalTraining(model, SCHEDULE, seed=1, privacy=ExampleLevel(0.5, 1.0, KEY))
    server, state = algorithm.init(state_of(model)), ClientState()
    for round in range(2):
        update, state = algorithm.client_round(server, state, data, training)
        server = algorithm.aggregate(server, [update])
        assert len(taken) == (round + 1) * ledger.planned[0]
        assert update.metrics == {"private_steps": ledger.planned[0]}
    # Every pass over the images draws samples of its own.
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", allowed("example"))
def test_every_allowed_algorithm_trains_with_private_examples(name, tmp_path):
    algorithm = Personalized(algorithm_of(name), epochs=1)
    stored = example_training(algorithm, tmp_path, schedule={"rounds": 1, "local_epochs": 1})
    for entry in stored.history:
        for row in entry["clients"]:
            assert set(row) == {"client", "seconds", "private_steps", "epsilon"}
    spent = [entry["epsilon"] for entry in stored.history]
    assert spent == sorted(spent)


@pytest.mark.parametrize("name", allowed("client"))
def test_every_allowed_algorithm_trains_with_private_clients(name, tmp_path):
    stored = client_training(algorithm_of(name), tmp_path, rate=0.7)
    assert differ(server_state(stored).parts["model"], state_of(PlainNet()))
    rows = [row for entry in stored.history for row in entry["clients"]]
    assert all(set(row) == {"client", "seconds", "epsilon"} for row in rows)


accountants = pytest.importorskip("opacus.accountants", reason="needs the extra [dp]")


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """The exact loss of T Gaussian mechanisms, which are one of multiplier z / sqrt(T).

    Source: Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, 2018,
    Theorem 8.
    """
    z = noise_multiplier / math.sqrt(steps)

    def excess(eps: float) -> float:
        tail = math.exp(eps + norm.logcdf(-0.5 / z - eps * z))
        return norm.cdf(0.5 / z - eps * z) - tail - delta

    return brentq(excess, 0, 500)


@pytest.mark.parametrize(("z", "steps"), [(1.0, 1), (2.0, 10), (8.0, 100), (30.0, 40)])
def test_without_sampling_it_bounds_the_exact_loss_closely(z, steps):
    exact, bound = gaussian_epsilon(z, steps, 1e-5), epsilon(z, 1.0, steps, 1e-5)
    assert exact <= bound <= 1.1 * exact


@pytest.mark.parametrize(("z", "rate", "steps"), [(1.0, 0.1, 50), (1.1, 0.01, 300)])
def test_with_sampling_it_bounds_a_tighter_accountant(z, rate, steps):
    tight, own = accountants.PRVAccountant(), accountants.RDPAccountant()
    tight.history = own.history = [(z, rate, steps)]
    bound = epsilon(z, rate, steps, 1e-5)
    # The PRV accountant's answer is an upper bound within 0.01 of the exact loss.
    assert tight.get_epsilon(1e-5) - 0.02 <= bound <= 1.4 * tight.get_epsilon(1e-5)
    assert bound == pytest.approx(own.get_epsilon(1e-5), rel=2e-2)


def test_the_ends():
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    assert 0 <= epsilon(500.0, 0.01, 1, 1e-2) < 0.01
    spent = [epsilon(1.0, 0.1, steps, 1e-5) for steps in (1, 10, 100, 1000)]
    assert spent == sorted(spent)


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(1.0, 0.1, 100), (8.0, 0.5, 30), (3.0, 1.0, 5)]
)
def test_the_noise_for_a_target_is_the_smallest_that_keeps_it(target, rate, steps):
    z = noise_for(target, rate, steps, 1e-5)
    assert epsilon(z, rate, steps, 1e-5) <= target < epsilon(0.997 * z, rate, steps, 1e-5)


def test_a_target_that_cannot_be_kept_is_refused():
    with pytest.raises(SpecError, match="target_epsilon = 1e-06 cannot be met over 10000 steps"):
        noise_for(1e-6, 1.0, 10_000, 1e-9)


def test_the_history_says_what_each_client_spent(tmp_path):
    stored = example_training(Personalized(FedAvg(), epochs=1), tmp_path)
    for number, entry in enumerate(stored.history):
        spent = []
        for row, data in zip(entry["clients"], clients(3), strict=True):
            steps = steps_per_epoch(len(data), 8)
            epochs = 2 * (number + 1) if number < 3 else 2 * 3 + 1
            assert row["epsilon"] == epsilon(1.2, 1 / steps, epochs * steps, 1e-3)
            spent.append(row["epsilon"])
        assert entry["epsilon"] == max(spent)


def test_only_rounds_that_a_client_took_part_in_count(tmp_path):
    stored = example_training(FedAvg(), tmp_path, participation=lambda r: [0, 1] if r else [2])
    rows = {
        (e["round"], row["client"]): row["epsilon"] for e in stored.history for row in e["clients"]
    }
    steps = steps_per_epoch(20, 8)
    assert rows[0, 2] == epsilon(1.2, 1 / steps, 2 * steps, 1e-3)
    assert rows[1, 0] == epsilon(1.2, 1 / 2, 4, 1e-3)
    assert rows[2, 0] == epsilon(1.2, 1 / 2, 8, 1e-3)
    assert stored.history[2]["epsilon"] == max(rows[2, 0], rows[2, 1], rows[0, 2])


def test_a_client_that_was_left_out_has_spent_all_the_same():
    ledger = ExampleLedger((0.5, 0.25), (1.0, 1.0), planned=(4, 8), rounds=5, delta=1e-3)
    trained = {"client": 0, "seconds": 0.1, "private_steps": 4, "loss": 0.3}
    late = [{"client": 1, "reason": "late"}]
    first = ledger([], {"round": 0, "clients": [trained], "left_out": late})
    assert first["left_out"][0]["epsilon"] == epsilon(1.0, 0.25, 8, 1e-3)
    assert "loss" not in first["clients"][0]
    both = [trained, {"client": 1, "seconds": 0.1, "private_steps": 8}]
    second = ledger([first], {"round": 1, "clients": both})
    assert second["clients"][1]["epsilon"] == epsilon(1.0, 0.25, 16, 1e-3)
    spent = [epsilon(1.0, 0.5, 8, 1e-3), epsilon(1.0, 0.25, 16, 1e-3)]
    assert ledger.spent([first, second]) == spent


def test_fine_tuning_counts_also_where_a_client_reports_no_steps():
    ledger = ExampleLedger((0.5, 0.25), (1.0, 1.0), (4, 8), rounds=1, delta=1e-3, finetuning=3)
    silent = [{"client": 0, "seconds": 0.1}]
    late = [{"client": 1, "reason": "late"}]
    entry = ledger([], {"round": 1, "clients": silent, "left_out": late})
    assert entry["clients"][0]["private_steps"] == 3 * 2
    assert entry["left_out"][0]["private_steps"] == 0  # what it deploys is not fine-tuned
    assert ledger.spent([entry]) == [epsilon(1.0, 0.5, 6, 1e-3), 0.0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rate", [1.0, 0.5, 1e-3])
def test_the_accountant_ends_for_any_noise(rate):
    for none in (5e-324, 1e-170, 1e-155, 0.0009):
        assert epsilon(none, rate, 1, 1e-5) == math.inf
    for much in (300.0, 1e5, 1e155, 1e308):  # opacus needs for ever, or overflows
        assert 0.0 < epsilon(much, rate, 1000, 1e-5) <= epsilon(200.0, rate, 1000, 1e-5)
    with pytest.raises(SpecError, match="noise_multiplier"):
        spec("privacy.kind=client", "privacy.noise_multiplier=1e-155")


def test_between_whole_orders_the_bound_is_not_below_the_exact_one():
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp")
    exact = analysis.compute_rdp(q=0.1, noise_multiplier=300.0, steps=1, orders=_ORDERS)
    bound = _divergences(300.0, 0.1)
    assert (bound >= exact * (1 - 1e-9)).all()
    whole = [order == int(order) for order in _ORDERS]
    assert bound[whole] == pytest.approx(exact[whole])


def test_every_round_costs_all_clients_the_same(tmp_path):
    stored = client_training(FedAvg(), tmp_path, rate=0.6)
    wanted = [epsilon(1.2, 0.6, rounds, 1e-3) for rounds in (1, 2, 3)]
    assert [entry["epsilon"] for entry in stored.history] == wanted
    assert ClientLedger(0.6, 1.2, 2, 1e-3).spent(stored.history) == wanted[1]
