"""`certify` on classifiers whose smoothed probabilities are known, and its promises."""

import gc
import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import data
from torch.utils.data import DataLoader

import certifl
from certifl.certification.checks import checked_blocks
from certifl.certification.counts import Request
from certifl.certification.network import prepare
from certifl.certification.sampling import CHUNK, VoteCounter
from certifl.certification.settings import ESTIMATORS, Settings
from certifl.errors import InputError
from certifl.rng import image_key, vote_generator
from known_models import (
    HalfSpace,
    normal_cdf,
    ramps,
    read_angle,
    read_factor,
    read_shift,
    votes_for,
)

NOISE = certifl.PixelNoise(0.5)
# The scan is no bound at delta = 0 alone; test_scan.py has its own cases.
AT_ZERO = [name for name in ESTIMATORS if name != "scan"]


def half_space(seed: int = 0, images: int = 12) -> tuple[HalfSpace, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    model = HalfSpace(torch.randn(3 * 8 * 8, generator=g), 0.0).eval()
    x = torch.rand((images, 3, 8, 8), generator=g)
    with torch.no_grad():
        middle = (x.flatten(1) @ model.weight).median()
    model.bias = -float(middle)
    return model, x


@pytest.mark.parametrize("estimator", AT_ZERO)
def test_a_half_space_is_never_certified_beyond_its_true_radius(estimator):
    model, images = half_space()
    options = {"estimator": estimator, "precision": "float32"}
    made = certifl.certify(model, images, NOISE, n=4000, **options)
    # 12 images at alpha = 1e-3: all hold with probability 0.988, and the seed is fixed.
    assert (made.radius <= model.true_radius(images).numpy()).all()
    assert (made.predicted[~made.abstained] >= 0).all()
    assert made.radius.max() > 0.1


def test_a_half_space_is_certified_up_to_nearly_its_true_radius():
    model, images = half_space()
    sigma = 0.25
    true = model.true_radius(images)
    # At p between 0.85 and 0.99 the bound of 100 000 votes lies 3.1 standard errors below p, which
    # is 1.4 to 1.6 % of the radius; the votes of one image add or take 0.5 %.
    moderate = ((true / sigma > 1.05) & (true / sigma < 2.4)).nonzero()[:3, 0]
    assert len(moderate) == 3
    options = {"estimator": "top-class", "precision": "float32"}
    made = certifl.certify(model, images[moderate], certifl.PixelNoise(sigma), **options)
    share = made.radius / true[moderate].numpy()
    assert share.mean() >= 0.98
    assert share.min() >= 0.97


@pytest.mark.parametrize("estimator", AT_ZERO)
def test_rotation_follows_corollary_1_where_h_of_the_angle_is_known(estimator):
    # sigma = 1 and f right on |angle| <= 0.7: p_A = 0.7, Corollary 1 gives 0.4; the truth is 0.7.
    model = votes_for(lambda x: read_angle(x).abs() <= 0.7)
    made = certifl.certify(
        model, ramps(), certifl.Rotation(1.0), n=20_000, estimator=estimator, labels=[1]
    )
    assert made.correct.all()
    assert 0.36 <= made.radius[0] <= 0.4
    assert 0.68 <= made.p_lower[0] <= 0.7


def test_scaling_follows_corollary_1_where_h_of_the_factor_is_known():
    model = votes_for(lambda x: read_factor(x).abs() <= 0.3)
    made = certifl.certify(model, ramps(), certifl.Scaling(0.4), n=20_000, estimator="runner-up")
    # p_A = 0.75, p_B = 0.25
    assert 0.18 <= made.radius[0] <= 0.2


def test_translation_follows_the_gaussian_law_where_h_of_the_shift_is_known():
    sigma, edge = 0.25, 0.2
    model = votes_for(lambda x: read_shift(x)[:, 0] <= edge)
    made = certifl.certify(
        model, ramps(), certifl.Translation(sigma), n=20_000, estimator="top-class"
    )
    # h is a half-plane: the bound is tight and the true radius is the distance to its edge.
    assert 0.9 * edge <= made.radius[0] <= edge
    assert made.p_lower[0] <= normal_cdf(edge / sigma)


def test_an_image_is_certified_alike_alone_in_a_batch_and_with_any_batch_size():
    model, images = half_space(images=7)

    def run(x: torch.Tensor, **options: object) -> certifl.Certificates:
        return certifl.certify(model, x, NOISE, n=1000, precision="float32", **options)

    together = run(images)
    for row in (0, 3, 6):
        alone = run(images[row : row + 1])
        assert np.array_equal(alone.counts[0], together.counts[row])
        assert np.array_equal(alone.selection_counts[0], together.selection_counts[row])
        assert alone.radius[0] == together.radius[row]
    assert np.array_equal(run(images, batch_size=33).counts, together.counts)
    assert np.array_equal(run(images.flip(0)).counts, together.counts[::-1])
    assert not np.array_equal(run(images, seed=1).counts, together.counts)


def test_no_global_generator_is_read_or_moved():
    model, images = half_space(images=2)
    torch.manual_seed(1)
    first = certifl.certify(model, images, NOISE, n=200)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = certifl.certify(model, images, NOISE, n=200)
    assert first.same_results(second)
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_votes_are_a_prefix_of_more():
    model, images = half_space(images=2)
    network = prepare(model, images, precision="float32")
    counter = VoteCounter(network, NOISE, seed=0)

    def votes(start: int, stop: int) -> np.ndarray:
        request = Request(0, 1, image_key(images[1]), "estimation", start, stop)
        return counter.count(images, [request], slots=1)

    assert np.array_equal(votes(0, 730), votes(0, 250) + votes(250, 730))
    assert votes(0, 730).sum() == 730


def test_selection_and_estimation_votes_never_share_a_stream():
    seeds = {
        vote_generator(3, purpose, 12345, chunk).initial_seed() % 2**32
        for purpose in ("selection", "estimation", "attack", "predict", "scan")
        for chunk in range(2000)
    }
    # torch's CPU generator keeps 32 bits of its seed, so these 32 bits must differ.
    assert len(seeds) == 10_000


def test_a_chunk_is_drawn_alike_however_much_of_it_is_wanted():
    draws = [NOISE.sample(CHUNK, (1, 8, 8), vote_generator(0, "estimation", 1, 0)) for _ in "ab"]
    assert torch.equal(*draws)


def test_sequential_stops_early_and_keeps_what_fixed_votes_certify_on_the_grid():
    model, images = half_space(images=12)
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    options = {"n": 20_000, "precision": "float32"}
    fixed = certifl.certify(model, images, NOISE, estimator="runner-up", **options)
    early = certifl.certify(model, images, NOISE, estimator="sequential", radii=grid, **options)
    assert early.votes.mean() < 0.5 * fixed.votes.mean()
    floor = np.searchsorted(grid, fixed.radius, side="right")
    lost = (np.searchsorted(grid, early.radius, side="right") < floor).sum()
    # An image that lies at a grid step within the sampling error may fall either way.
    assert lost <= 1
    assert set(early.votes.tolist()) <= set(Settings(n=20_000).estimator_for(NOISE).looks)


def test_keeping_the_curve_costs_fewer_votes_and_never_claims_more():
    model, images = half_space(images=20)
    grid = np.arange(11) * 0.1
    options = {"n": 10_000, "precision": "float32", "radii": grid.tolist()}
    kept = certifl.certify(model, images, NOISE, **options)
    curve = certifl.certify(model, images, NOISE, keep="curve", **options)
    assert curve.votes.mean() < 0.75 * kept.votes.mean()
    assert set(curve.votes.tolist()) <= set(
        Settings(n=10_000, keep="curve").estimator_for(NOISE).looks
    )
    assert sum(curve.conditions["look_levels"]) <= curve.conditions["alpha"]
    steps = [np.searchsorted(grid, held.radius, side="right") for held in (curve, kept)]
    # The final looks differ in level by a little, so a lucky image may gain a step.
    assert (steps[0] <= steps[1] + 1).all()
    assert steps[0].mean() > steps[1].mean() - 0.05 * len(grid)


def test_keep_is_for_sequential_certification_alone():
    model, images = half_space(images=1)
    for wrong in ({"keep": "nothing"}, {"keep": "curve", "estimator": "runner-up"}):
        with pytest.raises(certifl.errors.InputError, match="keep"):
            certifl.certify(model, images, NOISE, n=100, **wrong)


def test_sequential_votes_are_the_first_of_the_fixed_ones():
    model, images = half_space(images=3)
    early = certifl.certify(model, images, NOISE, n=3000, precision="float32", radii=[0.5])
    options = {"estimator": "top-class", "precision": "float32"}
    for row, votes in enumerate(early.votes):
        fixed = certifl.certify(model, images[row : row + 1], NOISE, n=int(votes), **options)
        assert np.array_equal(fixed.counts[0], early.counts[row])


def test_label_aware_stopping_needs_labels_and_a_wrong_class():
    model, images = half_space(images=4)
    plain = certifl.certify(model, images, NOISE, n=4000)
    chosen = plain.selection_counts.argmax(axis=1)
    right = certifl.certify(model, images, NOISE, n=4000, labels=chosen)
    wrong = certifl.certify(model, images, NOISE, n=4000, labels=1 - chosen)
    assert np.array_equal(right.votes, plain.votes)
    assert (wrong.votes == Settings(n=4000).estimator_for(NOISE).looks[0]).all()
    assert not wrong.correct.any()
    patient = certifl.certify(model, images, NOISE, n=4000, labels=1 - chosen, label_aware=False)
    assert np.array_equal(patient.votes, plain.votes)


def test_predict_answers_or_abstains():
    model, images = half_space(images=12)
    true = model.true_radius(images).numpy()
    answers = certifl.predict(model, images, NOISE, n=1000, alpha=1e-3)
    with torch.no_grad():
        classes = model(images).argmax(1).numpy()
    assert answers.dtype == np.int64
    far = true > 0.2
    assert far.sum() >= 3
    assert np.array_equal(answers[far], classes[far])
    few = certifl.predict(model, images, NOISE, n=11, alpha=1e-3)
    assert ((few == -1) | (few == classes)).all()
    assert (few == -1).any()  # eleven votes must all agree


def test_folding_and_bfloat16_keep_the_network_the_same_function():
    torch.manual_seed(0)
    net = certifl.models.small_resnet(in_channels=3, num_classes=10).train()
    for _ in range(2):
        net(torch.rand(16, 3, 16, 16))  # running statistics that are not the identity
    net.eval()
    images = torch.rand(8, 3, 16, 16)
    folded = prepare(net, images, device="cpu", precision="float32")
    assert folded.folded
    with torch.no_grad():
        assert torch.allclose(folded.call(images), net(images), atol=1e-3, rtol=1e-3)
        rounded = prepare(net, images, device="cpu", precision="bfloat16")
        assert rounded.call(images).dtype == torch.bfloat16
        assert torch.allclose(rounded.call(images).float(), net(images), atol=0.15)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())  # the model is left alone


