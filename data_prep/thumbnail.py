"""A small picture of a series: its middle slice, read alone, as a person would look at it."""

import gzip
import io
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from medseg.errors import MedsegError, ReadError
from medseg.io.text import one_line

SIDE = 96  # pixels of the longer side
SOFT_TISSUE = (-160.0, 240.0)  # HU: center 40, width 400
# What is read whole for a picture: bytes of a DICOM or picture file, voxels of an MHD or NRRD volume.
MOST_BYTES = 1 << 29
MOST_VOXELS = 1 << 28


def thumbnail(kind: str, path: Path, modality: str = "") -> bytes | str:
    """Make a picture of a file of a series: a DICOM slice, or the middle slice of a volume.

    DICOM is shown as it is stored, through the window of its tags; volumes of other kinds are turned upright (the
    patient's right on the left, the front or the head at the top) and shown from the 1st to the 99th percentile of the
    slice. CT without a window has that of soft tissue, PET is shown dark on white.

    Args:
        kind: as `medseg.io.Series` has it.
        path: the middle file of the series.
        modality: DICOM modality.

    Returns:
        JPEG without metadata, at most 96 pixels wide and high; or a text that says why there is none.
    """
    try:
        if kind == "dicom":
            picture = _dicom(path, modality)
        elif kind == "nifti":
            picture = _nifti(path)
        elif kind == "picture":
            picture = _picture(path)
        else:
            picture = _itk(path, kind)
        content = io.BytesIO()
        picture.save(content, format="JPEG", quality=80)
        return content.getvalue()
    except MedsegError as error:
        return one_line(error)
    except Exception as error:  # a file that gives no picture must not keep the others from theirs
        return f"its pixels cannot be decoded ({type(error).__name__})"


def _dicom(path: Path, modality: str) -> Image.Image:
    from medseg.io.dicom_header import quiet, read_instance
    from medseg.io.dicom_pixels import check_promise, decode, rescale, window_of
    from medseg.io.mosaic import picture_of

    _check_size(path)
    with quiet():
        item = read_instance(path, pixels=True, force=True)
        ds: Any = item.dataset
        if str(ds.get("BurnedInAnnotation") or "").upper() == "YES":
            raise ReadError("text is burned into it")
        if item.tiles:
            item = picture_of(item)
        check_promise([item], item.rows * item.columns * 3)
        frame = len(item.planes) // 2
        (pixels,) = decode(item, [frame])
        values = np.empty((item.rows, item.columns, pixels.shape[2] if pixels.ndim == 3 else 1), np.float32)
        rescale(item, frame, pixels, values)
        center, width, _ = window_of(ds, frame)
    spacing = item.planes[frame].spacing or (1.0, 1.0)
    limits = (center - width / 2, center + width / 2) if math.isfinite(width) else None
    if limits is None and modality == "CT":
        limits = SOFT_TISSUE
    return _shown(values, (spacing[0], spacing[1]), limits, dark_on_white=modality == "PT")


