"""Specs: read, checked as a whole, written back, hashed; perturbations of single clients."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tiny_study as tiny
from certifl.certification.network import choose_precision
from certifl.errors import InputError, SpecError
from certifl.federated.batches import PerClient
from certifl.paper.scales import REGIMES, quickstart
from certifl.spec import Spec, load, with_settings
from certifl.study.setup import label_of
from own_study import OWN, PIXEL, spec

ROTATION = {"family": "rotation", "sigma": "18deg"}
SMALL: dict[str, Any] = {"data": {"name": "digits"}, "certification": {"perturbation": ROTATION}}


def test_defaults_are_the_papers():
    spec = with_settings(SMALL)
    schedule = spec.training.schedule()
    assert (schedule.rounds, schedule.local_epochs, schedule.batch_size) == (45, 2, 64)
    assert (schedule.lr, schedule.decay_every, schedule.decay_factor) == (0.1, 30, 0.1)
    wanted = spec.certification
    assert (wanted.n0, wanted.n, wanted.alpha, wanted.images) == (100, 100_000, 1e-3, 500)


def test_sigma_may_be_written_in_degrees_and_is_kept_in_radians():
    spec = with_settings(SMALL)
    assert spec.perturbation().sigma == pytest.approx(0.1 * math.pi)
    same = with_settings(SMALL, ["certification.perturbation.sigma=0.1pi"])
    assert same.perturbation().sigma == pytest.approx(spec.perturbation().sigma)


@pytest.mark.parametrize("regime", REGIMES)
def test_toml_gives_the_same_spec_back(regime, tmp_path):
    spec = quickstart()[regime]
    path = tmp_path / "spec.toml"
    path.write_text(spec.to_toml())
    again = load(path)
    assert again == spec
    assert again.hash() == spec.hash()


def test_settings_override_any_key_and_change_the_hash():
    spec = with_settings(SMALL)
    changed = with_settings(
        SMALL, ["training.lr=0.05", "algorithm={name='mixture', personalization=0.5}", "seed=3"]
    )
    assert (changed.training.lr, changed.algorithm["name"], changed.seed) == (0.05, "mixture", 3)
    assert changed.hash() != spec.hash()
    assert with_settings(SMALL, ["name=other"]).hash() == spec.hash()


def test_reach_and_keep_are_keys_of_the_spec():
    spec = with_settings(SMALL, ["certification.estimator=scan", "certification.reach=0.5"])
    assert spec.certification.settings().reach == 0.5
    assert with_settings(SMALL, ["certification.keep=curve"]).certification.settings().keep
    with pytest.raises(SpecError, match="keep"):
        with_settings(SMALL, ["certification.keep=curve", "certification.estimator=runner-up"])


def test_a_default_spelled_out_is_the_same_study():
    spelled = {**SMALL, "training": {"rounds": 45}, "augmentation": {"personalized": "same"}}
    assert with_settings(spelled).hash() == with_settings(SMALL).hash()
    assert with_settings(spelled).training_hash() == with_settings(SMALL).training_hash()


def test_training_hash_ignores_certification_and_finds_the_base_of_personalized():
    specs = quickstart()
    fedavg, personal = specs["fedavg"], specs["personalized"]
    assert personal.training_hash(of_base=True) == fedavg.training_hash()
    assert personal.training_hash() != fedavg.training_hash()
    values = tomllib.loads(fedavg.to_toml())
    assert with_settings(values, ["certification.n=50"]).training_hash() == fedavg.training_hash()
    assert with_settings(values, ["training.lr=0.5"]).training_hash() != fedavg.training_hash()


def test_augmentation_of_personalisation_is_separate():
    personal = {"algorithm": {"name": "personalized", "base": {"name": "fedavg"}}}
    nominal = with_settings({**SMALL, **personal, "augmentation": {"personalized": ROTATION}})
    federated, personalized = nominal.augmentations()
    assert federated is None
    assert personalized.family == "rotation"
    same = with_settings({**SMALL, **personal, "augmentation": {"federated": ROTATION}})
    assert same.augmentations()[0] == same.augmentations()[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["trainign.lr=1"], "trainign: no such key. Did you mean 'training'?"),
        (["training.learning_rate=1"], "training.learning_rate: no such key.*lr"),
        (["training.lr=fast"], "training.lr: .*number; got 'fast'"),
        (["training.lr=0"], "training.lr: .*greater than 0"),
        (["training.lr=inf"], "training.lr: .*finite"),
        (["training=3"], r"training: .*section \[training\]"),
        (["training.flip=yes"], "must be true or false"),
        (["seed=2020-01-01"], "seed: .*whole number"),
        (["seed=-1"], "seed: .*greater than or equal to 0"),
        (["data.name="], "data.name"),
        (["training.momentum=1.0"], "training.momentum: .*less than 1"),
        (["training.rounds=2.5"], "training.rounds: .*whole number"),
        (["clients.count=0"], "clients.count: .*greater than or equal to 1"),
        (["clients.split=unifrom"], "clients: .*'unifrom' is unknown.*Did you mean 'uniform'"),
        (
            ["clients.options={alpha=1.0}"],
            "clients: uniform has no parameter 'alpha': it has no parameters",
        ),
        (["model.name=resnet19"], "model: .*choose one of resnet18.*module:function"),
        (["model.options={norm='layer'}"], "model: norm = 'layer' is not allowed.*batch, group"),
        (["algorithm=fedavg"], 'algorithm.*{ name = "fedavg" }'),
        (["algorithm.name=fedsgd"], "algorithm.*fedsgd.*fedavg"),
        (["algorithm={name='mixture', personalization=2.0}"], "personalization"),
        (["certification.estimator=best"], "certification.*estimator must be one of top-class"),
        (["certification.alpha=0.9"], "alpha"),
        (["certification.perturbation.family=shear"], "certification.perturbation.*shear"),
        (["certification.perturbation.sigma=-1"], "certification.perturbation.*sigma"),
        (["certification.perturbation.sigma=0.1pu"], "certification.perturbation.*18deg"),
        (["certification.n=0"], "certification.*n must lie between 1"),
        (["certification.radii=0.1"], "must be a list"),
        (["certification.precision=half"], "certification.precision.*bfloat16"),
        (["privacy.kind=dp"], "must be 'none', 'example' or 'client'"),
        (["certification.perturbation.color=1"], "certification.perturbation.*color"),
        (["certification.perturbation=none"], "certification.perturbation"),
        (["augmentation.personalized=none"], "no effect with 'fedavg'"),
        (["augmentation.federated=rotation"], "augmentation.federated: .*table"),
        (["algorithm={name='mixture', personalization=0.0}", "training.lr=2.0"], "overshoot"),
        (["algorithm={name='fedprox', mu=40.0}"], "lr mu must stay below"),
        (
            ["algorithm={name='personalized', base={name='ditto', mu=40.0}}"],
            "lr mu must stay below",
        ),
        (
            ["algorithm={name='l2gd', personalization=0.1, probability=0.05}"],
            "lr .1 - personalization. must stay below probability",
        ),
        (["data.test_images=5"], "without a test image"),
        (["seed"], "--set takes key=value"),
        (["seed.deep=1"], "seed.deep|seed"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(settings, says):
    with pytest.raises(SpecError, match=says):
        with_settings(SMALL, settings)


@pytest.mark.parametrize("missing", ["data", "certification"])
def test_required_sections(missing):
    values = {k: v for k, v in SMALL.items() if k != missing}
    with pytest.raises(SpecError, match=f"{missing}: this key is required"):
        with_settings(values)


def test_every_key_of_the_example_is_known():
    example = Path(__file__).resolve().parents[2] / "examples" / "cifar10_rotation.toml"
    assert isinstance(load(example), Spec)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_compiled_precisions_are_refused_with_what_to_choose(kind):
    with pytest.raises(SpecError, match=f'removed in 0.2.0: choose "{kind}"'):
        with_settings(SMALL, [f"certification.precision={kind}-compiled"])
    with pytest.raises(InputError, match=f'removed in 0.2.0: choose "{kind}"'):
        choose_precision(f"{kind}-compiled")


def test_components_of_a_study_are_built_once():
    spec = with_settings(SMALL, ["augmentation.federated=own"])
    assert spec.perturbations() is spec.perturbations()
    assert spec.build_algorithm() is spec.build_algorithm()
    assert spec.augmentations()[0] is spec.perturbations()[0]
    assert spec == with_settings(spec.model_dump(exclude_none=True))
    assert "_perturbations" not in spec.model_dump()


def test_every_client_gets_its_own_and_toml_gives_it_back():
    made = spec()
    rotation, pixel, nothing = made.perturbations()
    assert (rotation.family, pixel.family, nothing) == ("rotation", "pixel", None)
    assert made.augmentations()[0] == PerClient((rotation, pixel, None))
    assert with_settings(tomllib.loads(made.to_toml())) == made
    assert made.hash() != spec([OWN[1]]).hash()
    assert label_of(made) == "FedAvg"


def test_own_without_exceptions_is_the_common_perturbation():
    """The same objects train, under the same name: nothing of an older study changes."""
    plain = spec(None, augmentation={"federated": tiny.ROTATION})
    short = spec(None)
    assert short.augmentations() == plain.augmentations()
    assert short.training_hash() == plain.training_hash()
    assert "own" not in plain.to_toml()


def test_the_training_is_named_by_what_augments_each_client():
    other = [{"clients": [1], "perturbation": {**PIXEL, "sigma": 0.2}}, OWN[1]]
    assert spec().training_hash() != spec(other).training_hash()
    nominal = {"federated": "none"}
    first, second = (spec(own, augmentation=nominal) for own in (OWN, other))
    assert first.hash() != second.hash()
    assert first.training_hash() == second.training_hash()
    assert label_of(first) == "FedAvg (nominal)"


@pytest.mark.parametrize(
    ("own", "settings", "says"),
    [
        ([*OWN, {"clients": [1], "perturbation": "none"}], [], "client 1 twice"),
        ([{"clients": [3], "perturbation": PIXEL}], [], "names client 3"),
        ([{"clients": [0, 1, 2], "perturbation": "none"}], [], "no client certifies anything"),
        ([{"clients": [], "perturbation": PIXEL}], [], "at least 1 item"),
        ([{"clients": [1], "perturbation": "same"}], [], '"none", or a table'),
        ([{**OWN[1], "noise": PIXEL}], [], "Allowed here: clients, perturbation, radii, reach"),
        (OWN, ["certification.radii=[0.1]"], "radii is in radians, but own certifies pixel"),
        (OWN, ["certification.estimator=scan", "certification.n=300"], "pixel is none"),
    ],
)
def test_what_cannot_be_meant_is_refused(own, settings, says):
    with pytest.raises(SpecError) as refused:
        spec(own, *settings)
    assert says in str(refused.value)


@pytest.mark.timeout(300)
def test_a_spec_that_names_very_many_clients_is_read_at_once():
    count = 200_000  # in steps that grow with the square of them, minutes
    own = [{"clients": list(range(count)), "perturbation": "none"}]
    images = [f"data.{which}_images={count + 1}" for which in ("train", "test")]
    assert len(spec(own, f"clients.count={count + 1}", *images).perturbations()) == count + 1


def test_radii_may_be_given_in_each_unit():
    own = [{**OWN[0], "radii": [0.05, 0.1]}, OWN[1]]
    settings = spec(own, "certification.radii=[0.2]").certification.settings
    assert settings(0).radii == (0.2,)
    assert settings(1).radii == (0.05, 0.1)
