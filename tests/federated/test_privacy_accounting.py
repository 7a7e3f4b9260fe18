"""Epsilon: against closed forms, against another accountant, and along a history."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from certifl.errors import SpecError
from certifl.federated import FedAvg, Personalized
from certifl.federated.privacy import ClientLedger, ExampleLedger, epsilon, noise_for
from certifl.federated.privacy.accounting import steps_per_epoch
from private_federation import client_training, example_training
from tiny_federation import clients

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


def test_every_round_costs_all_clients_the_same(tmp_path):
    stored = client_training(FedAvg(), tmp_path, rate=0.6)
    wanted = [epsilon(1.2, 0.6, rounds, 1e-3) for rounds in (1, 2, 3)]
    assert [entry["epsilon"] for entry in stored.history] == wanted
    assert ClientLedger(0.6, 1.2, 2, 1e-3).spent(stored.history) == wanted[1]
