"""Which column of a table holds the images, and which the labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from certifl.errors import InputError

__all__ = ["Chosen", "choose_columns", "class_names_of", "features_of", "is_text", "plain_type"]

_USUAL_NAMES = {"image": ("image", "img"), "label": ("label", "labels")}
_TYPES = {"image": "Image", "label": "ClassLabel"}
_STORED = {
    "image": "Store the bytes of image files, alone or as a struct with `bytes`.",
    "label": "Store labels as integers or texts.",
}
_STRING_VIEW = pa.string_view() if hasattr(pa, "string_view") else None

Features = Mapping[str, Mapping[str, object]]
"""Column name -> the hub's feature, e.g. {"_type": "ClassLabel", "names": [...]}."""


@dataclass(frozen=True)
class Chosen:
    """The columns of images and labels, and the names of the classes where the file says them.

    Attributes:
        image, label, class_names: as they say.
        kept: a further column to keep. kept_names: what its numbers stand for, where that is said.
    """

    image: str
    label: str
    class_names: tuple[str, ...] | None
    kept: str | None = None
    kept_names: tuple[str, ...] | None = None

    @property
    def read(self) -> list[str]:
        """All columns that are read."""
        return list(dict.fromkeys(c for c in (self.image, self.label, self.kept) if c))


def features_of(schema: pa.Schema) -> Features:
    """The feature metadata that the hub writes into a parquet file; empty if there is none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    usable = features if isinstance(features, dict) else {}
    return {name: feature for name, feature in usable.items() if isinstance(feature, dict)}


def choose_columns(
    schema: pa.Schema,
    features: Features,
    image_column: str | None,
    label_column: str | None,
    where: str,
    kept: str | None = None,
) -> Chosen:
    """Find the columns: as asked for, else by feature type, else by storage type and name.

    A column that is kept for itself is not taken for the label unless that was asked for.

    Raises:
        InputError: a column asked for is not there, or it is not clear which one is meant.
    """
    image = _found("image", schema, features, where) if image_column is None else image_column
    label = (
        _found("label", schema, features, where, kept) if label_column is None else label_column
    )
    for asked in (image_column, label_column):
        if asked is not None and asked not in schema.names:
            raise InputError(
                f"{where} has no column {asked!r}; its columns are {', '.join(schema.names)}."
            )
    if kept is not None and kept not in schema.names:
        raise InputError(
            f"{where} has no column {kept!r} to split by; its columns are "
            f"{', '.join(schema.names)}."
        )
    named = None if kept is None else class_names_of(features, kept)
    return Chosen(image, label, class_names_of(features, label), kept, named)


def class_names_of(features: Features, column: str) -> tuple[str, ...] | None:
    """What the numbers of a column stand for, where the metadata says it."""
    names = features.get(column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _found(
    role: str, schema: pa.Schema, features: Features, where: str, kept: str | None = None
) -> str:
    """The one column that can be meant: by feature type, else by storage type and name."""
    fields = [field for field in schema if field.name != kept]
    typed = [f.name for f in fields if features.get(f.name, {}).get("_type") == _TYPES[role]]
    usual_names = _USUAL_NAMES[role]
    stored = [f.name for f in fields if _may_hold(role, f.type, f.name in usual_names)]
    candidates = typed or stored
    usual = [name for name in usual_names if name in candidates]
    if len(usual) == 1:
        return usual[0]
    unusable = [f for f in fields if f.name in usual_names and f.name not in candidates]
    if candidates and unusable and not typed and not usual:
        raise InputError(
            f"Column {unusable[0].name!r} of {where} holds {unusable[0].type}, from which no "
            f"{role}s are read. {_STORED[role]} If another column holds the {role}s: "
            f"{_how_to_choose(role, candidates[0])}"
        )
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(
            f"{where} has no column that could hold the {role}s; its columns are "
            f"{', '.join(f'{field.name} ({field.type})' for field in schema)}. {_STORED[role]}"
        )
    raise InputError(
        f"{where} has several columns that could hold the {role}s: {', '.join(candidates)}. "
        f"{_how_to_choose(role, candidates[0])}"
    )


def _how_to_choose(role: str, example: str) -> str:
    if role == "label":
        return f"Choose one by writing it behind the data set's name, as in NAME[{example}]."
    return f"Choose one with image_column={example!r}."


def _may_hold(role: str, kind: pa.DataType, usual: bool) -> bool:
    """Whether a column's type fits; yes and no only by its name, as in a column `occluded`."""
    if role == "label":
        kind = plain_type(kind)
        return is_text(kind) or pa.types.is_integer(kind) or (usual and pa.types.is_boolean(kind))
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, also where it is stored by number (a categorical column)."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's values are texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == _STRING_VIEW
