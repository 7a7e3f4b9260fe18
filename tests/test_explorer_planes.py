"""Planes of an exploration: shifts in both directions at once, votes at each, older records."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_study as tiny
from certifl import rng as streams
from certifl.certification import Certificates
from certifl.certification.network import prepare
from certifl.certification.sampling import CHUNK, VoteCounter
from certifl.certification.sweeps import SIDE, plane_of, vote_on, walks_of
from certifl.data import load
from certifl.experiments import explore as exploring
from certifl.experiments.explore import explore_run
from certifl.experiments.run import Options
from certifl.experiments.run import run as run_study
from certifl.perturbations import PERTURBATIONS, Translation, from_description
from certifl.report import write_report
from certifl.report.page import explorer as explored
from certifl.report.page import page as page_module
from certifl.runs.folder import RunFolder
from plane_factory import plane_runs
from report_pages import data_of

TRANSLATION = '{ family = "translation", sigma = 0.15 }'
POINTS = SIDE * SIDE


def _quarters(images: torch.Tensor) -> torch.Tensor:
    """A classifier that says which quarter of a picture is brightest."""
    whole = images.mean(dim=1)
    half = whole.shape[-1] // 2
    parts = (whole[:, :half, :half], whole[:, :half, half:], whole[:, half:, :half])
    return torch.stack([p.sum((1, 2)) for p in (*parts, whole[:, half:, half:])], dim=1)


@pytest.mark.parametrize("family", sorted(PERTURBATIONS))
def test_translations_alone_have_planes(family):
    plane = plane_of(from_description({"family": family, "sigma": 0.2}))
    assert (plane is not None) == (family == "translation")


def test_a_plane_is_an_even_grid_between_the_walks():
    perturbation = Translation(0.2)
    plane = plane_of(perturbation)
    assert plane is not None
    assert plane.reach == walks_of(perturbation)[0].reach
    deltas = plane.deltas
    assert deltas.shape == (POINTS, 2)
    assert torch.equal(deltas[POINTS // 2], torch.zeros(2))
    assert torch.equal(deltas.flip(0), -deltas)
    assert (deltas[1] - deltas[0])[1] == 0.0  # the first parameter changes fastest
    assert plane.values == pytest.approx(np.linspace(-0.6, 0.6, SIDE))


def test_votes_are_those_of_one_interpolation_with_the_summed_parameter():
    perturbation, seed = Translation(0.3), 5
    image = torch.rand(1, 8, 8, generator=streams.generator(0, "plane"))
    counter = VoteCounter(prepare(_quarters, image[None], "cpu", "float32"), perturbation, seed)
    plane = plane_of(perturbation)
    assert plane is not None
    voted = vote_on(counter, plane, image, CHUNK)
    assert voted.lengths == pytest.approx(plane.deltas.norm(dim=1).numpy())
    stream = streams.vote_generator(seed, "explore", streams.image_key(image), 0)
    noise = perturbation.sample(CHUNK, (1, 8, 8), stream)
    for point in (0, 20, POINTS // 2, POINTS - 1):
        noisy = perturbation.apply(image[None], noise + plane.deltas[point])
        expected = torch.bincount(_quarters(noisy).argmax(dim=1), minlength=4)
        assert voted.counts[point].tolist() == expected.tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planes") / "run"
    run_study(tiny.spec(f"certification.perturbation={TRANSLATION}"), Options(place))
    explore_run(place)
    return place


def test_the_record_holds_planes_that_go_with_the_certificates(run):
    record = json.loads(RunFolder(run).explorer.read_text())
    certificates = Certificates.load(run / "certificates.parquet")
    dataset = load("digits")
    assert (record["format"], record["plane_votes"]) == (3, CHUNK)
    for image in record["images"]:
        plane = image["plane"]
        assert len(plane["winners"]) == len(plane["lengths"]) == POINTS
        content = io.BytesIO(base64.b64decode(plane["picture"]))
        pixels = dataset.test.take(np.array([image["index"]])).images[0, 0].numpy()
        assert (np.asarray(Image.open(content)) == pixels).all()
        same = (certificates.client == image["client"]) & (certificates.index == image["index"])
        (row,) = np.flatnonzero(same)
        if certificates.abstained[row]:
            continue
        for length, (first, *_) in zip(plane["lengths"], plane["winners"], strict=True):
            inside = length <= certificates.radius[row]
            assert not inside or first[0] == certificates.predicted[row] or first[1] < 70


def test_exploring_twice_gives_the_same_record(run):
    before = RunFolder(run).explorer.read_bytes()
    RunFolder(run).explorer.unlink()
    explore_run(run)
    assert RunFolder(run).explorer.read_bytes() == before


def test_walks_lose_nothing_to_planes():
    spec = tiny.spec(f"certification.perturbation={TRANSLATION}")
    assert exploring._planes(spec, None, 8, 12_600)
    enough = 8 * (12_600 + POINTS * CHUNK)
    assert exploring._planes(spec, enough, 8, 12_600)
    assert not exploring._planes(spec, enough - 1, 8, 12_600)
    assert not exploring._planes(tiny.spec(), None, 8, 12_600)  # rotations have none


def test_records_of_the_format_before_are_shown_along_the_axes(tmp_path):
    old = plane_runs(tmp_path)[2]
    record = json.loads((old / "explorer.json").read_text())
    assert record["format"] == 2
    assert "plane" not in record["images"][0]
    page = write_report([old], tmp_path / "report.html", figures=False)
    explorer = data_of(page)["explorer"]
    assert len(explorer["images"]) == 3
    assert all(image["plane"] is None for image in explorer["images"])
    assert 'id="pad"' not in page.read_text()
    assert "shifted up and down" in page.read_text()


def test_planes_count_towards_what_a_page_may_hold(tmp_path, monkeypatch):
    runs = plane_runs(tmp_path)[:2]
    record = json.loads((runs[0] / "explorer.json").read_text())["images"][0]
    votes = json.dumps([record["plane"]["winners"]] * len(runs), separators=(",", ":"))
    pictures = record["plane"]["picture"] + "".join(walk["strip"] for walk in record["walks"])
    counted = explored._size({0: record, 1: record})
    assert counted >= len(pictures) + len(votes)
    monkeypatch.setattr(page_module, "MOST_PICTURES", 2 * counted)
    page = write_report(runs, tmp_path / "report.html", figures=False)
    assert len(data_of(page)["explorer"]["images"]) == 2
