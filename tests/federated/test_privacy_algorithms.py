"""Every algorithm with every kind of privacy: counted right, or refused with a reason."""

from __future__ import annotations

import pytest

from certifl.errors import SpecError
from certifl.federated import (
    ALGORITHMS,
    ClientState,
    LocalTraining,
    Personalized,
    describe,
    server_state,
    state_of,
)
from certifl.federated.algorithms import UNKNOWN
from certifl.federated.privacy import ExampleLevel, check_algorithm, plan_examples
from certifl.federated.privacy.mechanisms import PrivatePasses
from certifl.federated.privacy.planning import allowed
from private_federation import (
    BUDGET,
    KEY,
    SCHEDULE,
    PlainNet,
    algorithm_of,
    client_training,
    example_training,
)
from tiny_federation import client_data, differ

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
