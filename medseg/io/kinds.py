"""What a file is, by its content first and its name second."""

import gzip
import zlib
from pathlib import Path

from ..errors import ReadError

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"BM")
_NIFTI_MAGIC = (b"n+1\0", b"ni1\0")
_NIFTI2_MAGIC = (b"n+2", b"ni2")
_NIFTI2_SIZES = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")

SUFFIXES = {
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".mhd": "mhd",
    ".mha": "mhd",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".tif": "picture",
    ".tiff": "picture",
    ".gif": "picture",
    ".bmp": "picture",
}
# What is refused by name, so that the reader knows what to do about it.
_FOREIGN = {
    b"BZh": "compressed with bzip2: decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard: decompress it first",
    b"\xfd7zXZ": "compressed with xz: decompress it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x1f\x8b": "a gzip file with no NIfTI inside: decompress it first",
    b"\x5c\x01\x00\x00": "an Analyze 7.5 header, which knows no orientation: convert it to NIfTI",
    b"\x00\x00\x01\x5c": "an Analyze 7.5 header, which knows no orientation: convert it to NIfTI",
    b"CDF": "a MINC image: convert it to NIfTI",
    b"\x89HDF": "an HDF5 file (MINC 2 among them): convert it to NIfTI",
}
_NAMES = {"dicom": "DICOM", "nifti": "NIfTI", "mhd": "MetaImage (MHD/MHA)", "nrrd": "NRRD", "picture": "a picture"}


def claimed_kind(path: Path) -> str | None:
    """Return the kind that the name of a file claims, None where it claims none.

    Example:
        >>> claimed_kind(Path("case.nii.gz")), claimed_kind(Path("notes.txt"))
        ('nifti', None)
    """
    name = path.name.lower()
    return "nifti" if name.endswith(".nii.gz") else SUFFIXES.get(path.suffix.lower())


def kind_by_content(start: bytes) -> str | None:
    """Return the kind that the first bytes of a file show (512 suffice), None where they show none."""
    if start[128:132] == b"DICM":
        return "dicom"
    if start.startswith(b"NRRD000"):
        return "nrrd"
    if start[344:348] in _NIFTI_MAGIC or (start[:4] in _NIFTI2_SIZES and start[4:7] in _NIFTI2_MAGIC):
        return "nifti"
    if start.startswith(b"\x1f\x8b"):
        try:
            inside = zlib.decompressobj(wbits=31).decompress(start, 1024)
        except zlib.error:
            return None
        return "nifti" if kind_by_content(inside) == "nifti" else None
    if any(start.startswith(magic) for magic in _PICTURES):
        return "picture"
    head = start[:512].lstrip()
    if head.startswith((b"ObjectType", b"NDims", b"Comment")) and (b"NDims" in head or b"DimSize" in head):
        return "mhd"
    # DICOM without preamble starts with an element of group 2 or 8, little or big endian.
    if (
        len(start) > 16
        and start[:2] in (b"\x08\x00", b"\x02\x00")
        and start[2:4] in (b"\x00\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00", b"\x01\x00")
    ):
        return "dicom"
    if (
        len(start) > 16
        and start[:2] in (b"\x00\x08", b"\x00\x02")
        and start[2:4] in (b"\x00\x00", b"\x00\x05", b"\x00\x08", b"\x00\x16", b"\x00\x01")
    ):
        return "dicom"
    return None


def read_start(path: Path) -> bytes:
    """Return the first bytes of a file, enough for `kind_by_content`."""
    try:
        with path.open("rb") as file:
            return file.read(1024)
    except OSError as error:
        raise ReadError(f"{path}: cannot be opened ({error.strerror})") from error


def kind_of(path: Path, start: bytes | None = None) -> str:
    """Return ``"dicom"``, ``"nifti"``, ``"mhd"``, ``"nrrd"`` or ``"picture"``.

    Raises:
        ReadError: the file is absent, empty, a git-LFS pointer, or of no kind that is read here.
    """
    start = read_start(path) if start is None else start
    claimed = claimed_kind(path)
    what = _NAMES.get(claimed or "", "an image")
    if not start:
        raise ReadError(f"{path}: an empty file (0 bytes), expected {what}; copy it again from its source")
    if start.startswith(b"version https://git-lfs"):
        raise ReadError(f"{path}: a git-LFS pointer in place of {what}; fetch the file itself with `git lfs pull`")
    found = kind_by_content(start)
    if found is None and claimed in ("mhd", "nifti") and _long_enough(path, claimed, start):
        found = claimed
    if found is None:
        for magic, other in _FOREIGN.items():
            if start.startswith(magic):
                raise ReadError(f"{path}: {other}; expected {what}")
        if path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file():
            raise ReadError(f"{path}: the voxels of a pair .hdr/.img: name {path.with_suffix('.hdr').name!r} instead")
        raise ReadError(
            f"{path}: not {what}: its content is not what its name says"
            if claimed
            else f"{path}: of no known kind: expected DICOM, NIfTI, MHD/MHA, NRRD, PNG, JPEG, TIFF, GIF or BMP"
        )
    return found


def _long_enough(path: Path, claimed: str, start: bytes) -> bool:
    """Accept by name what the first bytes leave open: an MHD with its keys in another order."""
    if claimed == "mhd":
        return b"DimSize" in start and b"=" in start
    if start.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as file:
                return kind_by_content(file.read(544)) == "nifti"
        except (OSError, EOFError, zlib.error):
            return True  # let the NIfTI reader name the damage
    return False
