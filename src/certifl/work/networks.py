"""The networks of a study: as all clients begin with them, and as each of them deploys one."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from certifl.copies import evaluating
from certifl.data import Dataset
from certifl.errors import ModelError, StoreError, StoreMismatch, WorkError
from certifl.federated.engine import deployed_model
from certifl.models import build, fingerprint, require_code
from certifl.spec import Spec
from certifl.store.checkpoints import Checkpoints, StoredRound
from certifl.store.runs import RunFolder

__all__ = [
    "code_folder",
    "deployed",
    "initial_model",
    "last_round",
    "load_code",
    "run_model",
    "trained_model",
]


def initial_model(spec: Spec, dataset: Dataset) -> nn.Module:
    """The network all clients begin with, in evaluation mode.

    Raises:
        ModelError: a user's network that cannot be built or does not fit the images.
    """
    model = build(
        spec.model.name,
        dataset.in_channels,
        dataset.num_classes,
        spec.seed,
        spec.model.options,
        dataset.image_size,
    )
    return evaluating(model)


def code_folder(name: str) -> str | None:
    """Where the package of a user's `module:function` was found; None for a network from here."""
    top = sys.modules.get(name.partition(":")[0].partition(".")[0]) if ":" in name else None
    file = getattr(top, "__file__", None)
    if file is None:
        return None
    place = Path(file).resolve()
    return str(place.parent.parent if place.stem == "__init__" else place.parent)


def load_code(folder: Path, spec: Spec, code: Path | None, before: object = None) -> None:
    """Make a run's own network importable from a folder that the user names; does nothing else.

    A run folder may come from anybody, so it never decides what code runs: neither its spec nor
    the place it recorded is followed unless the user says where that code is.

    Args:
        folder: of the run. spec: of the run.
        code: the folder that holds the network's module; None = the user named none.
        before: where it was when the run was made, for the message.

    Raises:
        ModelError: the run has code of its own and `code` is not given, or does not hold it.
    """
    name = spec.model.name
    if ":" not in name:
        return
    if code is None:
        known = f"; it was in {before} when the run was made" if isinstance(before, str) else ""
        raise ModelError(
            f"The run in {folder} uses code of its own, {name!r}. Code is not run because a "
            "run folder names it: if you trust that code, name the folder that holds it with "
            f"--code DIR{known}."
        )
    require_code(name, code)


def run_model(folder: RunFolder, spec: Spec, code: Path | None = None) -> nn.Module:
    """The network of a run, with initial weights.

    Args:
        folder: of the run. spec: of the run.
        code: the folder that holds the module of a network of the user's; see `load_code`.

    Raises:
        ModelError: a user's network whose code was not named, or that cannot be built any more.
        StoreError: the run's manifest is damaged.
        StoreMismatch: a federation's clients have models of their own, which are with them.
    """
    if "deployment" in folder.manifest() and spec.build_algorithm().keeps_client_state:
        raise StoreMismatch(
            f"The models of {folder.path} are with its clients: {spec.algorithm['name']} gives "
            "each its own, in deployed.safetensors of its folder."
        )
    data = folder.data()
    load_code(folder.path, spec, code, folder.manifest().get("code"))
    return build(
        spec.model.name, data["in_channels"], data["num_classes"], spec.seed, spec.model.options
    )


def last_round(folder: RunFolder, spec: Spec) -> StoredRound:
    """The final checkpoint of a finished training.

    Raises:
        StoreError: it is missing or damaged, so the trained models are not known.
    """
    last = Checkpoints(folder.training).latest()
    wanted = spec.training.rounds + spec.build_algorithm().extra_rounds
    if last is None or last.number != wanted:
        raise StoreError(
            f"The final checkpoint in {folder.training} is missing or damaged, so the trained "
            "models are not known. Compute the run again with --overwrite."
        )
    return last


def deployed(last: StoredRound, spec: Spec, model: nn.Module, client: int) -> nn.Module:
    """The model that a client uses at test time, in evaluation mode.

    Args:
        last: the final checkpoint.
        spec: of the run.
        model: the architecture; its weights are replaced.
        client: number of the client.

    Raises:
        ModelError: the network is no longer the one that was trained.
        WorkError: it never was: a certificate of initial weights would mean nothing.
    """
    state = deployed_model(spec.build_algorithm(), last, client)
    if fingerprint(state) == last.identity.get("initial_model"):
        raise WorkError(
            f"Client {client} would deploy the network with the weights it began with: it failed "
            f"in every round, or took no step. The history in {last.path.parent} says why it was "
            "left out; see to that, and compute the run again with --overwrite."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"The trained weights in {last.path} do not fit the model {spec.model.name!r}: its "
            "code must be the one that the run was trained with."
        ) from error
    return model.eval()


def trained_model(
    folder: RunFolder, spec: Spec, client: int, code: Path | None = None
) -> nn.Module:
    """The model that a client of a finished run uses at test time, in evaluation mode.

    Raises:
        StoreError: the final checkpoint is missing or damaged.
        ModelError: a user's network that cannot be found, or was changed since.
    """
    return deployed(last_round(folder, spec), spec, run_model(folder, spec, code), client)
