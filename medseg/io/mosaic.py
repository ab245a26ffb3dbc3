"""Siemens mosaics: the slices of a volume tiled in one picture, with the geometry in the private CSA header."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from ..errors import GeometryError
from .dicom_header import Instance, Plane
from .dicom_values import integer, numbers

# CSA headers are some 10 to 100 kB; what is longer is none.
_LARGEST = 1 << 20


def cut(path: Path, ds: Dataset, whole: Plane) -> tuple[int, int, int, tuple[Plane, ...]]:
    """Return tiles in a row, rows and columns of a tile, and the plane of each slice.

    The picture is ⌈√n⌉ × ⌈√n⌉ tiles for n slices, from left to right and from top to bottom. ImagePositionPatient is
    that of a single slice as large as the whole picture around the same center, so the first slice lies half the
    difference further in. The slices follow SliceNormalVector of the CSA header, which may run against the normal of
    ImageOrientationPatient, at a distance of SpacingBetweenSlices. (nibabel's "Siemens mosaic format" and dcm2niix
    read it so.)

    Raises:
        GeometryError: no readable CSA header, or one that contradicts the picture.
    """
    csa = _csa(path, ds)
    count = _integer(csa, "NumberOfImagesInMosaic") or _private_count(ds)
    rows, columns = integer(ds, "Rows") or 0, integer(ds, "Columns") or 0
    if count is None or not 1 <= count <= 4096:
        raise GeometryError(f"{path}: a Siemens mosaic whose CSA header does not say how many slices it has")
    tiles = int(np.ceil(np.sqrt(count)))
    if rows % tiles or columns % tiles:
        raise GeometryError(
            f"{path}: a Siemens mosaic of {columns}×{rows} pixels, which {tiles}×{tiles} tiles for {count} slices do "
            "not divide"
        )
    if whole.position is None or whole.orientation is None or whole.spacing is None:
        return tiles, rows // tiles, columns // tiles, tuple(replace(whole, position=None) for _ in range(count))
    row, column = np.array(whole.orientation[:3]), np.array(whole.orientation[3:])
    normal = np.cross(row, column)
    toward = _vector(csa, "SliceNormalVector")
    if toward is None or abs(abs(float(normal @ toward)) - 1) > 1e-2:
        raise GeometryError(f"{path}: a Siemens mosaic whose CSA header has no usable SliceNormalVector")
    distance = numbers(ds, "SpacingBetweenSlices", 1)
    if count > 1 and (distance is None or distance[0] <= 0):
        raise GeometryError(f"{path}: a Siemens mosaic without SpacingBetweenSlices (0018,0088)")
    step = normal * np.sign(normal @ toward) * (distance[0] if distance else 0.0)
    inner = np.array([columns - columns // tiles, rows - rows // tiles]) / 2 * np.array(whole.spacing[::-1])
    corner = np.array(whole.position) + inner[0] * row + inner[1] * column
    planes = tuple(
        replace(
            whole,
            position=tuple(float(x) for x in corner + k * step),
            thickness=distance[0] if distance else whole.thickness,
        )
        for k in range(count)
    )
    return tiles, rows // tiles, columns // tiles, planes


def picture_of(item: Instance) -> Instance:
    """Return the instance of a mosaic as the one picture that it is stored as."""
    return replace(
        item, rows=item.rows * item.tiles, columns=item.columns * item.tiles, tiles=0, planes=item.planes[:1]
    )


def tile_of(item: Instance, picture: np.ndarray, frame: int) -> np.ndarray:
    """Return a tile of the picture of a mosaic [rows, columns]."""
    down, right = divmod(frame, item.tiles)
    return picture[down * item.rows : (down + 1) * item.rows, right * item.columns : (right + 1) * item.columns]


def _csa(path: Path, ds: Dataset) -> dict[str, Any]:
    from nibabel.nicom import csareader

    for element in (0x1010, 0x1110, 0x1210):
        mark = ds.get((0x0029, element >> 8))
        found = ds.get((0x0029, element)) if mark is not None else None
        if found is None or str(mark.value).strip() != "SIEMENS CSA HEADER":
            continue
        if not isinstance(found.value, bytes) or len(found.value) > _LARGEST:
            break
        try:
            return dict(csareader.read(found.value)["tags"])
        except Exception as error:  # the reader raises many kinds on damaged headers
            raise GeometryError(
                f"{path}: a Siemens mosaic whose CSA header (0029,1010) is damaged ({type(error).__name__}): the place "
                "of its slices is unknown"
            ) from error
    raise GeometryError(
        f"{path}: a Siemens mosaic without its CSA header (0029,1010), which an anonymizer may have removed: the place "
        "of its slices is unknown"
    )


def _integer(csa: dict[str, Any], name: str) -> int | None:
    """Return a whole number of a CSA header."""
    items = (csa.get(name) or {}).get("items") or []
    try:
        return int(items[0])
    except (IndexError, TypeError, ValueError, OverflowError):
        return None


def _vector(csa: dict[str, Any], name: str) -> np.ndarray | None:
    """Return three numbers of a CSA header."""
    items = (csa.get(name) or {}).get("items") or []
    try:
        vector = np.array([float(item) for item in items[:3]])
    except (TypeError, ValueError):
        return None
    return vector if vector.shape == (3,) and np.isfinite(vector).all() else None


def _private_count(ds: Dataset) -> int | None:
    found = ds.get((0x0019, 0x100A))
    value = found.value if found is not None else None
    return value if isinstance(value, int) else None
