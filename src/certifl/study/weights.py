"""The weights that a study begins with, where they are a user's: `model.weights`.

The spec holds the file's checksum, which is part of its hash; the run keeps the weights as the
network got them, so that a run can be verified without the file.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from certifl.errors import InputError, StoreError
from certifl.models import fingerprint, state_of
from certifl.models.state import load_weights, read_checkpoint, weights_in
from certifl.path_checks import WEIGHTS, check_file
from certifl.runs.atomic import load_tensors, save_tensors
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

_log = logging.getLogger(__name__)


def begin_with(model: nn.Module, path: Path, name: str) -> None:
    """Give a network the weights of a file.

    Args:
        model: gets the weights. path: .safetensors, or what `torch.save` wrote.
        name: of the network, for messages.

    Raises:
        InputError: there is no such file, or it is not a file of plain weights.
        ModelError: the weights do not fit the network.
    """
    if change := load_weights(model, read_weights(path), f"{path} does not fit {name}"):
        _log.warning("%s: %s", path, change)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Weights by name, from a file as people have them.

    Raises:
        InputError: there is no such file, or it is not a file of plain weights.
    """
    check_file(path, WEIGHTS)
    if path.suffix == ".safetensors":
        try:
            return load_tensors(path)
        except StoreError as error:
            raise InputError(
                f"{error} The file is incomplete: save model.state_dict() again with "
                "safetensors.torch.save_file."
            ) from error
    _require_plain(path)
    return weights_in(read_checkpoint(path), str(path))


def _require_plain(path: Path) -> None:
    """Refuse a file of weights that expands: torch writes them without compression."""
    try:
        with zipfile.ZipFile(path) as packed:
            inside = sum(entry.file_size for entry in packed.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # older files of torch are no archive; what is damaged is refused when it is read
    if inside > path.stat().st_size:
        raise InputError(
            f"{path} would expand to {inside:,} bytes. Save model.state_dict() with torch.save."
        )


def keep_weights(folder: RunFolder, spec: Spec, model: nn.Module) -> None:
    """Store the weights that a run begins with, where they came from a file.

    Raises:
        StoreError: the folder cannot be written.
    """
    if spec.model.weights is not None and not folder.initial.is_file():
        save_tensors(folder.initial, state_of(model))


def weights_problems(folder: RunFolder, spec: Spec, initial_model: object) -> list[str]:
    """Where the weights that a run keeps are not those that its training began with.

    Args:
        folder: of the run. spec: of the run.
        initial_model: fingerprint in the identity of the final checkpoint.
    """
    if spec.model.weights is None:
        return []
    try:
        kept = load_tensors(folder.initial)
    except StoreError as error:
        return [str(error).rstrip(".")]
    if fingerprint(kept) != initial_model:
        return [f"{folder.initial.name} is not what the training began with"]
    return []
