"""The record: written, read, added up, and held against its own votes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import certifl
from certifl.certification import verify
from certifl.errors import InputError
from known_models import HalfSpace


@pytest.fixture(scope="module")
def made() -> certifl.Certificates:
    g = torch.Generator().manual_seed(0)
    images = torch.rand((8, 1, 8, 8), generator=g)
    model = HalfSpace(torch.randn(64, generator=g), 0.0).eval()
    labels = torch.randint(0, 2, (8,), generator=g)
    return certifl.certify(model, images, certifl.PixelNoise(0.5), labels=labels, n=2000)


def test_parquet_gives_everything_back(made: certifl.Certificates, tmp_path: Path) -> None:
    made.save(tmp_path / "c.parquet")
    back = certifl.Certificates.load(tmp_path / "c.parquet")
    assert back.same_results(made)
    assert np.array_equal(back.seconds, made.seconds)
    assert back.conditions == made.conditions
    assert not list(tmp_path.glob("*.tmp"))


def test_tsv_has_the_published_layout_and_never_a_larger_radius(
    made: certifl.Certificates, tmp_path: Path
) -> None:
    made.save(tmp_path / "c.tsv")
    lines = (tmp_path / "c.tsv").read_text().splitlines()
    assert lines[0] == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    back = certifl.Certificates.load(tmp_path / "c.tsv")
    assert (back.radius <= made.radius).all()
    assert (back.radius >= made.radius - 1e-5).all()
    assert np.array_equal(back.predicted, made.predicted)
    assert np.array_equal(back.correct, made.correct)


def test_tsv_times_in_both_published_forms(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text(
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.378\t1\t15.4\n"
        "20\t7\t-1\t0.0\t0\t0:01:02.500000\n"
    )
    back = certifl.Certificates.load(path)
    assert back.seconds.tolist() == [15.4, 62.5]
    assert back.abstained.tolist() == [False, True]
    assert back.certified_accuracy([0.0, 0.378, 0.3781]).tolist() == [0.5, 0.5, 0.0]
    assert back.average_certified_radius() == pytest.approx(0.189)


@pytest.mark.parametrize("name", ["c.csv", "c.pt"])
def test_other_endings_are_refused(made: certifl.Certificates, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.parquet or \.tsv"):
        made.save(tmp_path / name)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no certificate file"):
        certifl.Certificates.load(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match="no certificates this version can read"):
        certifl.Certificates.load(tmp_path / "bad.parquet")
    (tmp_path / "bad.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(InputError, match="header"):
        certifl.Certificates.load(tmp_path / "bad.tsv")


def test_certified_accuracy_counts_all_images(made: certifl.Certificates) -> None:
    for radius in (0.0, 0.1, 0.3):
        by_hand = np.mean(
            [c and r >= radius for c, r in zip(made.correct, made.radius, strict=True)]
        )
        assert made.certified_accuracy([radius])[0] == pytest.approx(by_hand)
    assert made.average_certified_radius() == pytest.approx((made.radius * made.correct).mean())


def test_rows_are_selected_and_put_together(made: certifl.Certificates) -> None:
    halves = [made.select(np.arange(len(made)) % 2 == k) for k in (0, 1)]
    together = certifl.Certificates.concatenate(halves)
    order = np.argsort(together.index)
    assert together.select(order).same_results(made)
    with pytest.raises(InputError, match="no certificates"):
        certifl.Certificates.concatenate([])


def test_honest_certificates_pass_verification(made: certifl.Certificates) -> None:
    assert verify(made) == []


def _changed(
    made: certifl.Certificates, name: str, row: int, value: object
) -> certifl.Certificates:
    column = getattr(made, name).copy()
    column[row] = value
    return dataclasses.replace(made, **{name: column})


def test_verification_finds_every_kind_of_tampering(made: certifl.Certificates) -> None:
    row = int(made.radius.argmax())
    other = 1 - int(made.predicted[row])
    tampered = {
        "larger": _changed(made, "radius", row, np.nextafter(made.radius[row], np.inf)),
        "larger ": _changed(made, "radius", row, np.nan),
        "not the selected one": _changed(made, "predicted", row, other),
        "number of votes": _changed(made, "counts", row, made.counts[row] + [1, 0]),
        "selection votes": _changed(made, "selection_counts", row, [5, 5]),
        "level": _changed(made, "level", row, 0.01),
        "number of looks": _changed(made, "looks", row, 99),
    }
    for says, certificates in tampered.items():
        findings = verify(certificates)
        assert findings, says
        assert any(says.strip() in f.problem for f in findings)
        assert {f.index for f in findings} == {row}


def test_verification_finds_levels_that_spend_more_than_alpha(made: certifl.Certificates) -> None:
    metadata = {**made.conditions, "alpha": made.conditions["alpha"] / 2}
    assert len(verify(dataclasses.replace(made, conditions=metadata))) == len(made)


def test_certificates_without_votes_cannot_be_verified(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.378\t1\t15.4\n")
    with pytest.raises(InputError, match="carry no votes"):
        verify(certifl.Certificates.load(path))
