"""Pictures without geometry: PNG, JPEG, TIFF, GIF, BMP."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import ReadError
from .volume import Volume

# Modes of Pillow that are read as they are; every other mode but those of `_open` is refused by name.
_PLAIN = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I": 1, "F": 1, "I;16": 1, "I;16B": 1, "I;16L": 1}


def picture_size(path: Path) -> tuple[tuple[int, int], int]:
    """Return the (columns, rows) and the number of channels of a picture, from its header.

    The channels of a palette picture or of one with transparency are known only after reading: the count is that of
    the stored mode.
    """
    with _open(path) as picture:
        return picture.size, _PLAIN.get(picture.mode, 3 if picture.mode in ("P", "CMYK", "YCbCr") else 1)


def read_picture(path: Path) -> Volume:
    """Read a picture as [C, X, Y]: X counts columns from the left, Y rows from the top; values as stored.

    - Gray has one channel (any depth), color three. A transparency that hides nothing is dropped, else kept as the last
      channel.
    - A palette of two colors is a mask, 0 for the darker and 1 for the brighter; any other palette is expanded to its
      colors.

    Raises:
        ReadError: damaged, animated or of several pages.
    """
    try:
        with _open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                raise ReadError(f"{path}: a picture of {frames} frames or pages: expected one; split it first")
            if picture.mode == "P" and "transparency" not in picture.info:
                array = _from_palette(picture)
            elif picture.mode in ("P", "PA"):
                array = np.asarray(picture.convert("RGBA"))
            elif picture.mode == "1":
                array = np.asarray(picture).astype(np.uint8) * 255
            elif picture.mode in _PLAIN:
                array = np.asarray(picture)
            else:
                array = np.asarray(picture.convert("RGB"))
    except ReadError:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        raise ReadError(f"{path}: damaged picture: its pixels cannot be decoded ({type(error).__name__})") from error
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] in (2, 4) and array[..., -1].min() == np.iinfo(array.dtype).max:
        array = array[..., :-1]
    return Volume(array.astype(np.float32).transpose(2, 1, 0), np.eye(4), has_geometry=False)


def _from_palette(picture: Image.Image) -> np.ndarray:
    index = np.asarray(picture)
    palette = np.zeros((256, 3), dtype=np.uint8)
    entries = np.array(picture.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    used = np.unique(index)
    if len(used) <= 2:
        brightness = palette.astype(int).sum(axis=1)
        if len(used) == 1:
            return (index > 0).astype(np.uint8)
        return (index == max(used, key=lambda entry: brightness[entry])).astype(np.uint8)
    colors = palette[index]
    gray = (palette[used] == palette[used][:, :1]).all()
    return colors[..., :1] if gray else colors


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(path)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ReadError(f"{path}: damaged picture: its header cannot be read ({type(error).__name__})") from error
