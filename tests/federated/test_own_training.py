"""Training networks as people have them: equal to their plain twins, or refused beforehand."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_study as tiny
from certifl.errors import ModelError
from certifl.federated import FedAvg, LocalTraining, PerFedAvg
from certifl.federated.batches import Batch
from certifl.federated.objectives import Augmented, Consistency, Stability
from certifl.federated.privacy import check_network
from certifl.federated.privacy import mechanisms as clipping
from certifl.federated.states import ClientState
from certifl.models import check_logits, state_of
from private_federation import PlainNet
from tiny_federation import SCHEDULE, Noise, assert_same, client_data, federate, training


def test_batch_norm_and_a_client_with_one_image_are_refused_before_a_round(tmp_path):
    data = [client_data(0, 20), client_data(1, 1), client_data(2, 20)]
    with pytest.raises(ModelError, match=r"Client 1 has one training image.*BatchNorm \(norm\)"):
        federate(tmp_path / "training", data=data)
    assert not (tmp_path / "training").exists() or not list((tmp_path / "training").iterdir())


def test_a_client_that_is_loaded_later_is_refused_when_it_trains():
    local = training()
    with pytest.raises(ModelError, match="Client 4 has one training image"):
        local.train_epochs(state_of(local.network), client_data(4, 1), 0)


def test_batch_norm_and_batches_of_one_image_are_refused():
    with pytest.raises(ModelError, match=r"batch_size = 1.*BatchNorm \(norm\)"):
        training(batch_size=1)


def test_without_batch_norm_one_image_is_enough():
    local = LocalTraining(PlainNet(), replace(SCHEDULE, batch_size=1), seed=5)
    assert local.train_epochs(state_of(PlainNet()), client_data(0, 1), 0).metrics["loss"] > 0


ALONE = ("data.train_images=3", "clients.count=2", "training.rounds=1")


def test_the_commands_refuse_a_client_with_one_image(tmp_path):
    spec = tiny.write_spec(tmp_path, *ALONE, "model.name=small_resnet")
    words = ("one training image", "BatchNorm", "GroupNorm")
    tiny.cli("run", spec, "--out", tmp_path / "run").refused(*words)
    assert not (tmp_path / "run").exists()
    tiny.cli("plan", spec).refused(*words)
    tiny.cli("plan", tiny.write_spec(tmp_path, *ALONE)).fine()


def test_a_client_that_never_trained_is_not_certified(tmp_path, monkeypatch):
    real = LocalTraining.train_epochs

    def failing(self: LocalTraining, start, data, round, **options):
        if data.client == 1:
            raise RuntimeError("broken")
        return real(self, start, data, round, **options)

    monkeypatch.setattr(LocalTraining, "train_epochs", failing)
    own = ('algorithm={name="local"}', "clients.min_clients=1")
    spec = tiny.write_spec(tmp_path, *own)
    answer = tiny.cli("run", spec, "--out", tmp_path / "run")
    answer.refused("Client 1", "failed in every round", code=1)


class InPlace(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.body, self.in_place = PlainNet(), in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


class Nothing:
    """A perturbation that gives the images back as they are."""

    def sample(self, n: int, image_shape: tuple[int, int, int], generator: object) -> Tensor:
        return torch.zeros(n, 1)

    def apply(self, images: Tensor, params: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize(
    ("algorithm", "objective", "augmentation"),
    [
        (FedAvg(), Augmented(), Noise()),
        *((FedAvg(), one, None) for one in (Augmented(), Stability(), Consistency())),
        *((FedAvg(), one, Nothing()) for one in (Augmented(), Stability(), Consistency())),
        (PerFedAvg(approximation="hessian-free"), Augmented(), None),
        (PerFedAvg(approximation="hessian-free"), Augmented(), Nothing()),
    ],
)
def test_normalization_in_place_trains_like_its_copy(algorithm, objective, augmentation):
    states = []
    for in_place in (False, True):
        local = LocalTraining(
            InPlace(in_place), SCHEDULE, seed=5, augmentation=augmentation, objective=objective
        )
        server = algorithm.init(state_of(InPlace(in_place)))
        update, _ = algorithm.client_round(server, ClientState(), client_data(0, 20), local)
        states.append(update.model)
    assert_same(*states)


def test_names_of_weights_stay_as_they_are_in_training():
    net = nn.DataParallel(PlainNet())
    local = LocalTraining(net, SCHEDULE, seed=5)
    trained = local.train_epochs(state_of(net), client_data(0, 20), 0)
    net.load_state_dict(trained.state)
    plain = LocalTraining(PlainNet(), SCHEDULE, seed=5)
    alone = plain.train_epochs(state_of(PlainNet()), client_data(0, 20), 0)
    assert_same({f"module.{name}": v for name, v in alone.state.items()}, trained.state)


def test_lazy_layers_must_have_seen_an_image():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ModelError, match="Pass one batch of images through it"):
        LocalTraining(lazy, SCHEDULE, seed=5)


def test_programs_can_be_built_but_what_is_frozen_is_not_trained():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    batch = torch.export.Dim("batch")
    given = (torch.rand(2, 1, 6, 6),)
    program = torch.export.export(net, given, dynamic_shapes=({0: batch},)).module()
    check_logits(program, 1, 3, (6, 6))
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        frozen = torch.jit.freeze(torch.jit.script(net))
    check_logits(frozen, 1, 3, (6, 6))
    with pytest.raises(ModelError, match="nothing to train"):
        LocalTraining(frozen, SCHEDULE, seed=5)


def test_a_network_in_another_format_says_what_to_do_when_it_is_built():
    with pytest.raises(ModelError, match=r"float16.*call model.float\(\)"):
        check_logits(PlainNet().half(), 1, 3, (6, 6))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_second_network_beside_one_with_weight_norm():
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.LazyLinear(3))
    net(torch.rand(1, 1, 6, 6))
    local = LocalTraining(net, SCHEDULE, seed=5)
    local.network(torch.rand(2, 1, 6, 6))  # the weight it keeps now has a gradient history
    assert local.second_model(state_of(net), weight_decay=0.0).model is not local.network


def test_a_network_that_cannot_be_copied_cannot_be_trained():
    import threading

    net = PlainNet()
    net.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"cannot be copied.*locks"):
        LocalTraining(net, SCHEDULE, seed=5)


def relu(in_place: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=in_place), nn.Flatten(),
        nn.Linear(144, 3),
    )  # fmt: skip


class Written(nn.Module):
    """Writes over the output of a layer without saying so in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu_().flatten(1))


