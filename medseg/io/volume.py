"""What every reader of this room returns: voxels, their place in the patient, and what is known of them."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from monai.data import MetaTensor


@dataclass(frozen=True, eq=False)
class Volume:
    """An image as read, before it becomes a ``MetaTensor``.

    Attributes:
        voxels: float32, channel first: [C, X, Y, Z], or [C, X, Y] for a flat image.
        affine: 4 × 4, voxel index to RAS millimetres.
        modality: the DICOM modality (``"CT"``), empty where the format tells none.
        units: ``"HU"``, ``"SUVbw"``, ``"stored"``; empty where the format tells none.
        has_geometry: False for pictures, whose affine says nothing.
        problems: what a careful reader should know, one line each.
        mended: what reading changed, one line each: tilt corrected, slices interpolated, copies left out.
        volumes: the names of the channels where they are volumes of one DICOM series.
        window: center and width of the display window of the header, NaN where it has none.
        window_function: ``"LINEAR"``, ``"LINEAR_EXACT"`` or ``"SIGMOID"``.
        dicom: identity of the study that the image belongs to, without names.
    """

    voxels: np.ndarray
    affine: np.ndarray
    modality: str = ""
    units: str = ""
    has_geometry: bool = True
    problems: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    window: tuple[float, float] = (math.nan, math.nan)
    window_function: str = "LINEAR"
    dicom: dict[str, str] = field(default_factory=dict)

    def meta(self, name: str) -> dict[str, Any]:
        """Return the metadata that MONAI expects, with ``name`` as the file that was read.

        Values keep one type and length from image to image, so that a batch of images can be collated.
        """
        meta: dict[str, Any] = {
            "affine": self.affine.copy(),
            "original_affine": self.affine.copy(),
            "space": "RAS",
            "spatial_shape": np.asarray(self.voxels.shape[1:]),
            "original_channel_dim": 0,
            "filename_or_obj": name,
            "modality": self.modality,
            "units": self.units,
            "has_geometry": self.has_geometry,
            "problems": "; ".join(self.problems),
            "mended": "; ".join(self.mended),
            "volumes": "; ".join(self.volumes),
            "window": self.window,
            "window_function": self.window_function,
        }
        if self.dicom:
            meta["dicom"] = dict(self.dicom)
        return meta

    def tensor(self, name: str) -> "MetaTensor":
        """Return the image as a ``MetaTensor`` that shares memory with ``voxels``."""
        import torch
        from monai.data import MetaTensor

        meta = self.meta(name)
        affine = torch.from_numpy(meta.pop("affine"))
        return MetaTensor(torch.from_numpy(self.voxels), affine=affine, meta=meta)
