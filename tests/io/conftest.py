"""DICOM objects made on the spot, for cases that no archive file shows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SOP_CLASS = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
}
NAME, PATIENT = "Doe^Jane", "ID-4711"


def base(modality: str, uids: dict[str, str]) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SOP_CLASS[modality]
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.PatientName, ds.PatientID = NAME, PATIENT
    ds.Modality = modality
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uids["study"], uids["series"]
    ds.FrameOfReferenceUID = uids["frame"]
    ds.StudyDate = "20240131"
    ds.SeriesNumber = 3
    ds.SeriesDescription = "made for a test"
    return ds


@pytest.fixture
def uids() -> dict[str, str]:
    return {"study": generate_uid(), "series": generate_uid(), "frame": generate_uid()}


@pytest.fixture
def make_series(uids: dict[str, str]) -> Callable[..., list[Path]]:
    """Write stored values [slice, row, column] as one file per slice; return the files in the order of the slices."""

    def make(
        folder: Path,
        stored: np.ndarray,
        *,
        modality: str = "CT",
        origin: Sequence[float] = (-10.0, -20.0, 30.0),
        orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
        spacing: Sequence[float] = (2.0, 1.5),
        step: float = 3.0,
        positions: Sequence[Sequence[float]] | None = None,
        slopes: Sequence[float] | None = None,
        intercepts: Sequence[float] | None = None,
        change: Callable[[int, Dataset], Any] | None = None,
        names: Sequence[str] | None = None,
        series: str | None = None,
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        normal = np.cross(orientation[:3], orientation[3:])
        files = []
        for i, plane in enumerate(stored):
            ds = base(modality, {**uids, "series": series or uids["series"]})
            ds.InstanceNumber = i + 1
            where = positions[i] if positions else np.asarray(origin) + i * step * normal
            ds.ImagePositionPatient = [f"{float(x):.10g}" for x in where]
            ds.ImageOrientationPatient = [f"{float(x):.10g}" for x in orientation]
            ds.PixelSpacing = list(spacing)
            ds.SliceThickness = abs(step)
            ds.Rows, ds.Columns = plane.shape[:2]
            ds.SamplesPerPixel = 1
            ds.PhotometricInterpretation = "MONOCHROME2"
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
            ds.PixelRepresentation = int(plane.dtype.kind == "i")
            ds.RescaleSlope = slopes[i] if slopes else 1
            ds.RescaleIntercept = intercepts[i] if intercepts else 0
            ds.PixelData = plane.astype("<i2" if plane.dtype.kind == "i" else "<u2").tobytes()
            if change:
                change(i, ds)
            path = folder / (names[i] if names else f"{i:03}.dcm")
            pydicom.dcmwrite(path, ds, enforce_file_format=True)
            files.append(path)
        return files

    return make


@pytest.fixture
def make_rtstruct(uids: dict[str, str]) -> Callable[..., Path]:
    """Write an RTSTRUCT of the series of `make_series`: {name: [(points, type) or points, ...]}."""

    def make(path: Path, rois: dict[str, list[Any]], change: Callable[[Dataset], Any] | None = None) -> Path:
        ds = base("RTSTRUCT", {**uids, "series": generate_uid()})
        del ds.FrameOfReferenceUID
        series = Dataset()
        series.SeriesInstanceUID = uids["series"]
        study = Dataset()
        study.RTReferencedSeriesSequence = [series]
        frame = Dataset()
        frame.FrameOfReferenceUID = uids["frame"]
        frame.RTReferencedStudySequence = [study]
        ds.ReferencedFrameOfReferenceSequence = [frame]
        ds.StructureSetROISequence, ds.ROIContourSequence = [], []
        for number, (name, contours) in enumerate(rois.items(), start=1):
            item = Dataset()
            item.ROINumber, item.ROIName = number, name.split("#")[0]
            item.ReferencedFrameOfReferenceUID = uids["frame"]
            ds.StructureSetROISequence.append(item)
            roi = Dataset()
            roi.ReferencedROINumber = number
            roi.ContourSequence = []
            for entry in contours:
                points, kind = entry if isinstance(entry, tuple) else (entry, "CLOSED_PLANAR")
                contour = Dataset()
                contour.ContourGeometricType = kind
                contour.NumberOfContourPoints = len(points)
                contour.ContourData = [f"{float(x):.10g}" for x in np.asarray(points).ravel()]
                roi.ContourSequence.append(contour)
            ds.ROIContourSequence.append(roi)
        if change:
            change(ds)
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        return path

    return make
