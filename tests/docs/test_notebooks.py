"""The notebooks and the service in examples/ work as they are."""

from __future__ import annotations

import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import certifl
from certifl.certification import Certificates
from scripts import load_script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one kernel, which imports torch once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CERTIFL_CACHE", str(tmp_path / "cache"))
    study, model = (
        nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4) for name in ("study", "model")
    )
    cells = [*study.cells, *model.cells]
    assert not any(cell.get("outputs") for cell in cells), "stored without outputs"
    for number, cell in enumerate(cells):
        cell["id"] = str(number)
    study.cells = cells
    NotebookClient(study, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = [data for output in outputs if (data := output.get("data"))]
    assert sum("image/png" in data for data in shown) == 2
    assert sum("<progress" in data.get("text/html", "") for data in shown) >= 3
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert Certificates.load(tmp_path / "certificates.parquet").label[0] >= 0


def png(size: tuple[int, int], mode: str = "L") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_service_answers_as_the_classifier_does() -> None:
    from fastapi.testclient import TestClient

    model = certifl.models.build("small_cnn", 1, 10, seed=0).eval()
    smoothed = certifl.SmoothedClassifier(model, certifl.Rotation("18deg"), n=300)
    client = TestClient(load_script("examples/service.py").service(smoothed))
    answer = client.post("/predict", files={"image": png((8, 8))})
    image = np.asarray(Image.open(io.BytesIO(png((8, 8)))), np.float32) / 255
    labels, radii = smoothed.predict(torch.from_numpy(image)[None, None])
    assert answer.json() == {"label": int(labels[0]), "radius": float(radii[0])}
    for wrong in (b"no image", png((9, 8)), png((8, 8), "RGB")):
        refused = client.post("/predict", files={"image": wrong})
        assert refused.status_code == 422
        assert refused.json()["detail"]
    assert client.post("/predict").status_code == 422


def test_the_page_shows_the_lines_of_the_service() -> None:
    page = (EXAMPLES.parent / "docs" / "python.md").read_text()
    shown = page.split("```py\n")[1].split("```")[0]
    indented = "".join(f"    {line}\n" for line in shown.splitlines())
    assert indented in (EXAMPLES / "service.py").read_text()
