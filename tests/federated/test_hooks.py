"""Gradient hooks that work on all weights together: the bits of one weight after the other."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from algorithm_cases import CASES, all_rounds, in_memory, light
from certifl.errors import TrainingDiverged
from certifl.federated import Mixture
from certifl.federated.algorithms.proximal import proximal_hook
from certifl.federated.algorithms.scaffold import _MeanGradient
from certifl.federated.objectives import Augmented
from certifl.federated.states import ModelState, ServerState
from certifl.federated.steps import GradientHook, StepContext
from tiny_federation import assert_same, training


def advance_one_by_one(on: StepContext) -> None:
    hook = on._hook
    if hook is not None:
        with torch.no_grad():
            for name, parameter in on.parameters.items():
                if parameter.grad is not None:
                    hook({name: parameter})
    on._optimizer.step()


@pytest.mark.parametrize("name", ["mixture", "fedprox", "scaffold", "ditto", "fedrep"])
def test_every_hook_is_the_same_weight_by_weight(name, monkeypatch):
    _, server, states = in_memory(name)
    monkeypatch.setattr(StepContext, "optimizer_step", advance_one_by_one)
    single = all_rounds(CASES[name], [0, 1, 2], light(momentum_between_rounds="keep"))
    assert_same(server.parts, single[0].parts)
    for one, other in zip(states, single[1], strict=True):
        assert_same(one.parts, other.parts)


def weights(count: int = 4, seed: int = 0) -> dict[str, nn.Parameter]:
    """Weights with gradients, of which one has none."""
    drawn = torch.Generator().manual_seed(seed)
    made = {f"w{i}": nn.Parameter(torch.randn(i + 1, 5, generator=drawn)) for i in range(count)}
    for parameter in list(made.values())[1:]:
        parameter.grad = torch.randn(parameter.shape, generator=drawn)
    return made


CENTER: ModelState = {name: value.detach() for name, value in weights(seed=1).items()}
CORRECTION: ModelState = {name: CENTER[name] for name in ("w0", "w2")}


def pulled(name: str, parameter: nn.Parameter) -> None:
    """Eq. (5) as it is written, with lambda = 0.3."""
    parameter.grad.mul_(0.3)
    parameter.grad.add_(parameter - CENTER[name], alpha=2 * (1 - 0.3))


def near(name: str, parameter: nn.Parameter) -> None:
    parameter.grad.add_(parameter - CENTER[name], alpha=0.7)


def corrected(name: str, parameter: nn.Parameter) -> None:
    if name in CORRECTION:
        parameter.grad.add_(CORRECTION[name])


Formula = Callable[[str, nn.Parameter], None]
HOOKS: dict[str, tuple[Callable[[], GradientHook | None], Formula]] = {
    "mixture": (lambda: Mixture(0.3).hook(ServerState(0, {"model": CENTER}), training()), pulled),
    "held near": (lambda: proximal_hook(CENTER, 0.7), near),
    "scaffold": (lambda: _MeanGradient(CORRECTION), corrected),
}


class Still(torch.optim.SGD):
    """Moves nothing, so that what a context launches is what its hook launches."""

    def step(self, closure: Any = None) -> None:
        del closure


def context_of(parameters: dict[str, nn.Parameter], hook: GradientHook | None) -> StepContext:
    return StepContext(nn.Module(), parameters, Still(parameters.values()), Augmented(), hook)


class Launches(TorchDispatchMode):
    """Counts operations, and those for which a GPU would wait for the host or the host for it."""

    HOST_READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.lift_fresh.default,  # a tensor made of numbers of the host
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = self.host_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.host_reads += func in self.HOST_READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_does_what_its_formula_says_to_each_weight(name):
    (make, formula), joint, single = HOOKS[name], weights(), weights()
    with torch.no_grad():
        for parameter in list(single.values())[1:]:
            formula(next(n for n, p in single.items() if p is parameter), parameter)
    context_of(joint, make()).optimizer_step()
    assert joint["w0"].grad is None
    for one, other in zip(list(joint.values())[1:], list(single.values())[1:], strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_launches_as_much_for_many_weights_as_for_few(name, monkeypatch):
    """On a GPU a replayed step is one launch; a launch for each weight would undo that."""
    counts = []
    for count in (4, 40):
        every = {n: p.detach() for n, p in weights(count, seed=1).items()}
        monkeypatch.setitem(globals(), "CENTER", every)
        monkeypatch.setitem(globals(), "CORRECTION", every)
        on = context_of(weights(count), HOOKS[name][0]())
        on.optimizer_step()  # the first of a round may make places
        with Launches() as launches:
            on.optimizer_step()
        counts.append(launches.count)
    assert counts[0] == counts[1] > 0


def test_the_mean_of_scaffold_counts_each_weight_by_itself():
    """A weight that a gradient reaches later than the others, or not always."""
    hook, parameters = _MeanGradient({}), weights()
    on = context_of(parameters, hook)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for step in range(3):
        reached = {"w1"} if step == 0 else {"w1", "w2"} if step == 1 else {"w1", "w2", "w3"}
        for number, (name, parameter) in enumerate(parameters.items()):
            parameter.grad = None
            if name in reached:
                parameter.grad = torch.full_like(parameter, 10.0 * step + number)
                seen[name].append(parameter.grad.clone())
        on.optimizer_step()
    result = hook.result({n: p.detach() for n, p in parameters.items()}, parameters)
    for name, gradients in seen.items():
        mean = torch.stack(gradients).mean(0) if gradients else torch.zeros_like(result[name])
        assert torch.equal(result[name], mean)


def test_a_hook_is_called_with_the_weights_that_have_a_gradient():
    asked, parameters = [], weights()

    def hook(reached: Mapping[str, nn.Parameter]) -> None:
        asked.extend(reached)
        for parameter in reached.values():
            parameter.grad = None

    context_of(parameters, hook).optimizer_step()
    assert asked == ["w1", "w2", "w3"]
    assert all(parameter.grad is None for parameter in parameters.values())
    context_of(parameters, proximal_hook(CENTER, 0.7)).optimizer_step()
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("work", ["scale", "put"])
def test_what_algorithms_do_to_gradients_is_done_to_all_at_once(work):
    counts = []
    for count in (4, 40):
        on = context_of(weights(count), None)
        taken = on.copy_gradients()
        with Launches() as launches:
            if work == "scale":
                on.scale_gradients(0.3, 0.1)
            else:
                on.set_gradients(taken)
        counts.append(launches.count)
    assert counts[0] == counts[1] > 0


def test_the_scaled_gradient_is_the_formula():
    joint, single = weights(), weights()
    context_of(joint, None).scale_gradients(0.3, 0.1)
    for name, parameter in single.items():
        if parameter.grad is not None:
            with torch.no_grad():
                parameter.grad.add_(parameter, alpha=0.1)
                parameter.grad.mul_(0.3)
            grown = joint[name].grad
            assert torch.equal(grown, parameter.grad)


def test_whether_a_model_is_finite_is_asked_once():
    """Each question to a GPU waits until all work before it is done."""
    local = training()
    on = local.second_model(local.network.state_dict(), weight_decay=0.0)
    with Launches() as launches:
        local.result_of(on, client=0, round=0)
    assert launches.host_reads <= 1
    with torch.no_grad():
        on.model.get_parameter("head.bias")[1] = torch.inf
        on.model.get_parameter("norm.weight")[0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"client 4 in round 2: norm\.weight is not finite"):
        local.result_of(on, client=4, round=2)
