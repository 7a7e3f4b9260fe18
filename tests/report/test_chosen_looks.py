"""Labels, order, colors, size, unit and bands that a user chooses, and the page of one model."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex

import certifl
import tiny_study as tiny
from certifl.errors import InputError
from certifl.report import FigureStyle, load_runs
from certifl.report.figures import average_radius_figure, certified_accuracy_figure
from certifl.report.page.context import ReportContext
from certifl.report.page.results import classes_section
from certifl.report.results import RunResults
from certifl.report.style import arranged, assignments, known_names, listed_names
from report_factory import PIXEL, make_certificates, make_run, write_study

MIXTURE = "Mixture, λ = 0.5"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"), clients=3, images=20)


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[RunResults]:
    return load_runs(folders)


def test_names_are_recognized_not_cut_out():
    known = ["FedAvg", "fedavg", "Local", MIXTURE]
    assert assignments(["FedAvg=Global, of all,Local=Alone"], known, "--labels") == {
        "FedAvg": "Global, of all",
        "Local": "Alone",
    }
    assert assignments([f"{MIXTURE}=λ = 1/2", "Local=a=b"], known, "--labels") == {
        MIXTURE: "λ = 1/2",
        "Local": "a=b",
    }
    listed = listed_names([f"{MIXTURE}, Local", "fedavg"], known, "--order")
    assert listed == [MIXTURE, "Local", "fedavg"]
    for wrong in ("Fed=x", "FedAvg"):
        with pytest.raises(InputError, match=r"--labels .*FedAvg"):
            assignments([wrong], known, "--labels")
    with pytest.raises(InputError, match="--order"):
        listed_names(["FedAvg,Fed"], known, "--order")


def test_rows_are_renamed_ordered_and_colored(runs):
    shown = arranged(runs, {"FedAvg": "Global"}, ["mixture", "Global"], {"Global": "black"})
    assert [run.label for run in shown] == [MIXTURE, "Global", "Local", "Personalized"]
    assert [run.color for run in shown] == [None, "#000000", None, None]
    assert [run.label for run in runs][:2] == ["Local", "FedAvg"]  # as they were
    assert shown[1].certificates is runs[1].certificates
    assert {"FedAvg", "fedavg", "mixture"} <= {*known_names(runs)}


@pytest.mark.parametrize(
    ("labels", "order", "colors", "says"),
    [
        ({"FedAvg": "Local"}, None, None, "Two rows would be labeled 'Local'"),
        ({"FedAvg": " "}, None, None, "empty"),
        ({"nobody": "x"}, None, None, "no row 'nobody'"),
        (None, ["Local", "local"], None, "twice"),
        (None, None, {"Local": "redd"}, "'redd' is not a color"),
    ],
)
def test_what_names_nothing_is_refused(runs, labels, order, colors, says):
    with pytest.raises(InputError, match=says):
        arranged(runs, labels, order, colors)


def test_a_name_of_several_rows_is_ambiguous():
    both = [make_run(make_certificates(0.8, 2, 20, seed=s), "fedavg", "FedAvg") for s in (0, 1)]
    loaded = load_runs(both)
    with pytest.raises(InputError, match="could be any of"):
        arranged(loaded, {"fedavg": "x"})


def test_seeds_of_one_row_keep_one_label():
    made = [make_certificates(0.8, 2, 20, seed=s) for s in (0, 1)]
    loaded = load_runs([make_run(c, "fedavg", "FedAvg", seed=s) for s, c in enumerate(made)])
    shown = arranged(loaded, {"FedAvg": "Global"})
    assert [run.label for run in shown] == ["Global, seed 0", "Global, seed 1"]
    assert [run.label for run in load_runs(shown)] == ["Global, seed 0", "Global, seed 1"]


def test_a_figure_for_print_has_its_size_and_no_title(runs):
    style = FigureStyle((3.3, 2.2), "radians", bands=False)
    for make in (certified_accuracy_figure, average_radius_figure):
        figure = make(runs, style=style).figure
        axes = figure.axes[0]
        assert tuple(figure.get_size_inches()) == (3.3, 2.2)
        assert axes.get_title(loc="left") == ""
        assert "radians" in axes.get_xlabel()
        assert not axes.child_axes
    axes = certified_accuracy_figure(runs, style=style).figure.axes[0]
    assert not [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    usual = certified_accuracy_figure(runs)
    assert certified_accuracy_figure(runs, style=style).rows == usual.rows


def test_a_unit_that_radii_lack_is_refused(runs):
    with pytest.raises(InputError, match="degrees or radians; got 'meters'"):
        certified_accuracy_figure(runs, style=FigureStyle(unit="meters"))
    pixel = [make_run(make_certificates(0.8, 2, 20, PIXEL))]
    with pytest.raises(InputError, match="intensity"):
        certified_accuracy_figure(pixel, style=FigureStyle(unit="degrees"))
    with pytest.raises(InputError, match="inches"):
        FigureStyle((3.3, 0.0))
    with pytest.raises(InputError, match="png, pdf, svg"):
        FigureStyle(formats=("gif",))


def test_curves_of_several_calls_share_axes(runs):
    _, axes = plt.subplots()
    assert runs[1].plot(axes, label="Global", color="#123456") is axes
    runs[0].certificates.plot(axes, label="Alone")
    runs[0].plot(axes)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["Global", "Alone", "Local"]
    drawn = {line.get_label(): line for line in axes.lines if line.get_label() in names}
    curves = runs[1].curves()
    assert np.array_equal(drawn["Global"].get_xdata(), curves.index)
    assert np.array_equal(drawn["Global"].get_ydata(), curves["mean"])
    assert to_hex(drawn["Global"].get_color()) == "#123456"
    looks = {(line.get_color(), line.get_marker()) for line in drawn.values()}
    assert len(looks) == 3
    plt.close("all")


def test_several_results_in_one_call(runs):
    names = {"labels": {"fedavg": "Global model"}, "order": ["Global model"]}
    looks = {"colors": {"Local": "black"}, "size": (3.3, 2.2), "bands": False}
    axes = certifl.plot(runs[:2], **names, **looks)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["Global model", "Local"]
    assert tuple(axes.figure.get_size_inches()) == (3.3, 2.2)
    plt.close("all")


def test_the_command_writes_the_figures_of_a_paper(folders, tmp_path):
    page = tmp_path / "page" / "report.html"
    tiny.cli(
        *("report", *folders[:2], "--out", page, "--labels", "FedAvg=Global model"),
        *("--order", "Global model", "--colors", "local=#aa0011", "--size", "3.3x2.2"),
        *("--format", "pdf", "--unit", "degrees", "--no-bands", "--by-class"),
    ).fine("Global model", "Global model, by class", "abstained")
    written = {path.name for path in (page.parent / "figures").iterdir()}
    stems = ("curves", "clients", "average_radius", "history")
    assert written == {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "csv")}
    with (page.parent / "figures" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["regime"] for row in rows)) == ["Global model", "Local"]
    text = page.read_text()
    assert ".s0 { --c: #aa0011; }" in text
    assert text.index("Global model") < text.index("Local")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--size", "3"), "3.3x2.2"),
        (("--format", "gif"), "png, pdf, svg"),
        (("--order", "nobody"), "names of"),
        (("--unit", "miles"), "degrees or radians"),
        (("--name", "x"), "file of certificates"),
    ],
)
def test_wrong_requests_write_nothing(folders, tmp_path, arguments, says):
    out = tmp_path / "report.html"
    tiny.cli("report", folders[0], "--out", out, *arguments).refused(says)
    assert not out.exists()


@pytest.fixture(scope="module")
def model_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_certificates(0.7, 1, 100).save(folder / "certificates.parquet")
    file, chosen = folder / "certificates.parquet", ("--name", "My model", "--format", "pdf")
    tiny.cli("report", file, *chosen).fine("My model")
    return folder / "certificates-report" / "report.html"


def test_a_model_has_a_page_without_clients(model_page):
    text = model_page.read_text()
    visible = text[: text.index('<script type="application/json"')]
    shown = visible[visible.index("<body>") :]
    assert "My model certifies" in shown
    assert "certifl verify" in shown
    for word in (
        *("Algorithm", " algorithm", "client</", "of clients", "over clients"),
        *("certifl run", "Training<"),
    ):
        assert word not in shown, word
    assert (model_page.parent / "figures" / "curves.pdf").is_file()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_a_model_works(model_page, windows, width):
    page = windows(model_page, width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#curve-chart svg path").count() > 0
    assert page.get_by_role("heading", name="By class").is_visible()


def test_certificates_without_labels_or_beside_runs_are_refused(folders, tmp_path):
    certificates = make_certificates(0.7, 1, 20)
    object.__setattr__(certificates, "label", np.full(20, -1))
    certificates.save(tmp_path / "bare.parquet")
    tiny.cli("report", tmp_path / "bare.parquet").refused("no label")
    tiny.cli("report", tmp_path / "bare.parquet", folders[0]).refused("report it alone")


def test_classes_that_are_never_certified_are_named():
    certificates = make_certificates(0.95, 2, 60)
    lost = certificates.label == 3
    for name, value in (("predicted", -1), ("radius", 0.0)):
        values = getattr(certificates, name).copy()
        values[lost] = value
        object.__setattr__(certificates, name, values)
    run = load_runs([make_run(certificates, "fedavg", "FedAvg")])
    section = classes_section(ReportContext.of(run))
    assert "FedAvg certifies no test image of class 3 correctly." in section
    row = certificates.table("class").loc[3]
    assert row["at 0°"] == 0.0
    assert row["abstained"] == 1.0
    assert row["images"] == lost.sum()
