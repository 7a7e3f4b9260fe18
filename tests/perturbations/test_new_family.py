"""A new family is one file and one row: no other file of the package names a family."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import certifl
from certifl.certification.sampling import sweeps_of
from certifl.perturbations import PERTURBATIONS, family_label, trait
from certifl.registry import Positive, Row, parameters
from certifl.report.wording import family_words, scales
from certifl.spec import with_settings

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "certifl"
# The paper's own studies name what they compute; help and messages show an example.
_EXEMPT = ("perturbations", "paper")
_EXAMPLES = re.compile(r'family = "rotation"|e\.g\. .*|certifl\.Rotation\(sigma="18deg"\)')


@pytest.fixture
def exposure(monkeypatch: pytest.MonkeyPatch) -> type:
    """The family of CONTRIBUTING, with its file and its row."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    block = page[page.index("## A new perturbation family") :]
    source = block[block.index("```python\n") + 10 : block.index("\n\n\nrow = Row(")]
    module = types.ModuleType("certifl.perturbations.exposure")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "exposure.py", "exec", dont_inherit=True), module.__dict__)
    row = Row(f"{module.__name__}:Exposure", parameters(sigma=Positive), "exposure")
    monkeypatch.setitem(PERTURBATIONS.rows, "exposure", row)
    return module.__dict__["Exposure"]


def test_a_file_and_a_row_are_enough(exposure):
    described = {"family": "exposure", "sigma": 0.1}
    spec = with_settings(
        {"data": {"name": "digits"}, "certification": {"perturbation": described, "n": 300}}
    )
    perturbation = spec.perturbation()
    assert perturbation == exposure(0.1)
    assert [sweep.forward for sweep in sweeps_of(perturbation)] == ["more"]
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = certifl.models.small_cnn(1, 10).eval()
    certificates = certifl.certify(model, images, perturbation, n=300, n0=20)
    stored = certificates.conditions
    assert stored["description"] == described
    assert family_words(stored) == family_label("exposure") == "exposure"
    assert [scale.name for scale in scales(stored, 0.1)] == ["log factor"]
    assert trait("exposure", "promise", "").startswith("for every exposure")


def test_families_are_named_in_their_files_and_rows_alone():
    names = "|".join([*PERTURBATIONS, *(row.attribute for row in PERTURBATIONS.rows.values())])
    quoted = re.compile(rf"""["'`]({names})["'`(]""")
    found = {
        str(path.relative_to(SOURCE)): quoted.findall(_EXAMPLES.sub("", path.read_text()))
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] not in _EXEMPT and path.parent != SOURCE
    }
    assert {path: names for path, names in found.items() if names} == {
        "certification/metadata.py": ["rotation", "pixel"]  # a record, shown in the docstring
    }
