"""Exploring a run: walks through the parameters, votes at every step, a record that can go on."""

import base64
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_study as tiny
from certifl import rng as streams
from certifl.certification import Certificates
from certifl.certification.network import prepare
from certifl.certification.sampling import CHUNK, STEPS, VoteCounter, sweep_along, sweeps_of
from certifl.data import load, to_float
from certifl.errors import StoreMismatch
from certifl.experiments import explore as exploring
from certifl.experiments.explore import explore_run
from certifl.experiments.run import Options
from certifl.experiments.run import run as run_study
from certifl.perturbations import (
    PERTURBATIONS,
    PixelNoise,
    Rotation,
    Scaling,
    Translation,
    from_description,
)
from certifl.perturbations.base import Sweep
from certifl.report import write_report
from certifl.runs.folder import RunFolder
from report_factory import make_certificates
from report_pages import data_of

SEED = 5
pytestmark = [pytest.mark.xdist_group("explorer"), pytest.mark.usefixtures("undrawn")]


def _halves(images: torch.Tensor) -> torch.Tensor:
    """A classifier that says which half of a picture is brighter: left 0, right 1."""
    across = images.mean(dim=(1, 2))
    half = across.shape[1] // 2
    return torch.stack([across[:, :half].sum(1), across[:, half:].sum(1)], dim=1)


def _counter(perturbation: object, image: torch.Tensor) -> VoteCounter:
    network = prepare(_halves, image[None], "cpu", "float32")
    return VoteCounter(network, perturbation, SEED)


@pytest.fixture
def image() -> torch.Tensor:
    picture = torch.zeros(1, 8, 8)
    picture[:, 2:6, 2:4] = 0.75
    return picture


@pytest.mark.parametrize("family", sorted(PERTURBATIONS))
def test_every_family_has_walks_that_pass_through_the_image_as_it_is(family, image):
    perturbation = from_description({"family": family, "sigma": 0.2})
    counter, walks = _counter(perturbation, image), sweeps_of(perturbation)
    other = image.flip(-1)
    for walk in walks:
        seen = sweep_along(counter, walk, image, other, STEPS[len(walks)], CHUNK)
        (zero,) = np.flatnonzero(seen.values == 0.0)
        assert torch.equal(seen.frames[zero], image)
        assert seen.lengths == pytest.approx(np.abs(seen.values), rel=1e-5)
        assert (seen.counts.sum(axis=1) == CHUNK).all()
        if walk.backward:
            assert seen.values == pytest.approx(-seen.values[::-1])
        if walk.reach is None:
            assert seen.frames[-1].numpy() == pytest.approx(other.numpy(), abs=1e-6)


def test_votes_are_those_of_one_interpolation_with_the_summed_parameter(image):
    perturbation = Translation(sigma=0.3)
    walk = sweeps_of(perturbation)[0]
    seen = sweep_along(_counter(perturbation, image), walk, image, image, 21, 2 * CHUNK)
    key = streams.image_key(image)
    noise = torch.cat(
        [
            perturbation.sample(
                CHUNK, (1, 8, 8), streams.vote_generator(SEED, "explore", key, chunk)
            )
            for chunk in (0, 1)
        ]
    )
    for value, counts in zip(seen.values, seen.counts, strict=True):
        delta = torch.tensor([value, 0.0], dtype=torch.float32)
        votes = _halves(perturbation.apply(image[None], noise + delta)).argmax(dim=1)
        assert counts.tolist() == torch.bincount(votes, minlength=2).tolist()
    # Read to the right, the bright part moves left: more votes for the left half on the way there.
    assert seen.counts[0, 0] < seen.counts[10, 0] < seen.counts[20, 0]


def test_walks_reach_beyond_what_certificates_usually_do():
    (turn,) = sweeps_of(Rotation(sigma=0.1 * math.pi))
    assert turn.reach == pytest.approx(0.2 * math.pi)
    assert sweeps_of(Rotation(sigma="0.9pi"))[0].reach == math.pi
    assert sweeps_of(Scaling(sigma=0.8))[0].reach == 0.9
    across, down = sweeps_of(Translation(sigma=0.1))
    assert (across.axis, down.axis, across.reach) == (0, 1, pytest.approx(0.3))


def test_exact_pixel_noise_stays_on_the_grid_of_intensities(image):
    perturbation = PixelNoise(sigma=0.5, exact=True)
    walk = sweeps_of(perturbation)[0]
    original = (image * 255).round() / 255
    seen = sweep_along(_counter(perturbation, original), walk, original, original, 21, CHUNK)
    assert (seen.lengths <= np.abs(seen.values) + 1e-9).all()
    levels = seen.frames.double() * 255
    assert (levels - levels.round()).abs().max() < 1e-4


def test_a_drawn_direction_belongs_to_the_image():
    perturbation = from_description({"family": "affine", "sigma": 0.2})
    (walk,) = sweeps_of(perturbation)
    pictures = [torch.rand(1, 8, 8, generator=streams.generator(0, "t", k)) for k in range(2)]
    frames = [
        sweep_along(_counter(perturbation, one), walk, one, one, 3, CHUNK).frames
        for one in (pictures[0], pictures[0], pictures[1])
    ]
    assert torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[0][0], frames[2][0])


def test_the_first_images_do_not_depend_on_results():
    one, other = (make_certificates(q, 10, 20, seed=s) for q, s in ((0.9, 1), (0.5, 2)))
    chosen = [exploring._chosen(c, 8) for c in (one, other)]
    assert chosen[0][:6] == chosen[1][:6]
    assert len(set(one.client[chosen[0][:6]])) == 6
    assert len(set(one.label[chosen[0][:6]])) == 6