def test_a_convolution_used_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
            self.head = nn.Linear(64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.norm(self.conv(x)) + self.conv(x)).flatten(1))

    images = torch.rand(2, 1, 8, 8)
    assert not prepare(Twice().eval(), images, precision="float32").folded


def test_the_record_says_what_was_certified():
    model, images = half_space(images=2)
    made = certifl.certify(model, images, NOISE, n=500, seed=9)
    metadata = made.conditions
    assert metadata["family"] == "pixel"
    assert [metadata[key] for key in ("sigma", "alpha", "n", "seed")] == [0.5, 1e-3, 500, 9]
    assert metadata["norm"] == "l2"
    assert metadata["unit"] == "intensity"
    assert metadata["threat"]
    assert math.isclose(sum(metadata["look_levels"]), 1e-3, rel_tol=1e-9)
    assert metadata["model_fingerprint"] == certifl.models.fingerprint(model)
    assert made.votes.shape == (2,)
    assert made.seconds.sum() > 0


def test_radii_of_another_unit_are_refused_before_a_vote():
    model, image = certifl.models.build("small_cnn", 1, 2, seed=0).eval(), torch.zeros(1, 1, 8, 8)
    with pytest.raises(InputError, match=r"in radians \(5 degrees are 0\.0873\).*from 5 up"):
        certifl.certify(model, image, certifl.Rotation("18deg"), n=1000, radii=[0, 5, 10])


