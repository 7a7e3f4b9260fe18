"""The examples: what they print follows from what they computed; notebooks and service work."""

import ast
import importlib
import io
import struct
import zlib

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import certifl
from certifl.certification import Certificates
from certifl.report.compare import Difference
from certifl.runs.folder import RunFolder
from scripts import ROOT, load_script
from tiny_study import cli

EXAMPLES = ROOT / "examples"
FEW = ("training.rounds=1", "certification.n=100")

pytestmark = pytest.mark.usefixtures("undrawn")


def test_choosing_lambda(tmp_path, capsys):
    choose = load_script("examples/choose_lambda.py")
    choose.QUICK = (*choose.QUICK, *FEW)
    choose.main(["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    mean = [float(value) for value in rows["mean"][1:]]
    best = choose.QUICK_LAMBDAS[mean.index(max(mean))]
    assert len(mean) == 3
    assert f"\nlambda = {best:g} is " in said
    assert "By client, each by itself: " in said
    held = sorted(tmp_path.rglob("run.json"))
    before = [path.stat().st_mtime_ns for path in held]
    choose.main(["--quick", "--out", str(tmp_path)])
    assert capsys.readouterr().out == said
    assert [path.stat().st_mtime_ns for path in held] == before


def test_what_is_recommended():
    choose, lambdas = load_script("examples/choose_lambda.py"), (0.1, 0.5, 0.9)
    acr = (0.2, 0.3, 0.1)

    def pairs(low: float) -> dict[tuple[int, int], Difference]:
        return {
            (0, 1): Difference(0, 1, -0.1, -0.2, -low),
            (0, 2): Difference(0, 2, 0.1, 0.05, 0.2),
            (1, 2): Difference(1, 2, 0.2, 0.1, 0.3),
        }

    clear = choose.recommended(lambdas, acr, pairs(0.05))
    assert clear == "lambda = 0.5 is better than all others."
    tied = choose.recommended(lambdas, acr, pairs(-0.05))
    assert tied == "lambda = 0.5 is ahead; no difference shown to 0.1. It is better than the rest."


def test_comparing_regimes(tmp_path, capsys):
    compare = load_script("examples/compare_regimes.py")
    compare.QUICK = (*compare.QUICK, *FEW)
    compare.main(["fedavg", "local", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 + 4  # a line for every run, then the comparison
    folders = {path.parent.name for path in tmp_path.rglob("run.json")}
    assert folders == {"fedavg-0", "fedavg-1", "local-0", "local-1"}
    acr = {
        name: RunFolder(tmp_path / "quick" / name).load_certificates().average_certified_radius()
        for name in folders
    }
    gain = sum(acr[f"fedavg-{seed}"] - acr[f"local-{seed}"] for seed in range(2))
    words = said[5].split()
    shown = float(next(word for word in words if word[0] in "+-"))
    assert shown == 0.0 or (shown > 0) == (gain > 0)
    low, high = said[5].split("[")[1].split("]")[0].split(", ")
    assert float(low) <= shown <= float(high)
    zero = float(low) <= 0.0 <= float(high)
    assert said[5].endswith("no difference shown") == zero
    assert said[7].endswith("too few images for an interval")


def test_a_natural_federation_of_images_of_unlike_sizes(tmp_path):
    isic = load_script("examples/fed_isic2019.py")
    isic.main([str(tmp_path / "data"), "--train", "12", "--test", "3"])
    study = EXAMPLES / "fed_isic2019.toml"
    quick = ["training.rounds=1", "training.local_epochs=1"]
    quick += ["certification.n=100", "certification.images=2"]
    settings = [word for setting in quick for word in ("--set", setting)]
    cli("run", study, "--data-dir", tmp_path / "data", *settings, "--out", tmp_path / "run").fine()
    run = RunFolder(tmp_path / "run")
    certificates = run.load_certificates()
    assert set(certificates.client.tolist()) == set(range(6))
    assert certificates.conditions["unit"] == "log factor"
    assert run.manifest()["data"]["image_size"] == [32, 32]
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(isic.lesion(np.random.default_rng(0), 1, 3))
    cli("predict", photo, "--run", tmp_path / "run", "--n", "100").fine("crop = center", "factor")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebooks_run(tmp_path, monkeypatch):
    """Both in one kernel, which imports torch once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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


def damaged(header: bytes) -> bytes:
    """A PNG file with this header, for whose chunk alone Pillow raises no OSError."""
    chunk = b"IHDR" + header
    checked = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png((8, 8))[:8] + checked + png((8, 8))[33:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_service_answers_as_the_classifier_does():
    from fastapi.testclient import TestClient

    model = certifl.models.build("small_cnn", 1, 10, seed=0).eval()
    smoothed = certifl.SmoothedClassifier(model, certifl.Rotation("18deg"), n=300)
    client = TestClient(load_script("examples/service.py").service(smoothed))
    answer = client.post("/predict", files={"image": png((8, 8))})
    image = np.asarray(Image.open(io.BytesIO(png((8, 8)))), np.float32) / 255
    labels, radii = smoothed.predict(torch.from_numpy(image)[None, None])
    assert answer.json() == {"label": int(labels[0]), "radius": float(radii[0])}
    huge = damaged(struct.pack(">IIBBBBB", 1 << 17, 1 << 17, 8, 0, 0, 0, 0))
    for wrong in (b"no image", png((9, 8)), png((8, 8), "RGB"), huge, damaged(b"short")):
        refused = client.post("/predict", files={"image": wrong})
        assert refused.status_code == 422
        assert refused.json()["detail"]
    assert client.post("/predict").status_code == 422


def test_the_page_shows_the_lines_of_the_service():
    page = (EXAMPLES.parent / "docs" / "python.md").read_text()
    shown = page.split("```py\n")[1].split("```")[0]
    indented = "".join(f"    {line}\n" for line in shown.splitlines())
    assert indented in (EXAMPLES / "service.py").read_text()


FOLDERS = ("benchmarks", "docs", "examples")
PROGRAMS = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_program_imports_only_names_that_exist(path):
    support = {file.stem for file in (ROOT / "tests" / "support").glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module.partition(".")[0] in {"certifl", *support}:
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")
    assert 'ROOT / "tests"))' not in path.read_text(), "its helpers are in tests/support"