def test_right_wrong_and_abstained_are_all_there_where_a_run_has_them():
    certificates = make_certificates(0.55, 10, 40)
    rows = exploring._chosen(certificates, 8)
    assert len(rows) == len(set(rows)) <= 8
    assert certificates.correct[rows].any()
    assert certificates.abstained[rows].any()
    assert (~certificates.correct & ~certificates.abstained)[rows].any()


@pytest.mark.parametrize(("clients", "images"), [(1, 3), (2, 1), (3, 40)])
def test_small_runs_are_explored_as_far_as_they_go(clients, images):
    rows = exploring._chosen(make_certificates(0.8, clients, images), 8)
    assert len(rows) == len(set(rows))
    assert len(rows) >= min(6, clients * images)


def test_the_cost_is_bounded():
    certificates = make_certificates(0.8, 10, 40)  # 400 images of 1100 votes
    large = exploring._budget(certificates, 11_000_000)
    assert large == 0.05 * 400 * 1100
    assert exploring._budget(certificates, 1000) == 25_000
    assert exploring._size(31, large) == (7, CHUNK)
    assert exploring._size(31, 3099) == (0, CHUNK)
    images, votes = exploring._size(31, 10**9)
    assert (images, votes) == (8, 500)
    assert exploring._size(31, None) == (8, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, which says why it was not explored."""
    place = tmp_path_factory.mktemp("explored") / "run"
    run_study(tiny.spec(), Options(place))
    write_report([place], place / "report.html", figures=False)
    return place


@pytest.fixture(scope="module")
def explored(run: Path) -> Path:
    place = run.parent / "explored"
    shutil.copytree(run, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exploring, "_MOST_IMAGES", 4)
        tiny.cli("explore", place).fine("4 images, 300 votes at each deformation")
    return place


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploring, "_MOST_IMAGES", 4)


def _record(place: Path) -> dict:
    return json.loads(RunFolder(place).explorer.read_text())


def test_a_run_too_small_to_be_explored_says_so(run):
    record = _record(run)
    assert record["images"] == []
    assert "3,100 votes" in record["skipped"]
    assert RunFolder(run).finished()
    assert "No images to explore" in (run / "report.html").read_text()


def test_pictures_are_those_of_the_library(explored):
    record = _record(explored)
    spec = tiny.spec()
    dataset = load("digits")
    held = record["images"][0]
    pixels = dataset.test.take(np.array([held["index"]])).images
    assert held["label"] == int(dataset.test.labels[held["index"]])
    (walk,) = held["walks"]
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(walk["strip"]))))
    assert strip.shape == (8, 8 * 31)
    assert (strip[:, 8 * 15 : 8 * 16] == pixels[0, 0].numpy()).all()
    turned = spec.perturbation().apply(to_float(pixels), torch.tensor([[walk["values"][20]]]))
    assert (strip[:, 160:168] == (turned[0, 0] * 255).round().numpy()).all()


def test_votes_follow_the_certificates(explored):
    certificates = Certificates.load(explored / "certificates.parquet")
    for image in _record(explored)["images"]:
        row = (certificates.client == image["client"]) & (certificates.index == image["index"])
        (one,) = np.flatnonzero(row)
        if certificates.abstained[one]:
            continue
        for length, (first, *_) in zip(
            image["walks"][0]["lengths"], image["walks"][0]["winners"], strict=True
        ):
            if length <= certificates.radius[one]:
                assert first[0] == certificates.predicted[one] or first[1] < 200


@pytest.mark.usefixtures("few_images")
def test_every_client_is_explored_under_its_own_perturbation(tmp_path):
    own = '{ clients = [1], perturbation = { family = "translation", sigma = 0.1 } }'
    study = tiny.spec(f"certification.own=[{own}]")
    run_study(study, Options(tmp_path / "run", explore=False))
    explore_run(tmp_path / "run")
    walks = {
        image["client"]: [walk["name"] for walk in image["walks"]]
        for image in _record(tmp_path / "run")["images"]
    }
    assert walks == {0: ["turn"], 1: ["across", "down"]}
    assert _record(tmp_path / "run")["format"] == exploring.FORMAT == 4
    page = write_report([tmp_path / "run"], tmp_path / "report.html", figures=False)
    for client in (0, 1):
        images = data_of(page, client)["explorer"]["images"]
        assert {image["client"] for image in images} == {client}
        assert {len(image["sweeps"]) for image in images} == {client + 1}


@pytest.mark.usefixtures("few_images")
def test_exploring_resumes_where_it_was_stopped_and_replaces_a_damaged_record(
    explored, monkeypatch
):
    whole = RunFolder(explored).explorer.read_bytes()
    record = json.loads(whole)
    record["images"] = record["images"][:2]
    walked: list[Sweep] = []
    real = exploring.sweep_along
    monkeypatch.setattr(
        exploring, "sweep_along", lambda *given: walked.append(given[1]) or real(*given)
    )
    for stored, again in ((json.dumps(record), 2), ("{", 4), (whole.decode(), 0)):
        walked.clear()
        RunFolder(explored).explorer.write_text(stored)
        explore_run(explored)
        assert RunFolder(explored).explorer.read_bytes() == whole
        assert len(walked) == again


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(StoreMismatch):
        explore_run(tmp_path)
    tiny.cli("explore", tmp_path).refused("not a run folder")


def test_a_comparison_without_a_place_lies_beside_the_first_run(run, explored):
    answer = tiny.cli("report", run, explored)
    answer.fine("Report:", "Figures:")
    page = run.parent / "comparison-run-explored" / "report.html"
    assert str(page.resolve()) in answer.out.replace("\n", "")
    assert (page.parent / "figures" / "curves.png").is_file()
    assert not (run / "figures").exists()
