"""Studies in Python: the same folder as on the command line, and results as data frames."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import certifl
import tiny_study as tiny
from certifl.certification import certificates as frames
from certifl.errors import InputError, SpecError, StoreMismatch
from certifl.progress import NotebookBars, Pace
from certifl.report import load_runs
from certifl.report.results import RunResults
from report_factory import (
    PIXEL,
    keep_to_themselves,
    make_certificates,
    make_manifest,
    make_run,
    write_run,
)

ROTATION = certifl.Rotation("0.1pi")
SECTIONS: dict[str, Any] = {
    "data": tiny.VALUES["data"],
    "clients": {"count": 2},
    "training": tiny.VALUES["training"],
    "augmentation": {"federated": ROTATION},
    "certification": {"perturbation": ROTATION, "images": 6, "n": 200},
}


def test_a_study_is_the_spec_of_the_command_line(tmp_path):
    spec = tiny.spec()
    by_keywords = certifl.Study(name="tiny", model="small_cnn", algorithm="fedavg", **SECTIONS)
    by_file = certifl.Study(tiny.write_spec(tmp_path))
    by_values = certifl.Study({"model": "small_cnn", "name": "tiny", **SECTIONS})
    for study in (by_keywords, by_file, by_values, certifl.Study(spec)):
        assert study.spec.hash() == spec.hash()
        assert study.spec == spec
    assert repr(by_file) == "Study('tiny', fedavg, digits, 2 clients)"


def test_keywords_replace_keys_of_a_spec():
    mixture = {"name": "mixture", "personalization": 0.5}
    study = certifl.Study(tiny.spec(), algorithm=mixture, training={"lr": 0.1}, seed=3)
    settings = ("algorithm={name='mixture', personalization=0.5}", "training.lr=0.1", "seed=3")
    assert study.spec.hash() == tiny.spec(*settings).hash()
    assert certifl.Study(study.spec, algorithm="local").spec.algorithm == {"name": "local"}


def test_a_wrong_study_is_refused_by_its_key(tmp_path):
    with pytest.raises(SpecError, match="trainings"):
        certifl.Study({**tiny.VALUES, "trainings": {}})
    with pytest.raises(SpecError, match=r"training\.lr"):
        certifl.Study(tiny.spec(), training={"lr": "fast"})
    with pytest.raises(SpecError, match="no spec at"):
        certifl.Study(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="TOML file"):
        certifl.Study(3)


def test_an_interrupted_study_ends_with_the_bits_of_the_command(finished, tmp_path):
    study, reports = certifl.Study(tiny.spec()), []

    def interrupt(what: str, done: int, total: int, unit: str) -> None:
        reports.append((what, total, unit))
        if what == "training" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path / "run", progress=interrupt)
    assert reports[0] == ("training", 4, "client rounds")
    result = study.run(tmp_path / "run", report=False, progress=False)
    assert result.certificates.same_results(certifl.load(finished).certificates)
    assert tiny.weights(tmp_path / "run") == tiny.weights(finished)
    for name in ("spec.toml", "partition.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    assert "Study" in result.manifest["command"]
    before = tiny.files(tmp_path / "run")
    assert study.run(tmp_path / "run", report=False).certificates.same_results(result.certificates)
    assert tiny.files(tmp_path / "run") == before
    with pytest.raises(StoreMismatch, match="another"):
        certifl.Study(study.spec, seed=1).run(tmp_path / "run")


def test_a_study_has_the_files_of_the_command(finished, tmp_path):
    shared = tmp_path / "run"
    with tiny.undrawn():
        certifl.Study(tiny.spec()).run(shared, progress=False)
    assert tiny.files(shared).keys() == {*tiny.files(finished)}


def test_loading_refuses_what_is_no_run(finished, tmp_path):
    with pytest.raises(InputError, match=r"Certificates\.load"):
        certifl.load(finished / "certificates.parquet")
    with pytest.raises(InputError, match=r"several runs \(run\)"):
        certifl.load(finished.parent)
    with pytest.raises(StoreMismatch, match="not a run folder"):
        certifl.load(tmp_path)


@pytest.fixture(scope="module")
def result() -> RunResults:
    return make_run(make_certificates(0.8, 3, 40), "fedavg", "FedAvg")


def test_rows_of_images(result):
    certificates = result.certificates
    frame = certificates.to_pandas()
    for name in frame.columns:
        assert np.array_equal(frame[name], getattr(certificates, name)), name
    assert {"client", "label", "predicted", "correct", "abstained", "radius"} <= {*frame.columns}
    assert frame.attrs["unit"] == "radians"


def test_rows_name_the_perturbation_where_it_differs():
    own = [make_certificates(0.8, 2, 5), make_certificates(0.8, 4, 5, PIXEL)]
    parts = [own[0], own[1].select(own[1].client >= 2)]
    frame = certifl.Certificates.concatenate(parts).to_pandas()
    assert frame.groupby("client")["unit"].first().tolist() == [
        *["radians"] * 2,
        *["intensity"] * 2,
    ]
    assert "unit" not in frame.attrs
    mixed = make_run(certifl.Certificates.concatenate(parts))
    for refused in (mixed.curves, mixed.table, mixed.plot):
        with pytest.raises(InputError, match="different perturbations"):
            refused()


def test_curves_are_certified_accuracies(result):
    for frame in (result.curves(["0deg", "5deg"]), result.certificates.curves([0.0, "5deg"])):
        own = [
            result.certificates.of_client(client).certified_accuracy([0.0, "5deg"])
            for client in range(3)
        ]
        for client in range(3):
            assert np.array_equal(frame[client], own[client])
        assert np.allclose(frame["mean"], np.mean(own, axis=0))
        assert np.array_equal(frame["max"], np.max(own, axis=0))
        assert frame.index.name == "radius"
        assert frame.index[1] == np.deg2rad(5.0)


def test_tables_agree_with_the_certificates(result):
    certificates = result.certificates
    whole = result.table().loc["FedAvg"]
    assert whole["acr_low"] < whole["acr"] < whole["acr_high"]
    assert whole["at 0°"] == certificates.certified_accuracy([0.0])[0]
    for by, key in (("class", certificates.label), ("client", certificates.client)):
        table = result.table(by)
        assert table.index.tolist() == np.unique(key).tolist()
        for number, row in table.iterrows():
            own = certificates.select(key == number)
            assert row["images"] == len(own)
            assert row["acr"] == pytest.approx(own.average_certified_radius())
            assert row["at 5°"] == own.certified_accuracy(["5deg"])[0]
            assert row["abstained"] == own.abstained.mean()
    assert certificates.table("class").equals(result.table(by="class"))
    with pytest.raises(InputError, match="'client' or 'class'"):
        result.table(by="image")


def test_seeds_are_one_row_and_one_curve():
    made = [make_certificates(0.8, 2, 40, seed=s) for s in (0, 1)]
    runs = load_runs([make_run(c, "fedavg", "FedAvg", seed=s) for s, c in enumerate(made)])
    table = certifl.table(runs)
    assert table.index.tolist() == ["FedAvg"]
    assert table["seeds"].tolist() == [[0, 1]]
    axes = certifl.plot(runs, labels={"FedAvg": "Global"})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Global"]


def test_of_curves_alone_no_row_is_made_up(tmp_path):
    certificates = make_certificates(0.8, 2, 20)
    folder = write_run(tmp_path / "run", certificates, make_manifest("fedavg", "FedAvg", 2, 40))
    result = certifl.load(keep_to_themselves(folder, certificates))
    assert result.table()["abstained"].isna().all()
    assert result.curves([0.0])["mean"].tolist() == [certificates.certified_accuracy([0.0])[0]]
    for refused in (result.certificates.to_pandas, lambda: result.table(by="class")):
        with pytest.raises(InputError, match="shared curves"):
            refused()


def test_without_pandas_the_extra_is_named(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for needs in (result.certificates.to_pandas, result.table, result.curves, frames.pandas):
        with pytest.raises(InputError, match=r"certifl\[pandas\]"):
            needs()
    result.plot()


def test_bars_of_a_notebook_replace_their_output(monkeypatch):
    shown: list[tuple[Mapping[str, str], dict[str, Any]]] = []
    bars = NotebookBars()
    monkeypatch.setattr(bars, "_display", lambda formats, update: shown.append((formats, update)))
    for done in (0, 1, 2, 3):
        bars.report("training <b>", done, 3, "rounds")
    bars.report("certifying", 5, 5, "votes")
    assert [update for _, update in shown] == [False, True, False]  # the others came too soon
    assert shown[1][0]["text/plain"] == "training <b>: 3/3 rounds"
    assert "&lt;b&gt;" in shown[1][0]["text/html"]


def test_the_time_left_follows_the_pace(monkeypatch):
    now = iter([100.0, 130.0, 130.0])
    monkeypatch.setattr("certifl.progress.time.monotonic", lambda: next(now))
    pace = Pace()
    assert pace.begins("work", 10)
    assert pace.left(20, 60) == "about 2 min 0 s left"
    assert pace.left(60, 60) == ""


def test_certificates_of_several_calls_are_drawn_and_counted_together():
    blocks = [make_certificates(0.8, 1, 20, seed=seed) for seed in (0, 1)]
    both = certifl.Certificates.concatenate(blocks)
    assert both.table()["images"].tolist() == [40]
    curves = [block.curves([0.0])["mean"].iloc[0] for block in blocks]
    assert both.curves([0.0])["mean"].iloc[0] == pytest.approx(np.mean(curves))
