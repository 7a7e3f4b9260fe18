"""Numbers as people write and read them: too few votes, amounts hardly meant, units."""

import math
import re
import warnings
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import certifl
import tiny_study as tiny
from certifl.certification.settings import Settings
from certifl.errors import InputError, RequestError, SpecError, UnusualValue
from certifl.perturbations import (
    PERTURBATIONS,
    PixelNoise,
    Rotation,
    Translation,
    describe,
    format_amount,
    from_description,
    from_record,
    parse_sigma,
)
from certifl.spec import load, load_stored

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = certifl.PixelNoise(0.25)
ESTIMATORS = ("top-class", "runner-up", "sequential", "sequential-top-class")


def always(images: Tensor) -> Tensor:
    """The class 3 of 4, whatever the image."""
    mean = images.mean((1, 2, 3))
    return torch.stack([mean * 0, mean * 0, mean * 0, mean * 0 + 9], dim=1)


def certify(noise: Any = NOISE, **options: Any) -> certifl.Certificates:
    return certifl.certify(always, IMAGES, noise, **{"n0": 10, **options})


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("alpha", [0.2, 1e-3, 1e-12])
def test_the_least_n_of_certify_is_the_least_that_certifies(estimator, alpha):
    least = Settings(estimator, alpha=alpha).estimator_for(NOISE).least_votes()
    assert certify(estimator=estimator, alpha=alpha, n=least).radius.min() > 0
    with pytest.raises(InputError, match=f"take n = {least} or more"):
        certify(estimator=estimator, alpha=alpha, n=least - 1)
    with pytest.raises(InputError, match=f"take n = {least} or more"):
        certify(estimator=estimator, alpha=alpha, n=least - 1, radii=[0.0, 0.01])


def test_at_one_in_a_thousand_eleven_votes_are_needed_and_ten_of_the_top_class():
    least = [Settings(name).estimator_for(NOISE).least_votes() for name in ESTIMATORS]
    assert least == [10, 11, 11, 10]


@pytest.mark.parametrize("alpha", [0.2, 1e-3, 1e-9])
def test_the_least_n_of_predict_is_the_least_that_decides(alpha):
    least = math.ceil(1 - math.log2(alpha))
    assert (certifl.predict(always, IMAGES, NOISE, n=least, alpha=alpha) == 3).all()
    with pytest.raises(InputError, match=f"take n = {least} or more"):
        certifl.predict(always, IMAGES, NOISE, n=least - 1, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.05, 1e-6])
@pytest.mark.parametrize(
    "noise", [certifl.Rotation("18deg"), certifl.Rotation("90deg"), certifl.Scaling(0.2)]
)
def test_a_scan_names_a_number_of_votes_that_is_enough(noise, alpha):
    with pytest.raises(InputError, match=r"take n = \d+ or more") as refusal:
        certify(noise, estimator="scan", alpha=alpha, n=10)
    named = int(str(refusal.value).partition("take n = ")[2].split()[0])
    for n in (named, named + 1, named + 4, 2 * named):
        assert not certify(noise, estimator="scan", alpha=alpha, n=n).abstained.any()


def test_a_study_and_the_command_line_refuse_too_few_votes(finished, tmp_path):
    net = tmp_path / "image.png"
    from PIL import Image

    Image.new("L", (8, 8)).save(net)
    spec = tiny.write_spec(tmp_path)
    tiny.cli("predict", net, "--run", finished, "--n", "10").refused("take n = 11 or more")
    tiny.cli("plan", spec, "--set", "certification.n=10").refused("take n = 11 or more")
    tiny.cli(
        "plan", spec, "--set", "certification.n=10", "--set", "certification.radii=[0.01]"
    ).refused("take n = 11 or more")
    tiny.cli("certify", "--run", finished, "--n", "10", "--out", tmp_path / "c.parquet").refused(
        "take n = 11 or more"
    )
    assert not (tmp_path / "c.parquet").exists()


@pytest.mark.parametrize(
    ("family", "sigma", "says"),
    [
        ("pixel", 25, "divided by 255: 0.098"),
        ("pixel", "2.5", "lost in such noise"),
        ("translation", 3, "leaves the frame"),
        ("affine", 1.5, "leaves the frame"),
        ("smooth_flow", 2.0, "leaves the frame"),
        ("dense_flow", 2.0, "leaves the frame"),
        ("rotation", 2.5, '"18deg"'),
    ],
)
def test_a_sigma_that_is_hardly_meant_is_warned_of_once(family, sigma, says):
    with pytest.warns(UnusualValue, match=says) as warned:
        made = from_description({"family": family, "sigma": sigma})
    assert len(warned) == 1
    assert from_record(describe(made)) == made  # a warning would be an error here


