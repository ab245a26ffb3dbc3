"""A single DICOM object that is no image: a structure set, a segmentation."""

from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from ..errors import ReadError
from .dicom_header import check_deflated, modality_of
from .kinds import kind_of, read_start


def read_object(path: Path, modality: str) -> Dataset:
    """Read a DICOM file whole, which must be of this modality.

    pydicom parses most values only when they are asked for, and raises many kinds of errors on damaged ones, here too:
    the caller turns them into a `ReadError`.

    Raises:
        ReadError: absent, not DICOM, of another modality, or far larger than it looks.
    """
    if not path.is_file():
        raise ReadError(f"{path}: no such file: expected DICOM of modality {modality}")
    start = read_start(path)
    if kind_of(path, start) != "dicom":
        raise ReadError(f"{path}: not DICOM: expected DICOM of modality {modality}")
    check_deflated(path, start)
    ds = pydicom.dcmread(path, force=True)
    found = modality_of(ds)
    if found != modality:
        raise ReadError(f"{path}: a DICOM object of modality {found or 'unknown'}: expected {modality}")
    return ds
