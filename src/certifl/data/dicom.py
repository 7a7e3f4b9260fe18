"""Gray images in DICOM files: their intensities in the modality's units.

Only pixels are read; whatever else the file says of a patient is not.
"""

from __future__ import annotations

import io

import numpy as np

from certifl.errors import InputError, first_line

_MAGIC, _MAGIC_AT = b"DICM", 128
_GRAY = {"MONOCHROME1": True, "MONOCHROME2": False}
"""Kinds of gray images, and whether their lowest value is white."""


def is_dicom(content: bytes) -> bool:
    """Whether a file's bytes are a DICOM file's."""
    return content[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


def read_dicom(content: bytes, most: int) -> tuple[np.ndarray, bool]:
    """Intensities of a DICOM file's image, after its rescale slope and intercept.

    Args:
        content: of the file. most: pixels that it may have.

    Returns:
        (h, w) float64, and whether low values are white (MONOCHROME1).

    Raises:
        InputError: the extra is missing, or the file holds no single gray image that can be read.
    """
    try:
        import pydicom
        from pydicom.filereader import read_dataset
        from pydicom.pixels.processing import apply_modality_lut
        from pydicom.uid import DeflatedExplicitVRLittleEndian
    except ImportError as error:
        raise InputError(
            "DICOM files are read by pydicom, which is not installed: install the extra "
            "`certifl[dicom]`"
        ) from error
    try:
        stream = io.BytesIO(content)
        stream.seek(_MAGIC_AT + len(_MAGIC))
        about = read_dataset(
            stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2
        )
        if about.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            # Reading it would unpack everything, however much that is.
            raise InputError("it is compressed as a whole; save it with compressed pixels or none")
        file = pydicom.dcmread(io.BytesIO(content))
        size = int(file.Rows) * int(file.Columns)
        kind, frames = str(file.PhotometricInterpretation), int(file.get("NumberOfFrames") or 1)
    except InputError:
        raise
    except Exception as error:  # pydicom raises many unrelated types for damaged files
        raise InputError(f"it is not a readable DICOM image ({first_line(error)})") from error
    if kind not in _GRAY or frames != 1:
        what = f"{frames} frames" if frames != 1 else f"colors of kind {kind}"
        raise InputError(f"it holds {what}; save the one image that is meant as gray DICOM or PNG")
    if size > most:
        raise InputError(f"it is {file.Rows} x {file.Columns}, too large to be read")
    try:
        values = np.asarray(apply_modality_lut(file.pixel_array, file), np.float64)
    except Exception as error:  # as above, and packages for compressed files that are missing
        raise InputError(f"its pixels cannot be read ({first_line(error)})") from error
    return values, _GRAY[kind]