@pytest.mark.parametrize(
    ("family", "sigma"),
    [
        ("pixel", 2.0),
        ("translation", 1.0),
        ("affine", 1.0),
        ("rotation", math.pi / 2),
        ("rotation", "120deg"),
        ("rotation", "120°"),
        ("rotation", "0.7pi"),
        ("scaling", 1.0),
    ],
)
def test_usual_sigmas_and_angles_written_out_pass_without_a_word(family, sigma):
    from_description({"family": family, "sigma": sigma})


def test_a_study_warns_of_its_sigma_when_written_and_never_when_read_again(tmp_path):
    wide = "{ family = 'translation', sigma = 3.0 }"
    with pytest.warns(UnusualValue, match="leaves the frame"):
        spec = tiny.spec(f"certification.perturbation={wide}", "augmentation.federated='none'")
    (tmp_path / "spec.toml").write_text(spec.to_toml())
    assert load_stored(tmp_path / "spec.toml").perturbation() == spec.perturbation()
    angle = tiny.spec("certification.perturbation.sigma=120deg")
    (tmp_path / "spec.toml").write_text(angle.to_toml())
    assert load_stored(tmp_path / "spec.toml").perturbations()[0] == certifl.Rotation("120deg")


def test_the_command_line_shows_a_warning_as_one_line(finished, tmp_path):
    wide = ("--family", "translation", "--sigma", "5", "--images", "1", "--n", "20")
    outcome = tiny.cli("certify", "--run", finished, *wide, "--out", tmp_path / "c.parquet")
    outcome.fine()
    assert "certifl: sigma = 5 half-widths: the image leaves the frame" in outcome.err
    assert "UnusualValue" not in outcome.err


def test_radii_beyond_all_that_is_possible_are_pointed_out():
    made = certify(certifl.Rotation("18deg"), n=200, labels=[3, 3])
    with pytest.warns(UnusualValue, match=r"radians.*above 0\.29.*\"5deg\""):
        assert made.certified_accuracy([5, 10]).tolist() == [0.0, 0.0]
    pixel = certify(n=200, labels=[3, 3])
    with pytest.warns(UnusualValue, match="intensity"):
        pixel.certified_accuracy([0.0, 3.0])
    scan = certify(certifl.Rotation("18deg"), estimator="scan", n=1000, labels=[3, 3])
    assert scan.certified_accuracy([0.0, "100deg"]).tolist() == [1.0, 1.0]


def test_radii_are_taken_in_degrees_wherever_an_angle_is_certified():
    rotation = certifl.Rotation("18deg")
    made = certify(rotation, n=200, labels=[3, 3], radii=["5deg", "10°", 0.2])
    assert made.conditions["radii"] == [math.radians(5), math.radians(10), 0.2]
    assert made.certified_accuracy(["5deg", 0.1]).tolist() == [1.0, 1.0]
    assert made.certified_accuracy("5deg") == made.certified_accuracy(0.08) == 1.0
    assert np.array_equal(made.certified_accuracy(np.array([0, 0.1])), [1.0, 1.0])
    scan = certify(rotation, estimator="scan", n=1000, reach="30deg")
    assert scan.conditions["scan"]["high"] == math.radians(30) + rotation.sigma
    for refused in (["5deg"], ["0.1pi"], ["far"]):
        with pytest.raises(InputError, match="radii"):
            certify(n=200, labels=[3, 3]).certified_accuracy(refused)
        with pytest.raises(InputError, match="radii"):
            certify(n=200, radii=refused)
    with pytest.raises(InputError, match="reach"):
        certify(certifl.Scaling(0.2), estimator="scan", n=1000, reach="5deg")


def test_radii_of_a_study_are_taken_in_degrees_and_stored_as_numbers():
    spec = tiny.spec('certification.radii=["5deg", "10°"]')
    assert spec.certification.settings().radii == (math.radians(5), math.radians(10))
    assert (
        spec.hash() == tiny.spec(f"certification.radii={list(map(math.radians, (5, 10)))}").hash()
    )
    scan = ('certification.estimator="scan"', "certification.n=1000")
    reach = tiny.spec(*scan, "certification.reach=30deg").certification.settings().reach
    assert reach == math.radians(30)
    own = (
        "[{ clients = [1], perturbation = { family = 'pixel', sigma = 0.25 }, radii = ['5deg'] }]"
    )
    with pytest.raises(SpecError, match="is an angle"):
        tiny.spec(f"certification.own={own}")
    with pytest.raises(SpecError, match="can be reached"):
        tiny.spec("certification.radii=[5.0, 10.0]")
    with pytest.raises(SpecError, match="can be reached"):
        tiny.spec(*scan, "certification.radii=['40deg']", "certification.reach=30deg")