def test_nobody_takes_unlabelled_images_for_wrong_ones():
    noise = certifl.PixelNoise(0.25)
    model = certifl.models.build("small_cnn", 1, 2, seed=0).eval()
    made = certifl.certify(model, torch.zeros(2, 1, 8, 8), noise, n0=10, n=100)
    assert len(made.radius) == 2
    for ask in (made.average_certified_radius, lambda: made.certified_accuracy([0.0])):
        with pytest.raises(InputError, match=r"2 of 2 certificates have no label.*give labels"):
            ask()


# Images that come in blocks: the same certificates as of all of them at once.


@pytest.fixture
def model() -> HalfSpace:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(2))
    return HalfSpace(weight, -float(weight.sum() / 2)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand((7, 1, 8, 8), generator=torch.Generator().manual_seed(1))


LABELS = np.array([0, 1, 0, 1, 0, 1, 0])


def test_blocks_are_certified_like_the_whole(model, images):
    whole = certifl.certify(model, images, NOISE, labels=LABELS, n=500)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    parts = certifl.certify(
        model, (images[cut] for cut in cuts), NOISE, labels=(LABELS[cut] for cut in cuts), n=500
    )
    assert parts.same_results(whole)
    assert parts.index.tolist() == list(range(7))
    assert parts.conditions == whole.conditions  # the data fingerprint too


def test_blocks_need_no_labels_and_may_be_arrays(model, images):
    whole = certifl.certify(model, images, NOISE, n=500)
    parts = certifl.certify(model, [images[:4].numpy(), images[4:].numpy()], NOISE, n=500)
    assert parts.same_results(whole)
    assert (parts.label == -1).all()


def test_no_more_than_two_blocks_are_held(model):
    alive: list[weakref.ref] = []
    most = 0

    def blocks() -> Iterator[Tensor]:
        nonlocal most
        for number in range(4):
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            block = torch.full((2, 1, 8, 8), number / 6)
            alive.append(weakref.ref(block))
            yield block

    assert len(certifl.certify(model, blocks(), NOISE, n=100)) == 8
    assert most <= 2


def test_progress_never_goes_back(model, images):
    seen: list[tuple[int, int]] = []
    blocks = [images[:3], images[3:]]
    certifl.certify(model, blocks, NOISE, n=300, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen)
    assert seen[-1] == (7 * 400, 7 * 400)


@pytest.mark.parametrize(
    ("blocks", "labels", "says"),
    [
        ([], None, "no block"),
        ([torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 7)], None, r"one shape; block 1"),
        ([torch.rand(1, 8, 8)], None, "four axes"),
        ([torch.rand(1, 1, 8, 8), torch.rand(0, 1, 8, 8)], None, "nothing to certify"),
        ([torch.rand(2, 1, 8, 8)] * 2, [[0, 1]], "only one of both for block 1"),
        ([torch.rand(2, 1, 8, 8)], [[0, 1], [0, 1]], "only one of both for block 1"),
        ([torch.rand(2, 1, 8, 8)], [[0]], "one number per image"),
    ],
)
def test_blocks_that_do_not_fit(model, blocks, labels, says):
    with pytest.raises(InputError, match=says):
        certifl.certify(model, blocks, NOISE, labels=labels, n=100)


@pytest.mark.parametrize("label", [0.7, "3", None])
def test_labels_of_a_data_set_are_never_cut_to_whole_numbers(label):
    pairs = [(torch.rand(1, 4, 4), label)] * 3
    with pytest.raises(InputError, match="as a label: labels must be whole numbers"):
        next(checked_blocks(ListDataset(pairs), None, certifl.PixelNoise(0.25)))


def test_loaders_that_shuffle_by_their_sampler_are_refused_too():
    images = ListDataset(list(torch.rand(4, 1, 4, 4)))
    shuffling = data.RandomSampler(range(4))
    for options in (
        {"sampler": data.SubsetRandomSampler(range(4))},
        {"sampler": data.WeightedRandomSampler([1.0] * 4, 4)},
        {"batch_sampler": data.BatchSampler(shuffling, 2, drop_last=False)},
    ):
        with pytest.raises(InputError, match="shuffle=False"):
            next(checked_blocks(DataLoader(images, **options), None, certifl.PixelNoise(0.25)))


class ListDataset(data.Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int):
        return self.items[row]
