"""A client's passes against bare loops of the same steps, and what they refuse."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from certifl import rng as streams
from certifl.errors import InputError, ModelError, SpecError, StoreMismatch, TrainingDiverged
from certifl.federated import ClientData, FedAvg, LocalTraining, state_of, train
from certifl.federated.batches import BatchStream, batch_bounds
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import SCHEDULE, Noise, TinyNet, assert_same, client_data, differ, training

SEED = 5


class PlainNet(nn.Module):
    """Without dropout, so that a bare loop needs no generator for the network."""

    def __init__(self) -> None:
        super().__init__()
        tiny = TinyNet()
        self.layers = nn.Sequential(tiny.convolution, tiny.norm, nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(36, 3)
        nn.init.constant_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(images))


def bare_loop(data, schedule, *, fresh_optimizer_each_round):
    """Plain SGD in one piece on one client's data, with the project's streams."""
    model = PlainNet()

    def sgd():
        options = {key: getattr(schedule, key) for key in ("lr", "momentum", "weight_decay")}
        return torch.optim.SGD(model.parameters(), **options)

    optimizer = sgd()
    noise, epoch = Noise(), 0
    for round in range(schedule.rounds):
        if fresh_optimizer_each_round:
            optimizer = sgd()
        shuffle = streams.generator(SEED, "shuffle", data.client, round)
        draws = streams.generator(SEED, "augmentation", data.client, round)
        for _ in range(schedule.local_epochs):
            decays = epoch // schedule.decay_every
            optimizer.param_groups[0]["lr"] = schedule.lr * schedule.decay_factor**decays
            order = torch.randperm(len(data.labels), generator=shuffle)
            for chosen in order.split(schedule.batch_size):
                images = data.images[chosen].float() / 255
                images = noise.apply(images, noise.sample(len(chosen), images.shape[1:], draws))
                optimizer.zero_grad()
                functional.cross_entropy(model(images), data.labels[chosen]).backward()
                optimizer.step()
            epoch += 1
    return state_of(model)


@pytest.mark.parametrize("momentum", ["keep", "reset"])
def test_one_clients_fedavg_is_plain_sgd_in_one_piece(momentum, tmp_path):
    """With "keep" nothing happens at a round's end; "reset" empties the momentum buffers there."""
    data = client_data(0)
    local = training(model=PlainNet(), momentum_between_rounds=momentum)
    stored = train(FedAvg(), PlainNet(), [data], local, Checkpoints(tmp_path))
    reset = momentum == "reset"
    expected = bare_loop(data, SCHEDULE, fresh_optimizer_each_round=reset)
    assert_same(stored.server()["model"], expected)
    assert differ(expected, bare_loop(data, SCHEDULE, fresh_optimizer_each_round=not reset))


def test_momentum_is_kept_only_where_the_schedule_says_so():
    data, start = client_data(0), state_of(TinyNet())
    kept = training(momentum_between_rounds="keep").train_epochs(start, data, 0)
    assert set(kept.momentum) == {name for name, _ in TinyNet().named_parameters()}
    assert set(kept.momentum_part) == {"momentum"}
    for change in ({"momentum_between_rounds": "reset"}, {"momentum": 0.0}):
        local = training(**{"momentum_between_rounds": "keep", **change})
        trained = local.train_epochs(start, data, 0)
        assert trained.momentum_part == {}
        ignored = local.train_epochs(start, data, 0, momentum=kept.momentum)
        assert_same(ignored.state, trained.state)


def test_metrics_are_means_over_the_training_stream():
    start, data = state_of(PlainNet()), client_data(0, images=16)
    local = training(model=PlainNet(), lr=1e-30, local_epochs=1, momentum=0.0, augmentation=None)
    metrics = local.train_epochs(start, data, 0).metrics
    losses, right = [], 0
    order = torch.randperm(16, generator=streams.generator(SEED, "shuffle", 0, 0))
    model = PlainNet()  # in training mode: batch statistics
    for chosen in order.split(8):
        logits = model(data.images[chosen].float() / 255)
        losses.append(functional.cross_entropy(logits, data.labels[chosen], reduction="sum"))
        right += (logits.argmax(1) == data.labels[chosen]).sum().item()
    assert metrics["loss"] == pytest.approx(sum(losses).item() / 16, rel=1e-5)
    assert metrics["accuracy"] == right / 16


def test_training_learns():
    local = training(rounds=1, local_epochs=30, decay_every=None, augmentation=None)
    data, state = client_data(0, images=60), state_of(TinyNet())
    first = training(rounds=1, local_epochs=1).train_epochs(state, data, 0).metrics
    model = TinyNet()
    model.load_state_dict(local.train_epochs(state, data, 0).state)
    logits = model.eval()(data.images / 255)
    assert functional.cross_entropy(logits, data.labels).item() < 0.5 * first["loss"]


