"""docs/results/regime.py and mixture.py: pages that explain, from runs with planted effects."""

import dataclasses
import io
import json
from pathlib import Path

from PIL import Image

import claims_factory as factory
from certifl.paper.figures import FEDAVG, LOCAL, MATCHED, MIXTURES, Setting
from certifl.paper.scales import scale_named
from certifl.report.figures import image_bytes
from certifl.spec import Spec
from scripts import results_scripts

regime, mixture, study_numbers = results_scripts("regime", "mixture", "study_numbers")


def plant(folder: Path, spec: Spec, acr: float, fit: float, images: int = 1000) -> None:
    """A finished run of this spec in which every client has this ACR and fits so many images."""
    values = json.loads(spec.model_dump_json(exclude_none=True))
    clients = values["clients"]["count"]
    values["certification"]["perturbation"]["sigma"] = spec.perturbations()[0].sigma
    planted = factory.run(values, acr, images=40)
    named = dataclasses.replace(planted.results, folder=Path(spec.hash()))
    factory.write(folder, dataclasses.replace(planted, results=named))
    written = folder / "runs" / spec.hash()
    record = json.loads((written / "run.json").read_text())
    record["data"]["train_images"] = images * clients
    (written / "run.json").write_text(json.dumps(record))
    own = {str(c): {"accuracy": fit} for c in range(clients)}
    entry = {"round": 0, "seconds": 1.0, "clients": own}
    (written / "history.jsonl").write_text(json.dumps(entry) + "\n")


def test_the_regime_page_has_a_row_for_every_finished_pair(tmp_path):
    few, many = regime.CELLS[0], regime.CELLS[-2]
    for cell, ahead in ((few, 0.2), (many, 0.0)):
        for kind, acr in ((FEDAVG, 0.3 + ahead), (LOCAL, 0.3)):
            plant(tmp_path, regime.spec(*cell, kind), acr, 0.75, images=cell[0])
    (tmp_path / "runs").rename(tmp_path / "regime")
    scale = scale_named("overnight")
    plant(tmp_path, scale.spec(Setting("cifar10", 4, "rotation", "0.1pi"), FEDAVG), 0.4, 0.5)
    found = regime.pairs(tmp_path)  # Figure 1 lacks its training alone
    cells = [(pair.clients, pair.images, pair.epochs) for pair in found]
    assert cells == [(10, 250, 16), (10, 2500, 16)]
    gap = found[0].gap
    assert 0.15 < gap.low < gap.share < gap.high < 0.25
    assert abs(found[1].gap.share) < 0.05
    page = regime.page(found)
    assert "Of 2 pairs, FedAvg is ahead in 1, training alone in 0, and 1 show no" in page
    assert "FedAvg is ahead with 250 images, 16 epochs." in page
    assert "| 75% |" in page
    drawn = Image.open(io.BytesIO(image_bytes(regime.drawing_of(found), "png")))
    assert drawn.width > 1000


def test_the_mixture_page_separates_the_steps_from_the_pull(tmp_path):
    scale = scale_named("overnight")
    setting = Setting("cifar10", 10, "rotation", "0.1pi")
    assert mixture.panels(tmp_path) == []
    for kind in dict.fromkeys((*MIXTURES, *MATCHED)):
        acr = 0.2 if kind.personalization == 0.1 and not kind.matched_steps else 0.4
        plant(tmp_path, scale.spec(setting, kind), acr, 0.9)
    (panel,) = mixture.panels(tmp_path)
    paper, matched = panel.points
    assert [point.value for point in paper] == [0.1, 0.5, 0.9, 1.0]
    assert paper[0].gap.high < -0.15
    assert abs(matched[0].gap.share) < 0.05
    page = mixture.page([panel])
    assert "With the paper's steps, 0 of 3 mixtures are ahead of FedAvg, 1 are behind" in page
    assert "With steps divided by λ, 0 of 3 mixtures are ahead of FedAvg, 0 are behind" in page
    assert Image.open(io.BytesIO(image_bytes(mixture.drawing_of([panel]), "png"))).width > 500


def test_intervals_of_the_pages_are_rounded_outward():
    gap = study_numbers.Gap
    assert gap(0.0210, 0.0009, 0.0401).words == "+2.1 (+0.0 to +4.1)"
    assert gap(-0.0210, -0.0401, -0.0009).words == "-2.1 (-4.1 to +0.0)"
