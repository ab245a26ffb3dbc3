"""A single DICOM object that is no image: a structure set, a segmentation."""

import zlib
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ..errors import ReadError
from .kinds import kind_of, read_start
from .text import one_line

# What a deflated file may grow to: deflate shrinks zeros a thousand times.
_MOST_BYTES = 1 << 29


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
    if start[128:132] == b"DICM":
        _check_deflated(path, start)
    ds = pydicom.dcmread(path, force=True)
    found = one_line(ds.get("Modality") or "unknown")
    if found != modality:
        raise ReadError(f"{path}: a DICOM object of modality {found[:16]}: expected {modality}")
    return ds


def _check_deflated(path: Path, start: bytes) -> None:
    """Inflate what is deflated once, in pieces, before it is inflated into memory at once."""
    if read_file_meta_info(path).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    # The group of the file's meta information begins with its own length (PS3.10 7.1).
    length = int.from_bytes(start[140:144], "little") if start[132:136] == b"\x02\0\0\0" else 0
    stream, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(144 + length)
        while not stream.eof and (chunk := file.read(1 << 16)):
            while chunk:
                size += len(stream.decompress(chunk, 1 << 24))
                chunk = stream.unconsumed_tail
                if size > _MOST_BYTES:
                    raise ReadError(f"{path}: inflates to more than {_MOST_BYTES:,} bytes: damaged or forged")
