"""Every family keeps the promises of `Perturbation`: one row here per member, whatever it is."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from certifl.errors import InputError
from certifl.perturbations import (
    PERTURBATIONS,
    Affine,
    DenseFlow,
    GaussianBlur,
    PixelNoise,
    Rotation,
    Scaling,
    SmoothFlow,
    Translation,
    covers_received,
    describe,
    from_description,
)
from certifl.perturbations.deformations import Deformation
from certifl.smoothing.laws import EXPONENTIAL, GAUSSIAN, UNIFORM
from pictures import IMAGE, pictures, rng

SIGMA = 0.2
# Every family once with its defaults, then the options.
MEMBERS = [family(SIGMA) for family in PERTURBATIONS.values()] + [
    PixelNoise(SIGMA, exact=True),
    SmoothFlow(SIGMA, bases=3, padding="reflection"),
    Rotation(SIGMA, padding="border"),
    Translation(SIGMA, padding="reflection"),
]
DEFORMATIONS = [family for family in PERTURBATIONS.values() if issubclass(family, Deformation)]
each = pytest.mark.parametrize("p", MEMBERS, ids=repr)


def test_the_table_of_families():
    table = {
        "pixel": (GAUSSIAN, "l2", "intensity", None),
        "translation": (GAUSSIAN, "l2", "half-widths", 2),
        "rotation": (UNIFORM, "l1", "radians", 1),
        "scaling": (UNIFORM, "l1", "relative", 1),
        "affine": (GAUSSIAN, "l2", "coefficients", 6),
        "smooth_flow": (GAUSSIAN, "l2", "coefficients", 8),
        "dense_flow": (GAUSSIAN, "l2", "half-widths", None),
        "brightness": (GAUSSIAN, "l2", "intensity", 1),
        "contrast": (GAUSSIAN, "l2", "log factor", 1),
        "gaussian_blur": (EXPONENTIAL, "l1", "px^2", 1),
    }
    found = {
        name: (p.law, p.norm, p.unit, p.dim)
        for name, p in ((name, family(SIGMA)) for name, family in PERTURBATIONS.items())
    }
    assert found == table


@each
def test_it_is_a_frozen_printable_value(p):
    assert PERTURBATIONS[p.family] is type(p)
    again = from_description(json.loads(json.dumps(describe(p))))
    assert again == p
    assert hash(again) == hash(p)
    assert repr(again) == repr(p)
    assert str(SIGMA) in repr(p)
    assert p != dataclasses.replace(p, sigma=2 * SIGMA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.sigma = 1.0
    assert p.norm == p.law.norm
    assert not inspect.isabstract(type(p))


@each
def test_dim_counts_the_parameters(p):
    for image in [(1, 8, 8), IMAGE]:
        count = math.prod(p.params_shape(image))
        assert p.dim is None or count == p.dim
    if p.dim is None:
        assert p.params_shape((1, 8, 8)) != p.params_shape(IMAGE)


@each
def test_the_threat_model_says_what_is_not_covered(p):
    text = p.threat
    assert "radius" in text
    assert covers_received(p.family) == (not isinstance(p, Deformation))
    if covers_received(p.family):
        assert "twice" not in text
        assert "is covered" in text
    else:
        assert "parameter space" in text
        assert "ONE interpolation" in text
        assert "interpolates twice" in text
    assert ("whole-pixel" in text) == (p.family == "translation")


@each
def test_samples_have_the_promised_form(p):
    drawn = p.sample(5, IMAGE, rng())
    assert drawn.shape == (5, *p.params_shape(IMAGE))
    assert drawn.dtype == torch.float32
    assert drawn.device == torch.device("cpu")
    assert not drawn.requires_grad
    assert drawn.isfinite().all()


@each
def test_samples_come_from_the_generator_alone(p):
    first = p.sample(4, IMAGE, rng(1))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(p.sample(4, IMAGE, rng(1)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(p.sample(4, IMAGE, rng(2)), first)
    shared = rng(1)
    assert torch.equal(p.sample(4, IMAGE, shared), first)
    assert not torch.equal(p.sample(4, IMAGE, shared), first)


def _distribution(law, scale):
    if law is GAUSSIAN:
        return stats.norm(0, scale)
    return stats.expon(0, scale) if law is EXPONENTIAL else stats.uniform(-scale, 2 * scale)


@pytest.mark.statistical
@pytest.mark.parametrize("p", [m for m in MEMBERS if m != PixelNoise(SIGMA, exact=True)], ids=repr)
def test_samples_follow_the_law(p):
    """Kolmogorov-Smirnov: P(D > sqrt(ln(2 / a) / (2 n))) <= a; a = 1e-9 for a fixed seed.

    The bound is 0.018 for n = 32 768, so a sigma that is off by 10 % (D about 0.024 for the normal
    law and 0.045 for the uniform one) is caught.
    """
    image = (1, 8, 8)
    n = 32_768 // math.prod(p.params_shape(image))
    values = p.sample(n, image, rng(7)).double().flatten().numpy()
    scale = SIGMA
    law, wrong = (_distribution(p.law, factor * scale) for factor in (1.0, 1.1))
    bound = math.sqrt(math.log(2 / 1e-9) / (2 * values.size))
    assert stats.kstest(values, law.cdf).statistic < bound
    assert stats.kstest(values, wrong.cdf).statistic > bound


@pytest.mark.statistical
@pytest.mark.parametrize(
    "p", [Translation(SIGMA), Affine(SIGMA), SmoothFlow(SIGMA), DenseFlow(SIGMA)], ids=repr
)
def test_parameters_are_independent(p):
    """Correlations of n = 10 000 draws have a spread of 0.01; allowed are six times that."""
    drawn = p.sample(10_000, (1, 4, 4), rng(3)).flatten(1).double().numpy()
    seen = np.corrcoef(drawn, rowvar=False) - np.eye(drawn.shape[1])
    assert np.abs(seen).max() < 0.06


@pytest.mark.parametrize("sigma", [0.1 * math.pi, 0.1, 1 / 3, 1.0, 1e-6, 0.77])
def test_uniform_samples_never_leave_their_interval(sigma):
    for family in (Rotation, Scaling):
        drawn = family(sigma).sample(200_000, IMAGE, rng(4)).double()
        assert drawn.abs().max().item() <= sigma
        assert drawn.abs().max().item() > 0.9999 * sigma


@pytest.mark.parametrize("sigma", [0.1 * math.pi, 0.1, 1 / 3, 1.35, "0.9pi"])
def test_even_the_most_extreme_uniform_draw_stays_inside(sigma, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    rotation = Rotation(sigma)
    sigma = rotation.sigma
    lowest = rotation.sample(1, IMAGE, rng()).double().item()
    assert -sigma <= lowest <= -sigma * (1 - 2**-22)


@pytest.mark.statistical
def test_exact_noise_is_rounded_gaussian_noise():
    """Integer levels; their frequencies by a chi-squared test at 1e-6 for a fixed seed."""
    sigma = 4 / 255
    levels = PixelNoise(sigma, exact=True).sample(2000, (1, 8, 8), rng(5)).double() * 255
    whole = levels.round()
    assert (levels - whole).abs().max() < 1e-4
    edges = np.arange(-12, 14) - 0.5
    counts, _ = np.histogram(whole.numpy(), np.concatenate([[-np.inf], edges, [np.inf]]))
    share = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], edges, [np.inf]]), scale=4))
    assert stats.chisquare(counts, share * whole.numel()).pvalue > 1e-6


def test_exact_noise_that_is_always_rounded_to_0_is_refused():
    assert PixelNoise(0.001, exact=True).sample(100, (1, 8, 8), rng()).any()
    with pytest.raises(InputError, match=r"give 0\.001 or more"):
        PixelNoise(1e-4, exact=True)


def test_exact_noise_is_double_precision_noise_rounded():
    drawn = torch.randn((6, *IMAGE), generator=rng(6), dtype=torch.float64) * 0.3
    exact = PixelNoise(0.3, exact=True).sample(6, IMAGE, rng(6))
    assert exact.dtype == torch.float32
    assert torch.equal((exact * 255).round().double(), (drawn * 255).round())
    # params stay intensities, off by at most half a level (and one float rounding)
    assert (exact - drawn).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("sigma", [0.1 * math.pi, 0.1, 0.25, 1 / 3])
def test_uniform_radii_use_the_width_on_which_noise_is_drawn(sigma, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    width = -Rotation(sigma).sample(1, IMAGE, rng()).double().item()
    assert sigma * (1 - 2**-23) <= width <= sigma
    assert UNIFORM.radius(sigma, 1.0, 0.0) <= width


@each
def test_zero_parameters_give_the_image_back_exactly(p):
    sizes = [(n, n) for n in range(8, 65)] + [(8, 64), (9, 31), (28, 20), (63, 8), (33, 47)]
    for h, w in sizes:
        images = pictures(2, 1, h, w, seed=h * w)
        zero = torch.zeros(2, *p.params_shape((1, h, w)))
        assert (p.apply(images, zero) - images).abs().max() == 0, (h, w)


@each
def test_results_are_images_of_the_same_shape(p):
    images, params = pictures(4, *IMAGE), p.sample(4, IMAGE, rng())
    changed = p.apply(images, params)
    assert changed.shape == images.shape
    assert changed.dtype == torch.float32
    assert changed.isfinite().all()
    assert not changed.requires_grad
    assert not torch.equal(changed, images)
    if isinstance(p, (Deformation, GaussianBlur)):  # others are not clipped
        assert changed.min() >= -1e-6
        assert changed.max() <= 1 + 1e-6


@each
def test_apply_changes_neither_input_nor_global_state(p):
    images, params = pictures(4, *IMAGE), p.sample(4, IMAGE, rng())
    before = images.clone(), params.clone(), torch.get_rng_state()
    first = p.apply(images, params)
    assert torch.equal(p.apply(images, params), first)
    assert torch.equal(images, before[0])
    assert torch.equal(params, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@each
def test_one_of_either_side_is_broadcast(p):
    images, params = pictures(5, *IMAGE), p.sample(5, IMAGE, rng())
    many = p.apply(images[:1].repeat(5, 1, 1, 1), params)
    assert torch.equal(p.apply(images[:1], params), many)
    copies = params[:1].repeat(5, *[1] * (params.ndim - 1))
    assert torch.equal(p.apply(images, params[:1]), p.apply(images, copies))


@each
def test_the_result_for_one_image_does_not_depend_on_its_batch(p):
    images, params = pictures(9, *IMAGE), p.sample(9, IMAGE, rng())
    together = p.apply(images, params)
    for k in range(9):
        assert torch.equal(p.apply(images[k : k + 1], params[k : k + 1])[0], together[k])


@each
def test_families_of_one_parameter_take_a_plain_vector(p):
    images, params = pictures(5, *IMAGE), p.sample(5, IMAGE, rng())
    if p.dim == 1:
        assert params.shape == (5, 1)
        assert torch.equal(p.apply(images, params[:, 0]), p.apply(images, params))
    else:
        with pytest.raises(InputError, match="params must have shape"):
            p.apply(images, torch.zeros(5))


@each
def test_half_precision_images_are_changed_in_float32(p):
    images, params = pictures(3, *IMAGE).half(), p.sample(3, IMAGE, rng())
    changed = p.apply(images, params)
    assert changed.dtype == torch.float32
    assert torch.equal(changed, p.apply(images.float(), params))
    assert p.apply(images.double(), params).dtype == torch.float64


@each
def test_double_precision_is_the_same_map(p):
    images, params = pictures(3, *IMAGE), p.sample(3, IMAGE, rng())
    fine = p.apply(images.double(), params.double())
    # positions are off by about 11 * 2**-23 pixels in float32, slopes are at most 1 a pixel
    torch.testing.assert_close(p.apply(images, params).double(), fine, atol=2e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_a_gpu_gives_the_same_images(p):
    images, params = pictures(5, *IMAGE), p.sample(5, IMAGE, rng())
    changed = p.apply(images.cuda(), params.cuda())
    torch.testing.assert_close(changed.cpu(), p.apply(images, params), atol=2e-5, rtol=0)
    zero = torch.zeros_like(params).cuda()
    assert torch.equal(p.apply(images.cuda(), zero).cpu(), images)
    drawn = p.sample(3, IMAGE, torch.Generator("cuda").manual_seed(0))
    assert drawn.device.type == "cuda"


@pytest.mark.parametrize(
    ("family", "sigma", "says"),
    [
        (Rotation, 18, '1031 degrees.*"18deg"'),
        (Rotation, "400deg", "400 degrees, more than a half turn"),
        (Scaling, 3, "turns over"),
    ],
)
def test_a_sigma_in_another_unit_is_noticed_where_it_can_be(family, sigma, says):
    with pytest.raises(InputError, match=says):
        family(sigma)
    assert Rotation("180deg").sigma == math.pi


@pytest.mark.parametrize("family", PERTURBATIONS.values())
@pytest.mark.parametrize("sigma", [0, -0.1, math.nan, math.inf, "x", None, True])
def test_a_sigma_that_is_no_scale_is_refused(family, sigma):
    with pytest.raises(InputError, match="sigma"):
        family(sigma)


@pytest.mark.parametrize("family", DEFORMATIONS)
def test_unknown_options_are_refused(family):
    with pytest.raises(InputError, match=r"padding = 'mirror'.*choose one of border, reflection"):
        family(0.1, padding="mirror")
    with pytest.raises(InputError, match=r"geometry = 'corner'.*choose one of centre, deformrs"):
        family(0.1, geometry="corner")


@pytest.mark.parametrize("bases", [0, -1, 1.5, True, "2"])
def test_bases_must_be_a_count(bases):
    with pytest.raises(InputError, match="bases"):
        SmoothFlow(0.1, bases=bases)


@each
def test_wrong_shapes_are_refused_with_what_was_expected(p):
    images, params = pictures(3, *IMAGE), p.sample(3, IMAGE, rng())
    with pytest.raises(InputError, match="images must have shape"):
        p.apply(images[0], params)
    with pytest.raises(InputError, match="params must have shape"):
        p.apply(images, params[..., None])
    with pytest.raises(InputError, match="3 images and 2 parameter sets"):
        p.apply(images, params[:2])
    with pytest.raises(InputError, match="0 parameter sets"):
        p.apply(images, params[:0])
    with pytest.raises(InputError, match="floating point"):
        p.apply((images * 255).to(torch.uint8), params)
    with pytest.raises(InputError, match=r"torch\.Tensor"):
        p.apply(images.numpy(), params)
    with pytest.raises(InputError, match="on cpu and params on meta"):
        p.apply(images, params.to("meta"))
    with pytest.raises(InputError, match="image_shape"):
        p.sample(3, (3, 1, 8, 8), rng())
    with pytest.raises(InputError, match="At least one"):
        p.sample(0, IMAGE, rng())


def test_parameters_of_another_image_size_are_refused():
    for p in (PixelNoise(0.1), DenseFlow(0.1)):
        with pytest.raises(InputError, match="params must have shape"):
            p.apply(pictures(2, 3, 8, 8), p.sample(2, IMAGE, rng()))


def test_descriptions_that_do_not_fit_are_refused():
    assert from_description({"family": "rotation", "sigma": "18deg"}) == Rotation("0.1pi")
    assert from_description({"family": "smooth_flow", "sigma": 1, "bases": 4}).dim == 32
    with pytest.raises(InputError, match="choose one of pixel, translation"):
        from_description({"family": "fog", "sigma": 0.1})
    with pytest.raises(InputError, match="choose one of"):
        from_description({"sigma": 0.1})
    with pytest.raises(InputError, match="no parameter 'bases'"):
        from_description({"family": "rotation", "sigma": 0.1, "bases": 2})
    with pytest.raises(InputError, match="no parameter 'law'"):
        from_description({"family": "rotation", "sigma": 0.1, "law": "gaussian"})
    with pytest.raises(InputError, match="needs the parameter 'sigma'"):
        from_description({"family": "pixel"})


def test_only_what_has_fields_can_be_described():
    class Plain:
        family = "plain"

    with pytest.raises(InputError, match="frozen dataclass"):
        describe(Plain())


@pytest.mark.parametrize("size", [(8, 8), (12, 31)])
def test_parameters_add_up(size):
    """Where two deformations in a row stay on whole pixels they equal the one of the sum."""
    images = torch.zeros(1, 1, *size)
    images[..., 3:5, 3:5] = pictures(1, 1, 2, 2)
    h, w = size
    a = torch.tensor([[2 / w, -2 / h]], dtype=torch.float64)
    b = torch.tensor([[-4 / w, 4 / h]], dtype=torch.float64)
    shift = Translation(1.0)
    twice = shift.apply(shift.apply(images.double(), a), b)
    torch.testing.assert_close(twice, shift.apply(images.double(), a + b), atol=1e-12, rtol=0)

    noise = PixelNoise(0.5, exact=True)
    first, second = noise.sample(2, (1, *size), rng()).split(1)
    in_a_row = (noise.apply(noise.apply(images, first), second) * 255).round()
    assert torch.equal(in_a_row, (noise.apply(images, first + second) * 255).round())


def test_quarter_turns_add_up():
    images, turn = pictures(2, 1, 9, 9), Rotation("180deg")
    quarter = torch.tensor([math.pi / 2])
    twice = turn.apply(turn.apply(images, quarter), quarter)
    torch.testing.assert_close(twice, turn.apply(images, 2 * quarter), atol=2e-5, rtol=0)
    back = turn.apply(turn.apply(images, quarter), -quarter)
    torch.testing.assert_close(back, images, atol=2e-5, rtol=0)


def test_pixel_noise_is_a_sum_and_is_not_clipped():
    images = pictures(3, *IMAGE)
    params = PixelNoise(1.0).sample(3, IMAGE, rng())
    changed = PixelNoise(1.0).apply(images, params)
    assert torch.equal(changed, images + params)
    assert changed.min() < 0
    assert changed.max() > 1


def test_exact_noise_depends_on_the_integer_sum_alone():
    """Every pair of an 8-bit level and a noise level with the same sum gives the same float."""
    p = PixelNoise(0.5, exact=True)
    levels = torch.arange(256.0)
    images = (levels / 255).view(1, 1, 1, 256)
    for total in (-300, -1, 0, 17, 254, 255, 600):
        params = ((total - levels) / 255).view(1, 1, 1, 256)
        changed = p.apply(images, params)
        assert changed.unique().numel() == 1
        assert changed.flatten()[0] == torch.tensor(float(total)) / 255
    plain = PixelNoise(0.5).apply(images, (17 - levels.view(1, 1, 1, 256)) / 255)
    assert plain.unique().numel() > 1  # the gap that the exact mode closes


def test_smooth_flow_formula():
    h, w, k = 6, 9, 3
    p = SmoothFlow(1.0, bases=k)
    phi = torch.randn(1, 2, k, k, generator=rng(), dtype=torch.float64)
    i = (torch.arange(h, dtype=torch.float64) + 0.5) * math.pi / h
    j = (torch.arange(w, dtype=torch.float64) + 0.5) * math.pi / w
    order = torch.arange(k, dtype=torch.float64)
    field = torch.einsum(
        "cab,ai,bj->cij", phi[0], torch.cos(order[:, None] * i), torch.cos(order[:, None] * j)
    )
    images = pictures(1, 2, h, w).double()
    torch.testing.assert_close(p.apply(images, phi), DenseFlow(1.0).apply(images, field[None]))


def test_smooth_flow_with_one_cosine_is_translation():
    images, params = pictures(4, *IMAGE), Translation(0.3).sample(4, IMAGE, rng())
    flow = SmoothFlow(0.3, bases=1).apply(images, params.view(4, 2, 1, 1))
    torch.testing.assert_close(flow, Translation(0.3).apply(images, params), atol=1e-6, rtol=0)


def test_dense_flow_moves_each_pixel_by_its_own_amount():
    images = pictures(1, 1, 8, 8)
    params = torch.zeros(1, 2, 8, 8)
    params[0, 0, 2, 3] = 2 * 2 / 8  # two pixels to the right
    params[0, 1, 5, 6] = -1 * 2 / 8  # one pixel up
    changed = DenseFlow(1.0).apply(images, params)
    expected = images.clone()
    expected[..., 2, 3] = images[..., 2, 5]
    expected[..., 5, 6] = images[..., 4, 6]
    assert torch.equal(changed, expected)
