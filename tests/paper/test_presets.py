"""The study as a table of specs: every panel of the paper, runs that are shared shared."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from certifl.errors import InputError, SpecError
from certifl.experiments.parallel import base_spec
from certifl.paper.figures import EXTRA, FIGURES, chosen_figures
from certifl.paper.reproduce import figure_index, make_plan
from certifl.paper.scales import SCALES, scale_named
from certifl.spec import with_settings
from certifl.study.setup import label_of

EVERY = {**FIGURES, **EXTRA}
# rows, columns, curves over all panels of certified accuracy, which are distinct runs
SHAPES = {
    "figure1": (2, 3, 18),
    "figure2": (2, 3, 12),
    "figure3": (2, 2, 8),
    "figure4": (3, 3, 18),
    "figure5": (2, 3, 20),
    "figure6": (2, 2, 12),
    "figure7": (2, 3, 18),
    "figure8": (4, 2, 8),
    "figure9": (4, 2, 8),
    "figure10": (4, 3, 40),
}


@functools.cache
def specs(scale: str, *names: str):
    found = {}
    for name in names:
        for setting, regime in EVERY[name].curves():
            spec = SCALES[scale].spec(setting, regime)
            found[spec.hash()] = spec
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EVERY)
def test_every_curve_of_every_figure_is_a_sound_spec_at_every_scale(name, scale):
    for spec in specs(scale, name).values():
        assert with_settings(spec.model_dump(exclude_none=True)) == spec
        assert spec.data.name in ("digits", "mnist", "cifar10")


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_panels_and_curves_are_those_of_the_paper(name, shape):
    figure = FIGURES[name]
    assert (len(figure.rows), {len(row) for row in figure.rows}) == (shape[0], {shape[1]})
    drawn = [p for p in figure.panels if p.kind != "mixture"]
    assert sum(len(p.regimes) * len(p.settings) for p in drawn) == shape[2]
    assert len(specs("laptop", name)) == len(specs("paper", name)) == shape[2]
    assert set(SHAPES) == set(FIGURES)


def test_settings_are_those_of_the_paper():
    def of(name, what):
        return {getattr(setting, what) for setting, _ in FIGURES[name].curves()}

    assert of("figure1", "clients") == {4, 10, 20}
    assert of("figure1", "sigma") == {"0.1pi", "0.5pi"}
    assert of("figure6", "clients") == {4, 10}
    assert of("figure6", "family") == {"translation"}
    assert of("figure7", "clients") == {100}
    assert [of(name, "clients") for name in ("figure8", "figure9")] == [{4}, {10}]
    for name in ("figure2", "figure4", "figure7"):
        settings = {(s.family, s.sigma) for s, _ in FIGURES[name].curves() if s.data == "cifar10"}
        wanted = {"pixel": (0.12, 0.5), "rotation": ("0.1pi", "0.5pi"), "translation": (0.1, 0.5)}
        assert settings == {(family, sigma) for family in wanted for sigma in wanted[family]}
    assert of("figure4", "data") == of("figure10", "data") == {"cifar10", "mnist"}
    rows = [{s.data for p in row for s in p.settings} for row in FIGURES["figure10"].rows]
    assert rows == [{"mnist"}, {"mnist"}, {"mnist"}, {"cifar10"}]


@pytest.mark.parametrize("name", ["figure5", "figure10"])
def test_mixture_panels_hold_fedavg_and_four_lambdas_at_both_sigmas(name):
    for row in FIGURES[name].rows:
        *curves, against = row
        assert [p.kind for p in row] == ["curves", "curves", "mixture"]
        assert against.settings == tuple(p.settings[0] for p in curves)
        assert [r.personalization for r in against.regimes] == [None, 0.1, 0.5, 0.9, 1.0]


def test_sigma_of_rotation_is_in_units_of_pi():
    found = {
        (s.certification.perturbation["family"], s.certification.perturbation["sigma"])
        for s in specs("paper", *FIGURES).values()
    }
    angles = (0.1 * math.pi, 0.5 * math.pi)
    wanted = {"pixel": (0.12, 0.5), "rotation": angles, "translation": (0.1, 0.5)}
    assert found == {(family, sigma) for family in wanted for sigma in wanted[family]}


@pytest.mark.parametrize("scale", ["laptop", "overnight", "paper"])
def test_runs_that_figures_share_are_counted_once(scale):
    assert len(specs(scale, *FIGURES)) == 123
    shown = specs(scale, "figure1", "figure6")
    assert set(specs(scale, "figure8", "figure9")) <= set(shown)
    # lambda = 1 is local training, and FedAvg of Figure 5 that of Figures 1 and 6
    shared = set(specs(scale, "figure5")) & set(shown)
    assert {s.algorithm["name"] for s in map(shown.__getitem__, shared)} == {"local", "fedavg"}
    assert len(shared) == 8


def test_the_paper_scale_is_the_papers():
    for spec in specs("paper", *FIGURES).values():
        t, c = spec.training, spec.certification
        assert (t.rounds, t.local_epochs, t.batch_size, t.lr) == (45, 2, 64, 0.1)
        assert (t.decay_every, t.decay_factor) == (30, 0.1)
        assert (c.images, c.n0, c.n, c.alpha) == (500, 100, 100_000, 0.001)
        assert (c.estimator, spec.model.name) == ("top-class", "resnet18")
        assert spec.data.train_images is spec.data.test_images is None


def test_the_overnight_scale_has_the_papers_schedule_and_clients():
    for spec in specs("overnight", *EVERY).values():
        t = spec.training
        assert (t.local_epochs, t.decay_factor, t.momentum_between_rounds) == (2, 0.1, "keep")
        assert 3 * t.decay_every == t.rounds * t.local_epochs
        assert spec.clients.count in (4, 10, 20, 100)
        assert spec.clients.count * spec.certification.images <= 10_000
    certified = {
        (s.data.name, s.clients.count, s.certification.perturbation["family"]): set()
        for s in specs("overnight", *EVERY).values()
    }
    for s in specs("overnight", *EVERY).values():
        name = (s.data.name, s.clients.count, s.certification.perturbation["family"])
        certified[name].add((s.certification.images, s.certification.n))
    assert {len(found) for found in certified.values()} == {1}


def test_a_start_that_no_curve_shows_has_no_parameter_of_another_estimator(tmp_path):
    plan = make_plan(chosen_figures("figure4"), SCALES["overnight"], tmp_path)
    (mnist,) = (job.spec for job in plan.jobs if job.support and job.spec.data.name == "mnist")
    assert mnist.certification.estimator == "top-class"
    assert mnist.certification.keep == "certificates"


def test_starts_of_personalization():
    rotation = {"family": "rotation", "sigma": 0.1 * math.pi}
    starts = {}
    for name in ("figure1", "figure2", "figure3"):
        for setting, regime in FIGURES[name].curves():
            if regime.algorithm == "personalized" and setting.sigma == "0.1pi":
                starts[name] = SCALES["laptop"].spec(setting, regime)
    before, after = zip(*(starts[n].augmentations() for n in sorted(starts)), strict=True)
    assert [None if p is None else (p.family, p.sigma) for p in before] == [
        ("rotation", rotation["sigma"]),
        None,
        ("affine", 0.1),
    ]
    assert {(p.family, p.sigma) for p in after} == {("rotation", rotation["sigma"])}


def test_matched_steps_divide_the_learning_rate_by_lambda():
    plain = [s for s in specs("laptop", "figure5").values() if s.algorithm["name"] == "mixture"]
    matched = specs("laptop", "figure5-matched").values()
    matched = [s for s in matched if s.algorithm["name"] == "mixture"]
    assert len(plain) == len(matched) == 12
    for one, other in zip(plain, matched, strict=True):
        value = one.algorithm["personalization"]
        assert other.algorithm["personalization"] == value
        assert other.training.lr * value == pytest.approx(one.training.lr)


@pytest.mark.parametrize("name", FIGURES)
def test_labels_of_runs_are_those_of_legends(name):
    for setting, regime in FIGURES[name].curves():
        label = label_of(SCALES["laptop"].spec(setting, regime))
        wanted = {"mixture": f"Mixture, {regime.label}", "local": "Local"}
        assert label == wanted.get(regime.algorithm, regime.label)


def test_labels_name_a_training_with_another_sigma():
    spec = next(iter(specs("smoke", "figure1").values()))
    values = spec.model_dump(exclude_none=True)
    values["augmentation"]["federated"] = {"family": "rotation", "sigma": 0.25}
    assert label_of(with_settings(values)) == "Local (trained with σ = 14.3°)"


@pytest.mark.parametrize("name", ["figure4", *EXTRA, "all"])
def test_a_plan_holds_distinct_runs_and_trainings_before_their_continuation(name, tmp_path):
    plan = make_plan(chosen_figures(name), SCALES["laptop"], tmp_path)
    names = [job.spec.hash() for job in plan.jobs]
    assert len(set(names)) == len(names)
    shown = {job.path for figure in plan.figures for job in plan.jobs_of(figure)}
    done: set[str] = set()
    for job in plan.jobs:
        start = job.spec.training_hash(of_base=True)
        assert start == job.spec.training_hash() or start in done, job.spec.name
        done.add(job.spec.training_hash())
        assert job.path == tmp_path / "runs" / job.spec.hash()
        assert job.path in shown


def test_a_base_that_no_curve_shows_is_trained_once_and_hardly_certified(tmp_path):
    plan = make_plan(chosen_figures("figure4"), SCALES["laptop"], tmp_path)
    support = [job.spec for job in plan.jobs if job.support]
    assert [(s.data.name, s.algorithm["name"]) for s in support] == [
        ("cifar10", "fedavg"),
        ("mnist", "fedavg"),
    ]
    assert {s.certification.images for s in support} == {1}
    both = make_plan(
        {name: FIGURES[name] for name in ("figure2", "figure4")}, SCALES["laptop"], tmp_path
    )
    assert [job.spec.data.name for job in both.jobs if job.support] == ["mnist"]


def test_the_start_of_a_personalized_run_is_its_base(tmp_path):
    personal = [s for s in specs("laptop", *FIGURES).values() if "base" in s.algorithm]
    assert len(personal) == 29
    for spec in personal:
        assert base_spec(spec).training_hash() == spec.training_hash(of_base=True)


def test_pages_hold_runs_that_can_be_compared_image_by_image():
    for name in EVERY:
        plan = make_plan({name: EVERY[name]}, SCALES["laptop"], Path("nowhere"))
        by_hash = {job.spec.hash(): job.spec for job in plan.jobs}
        index = figure_index(plan, name)
        shown = set()
        for page in index["pages"]:
            held = [by_hash[Path(run["run"]).name] for run in page["runs"]]
            shown |= {spec.hash() for spec in held}
            same = {
                (s.data.name, s.clients.count, str(s.certification.perturbation)) for s in held
            }
            assert len(same) == 1
            assert len({run["label"] for run in page["runs"]}) == len(held) <= 5
        assert shown == set(by_hash) - {j.spec.hash() for j in plan.jobs if j.support}


def test_settings_apply_to_every_spec_of_a_scale():
    fewer = scale_named("paper", ["certification.images=20"])
    assert fewer == replace(SCALES["paper"], settings=("certification.images=20",))
    curves = [fewer.spec(*curve) for curve in FIGURES["figure1"].curves()]
    assert {s.certification.images for s in curves} == {20}
    with pytest.raises(SpecError, match="imagse"):
        scale_named("paper", ["certification.imagse=20"]).spec(*next(FIGURES["figure1"].curves()))


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(InputError, match="Did you mean 'figure10'"):
        chosen_figures("figure_10")
    with pytest.raises(InputError, match="smoke, laptop, overnight, paper"):
        scale_named("huge")
