"""One slice of a case with the outlines of its labels, by which a person sees whether they lie on the image."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..errors import GeometryError, ReadError
from ..io.channel_names import is_ct
from ..io.image import load
from ..io.position import is_picture, position_index
from ..io.same_grid import millimeters_apart
from ..io.text import one_line
from .figures import ORANGE, SKY, VERMILLION

LABEL_COLORS = (VERMILLION, SKY, ORANGE, "#F0E442", "#009E73", "#CC79A7")
SOFT_TISSUE = (-160.0, 240.0)  # HU: center 40, width 400
HEIGHT = 150  # pixels of a picture
RED = (255, 0, 0)
# What a picture of a case may take in the page, so that a thousand of them open at once.
_QUALITY = 75


def alignment_picture(
    images: Sequence[Path], label: Path | None, channels: Sequence[str], height: int = HEIGHT, position: str = ""
) -> Image.Image:
    """One slice of a case, channels side by side, with the outline of every label: does the mask lie on the image?

    The slice is the one with the largest labelled area; without a label it is the one through the position of the
    lesion, which gets a red dot, or the middle one. It is cut across the axis with the thickest slices (foot to head
    where voxels are about as long on all sides), and turned as a radiologist looks at it: the patient's left on the
    right, the front (or the head) at the top. CT is shown from -160 to 240 HU, other channels between the first and
    99th percentile of the slice.

    Args:
        images: one NIfTI file per channel.
        label: NIfTI file of the label map, or None.
        channels: name of each channel.
        height: height of the picture in pixels.
        position: of a lesion, as in cases.csv: RAS mm; of a picture its column and row.

    Raises:
        ReadError: a file is no readable NIfTI.
        GeometryError: the files differ in shape or affine; the message holds the shapes.
    """
    volumes, affines = zip(*(_read(path) for path in images), strict=True)
    others = [(volume, affine, "channel") for volume, affine in zip(volumes[1:], affines[1:], strict=True)]
    mask = None
    if label is not None:
        mask, affine = _read(label)
        others.append((mask, affine, "label"))
    shape = volumes[0].shape
    if len(shape) != 3:
        raise GeometryError(f"image {_x(shape)} is not 3D")
    for other, affine, what in others:
        if other.shape != shape:
            raise GeometryError(f"image {_x(shape)} and {what} {_x(other.shape)} differ in shape")
        if millimeters_apart(shape, affines[0], affine):
            raise GeometryError(f"image and {what} differ in affine")
    return draw_case(volumes, mask, affines[0], channels, height, position)


def draw_case(
    volumes: Sequence[NDArray[np.float32]],
    mask: NDArray[Any] | None,
    affine: NDArray[np.float64],
    channels: Sequence[str],
    height: int = HEIGHT,
    position: str = "",
) -> Image.Image:
    """Draw what :func:`alignment_picture` shows, of arrays [x, y, z] on one grid."""
    shape = volumes[0].shape
    axis = _slice_axis(shape, affine)
    labelled = np.zeros(shape[axis]) if mask is None else np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis}))
    point = position_index(position, shape, affine) if position.strip() else None
    number = int(labelled.argmax()) if labelled.any() else shape[axis] // 2
    if point is not None and not labelled.any():
        number = int(np.clip(np.rint(point[axis]), 0, shape[axis] - 1))
    turn, zooms = _turn(shape, affine)
    outlined = None if mask is None else _as_shown(mask, number, turn, axis)
    across, down = sorted({0, 1, 2} - {int(turn[axis, 0])})
    panels = []
    for volume, name in zip(volumes, channels, strict=True):
        shown = _as_shown(volume, number, turn, axis)
        panels.append(_panel(shown, outlined, (zooms[down], zooms[across]), name, height))
        if point is not None and abs(point[axis] - number) <= 1:
            _dot(panels[-1], point, shape, turn, (across, down))
    whole = Image.new("RGB", (sum(panel.width for panel in panels) + 3 * (len(panels) - 1), height), "white")
    left = 0
    for panel in panels:
        whole.paste(panel, (left, 0))
        left += panel.width + 3
    return whole


def jpeg(picture: Image.Image) -> bytes:
    """A picture as it stands in the page."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def _panel(
    picture: NDArray[Any], labels: NDArray[Any] | None, spacing: tuple[float, float], channel: str, height: int
) -> Image.Image:
    """A gray picture [row, column] with outlines, its pixels as long as they are in the patient."""
    picture = np.nan_to_num(picture.astype(np.float32))
    low, high = SOFT_TISSUE if is_ct(channel) else (float(value) for value in np.percentile(picture, (1, 99)))
    gray = (np.clip((picture - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    rows, columns = gray.shape
    width = round(height * columns * spacing[1] / (rows * spacing[0]))
    size = (min(max(width, 8), 3 * height), height)
    panel = Image.fromarray(gray).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    if labels is None:
        return panel
    color = np.asarray(panel).copy()
    small = np.nan_to_num(labels).astype(np.uint8)
    large = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.NEAREST))
    for value in np.unique(large[large > 0]):
        # A frame of background outlines also what touches the edge.
        area = np.pad(large == value, 1)
        inside = area[:-2, 1:-1] & area[2:, 1:-1] & area[1:-1, :-2] & area[1:-1, 2:]
        paint = LABEL_COLORS[(int(value) - 1) % len(LABEL_COLORS)]
        color[area[1:-1, 1:-1] & ~inside] = [int(paint[place : place + 2], 16) for place in (1, 3, 5)]
    return Image.fromarray(color)


def _dot(
    panel: Image.Image, point: NDArray[Any], shape: Sequence[int], turn: NDArray[Any], sides: tuple[int, int]
) -> None:
    """A red dot on a panel, where a point of the array lies."""
    turned, sizes = np.empty(3), np.empty(3)
    for first, (second, sign) in enumerate(turn.astype(int)):
        turned[second] = point[first] if sign > 0 else shape[first] - 1 - point[first]
        sizes[second] = shape[first]
    x, y = ((turned[side] + 0.5) / sizes[side] * panel.size[place] for place, side in enumerate(sides))
    ImageDraw.Draw(panel).ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=RED)


def _slice_axis(shape: Sequence[int], affine: NDArray[Any]) -> int:
    """The axis across the slices."""
    if 1 in shape:
        return list(shape).index(1) if shape[2] != 1 else 2
    zooms = nib.affines.voxel_sizes(affine)
    if zooms.max() > 1.5 * np.median(zooms):
        return int(zooms.argmax())
    return int(np.abs(affine[2, :3] / zooms).argmax())


def _turn(shape: Sequence[int], affine: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """How to reorder and flip the axes to left, posterior, inferior; the spacing of the axes after that."""
    zooms = nib.affines.voxel_sizes(affine)
    if is_picture(shape, affine):
        return np.array([[0, 1], [1, 1], [2, 1]]), zooms  # a picture: it has no place in a patient
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(("L", "P", "I")))
    turned = np.empty(3)
    turned[turn[:, 0].astype(int)] = zooms
    return turn, turned


def _as_shown(volume: NDArray[Any], number: int, turn: NDArray[Any], axis: int) -> NDArray[Any]:
    """A slice as rows and columns."""
    turned = apply_orientation(np.take(volume, [number], axis=axis), turn)
    return np.take(turned, 0, axis=int(turn[axis, 0])).T


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    try:
        volume, _ = load(path)
    except (ReadError, GeometryError, OSError) as error:
        raise ReadError(one_line(str(error).replace(str(path), path.name))) from error
    return volume.voxels[0] if len(volume.voxels) == 1 else volume.voxels, volume.affine


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