def _nifti(path: Path) -> Image.Image:
    from medseg.io.nifti import read_nifti_header

    header, _ = read_nifti_header(path)
    second = isinstance(header, nib.Nifti2Header)
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as stream:
        image: Any
        if bytes(header["magic"]).startswith(b"n+"):
            image = (nib.Nifti2Image if second else nib.Nifti1Image).from_stream(stream)
        else:
            image = (nib.Nifti2Pair if second else nib.Nifti1Pair).from_filename(path)
        shape = (*image.shape, 1, 1)[:3]
        affine = np.asarray(image.affine, float)
        axis = _across(shape, affine)
        index: list[Any] = [slice(None), slice(None), slice(None), *[0] * 4][: image.ndim]
        if axis < image.ndim:
            index[axis] = slice(shape[axis] // 2, shape[axis] // 2 + 1)
        values = np.asarray(image.dataobj[tuple(index)])
    if values.dtype.fields:  # RGB24 and RGBA32
        values = np.stack([values[name] for name in list(values.dtype.fields)[:3]], axis=-1)
    else:
        values = values[..., None]
    values = values.reshape(*[1 if a == axis else n for a, n in enumerate(shape)], values.shape[-1])
    return _upright(values, affine, axis)


def _itk(path: Path, kind: str) -> Image.Image:
    from medseg.io.itk_formats import read_itk, read_itk_header

    header = read_itk_header(path, kind)
    voxels = math.prod(header.shape) * header.channels
    if voxels > MOST_VOXELS:  # compressed or not, it is read whole
        raise ReadError(f"{path}: {voxels:,} voxels in one file are too many for a picture")
    shape = (*header.shape, 1, 1)[:3]
    axis = _across(shape, header.affine)
    volume = read_itk(path, kind).voxels.reshape(header.channels, *shape)
    middle = np.take(volume, [shape[axis] // 2], axis=axis + 1)
    return _upright(np.moveaxis(middle, 0, -1), header.affine, axis)


def _picture(path: Path) -> Image.Image:
    _check_size(path)
    with Image.open(path) as picture:
        picture.draft("RGB", (4 * SIDE, 4 * SIDE))  # JPEG is decoded small
        if picture.mode in ("I", "F", "I;16", "I;16B", "I;16L"):
            return _shown(np.asarray(picture, np.float32)[..., None], (1.0, 1.0))
        if picture.mode in ("1", "L"):
            gray = np.asarray(picture, np.float32)[..., None]
            return _shown(gray, (1.0, 1.0), (0.0, max(float(gray.max()), 1.0)))  # labels may be 0 and 1
        small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        return small


def _across(shape: tuple[int, ...], affine: np.ndarray) -> int:
    """Return the axis to look along: of few or thick slices, else the one from foot to head."""
    least = min(range(2, -1, -1), key=lambda axis: shape[axis])
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    thickest = int(zooms.argmax())
    if 3 * shape[least] < sorted(shape)[1]:
        return least
    if zooms[thickest] > 1.5 * np.sort(zooms)[1]:
        return thickest
    return int(np.abs(affine[2, :3] / zooms).argmax())


def _upright(values: np.ndarray, affine: np.ndarray, axis: int) -> Image.Image:
    """Show one slice [X, Y, Z, channels], of which the axis across is 1 long."""
    column, row = (other for other in range(3) if other != axis)
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    turned = nib.io_orientation(affine)
    if not np.isnan(turned).any() and not np.array_equal(affine, np.eye(4)):
        if turned[column, 0] > turned[row, 0]:
            column, row = row, column
        # Pictures run from right to left, front to back, head to foot: against all axes of RAS.
        values = np.flip(values, tuple(other for other in (column, row) if turned[other, 1] > 0))
    plane = values.transpose(row, column, axis, 3)[:, :, 0]
    return _shown(plane[..., :3] if plane.shape[2] == 3 else plane[..., :1], (zooms[row], zooms[column]))


def _shown(
    values: np.ndarray,
    spacing: tuple[float, float],
    limits: tuple[float, float] | None = None,
    *,
    dark_on_white: bool = False,
) -> Image.Image:
    """Show [rows, columns, 1 or 3] in gray levels or colors, pixels as long as they are in the patient."""
    if values.shape[2] == 3:
        scale = 255 / max(float(values.max()), 255)
        levels = (np.clip(values * scale, 0, 255)).astype(np.uint8)
    else:
        gray = (np.abs(values) if values.dtype.kind == "c" else values)[..., 0].astype(np.float32)
        sound = gray[np.isfinite(gray)]
        if limits is None:
            low, high = (float(n) for n in np.percentile(sound, (1, 99))) if sound.size else (0.0, 1.0)
            if high <= low and sound.size:  # a small label on a large background
                low, high = float(sound.min()), float(sound.max())
        else:
            low, high = limits
        gray = np.nan_to_num(gray, nan=low, posinf=high, neginf=low)
        levels = (np.clip((gray - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
        if dark_on_white:
            levels = 255 - levels
    high_mm, wide_mm = levels.shape[0] * abs(spacing[0] or 1), levels.shape[1] * abs(spacing[1] or 1)
    scale = SIDE / max(high_mm, wide_mm)
    size = max(round(wide_mm * scale), 4), max(round(high_mm * scale), 4)
    return Image.fromarray(levels).resize(size, Image.Resampling.BILINEAR)


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ReadError(f"{path}: a file of {size / 1e9:.1f} GB is too large for a picture")
