"""Images, labels, and which client has which of them; one row for each way to split them.

Nothing here imports torch: a spec's split is checked against its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from certifl.lazy import lazy_names
from certifl.registry import NonNegative, Positive, PositiveInt, Registry, Row, parameters

if TYPE_CHECKING:
    from certifl.data.dataset import Dataset, ImageSplit, fingerprint, random_part, to_float
    from certifl.data.decode import changes_of, read_image, shape_of_file
    from certifl.data.loading import EMBEDDED, load, named_folder
    from certifl.data.partition import ClientIndices, Partition, check, choose, label_checksum
    from certifl.data.splitters import Column, Splitter, assign_images

__all__ = [
    "EMBEDDED",
    "SPLITS",
    "ClientIndices",
    "Column",
    "Dataset",
    "ImageSplit",
    "Partition",
    "Splitter",
    "assign_images",
    "changes_of",
    "check",
    "choose",
    "fingerprint",
    "label_checksum",
    "load",
    "named_folder",
    "random_part",
    "read_image",
    "shape_of_file",
    "to_float",
]

_SPLITTERS = "certifl.data.splitters"
_ColumnName = Annotated[str, Field(min_length=1, description="the name of a column")]
_LEAST = {"min_train": (PositiveInt, 10), "min_test": (PositiveInt, 2)}

SPLITS: Registry[Row] = Registry(
    "split",
    {
        "uniform": Row(f"{_SPLITTERS}:Uniform", parameters(), "uniform"),
        "balanced": Row(f"{_SPLITTERS}:Balanced", parameters(), "balanced"),
        "dirichlet": Row(
            f"{_SPLITTERS}:Dirichlet",
            parameters(alpha=(Positive, 0.5), **_LEAST, retries=(PositiveInt, 1000)),
            "Dirichlet",
        ),
        "shards": Row(
            f"{_SPLITTERS}:Shards", parameters(shards_per_client=(PositiveInt, 2)), "shards"
        ),
        "quantity": Row(
            f"{_SPLITTERS}:Quantity", parameters(exponent=(NonNegative, 1.0)), "quantity"
        ),
        "column": Row(
            f"{_SPLITTERS}:Column",
            parameters(column=_ColumnName, min_train=(PositiveInt, 1), min_test=(PositiveInt, 1)),
            "by column",
        ),
    },
)
"""All ways to split: those that look at the labels alone, and the one by a column."""

_MODULES = {
    "certifl.data.dataset": ("Dataset", "ImageSplit", "fingerprint", "random_part", "to_float"),
    "certifl.data.decode": ("changes_of", "read_image", "shape_of_file"),
    "certifl.data.loading": ("EMBEDDED", "load", "named_folder"),
    "certifl.data.partition": ("ClientIndices", "Partition", "check", "choose", "label_checksum"),
    _SPLITTERS: ("Column", "Splitter", "assign_images"),
}
__getattr__ = lazy_names(
    __name__, {n: module for module, names in _MODULES.items() for n in names}
)