def test_whole_numbers_may_be_written_as_powers_of_ten(tmp_path):
    assert tiny.spec("certification.n=1e4").hash() == tiny.spec("certification.n=10000").hash()
    assert tiny.spec("certification.n0=1e2").certification.n0 == 100
    assert tiny.spec("data.train_images=6e1").data.train_images == 60
    with pytest.raises(SpecError, match="whole number"):
        tiny.spec("certification.n=1e-2")
    assert certify(n=1e3).conditions["n"] == 1000
    assert certifl.predict(always, IMAGES, NOISE, n=1e2).tolist() == [3, 3]  # type: ignore[arg-type]
    named = ("certify", "--model", "small_cnn", "--data", "digits")
    weights = (*named, "--weights", tmp_path / "none")
    tiny.cli(*weights, "--n", "1e4").refused("no weights")
    outcome = tiny.cli(*weights, "--n", "1.5")
    assert outcome.code == 2
    assert "not a valid integer" in outcome.err


@pytest.mark.parametrize("amount", ["18deg", "18°", "0.1pi", "0.1*pi"])
def test_an_angle_without_quotes_is_told_to_need_them(amount, tmp_path):
    text = tiny.spec().to_toml().replace("sigma = 0.3141592653589793", f"sigma = {amount}")
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(SpecError, match="in quotes") as refusal:
        load(tmp_path / "study.toml")
    assert f'"{amount}"' in str(refusal.value)
    tiny.cli("plan", tmp_path / "study.toml").refused("in quotes")


def test_degrees_may_be_written_with_their_sign():
    assert certifl.Rotation("18°") == certifl.Rotation("18 °") == certifl.Rotation("18deg")
    assert certifl.Rotation("0.1π") == certifl.Rotation("0.1pi")
    assert tiny.spec("certification.perturbation.sigma=18°").hash() == tiny.spec().hash()
    with warnings.catch_warnings(), pytest.raises(InputError, match="angle"):
        certifl.PixelNoise("18°")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0.3, 0.3),
        (1, 1.0),
        (np.float32(0.5), 0.5),
        ("0.3", 0.3),
        (" 0.3 ", 0.3),
        (".5", 0.5),
        ("2.", 2.0),
        ("+1e-3", 1e-3),
        ("0.1pi", 0.1 * math.pi),
        ("0.1*pi", 0.1 * math.pi),
        (" 0.1 * pi ", 0.1 * math.pi),
        ("0.1 pi", 0.1 * math.pi),
        ("18deg", math.radians(18)),
        ("18 deg", math.radians(18)),
        ("1e1deg", math.radians(10)),
    ],
)
def test_sigma_is_read(written, meant):
    found = parse_sigma(written)
    assert type(found) is float
    assert found == meant


@pytest.mark.parametrize(
    "written",
    [
        *("", "pi", "abc", "0.1 rad", "0.1pi2", "18 degrees", "1,5", "0x10"),
        *("nan", "inf", "1e999", "--1"),
    ],
)
def test_text_that_means_nothing_is_refused(written):
    with pytest.raises(InputError, match="sigma"):
        parse_sigma(written)


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, "-0.1", "0", "0deg", math.nan, math.inf, -math.inf]
)
def test_sigma_must_be_finite_and_positive(value):
    with pytest.raises(InputError, match="finite and above 0"):
        parse_sigma(value)


@pytest.mark.parametrize("value", [None, True, [0.1], 1j, b"0.1"])
def test_other_types_are_refused(value):
    with pytest.raises(InputError, match="sigma cannot be"):
        parse_sigma(value)


def test_the_error_is_also_a_value_error():
    with pytest.raises(ValueError):
        parse_sigma("nonsense")
    assert issubclass(InputError, RequestError)


def test_angles_belong_to_families_with_an_angle():
    assert Rotation("0.1pi") == Rotation(0.1 * math.pi) == Rotation("18deg")
    for family in (Translation, PixelNoise):
        for written in ("0.1pi", "18deg"):
            with pytest.raises(InputError, match="angle"):
                family(written)
    assert Translation("0.1").sigma == 0.1


def test_degrees_and_multiples_of_pi_agree_on_the_studys_values():
    assert parse_sigma("0.1pi") == parse_sigma("18deg")
    assert parse_sigma("0.5pi") == parse_sigma("90deg")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1 * math.pi, "radians", "0.314 rad (18.0 deg)"),
        (math.pi / 2, "radians", "1.570 rad (90.0 deg)"),
        (1.9057, "intensity", "1.905 intensity"),
        (0.0, "half-widths", "0.000 half-widths"),
        (0.2999, "relative", "0.299 relative"),
    ],
)
def test_amounts_are_written_with_their_unit(value, unit, text):
    assert format_amount(value, unit) == text


@given(st.floats(0, 1e6), st.integers(0, 6))
def test_a_written_radius_never_exceeds_the_real_one(value, digits):
    for unit in {family(1.0).unit for family in PERTURBATIONS.values()}:
        text = format_amount(value, unit, digits)
        number = re.match(r"[\d.]+", text.removeprefix("added variance 0 to "))
        assert float(number[0]) <= value
        assert value - float(Decimal(number[0])) <= 10.0**-digits * (1 + 1e-9) + value * 2**-52
        degrees = re.search(r"\(([\d.]+) deg\)", text)
        assert (degrees is not None) == (unit == "radians")
        assert degrees is None or float(degrees[1]) <= math.degrees(value)