def test_the_template_and_the_arguments_stay_as_they_are():
    model = TinyNet().eval()
    before = state_of(model)
    local = training(model=model)
    start, data = state_of(TinyNet(seed=9)), client_data(0)
    copies = {k: v.clone() for k, v in start.items()}, data.images.clone(), data.labels.clone()
    trained = local.train_epochs(start, data, 0)
    assert_same(state_of(model), before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(start, copies[0])
    assert torch.equal(data.images, copies[1])
    assert torch.equal(data.labels, copies[2])
    result = {k: v.clone() for k, v in trained.state.items()}
    local.train_epochs(start, client_data(1), 0)
    assert_same(trained.state, result)  # the reused model object does not reach into results


def test_rounds_and_clients_have_streams_of_their_own():
    start, local = state_of(TinyNet()), training(decay_every=None)
    data = client_data(0)
    results = [
        local.train_epochs(start, data, 0).state,
        local.train_epochs(start, data, 1).state,
        local.train_epochs(start, ClientData(1, data.images, data.labels), 0).state,
    ]
    assert differ(results[0], results[1])
    assert differ(results[0], results[2])
    assert differ(results[1], results[2])


def test_dropout_draws_from_a_derived_stream():
    start, data = state_of(TinyNet()), client_data(0)
    local = training(augmentation=None)
    torch_state = torch.get_rng_state()
    first = local.train_epochs(start, data, 0).state
    assert torch.equal(torch.get_rng_state(), torch_state)
    torch.rand(3)
    assert_same(local.train_epochs(start, data, 0).state, first)
    torch.set_rng_state(torch_state)
    other = LocalTraining(TinyNet(), SCHEDULE, seed=SEED)
    other._model.dropout.p = 0.0
    assert differ(other.train_epochs(start, data, 0).state, first)


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (8, 4, [4, 4]),
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_batches_cover_every_image_and_none_is_left_alone(images, batch_size, sizes):
    bounds = batch_bounds(images, batch_size)
    assert [stop - start for start, stop in bounds] == sizes
    assert [bounds[0][0], bounds[-1][1]] == [0, images]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


def test_one_image_left_over_does_not_break_batchnorm():
    class Flat(nn.Sequential):  # BatchNorm over features: a batch of one image is an error
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    local = training(model=Flat())
    trained = local.train_epochs(state_of(Flat()), client_data(0, images=17), 0)
    assert trained.state["2.num_batches_tracked"].item() == 2 * 2


def stream(data, **changes):
    settings = {"batch_size": 100, "augmentation": None, "flip": False, "crop": 0}
    return BatchStream(data, seed=SEED, round=0, **{**settings, **changes})


def test_an_epoch_is_every_image_once_in_a_new_order_each_time():
    data = client_data(0, images=20)
    batches = stream(data, batch_size=6)
    epochs = [list(batches.epoch()) for _ in range(2)]
    orders = []
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [6, 6, 6, 2]
        images = torch.cat([batch.images for batch in epoch])
        labels = torch.cat([batch.labels for batch in epoch])
        distance = (images[:, None] - (data.images.float() / 255)[None]).abs().amax((2, 3, 4))
        order = distance.argmin(1)
        assert distance.amin(1).max() == 0
        assert sorted(order.tolist()) == list(range(20))
        assert torch.equal(labels, data.labels[order])
        orders.append(order)
    assert not torch.equal(orders[0], orders[1])


def test_augmentation_is_one_sample_per_image_and_step():
    data = client_data(0, images=12)
    plain = stream(data)
    noisy = stream(data, augmentation=Noise(0.2))
    first, second = (
        next(noisy.epoch()).draw() - next(plain.epoch()).draw(),
        next(noisy.epoch()).draw() - next(plain.epoch()).draw(),
    )
    assert first.std().item() == pytest.approx(0.2, rel=0.1)
    everything = torch.cat([first.flatten(1), second.flatten(1)])
    correlation = torch.from_numpy(np.corrcoef(everything.numpy())) - torch.eye(24)
    assert correlation.abs().max() < 0.6  # no two images, no two steps share their noise


def test_flips_mirror_about_half_of_the_images():
    data = client_data(0, images=200)
    plain, mirrored = (
        next(stream(data, batch_size=200, flip=flip).epoch()).draw() for flip in (False, True)
    )
    same = (plain == mirrored).all(3).all(2).all(1)
    flipped = (plain.flip(-1) == mirrored).all(3).all(2).all(1)
    assert bool((same | flipped).all())
    assert 60 < int(flipped.sum()) < 140


def test_crops_are_shifts_with_zero_padding():
    data = client_data(0, images=100)
    wide = ClientData(0, data.images[..., :6].contiguous(), data.labels)  # 8 x 6: not square
    plain, cropped = (next(stream(wide, crop=crop).epoch()).draw() for crop in (0, 2))
    padded = functional.pad(plain, (2, 2, 2, 2))
    shifts = {(dy, dx) for dy in range(5) for dx in range(5)}
    found = set()
    for image, source in zip(cropped, padded, strict=True):
        matches = {
            (dy, dx)
            for dy, dx in shifts
            if torch.equal(image, source[:, dy : dy + 8, dx : dx + 6])
        }
        assert matches
        found |= matches
    assert len(found) > 15


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 8, 8)])
def test_any_size_and_channels(shape):
    channels, height, width = shape
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 3))
    images = torch.randint(256, (10, *shape), dtype=torch.uint8)
    local = training(model=model, flip=True, crop=1)
    trained = local.train_epochs(state_of(model), ClientData(2, images, torch.arange(10) % 3), 0)
    assert trained.state["1.weight"].isfinite().all()


