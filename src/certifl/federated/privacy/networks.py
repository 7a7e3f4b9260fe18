"""Which networks can be trained with privacy."""

from __future__ import annotations

from torch import nn

from certifl.errors import ModelError
from certifl.federated.privacy.accounting import grad_sample

__all__ = ["check_network"]

_ADVICE = (
    'Take model.name = "small_cnn", or a residual network with model.options = { norm = "group" }.'
)


def check_network(model: nn.Module, kind: str) -> None:
    """Refuse networks whose state the mechanism would not protect.

    Parameters are protected. BatchNorm is not: it mixes the images of a batch, so no image has a
    gradient of its own to clip; and its running statistics are sums over images (example level)
    or a client's own averages (client level) that would be sent without clipping or noise.

    Args:
        model: the network.
        kind: "example" or "client".

    Raises:
        ModelError: it has BatchNorm, a state beside its parameters, or (example level) layers that
            write their result over their input.
        SpecError: opacus is not installed.
    """
    grad_sample()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = (
                "mixes the images of a batch, so that no image has a gradient of its own"
                if kind == "example"
                else "has running statistics that would be averaged without protection"
            )
            raise ModelError(
                f'privacy.kind = "{kind}" cannot train this network: its BatchNorm ({name}) '
                f"{reason}. {_ADVICE}"
            )
    if kind == "example":
        _check_in_place(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if others := sorted(model.state_dict().keys() - parameters):
        raise ModelError(
            f'privacy.kind = "{kind}" protects parameters only, and this network\'s state also '
            f"holds {others[0]}: register it with persistent=False if it never changes. {_ADVICE}"
        )


def _check_in_place(model: nn.Module) -> None:
    """Refuse `inplace=True`: gradients of single images follow from what it would write over."""
    found = {n: m for n, m in model.named_modules() if getattr(m, "inplace", False) is True}
    if found:
        layers = ", ".join(f"{name} ({type(layer).__name__})" for name, layer in found.items())
        raise ModelError(
            'privacy.kind = "example" needs the output of each layer as it was, and these write '
            f"over it: {layers}. Build them with inplace=False."
        )