def test_layers_that_write_over_their_input_are_refused_by_name():
    pytest.importorskip("opacus", reason="needs the extra [dp]")
    check_network(relu(in_place=False), "example")
    check_network(relu(in_place=True), "client")
    with pytest.raises(ModelError, match=r"2 \(ReLU\).*inplace=False"):
        check_network(relu(in_place=True), "example")
    clipping.try_clipping(relu(in_place=False), (1, 8, 8))
    with pytest.raises(ModelError, match="overwrites one"):
        clipping.try_clipping(Written(), (1, 8, 8))


def test_normalization_in_place_has_the_same_clipped_gradients():
    pytest.importorskip("opacus", reason="needs the extra [dp]")
    sums = []
    for in_place in (False, True):
        data = client_data(0, 6)
        batch = Batch(data.images.float() / 255, data.labels, None, torch.Generator())
        net = InPlace(in_place)
        total, _ = clipping.clipped_sum(net, dict(net.named_parameters()), Augmented(), batch, 0.4)
        sums.append(total)
        assert torch.equal(batch.images, data.images.float() / 255)
    assert_same(*sums)


CODE = """
from torch import nn

def named(in_channels, num_classes):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(inplace=True), nn.Flatten(),
                         nn.Linear(144, num_classes))

class Written(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(144, classes)
    def forward(self, x):
        x = self.conv(x)
        x += 1
        return self.head(x.flatten(1))

def unnamed(in_channels, num_classes):
    return Written(in_channels, num_classes)
"""


@pytest.fixture
def _own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "writing.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("writing", None)


@pytest.mark.usefixtures("_own_code")
@pytest.mark.parametrize(("name", "says"), [("named", "1 (ReLU)"), ("unnamed", "x += y")])
def test_a_run_with_privacy_refuses_them_before_it_begins(name, says, tmp_path):
    pytest.importorskip("opacus", reason="needs the extra [dp]")
    private = 'privacy={kind="example", noise_multiplier=1.0, max_norm=1.0, delta=1e-3}'
    spec = tiny.write_spec(tmp_path, f"model.name=writing:{name}", private)
    tiny.cli("run", spec, "--out", tmp_path / "run").refused(says, "inplace=")
    assert not (tmp_path / "run").exists()
