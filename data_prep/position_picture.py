"""The picture by which a person checks that a lesion is where it should be: whole slices, a red dot and a frame."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from monai.data import MetaTensor
    from numpy.typing import NDArray
    from PIL import Image

_HEIGHT = 400  # pixels of each panel
_RED, _YELLOW = (255, 0, 0), (255, 220, 0)


@dataclass(frozen=True)
class Panel:
    """One slice of such a picture.

    Attributes:
        image: [1, x, y, z], with its affine.
        patch: [channel, x, y, 1], whose affine tells where the frame goes.
        slice_index: which slice of ``image`` to show.
        limits: values that are black and white; by default the 1st and 99th percentile of the slice.
    """

    image: "MetaTensor"
    patch: "MetaTensor"
    slice_index: int = 0
    limits: tuple[float, float] | None = None


def position_picture(panels: Sequence[Panel], position: Sequence[float]) -> bytes:
    """Draw slices side by side, each with the frame of its patch and a dot on the lesion.

    The slices are shown as they are stored (columns to the right, rows downward), a millimeter as long in both
    directions; the dot is where their own affine puts the position.

    Args:
        panels: from left to right.
        position: RAS mm (of a picture without geometry, its pixels).

    Returns:
        PNG.
    """
    from PIL import Image

    shown = [_draw(panel, position) for panel in panels]
    sheet = Image.new("RGB", (sum(one.width for one in shown), _HEIGHT))
    left = 0
    for one in shown:
        sheet.paste(one, (left, 0))
        left += one.width
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    return content.getvalue()


def _draw(panel: Panel, position: Sequence[float]) -> "Image.Image":
    from PIL import Image, ImageDraw

    affine = np.asarray(panel.image.affine, dtype=np.float64)
    pixels = np.asarray(panel.image)[0, ..., panel.slice_index]
    low, high = panel.limits or (float(level) for level in np.percentile(pixels, (1, 99)))
    gray = np.clip((pixels - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    height = pixels.shape[1] * spacing[1]
    size = max(1, round(_HEIGHT * pixels.shape[0] * spacing[0] / height)), _HEIGHT
    picture = Image.fromarray(gray.T).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    pen = ImageDraw.Draw(picture)

    def place(points: "NDArray[np.float64]") -> list[tuple[float, float]]:
        index = (np.linalg.inv(affine) @ np.c_[points, np.ones(len(points))].T)[:2].T
        return [(float(x), float(y)) for x, y in (index + 0.5) * np.array(size) / pixels.shape]

    x, y = panel.patch.shape[1:3]
    corners = np.array([(a, b, 0, 1) for a, b in ((-0.5, -0.5), (x - 0.5, -0.5), (x - 0.5, y - 0.5), (-0.5, y - 0.5))])
    frame = place((np.asarray(panel.patch.affine, dtype=np.float64) @ corners.T)[:3].T)
    pen.line([*frame, frame[0]], fill=_YELLOW, width=1)
    ((across, down),) = place(np.array([position], dtype=np.float64))
    pen.ellipse((across - 3, down - 3, across + 3, down + 3), fill=_RED)
    return picture