def test_frozen_parameters_and_unused_ones_are_left_alone():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(64, 8)
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, images):
            return self.used(self.frozen(images.flatten(1)))

    model = Partly()
    start = state_of(model)
    local = training(model=model, momentum_between_rounds="keep")
    trained = local.train_epochs(start, client_data(0), 0)
    assert set(trained.momentum) == {"used.weight", "used.bias"}
    again = local.train_epochs(trained.state, client_data(0), 1, momentum=trained.momentum)
    for name, value in start.items():
        assert torch.equal(again.state[name], value) == (not name.startswith("used"))


def test_a_diverging_client_is_named():
    local = training(lr=1e30, momentum=0.9)
    with pytest.raises(TrainingDiverged, match="client 4 in round 2") as caught:
        local.train_epochs(state_of(TinyNet()), client_data(4), 2)
    assert (caught.value.client, caught.value.round) == (4, 2)
    trained = training().train_epochs(state_of(TinyNet()), client_data(4), 2)
    local.schedule = SCHEDULE  # the same trainer is usable again: nothing of the failure stays
    assert_same(local.train_epochs(state_of(TinyNet()), client_data(4), 2).state, trained.state)


def test_weights_that_overflow_in_the_last_step_are_noticed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    huge = {"lr": 3e38, "weight_decay": 1e4}
    local = training(model=model, momentum=0.0, local_epochs=1, batch_size=100, **huge)
    with pytest.raises(TrainingDiverged, match=r"1\.(weight|bias) is not finite"):
        local.train_epochs(state_of(model), client_data(0), 0)


def test_requests_that_cannot_be_trained_are_refused():
    pixels, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)
    none = ClientData(3, pixels[:0], labels[:0])
    with pytest.raises(InputError, match="Client 3 has no training images"):
        training().train_epochs(state_of(TinyNet()), none, 0)
    with pytest.raises(ModelError, match="nothing to train"):
        LocalTraining(nn.Flatten(), replace(SCHEDULE), seed=0)
    with pytest.raises(InputError, match="uint8"):
        ClientData(0, pixels.float(), labels[:2])
    with pytest.raises(InputError, match="as many labels"):
        ClientData(0, pixels, labels)


def formatted(precision: str, memory_format: str) -> LocalTraining:
    return LocalTraining(
        TinyNet(), SCHEDULE, seed=SEED, precision=precision, memory_format=memory_format
    )


def trained_in(precision: str, memory_format: str):
    local = formatted(precision, memory_format)
    return local.train_epochs(state_of(TinyNet()), client_data(0, 12), 0).state


def test_auto_is_the_layout_that_a_precision_always_had():
    """No bit of an older study changes: float32 stays contiguous, bfloat16 channels-last."""
    for precision, layout in (("float32", "contiguous"), ("bfloat16", "channels-last")):
        assert_same(trained_in(precision, "auto"), trained_in(precision, layout))


def test_channels_last_in_float32_is_the_same_training_up_to_rounding():
    local = formatted("float32", "channels-last")
    weight = next(p for p in local.network.parameters() if p.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain, last = (trained_in("float32", layout) for layout in ("auto", "channels-last"))
    for name, value in plain.items():
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-5)


def test_another_layout_does_not_resume_a_training(tmp_path):
    clients = [client_data(0, 12)]
    folder = Checkpoints(tmp_path)
    train(FedAvg(), TinyNet(), clients, formatted("float32", "auto"), folder)
    with pytest.raises(StoreMismatch, match="memory_format"):
        train(FedAvg(), TinyNet(), clients, formatted("float32", "channels-last"), folder)


def test_unknown_layouts_are_refused():
    with pytest.raises(SpecError, match="contiguous"):
        formatted("float32", "channels_last")
