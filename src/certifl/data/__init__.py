"""Images, labels, and who holds which of them."""

from __future__ import annotations

from certifl.data.dataset import Dataset, ImageSplit, fingerprint, random_part, to_float
from certifl.data.decode import changes_of, read_image
from certifl.data.loading import EMBEDDED, load, named_folder
from certifl.data.partition import ClientIndices, Partition, check, choose, label_checksum
from certifl.data.splitters import SPLITS, Column, Splitter, deal_out, make_splitter

__all__ = [
    "EMBEDDED",
    "SPLITS",
    "ClientIndices",
    "Column",
    "Dataset",
    "ImageSplit",
    "Partition",
    "Splitter",
    "changes_of",
    "check",
    "choose",
    "deal_out",
    "fingerprint",
    "label_checksum",
    "load",
    "make_splitter",
    "named_folder",
    "random_part",
    "read_image",
    "to_float",
]
