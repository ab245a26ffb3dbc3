"""Pictures without geometry: PNG, JPEG, TIFF, GIF, BMP."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import MedsegError, ReadError
from .volume import Volume

# Modes of Pillow that are read as they are; every other mode but those of `_open` is refused by name.
_PLAIN = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I": 1, "F": 1, "I;16": 1, "I;16B": 1, "I;16L": 1}
# Tags of TIFF and EXIF.
_BITS, _PHOTOMETRIC, _FORMAT, _ORIENTATION, _PLANES = 258, 262, 339, 274, 284
_STRIPS, _STRIP_ROWS, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 273, 278, 322, 323, 324
# PNG and TIFF shrink to a thousandth at most, GIF to a 2,700th; small pictures are let through in any case.
_MOST_PER_BYTE, _SMALL = 3000, 1 << 24
# How far from 0, or from 255, a color may be that counts as black, or as white.
_BLACK = 16


def picture_size(path: Path) -> tuple[tuple[int, int], int]:
    """Return the (columns, rows) and the number of channels of a picture, from its header.

    The channels of a palette picture or of one with transparency are known only after reading: the count is that of
    the stored mode.
    """
    with _open(path) as picture:
        return picture.size, _PLAIN.get(picture.mode, 3 if picture.mode in ("P", "CMYK", "YCbCr") else 1)


def read_picture(path: Path) -> Volume:
    """Read a picture as [C, X, Y]: X counts columns from the left, Y rows from the top; values as stored.

    - Gray has one channel (any depth), color three (8 bits, in PNG 16 too; CMYK becomes RGB). A transparency that
      hides nothing is dropped, else kept as the last channel.
    - A palette of grays gives these. A picture in two colors of its palette that are nearly black and nearly white is a
      mask, 0 and 1. Any other is expanded to its colors.
    - A TIFF of 8 or 16 bits whose zero is white is turned round: high is white.
    - The pixels stay in stored order: a camera's note how to turn the picture (EXIF) is told in ``problems`` and not
      followed, for a mask that belongs to it has the order of these pixels.

    Raises:
        ReadError: damaged, animated, of several pages, or larger than Pillow's limit against decompression bombs.
    """
    problems = []
    try:
        with _open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                raise ReadError(f"{path}: a picture of {frames} frames or pages: expected one; split it first")
            _check_promise(path, picture)
            array = _pixels(path, picture)
            turned = picture.getexif().get(_ORIENTATION, 1)
        if turned in range(2, 9):
            problems.append(f"EXIF orientation {turned} is not applied: the pixels are in stored order")
    except MedsegError:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        raise ReadError(f"{path}: damaged picture: its pixels cannot be decoded ({type(error).__name__})") from error
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] in (2, 4) and array[..., -1].min() == np.iinfo(array.dtype).max:
        array = array[..., :-1]
    return Volume(array.astype(np.float32).transpose(2, 1, 0), np.eye(4), has_geometry=False, problems=tuple(problems))


def _check_promise(path: Path, picture: Image.Image) -> None:
    """Refuse a picture whose header promises more than the file holds: Pillow fills the rows of a TIFF with zeros."""
    width, height = picture.size
    size = path.stat().st_size
    if width * height > _MOST_PER_BYTE * size + _SMALL:
        raise ReadError(
            f"{path}: damaged picture: its header promises {width:,} × {height:,} pixels, the file has {size:,} bytes"
        )
    tags = getattr(picture, "tag_v2", None)  # of a TIFF
    if tags is None:
        return
    if _TILES in tags:
        parts, needed = tags[_TILES], -(-width // tags[_TILE_WIDTH]) * -(-height // tags[_TILE_HEIGHT])
    else:
        parts, needed = tags.get(_STRIPS, ()), -(-height // min(tags.get(_STRIP_ROWS, height), height))
    if tags.get(_PLANES) == 2:
        needed *= len(tags.get(_BITS, (8,)))
    if len(parts) < needed:
        raise ReadError(f"{path}: damaged picture: a TIFF of {needed} parts, of which {len(parts)} are there")


def _pixels(path: Path, picture: Image.Image) -> np.ndarray:
    if picture.mode == "P" and "transparency" not in picture.info:
        return _from_palette(picture)
    if picture.mode in ("P", "PA"):
        return np.asarray(picture.convert("RGBA"))
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8) * 255
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if picture.mode in ("LA", "RGB", "RGBA"):
        # Pillow halves the bits of deep color without a word.
        if picture.format == "PNG" and _depth_of_png(path) == 16:
            import imagecodecs

            return np.asarray(imagecodecs.png_decode(path.read_bytes()))
        if max(tags.get(_BITS, (8,))) > 8:
            raise ReadError(f"{path}: a TIFF of {max(tags[_BITS])} bits per color: expected 8; write it as 16-bit PNG")
    if picture.mode not in _PLAIN:
        return np.asarray(picture.convert("RGB"))
    array = np.asarray(picture)
    bits, kind = tags.get(_BITS), tags.get(_FORMAT, (1,))[0]
    # Pillow holds 32 bits as signed and 8 bits as unsigned, whatever the file says.
    if bits == (32,) and kind == 1 and array.dtype == np.int32:
        return array.view(np.uint32)
    if bits == (8,) and kind == 2 and array.dtype == np.uint8:
        return array.view(np.int8)
    # And it turns round what is white at zero in 8 bits only.
    if bits and tags.get(_PHOTOMETRIC) == 0 and array.dtype.kind == "u" and array.itemsize == 2:
        return ((1 << bits[0]) - 1) - array
    return array


def _depth_of_png(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]


def _from_palette(picture: Image.Image) -> np.ndarray:
    index = np.asarray(picture)
    palette = np.zeros((256, 3), dtype=np.uint8)
    entries = np.array(picture.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    colors, used = palette[index], palette[np.unique(index)]
    black_and_white = ((used < _BLACK).all(axis=1) | (used >= 256 - _BLACK).all(axis=1)).all()
    if len(used) <= 2 and black_and_white and (entries != entries[:, :1]).any():
        return (colors[..., 0] > 127).astype(np.uint8)
    return colors[..., :1] if (used == used[:, :1]).all() else colors


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(path)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ReadError(
            f"{path}: a picture of more than {limit:,} pixels: not read; cut it into smaller ones"
        ) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ReadError(
            f"{path}: damaged picture, or of a kind that Pillow does not know: its header cannot be read "
            f"({type(error).__name__})"
        ) from error
