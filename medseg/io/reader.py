"""The reading code as a MONAI reader, for ``LoadImaged`` in any bundle."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader

from ..errors import MedsegError
from .image import load
from .kinds import claimed_kind

PathLike = str | os.PathLike[str]


class Reader(ImageReader):
    """Read DICOM folders and files, NIfTI, MHD/MHA, NRRD and pictures just as `read_image` does.

    The array is channel first already, and its metadata says so: ``ensure_channel_first=True`` and
    ``EnsureChannelFirstd`` leave it as it is. A list of files is one DICOM series, or else channels in that order.

    MONAI's ``LoadImage`` answers an error in ``read`` by trying its other readers, which would read what is refused
    here for good reason (a series with a missing slice). `read` therefore keeps the error, and `get_data` raises it.

    Args:
        pet_units: as in `read_image`.
        tilt: as in `read_image`.
        gaps: as in `read_image`.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> from medseg.io import Reader, write_nifti
        >>> path = Path(tempfile.mkdtemp()) / "image.nii.gz"
        >>> write_nifti((np.ones((4, 5, 6), np.float32), np.diag([2, 2, 3, 1])), path)
        >>> LoadImage(reader=Reader, ensure_channel_first=True)(path).shape
        torch.Size([1, 4, 5, 6])
    """

    def __init__(self, pet_units: str = "SUVbw", tilt: str = "correct", gaps: str = "refuse") -> None:
        super().__init__()
        self.options = {"pet_units": pet_units, "tilt": tilt, "gaps": gaps}

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every name is a folder, of a known suffix, or without suffix as DICOM files often are."""
        names = [filename] if isinstance(filename, (str, os.PathLike)) else filename
        return all(Path(name).is_dir() or claimed_kind(Path(name)) or not Path(name).suffix for name in names)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """Read a file, a folder or a list of files; return it, or the error that `get_data` shall raise."""
        try:
            return load(data, **{name: kwargs.get(name, value) for name, value in self.options.items()})
        except MedsegError as error:
            return error

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the array [C, X, Y, Z] or [C, X, Y] and the metadata of what `read` returned.

        Raises:
            ReadError, MissingTagError, GeometryError: as `read_image`.
        """
        if isinstance(img, MedsegError):
            raise img
        volume, name = img
        return volume.voxels, volume.meta(name)
