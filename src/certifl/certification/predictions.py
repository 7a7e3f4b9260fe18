"""Plain predictions of clients that certify nothing: one vote of the network per pristine image.

They promise nothing about any perturbation, so they are no certificates: they have no radius and
are kept in a file of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from certifl.certification.formats import column_of_numbers
from certifl.certification.network import Network
from certifl.convolutions import exact_convolutions
from certifl.errors import InputError
from certifl.outside import open_parquet, parse_json
from certifl.threads import one_thread

__all__ = ["Predictions", "predict_plain"]

_KEY = b"certifl"
_COLUMNS = ("client", "index", "label", "predicted")

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """The network's own answers on m unperturbed images; every array has one row per image.

    Attributes:
        client: (m,) the client whose test image it is.
        index: (m,) position of the image in its data set.
        label: (m,) true class.
        predicted: (m,) the class the client's model gives.
        conditions: model_fingerprint (by client), data_fingerprint, precision, device, versions.
    """

    client: Ints
    index: Ints
    label: Ints
    predicted: Ints
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(m,) where the prediction is the label."""
        return self.predicted == self.label

    @property
    def clients(self) -> list[int]:
        """Who predicted, in order."""
        return np.unique(self.client).tolist()

    def accuracy(self, client: int) -> float:
        """Share of one client's images that its model gets right; no certificate is behind it."""
        return float(self.correct[self.client == client].mean())

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Rows put together; the conditions are those of the first part."""
        columns = {n: np.concatenate([getattr(part, n) for part in parts]) for n in _COLUMNS}
        return dataclasses.replace(parts[0], **columns)

    def save(self, path: Path) -> None:
        """Write them as Parquet, whole or not at all."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        about = json.dumps(dict(self.conditions), sort_keys=True).encode()
        table = pa.table({**columns, "correct": self.correct})
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(table.replace_schema_metadata({_KEY: about}), part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> Predictions:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, damaged, or has other columns.
        """
        if not path.is_file():
            raise InputError(f"There are no plain predictions at {path}.")
        try:
            file = open_parquet(path, _COLUMNS)
            schema = file.schema_arrow
            if not all(pa.types.is_integer(schema.field(name).type) for name in _COLUMNS):
                raise ValueError("a column does not hold integers")
            table = file.read(list(_COLUMNS))
            columns = {name: column_of_numbers(table, name) for name in _COLUMNS}
            conditions = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"))
            if not isinstance(conditions, dict):
                raise ValueError("its conditions are not an object")
        except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
            raise InputError(f"{path} holds no plain predictions: {error}.") from error
        return Predictions(**columns, conditions=conditions)


def predict_plain(network: Network, images: Tensor) -> Ints:
    """The network's class of every image as it is, one call each in batches of one shape.

    Args:
        network: as it would vote.
        images: (m, c, h, w) in [0, 1].

    Returns:
        (m,) classes.
    """
    answers = []
    for part in images.to(network.device).split(network.batch_size):
        # Every call has the same number of rows, as in voting; what fills it up is not looked at.
        filled = part[torch.arange(network.batch_size, device=part.device) % len(part)]
        with (
            torch.inference_mode(),
            exact_convolutions(network.device),
            one_thread(network.threads == 1),
        ):
            logits = network.call(filled)[: len(part)]
        answers.append(logits.argmax(dim=1).cpu().numpy())
    return np.concatenate(answers).astype(np.int64)
