"""Figures show the stored numbers, equal results give equal files, and nothing global changes."""

import csv
import math
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex

from certifl.errors import StoreError, StoreMismatch
from certifl.report import FigureStyle, load_runs, write_figures
from certifl.report.figures import (
    average_radius_figure,
    certified_accuracy_figure,
    history_figure,
    image_bytes,
    per_client_figure,
    save,
)
from certifl.report.style import looks_of
from certifl.report.summary import client_acr, client_curves, radius_grid
from report_factory import PIXEL, make_certificates, make_run, write_study

DRAWERS = (certified_accuracy_figure, per_client_figure, average_radius_figure, history_figure)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    return load_runs(write_study(tmp_path_factory.mktemp("study"), clients=3, images=20))


def test_the_curves_are_the_means_with_their_bands(runs):
    drawing = certified_accuracy_figure(runs)
    axes, radii = drawing.figure.axes[0], radius_grid(runs)
    bands = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    for run, look, band in zip(runs, looks_of(runs), bands, strict=True):
        curves = client_curves(run, radii)
        (line,) = [drawn for drawn in axes.lines if drawn.get_label() == run.label]
        assert np.array_equal(line.get_xdata(), radii)
        assert np.array_equal(line.get_ydata(), curves.mean(axis=0))
        assert to_hex(line.get_color()).upper() == look.color
        edge = band.get_paths()[0].vertices
        assert edge[:, 1].min() == pytest.approx(curves.min())
        assert edge[:, 1].max() == pytest.approx(curves.max())


def test_rotation_is_read_in_degrees_first_and_in_radians_above(runs):
    for make in (certified_accuracy_figure, average_radius_figure):
        axes = make(runs).figure.axes[0]
        assert "degrees" in axes.get_xlabel()
        (above,) = axes.child_axes
        assert above.get_xlabel() == "radians"
    clients = per_client_figure(runs).figure.axes[0]
    assert "degrees" in clients.get_xlabel()
    for axes in (certified_accuracy_figure(runs).figure.axes[0], clients):
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        marks = {text.get_text(): math.degrees(at) for at, text in ticks}
        assert all(float(text) == pytest.approx(at) for text, at in marks.items())
        assert len(marks) > 1
    pixel = make_run(make_certificates(0.8, 2, 12, PIXEL))
    plain = certified_accuracy_figure([pixel]).figure.axes[0]
    assert "intensity" in plain.get_xlabel()
    assert not plain.child_axes


def test_equal_results_give_equal_files_with_the_numbers_beside_the_picture(runs, tmp_path):
    names = ["curves.png", "curves.pdf", "curves.svg", "curves.csv"]
    contents = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        drawing = certified_accuracy_figure(runs[:2])
        files = save(drawing, folder, "curves")
        assert [f.name for f in files] == names
        contents.append([f.read_bytes() for f in files])
    assert contents[0] == contents[1]
    assert image_bytes(drawing, "svg") == contents[0][2]  # a drawing that was saved before
    width, height = struct.unpack(">II", contents[0][0][16:24])
    inches = drawing.figure.get_size_inches()
    assert (width, height) == (round(inches[0] * 200), round(inches[1] * 200))
    rows = list(csv.DictReader(contents[0][3].decode().splitlines()))
    assert list(rows[0]) == ["regime", "client", "radius", "certified_accuracy"]
    run, radii = runs[1], radius_grid(runs)
    curves = client_curves(run, radii)
    expected = {"0": curves[0], "2": curves[2], "mean": curves.mean(0), "min": curves.min(0)}
    for client, values in expected.items():
        mine = [r for r in rows if r["regime"] == run.label and r["client"] == client]
        assert [float(r["radius"]) for r in mine] == radii.tolist()
        assert [float(r["certified_accuracy"]) for r in mine] == values.tolist()
    assert len(rows) == 2 * (3 + 3) * len(radii)


def test_average_radii_are_drawn_and_written(runs):
    drawing = average_radius_figure(runs)
    for row, run in enumerate(runs):
        acr = client_acr(run)
        means = [r[2] for r in drawing.rows if r[:2] == (run.label, "mean")]
        assert means == [pytest.approx(acr.mean())]
        assert drawing.figure.axes[0].patches[row].get_width() == pytest.approx(acr.mean())


def test_every_client_has_a_panel_with_every_regime(runs):
    axes = per_client_figure(runs).figure.axes
    assert [a.get_title() for a in axes] == ["client 0", "client 1", "client 2"]
    curves = client_curves(runs[2], radius_grid(runs))
    assert np.array_equal(axes[1].lines[2].get_ydata(), curves[1])


def test_training_history_is_drawn_and_its_absence_said(runs):
    drawn = history_figure(runs)
    assert [a.get_ylabel() for a in drawn.figure.axes] == ["loss", "accuracy"]
    assert len(drawn.rows) == len(runs) * 2 * 12
    nothing = history_figure([make_run(make_certificates(0.8, 2, 12))])
    assert nothing.rows == ()
    assert nothing.figure.axes[0].texts[0].get_text() == "no training history"


def test_pyplot_is_never_imported():
    code = "import certifl.report, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_text_and_not_formulas_and_nothing_global_changes():
    certificates = make_certificates(0.8, 2, 12)
    odd = [
        make_run(certificates, "mixture", r"$\frac{1}{$ <b>"),
        make_run(certificates, "local", "_hidden_"),
    ]
    before = dict(mpl.rcParams)
    for draw in DRAWERS:
        assert image_bytes(draw(odd, r"100 $ & \alpha {"), "svg")
    assert dict(mpl.rcParams) == before
    legend = certified_accuracy_figure(odd).figure.axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [run.label for run in odd]


def test_runs_that_cannot_be_compared_are_not_drawn(runs):
    pixel = make_run(make_certificates(0.8, 2, 12, PIXEL))
    with pytest.raises(StoreMismatch):
        certified_accuracy_figure([runs[0], pixel])


def test_all_figures_are_written_or_the_place_is_named(runs, tmp_path):
    files = write_figures(runs[:1], tmp_path / "figures", FigureStyle(formats=("svg",)))
    stems = ("curves", "clients", "average_radius", "history")
    assert {f.name for f in files} == {
        f"{stem}.{kind}" for stem in stems for kind in ("svg", "csv")
    }
    assert all(f.stat().st_size > 100 for f in files)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Cannot write"):
        save(average_radius_figure(runs[:1]), Path(tmp_path / "file" / "below"), "x")
