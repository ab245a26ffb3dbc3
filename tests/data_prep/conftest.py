"""Fixtures for recipes that read DICOM: small series in any geometry."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

#: Programs that tests run, and what they import: no tests.
collect_ignore = ["full_disk.py", "light_recipe.py", "on_a_cluster.py"]


@pytest.fixture(scope="session")
def write_series() -> Callable[..., list[Path]]:
    """Write [x, y, z] as a DICOM series whose voxel (x, y, z) lies at ``affine @ (x, y, z, 1)`` in LPS mm."""

    def write(
        folder: Path,
        voxels: np.ndarray,
        affine: np.ndarray,
        *,
        patient: str,
        number: int = 1,
        description: str = "",
        modality: str = "MR",
        study: str = "study",
        instances: Sequence[int] | None = None,
    ) -> list[Path]:
        folder.mkdir(parents=True)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        along = affine[:3, :3] / spacing
        slices = voxels.shape[2]
        files = []
        for k, instance in enumerate(instances or range(1, slices + 1)):
            ds = pydicom.Dataset()
            ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4" if modality == "MR" else "1.2.840.10008.5.1.4.1.1.2"
            ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(k)])
            ds.StudyInstanceUID = generate_uid(entropy_srcs=[patient, study])
            ds.SeriesInstanceUID = generate_uid(entropy_srcs=[str(folder)])
            ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[patient, study, "frame"])
            ds.PatientID, ds.PatientName, ds.Modality = patient, "", modality
            ds.StudyDate, ds.SeriesNumber, ds.SeriesDescription = "20110707", number, description
            ds.InstanceNumber = instance
            ds.ImageOrientationPatient = [round(float(v), 12) for v in (*along[:, 0], *along[:, 1])]
            ds.ImagePositionPatient = [round(float(v), 9) for v in (affine @ [0, 0, k, 1])[:3]]
            ds.PixelSpacing, ds.SliceThickness = [float(spacing[1]), float(spacing[0])], float(spacing[2])
            ds.Rows, ds.Columns, ds.SamplesPerPixel = voxels.shape[1], voxels.shape[0], 1
            ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 1
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
            ds.RescaleSlope, ds.RescaleIntercept = 1, 0
            ds.PixelData = voxels[..., k].T.astype("<i2").tobytes()
            ds.file_meta = pydicom.dataset.FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            files.append(folder / f"1-{instance:03d}.dcm")
            ds.save_as(files[-1], enforce_file_format=True)
        return files

    return write
