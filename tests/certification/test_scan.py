"""The scan certificate: votes of known functions, real images end to end, its record.

Its inequality is tested in test_scan_inequality.py; that it claims too much no more often than it
may, in test_scan_validity.py.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
import tiny_study as tiny
from certifl.certification import counts as engine
from certifl.certification import verify
from certifl.certification.counts import advance
from certifl.certification.network import prepare
from certifl.certification.scan import scan_of, unpacked
from certifl.certification.settings import Settings
from certifl.errors import InputError, SpecError
from certifl.experiments.run import Options, run
from certifl.smoothing.scan import BETS, SHARES, Scan, passes_of, read_scan
from certifl.spec import with_settings
from certifl.study import certify as certifying
from known_models import ramps, read_angle, read_factor, votes_for


def voted(scan: Scan, h, seed: int = 0) -> np.ndarray:
    uniforms = np.random.default_rng(seed).random(int(scan.totals[-1]))
    return h(scan.parameters(np.arange(len(uniforms)), uniforms))[None].astype(np.int64)


def test_a_circle_that_is_right_all_around_is_certified_all_around():
    scan = Scan(0.3, -math.pi, math.pi, True, (600,))
    made = read_scan(scan, voted(scan, np.zeros_like), [0], 1e-3)
    assert made.interval[0] == pytest.approx([-math.pi, math.pi], abs=1e-12)
    assert np.abs(made.interval).max() < math.pi


def test_unanimous_votes_certify_from_about_log_two_over_alpha_pairs_on():
    """All pairs agree: E = sum of shares * exp(bet (pairs - discrepancy)), so this is exact."""
    for alpha in (0.05, 1e-3, 1e-6):
        needed = math.log(2 / alpha / SHARES[0]) / BETS[0]
        for pairs in range(2, 60, 2):
            scan = Scan(1.0, -1.0, 1.0, False, (pairs,))
            certified = read_scan(scan, np.zeros((1, 2 * pairs), int), [0], alpha).certified[0]
            assert certified or pairs < needed + 3
            assert not certified or pairs > 0.9 * needed


def test_a_rival_that_leads_is_not_certified_and_gives_no_hope():
    scan = Scan(1.0, -3.0, 3.0, False, (300,))
    made = read_scan(scan, voted(scan, lambda t: np.abs(t) > 0.2), [0], 1e-3)
    assert not made.certified[0]
    assert np.array_equal(made.interval, [[0.0, 0.0]])
    assert np.array_equal(made.hope, [[0.0, 0.0]])


@pytest.mark.parametrize(
    ("scan", "says"),
    [
        ((0.0, -1.0, 1.0, False, (5,)), "at least one window"),
        ((1.0, -0.5, 0.5, True, (5,)), "at least one window"),
        ((1.0, -0.5, 3.0, False, (5,)), "contain the window around 0"),
        ((1.0, -2.0, 2.0, False, ()), "at least one pass"),
    ],
)
def test_scans_that_span_nothing_are_refused(scan, says):
    with pytest.raises(InputError, match=says):
        Scan(*scan)


def test_votes_of_half_a_pass_are_refused():
    scan = Scan(1.0, -2.0, 2.0, False, (40, 40))
    with pytest.raises(InputError, match="whole passes"):
        read_scan(scan, np.zeros((1, 100), int), [0], 1e-3)
    with pytest.raises(InputError, match="alpha must lie"):
        read_scan(scan, np.zeros((1, 80), int), [0], 1.0)
    with pytest.raises(InputError, match="at least 2"):
        passes_of(1, 1.0, 4.0)


def within(low: float, high: float):
    """A classifier of `ramps()` that answers 1 where the angle lies between low and high."""
    return votes_for(lambda x: (read_angle(x) >= low) & (read_angle(x) <= high))


def scanned(model, perturbation=None, n: int = 20_000, **options) -> certifl.Certificates:
    noise = certifl.Rotation(1.0) if perturbation is None else perturbation
    return certifl.certify(model, ramps(), noise, n=n, estimator="scan", **options)


@pytest.mark.parametrize(("edge", "least", "one_centre"), [(0.7, 0.68, 0.4), (2.0, 1.98, 1.0)])
def test_a_known_angle_is_certified_up_to_nearly_the_truth(edge, least, one_centre):
    made = scanned(within(-edge, edge), labels=[1])
    assert made.correct.all()
    assert least <= made.radius[0] <= edge
    assert np.all(np.abs(made.interval) <= edge)
    assert made.radius[0] == min(-made.interval[0, 0], made.interval[0, 1])
    corollary = certifl.certify(
        within(-edge, edge), ramps(), certifl.Rotation(1.0), n=20_000, estimator="runner-up"
    )
    assert corollary.radius[0] <= one_centre
    assert verify(made) == []


def test_the_two_sides_differ_where_the_truth_does():
    made = scanned(within(-0.4, 1.4))
    low, high = made.interval[0]
    assert -0.4 <= low <= -0.37
    assert 1.37 <= high <= 1.4
    assert made.radius[0] == -low


def test_below_one_half_the_rivals_decide():
    """Three classes in turn, 0.48 for class 0: no bound above one half could certify it."""

    def model(images: Tensor) -> Tensor:
        place = (read_angle(images) * 50.0) % 1.0
        return torch.stack(
            [place < 0.48, (place >= 0.48) & (place < 0.74), place >= 0.74], 1
        ).float()

    made = scanned(model, n=4000)
    assert made.predicted[0] == 0
    assert made.radius[0] > 3.1


def test_scaling_is_certified_to_either_side_and_never_to_a_negative_factor():
    model = votes_for(lambda x: (read_factor(x) >= -0.3) & (read_factor(x) <= 0.5))
    made = scanned(model, certifl.Scaling(0.4))
    low, high = made.interval[0]
    assert -0.3 <= low <= -0.28
    assert 0.48 <= high <= 0.5
    scan = scan_of(certifl.Scaling(0.4), Settings("scan"))
    assert (scan.low, scan.ends[0]) == (-1.0, pytest.approx(-0.6))
    always = scanned(votes_for(lambda x: read_factor(x) > -9), certifl.Scaling(0.2), reach=0.3)
    assert always.interval[0] == pytest.approx([-0.3, 0.3])


def test_the_reach_bounds_where_votes_are_cast():
    near = scan_of(certifl.Rotation(0.3), Settings("scan", reach=0.5))
    assert (near.low, near.high, near.periodic) == (-0.8, 0.8, False)
    assert scan_of(certifl.Rotation(0.3), Settings("scan", reach=3.0)).periodic
    made = scanned(within(-2.0, 2.0), certifl.Rotation(0.5), reach=1.0, n=4000)
    assert made.interval[0] == pytest.approx([-1.0, 1.0], abs=1e-9)


def test_votes_stop_where_the_ends_are_settled():
    model = within(-0.7, 0.7)
    by_default = scanned(model, n=100_000)
    assert by_default.votes[0] <= 16_000
    looks = by_default.conditions["look_votes"]
    assert looks[by_default.looks[0] - 1] == by_default.votes[0]
    coarse = scanned(model, n=100_000, radii=[0.25, 0.5, 1.0])
    assert coarse.votes[0] < by_default.votes[0]
    assert coarse.radius[0] >= 0.5
    wrong = scanned(model, n=100_000, labels=[0])
    assert wrong.votes[0] == 1000
    patient = scanned(model, n=100_000, labels=[0], label_aware=False)
    assert patient.votes[0] == by_default.votes[0]


def images_and_model() -> tuple[torch.nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn((4, 64), generator=generator))
    return model.eval(), torch.rand((6, 1, 8, 8), generator=generator)


def of_images(rows: slice, **options) -> certifl.Certificates:
    model, images = images_and_model()
    settings = {"n": 3000, "estimator": "scan", "precision": "float32", **options}
    return certifl.certify(model, images[rows], certifl.Rotation("36deg"), **settings)


def test_an_image_is_certified_alike_alone_in_a_batch_and_with_any_batch_size():
    together = of_images(slice(None))
    assert len(set(together.radius.tolist())) > 3
    alone = of_images(slice(4, 5), batch_size=33)
    assert alone.scan_votes[0] == together.scan_votes[4]
    assert np.array_equal(alone.interval[0], together.interval[4])
    other = of_images(slice(4, 5), seed=1)
    assert other.scan_votes[0] != together.scan_votes[4]


def test_no_attack_succeeds_inside_an_interval():
    """Votes at the very ends and between, ten times those of the certificate, agree with it."""
    model, images = images_and_model()
    made = of_images(slice(None))
    network = prepare(model, images, precision="float32")
    for row in np.flatnonzero(~made.abstained):
        low, high = made.interval[row]
        angles = torch.linspace(-0.2 * math.pi, 0.2 * math.pi, 30_000)  # sigma = 36 degrees
        for delta in np.linspace(low, high, 5):
            params = (angles + float(delta))[:, None]
            noisy = certifl.Rotation("36deg").apply(images[row : row + 1], params)
            counts = network.call(noisy).argmax(1).bincount(minlength=4)
            assert counts.argmax() == made.predicted[row]


def test_parquet_gives_everything_back_and_tsv_the_radius(tmp_path):
    made = of_images(slice(None))
    made.save(tmp_path / "c.parquet")
    back = certifl.Certificates.load(tmp_path / "c.parquet")
    assert back.same_results(made)
    assert back.conditions == made.conditions
    assert verify(back) == []
    rows = np.array([5, 0])
    joined = certifl.Certificates.concatenate([back.select(rows[:1]), back.select(rows[1:])])
    assert joined.same_results(made.select(rows))
    assert verify(joined) == []
    made.save(tmp_path / "c.tsv")
    assert np.all(certifl.Certificates.load(tmp_path / "c.tsv").radius <= made.radius)


def test_the_record_says_where_it_looked():
    metadata = of_images(slice(1)).conditions
    assert metadata["scan"]["periodic"]
    assert 2 * sum(metadata["scan"]["passes"]) == 3000 == metadata["look_votes"][-1]
    assert metadata["look_levels"] == [1e-3]
    assert np.isnan(of_images(slice(1)).p_lower[0])


def test_stored_votes_are_one_byte_each():
    made = of_images(slice(None))
    for row, packed in enumerate(made.scan_votes):
        votes = unpacked(packed, 4)
        assert np.array_equal(np.bincount(votes, minlength=4), made.counts[row])
    with pytest.raises(ValueError, match="not"):
        unpacked(made.scan_votes[0], 2) if made.counts[0, 2:].any() else unpacked(b"not", 4)


def changed(made: certifl.Certificates, name: str, row: int, value) -> certifl.Certificates:
    column = getattr(made, name).copy()
    column[row] = value
    return dataclasses.replace(made, **{name: column})


def test_verification_finds_every_kind_of_tampering():
    made = of_images(slice(None))
    row = int(made.radius.argmax())
    low, high = made.interval[row]
    other = (made.predicted[row] + 1) % 4
    tampered = {
        "its radius ": changed(made, "radius", row, np.nextafter(made.radius[row], 9)),
        "its interval": changed(made, "interval", row, [low, np.nextafter(high, 9)]),
        "its interval ": changed(made, "interval", row, [np.nextafter(low, -9), high]),
        "its interval  ": changed(made, "interval", row, [np.nan, high]),
        "not the selected one": changed(made, "predicted", row, other),
        "number of votes": changed(made, "counts", row, made.counts[row] + 1),
        "not those that were counted": changed(
            made, "scan_votes", row, made.scan_votes[(row + 1) % 6]
        ),
        "cannot be read": changed(made, "scan_votes", row, b"nothing"),
        "level": changed(made, "level", row, 0.01),
        "selection votes": changed(made, "selection_counts", row, [5, 5, 0, 0]),
        "number of looks": changed(made, "looks", row, 99),
    }
    for says, certificates in tampered.items():
        findings = verify(certificates)
        assert any(says.strip() in f.problem for f in findings), says
        assert {f.index for f in findings} == {row}
    scan = {**made.conditions["scan"], "passes": [1500]}
    moved = dataclasses.replace(made, conditions={**made.conditions, "scan": scan})
    assert len(verify(moved)) >= len(made)
    metadata = {k: v for k, v in made.conditions.items() if k != "scan"}
    with pytest.raises(InputError, match="how their votes were cast"):
        verify(dataclasses.replace(made, conditions=metadata))


def test_a_study_that_scans_resumes_verifies_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(certifying, "_SECONDS_BETWEEN_SAVES", 0.0)
    scans = ("certification.estimator=scan", "certification.n=2000")
    spec = tiny.spec(*scans)
    options = {name: Options(tmp_path / name, explore=False) for name in ("whole", "cut")}
    run(spec, options["whole"])
    batches = []

    def advance_twice(*arguments) -> None:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(advance(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "advance", advance_twice)
        with pytest.raises(KeyboardInterrupt):
            run(spec, options["cut"])
    run(spec, options["cut"])
    whole, cut = (
        certifl.Certificates.load(tmp_path / name / "certificates.parquet")
        for name in ("whole", "cut")
    )
    assert cut.same_results(whole)
    assert whole.conditions["estimator"] == "scan"
    assert whole.interval is not None
    tiny.cli("verify", tmp_path / "cut").fine()
    tiny.cli("report", tmp_path / "cut").fine()


@pytest.mark.parametrize(
    ("perturbation", "options", "says"),
    [
        (certifl.PixelNoise(0.5), {}, "families of one uniform parameter"),
        (certifl.Translation(0.5), {}, "translation is none"),
        (certifl.Scaling(1.0), {}, "factors down to 0"),
        (
            certifl.Rotation(1.0),
            {"reach": -1.0},
            "reach = -1.0 is not allowed: it must be a positive",
        ),
        (certifl.Rotation(1.0), {"n": 1}, "at least 2"),
        (
            certifl.Rotation(1.0),
            {"reach": 1.0, "estimator": "sequential"},
            "has no parameter 'reach'",
        ),
    ],
)
def test_what_a_scan_cannot_do_is_refused(perturbation, options, says):
    arguments = {"estimator": "scan", **options}
    with pytest.raises(InputError, match=says):
        certifl.certify(within(-1, 1), ramps(), perturbation, **arguments)


def test_a_spec_that_scans_the_wrong_family_is_refused_before_training():
    noise = {"family": "pixel", "sigma": 0.1}
    certification = {"perturbation": noise, "estimator": "scan"}
    with pytest.raises(SpecError, match="families of one uniform parameter"):
        with_settings({"data": {"name": "digits"}, "certification": certification})
