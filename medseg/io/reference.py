"""The image that contours, segmentations and labels belong to: its grid and its identity, without its voxels."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GeometryError, ReadError
from .dicom_header import hash_patient
from .series import Series, find_series
from .text import one_line


@dataclass(frozen=True, eq=False)
class Reference:
    """The grid of an image, and what ties it to other objects.

    Attributes:
        name: what a message calls it.
        shape: voxels along X, Y and Z.
        affine: 4 × 4, voxel index to RAS millimetres.
        identity: ``study_uid``, ``series_uid``, ``frame_of_reference_uid`` and ``patient_hash`` of a DICOM image; empty
            for another.
        slices: of a DICOM series the file of each slice, where each is one file; else empty.
    """

    name: str
    shape: tuple[int, ...]
    affine: np.ndarray
    identity: dict[str, str] = field(default_factory=dict)
    slices: tuple[Path, ...] = ()

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres along X, Y and Z."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def find_reference(reference: Any, what: str, series_uids: Collection[str] = ()) -> Reference:
    """Return the grid of an image, from headers where it is not read already.

    Args:
        reference: an image, a `Series`, the path of a folder or an image file, or the files of one DICOM series.
        what: what needs it, for messages: ``"contours"``.
        series_uids: which series to take where the folder holds several.

    Raises:
        ReadError: no image, or several.
        GeometryError: no volume with geometry.
    """
    if isinstance(reference, (str, os.PathLike)):
        reference = _only_image(reference, what, series_uids)
    elif not isinstance(reference, Series) and not hasattr(reference, "affine"):
        return _of_files([Path(item) for item in reference], what)
    if isinstance(reference, Series):
        return _of_series(reference, what)
    meta = getattr(reference, "meta", {})
    name = str(meta.get("filename_or_obj", "the reference image"))
    if not meta.get("has_geometry", True) or reference.ndim != 4:
        raise GeometryError(f"{name}: not a volume with geometry: {what} need one")
    affine = np.asarray(reference.affine.detach().cpu().numpy(), dtype=np.float64)
    return Reference(name, tuple(reference.shape[1:]), affine, dict(meta.get("dicom") or {}))


def uid_of(value: object) -> str:
    """Return a UID, or nothing where a file has none or something that is none."""
    text = one_line(value or "")
    return text if "." in text and not text.strip("0123456789.") else ""


def matched_by(
    reference: Reference,
    name: str,
    *,
    patient_hash: str,
    study_uid: str,
    series_uids: Collection[str],
    frames: Mapping[str, str],
    advice: str = "",
) -> tuple[str, bool]:
    """Return what ties an object to a reference: ``"series"``, ``"frame of reference"``, ``"study"`` or ``"geometry"``.

    The second value tells whether geometry must prove it: nothing ties the object to a DICOM image, and nothing speaks
    against it.

    Args:
        reference: the image.
        name: what a message calls the object.
        patient_hash: from `hash_patient`.
        study_uid: StudyInstanceUID of the object.
        series_uids: the series that it refers to.
        frames: the frames of reference that it is drawn in, and what is drawn in each.
        advice: what to do about a refusal.

    Raises:
        GeometryError: another patient, frame of reference or study.
    """
    own = reference.identity
    check_patient(reference, name, patient_hash)
    frame, series, study = (uid_of(own.get(key)) for key in ("frame_of_reference_uid", "series_uid", "study_uid"))
    if not (frame or series or study):
        return "geometry", False
    same_study = bool(study) and study == study_uid
    end = f"; {advice}" if advice else ""
    for other, what in frames.items():
        if frame and other not in (frame, ""):
            if series in series_uids:
                where = f"refers to {reference.name} and yet lies in another frame of reference"
            elif same_study:
                where = f"lies in another frame of reference than {reference.name}"
            else:
                where = f"lies in another study and frame of reference than {reference.name}"
            raise GeometryError(f"{name} {where} ({what}): FrameOfReferenceUID (0020,0052) differs{end}")
    if series and series in series_uids:
        return "series", False
    if frame and set(frames) == {frame}:
        return "frame of reference", False
    if same_study:
        return "study", False
    if study and study_uid:
        raise GeometryError(
            f"{name} belongs to another study than {reference.name}: StudyInstanceUID (0020,000D) differs{end}"
        )
    return "geometry", True


def check_patient(reference: Reference, name: str, patient_hash: str) -> None:
    """Refuse an object of another patient; an absent PatientID speaks neither for nor against."""
    mine = reference.identity.get("patient_hash")
    if mine and patient_hash and mine != patient_hash:
        raise GeometryError(f"{name} belongs to another patient than {reference.name}: PatientID (0010,0020) differs")


def _only_image(path: str | os.PathLike[str], what: str, series_uids: Collection[str]) -> Series:
    images = [series for series in find_series(path) if series.is_image]
    if len(images) > 1:
        images = [series for series in images if series.series_uid in series_uids] or images
        images = [series for series in images if series.affine is not None] or images
        # What `read_image` sets apart too.
        images = [series for series in images if not series.stack.startswith(("localizer", "without"))] or images
    if len(images) != 1:
        raise ReadError(f"{path}: {len(images)} images found: expected one to be the reference of the {what}")
    return images[0]


def _of_series(series: Series, what: str) -> Reference:
    name = str(series.files[0].parent if series.n_files > 1 else series.files[0])
    if series.problems and series.affine is None:
        raise GeometryError(series.problems[0])
    if series.affine is None or len(series.shape) != 3:
        raise GeometryError(f"{name}: not a volume with geometry: {what} need one")
    identity = {}
    if series.kind == "dicom":
        identity = _identity(
            series.study_uid, series.series_uid, series.frame_of_reference_uid, hash_patient(series.patient_id)
        )
    slices = series.files if series.kind == "dicom" and series.n_files == series.shape[2] else ()
    return Reference(name, series.shape, np.asarray(series.affine, dtype=np.float64), identity, slices)


def _of_files(files: list[Path], what: str) -> Reference:
    from .dicom_geometry import assemble
    from .dicom_header import read_instance

    if not files:
        raise ReadError(f"an empty list of files: expected the image that the {what} belong to")
    instances = [read_instance(path, force=True) for path in files]
    first = instances[0]
    if len({(item.patient_id, item.study_uid, item.series_uid) for item in instances}) > 1:
        raise ReadError(f"{first.path.parent}: the files belong to several DICOM series: expected one")
    grid = assemble(instances)
    if not grid.has_geometry:
        raise GeometryError(f"{first.path}: not a volume with geometry: {what} need one")
    identity = _identity(
        first.study_uid, first.series_uid, first.frame_of_reference_uid, hash_patient(first.patient_id)
    )
    slices = tuple(instances[i].path for i, _ in grid.order)
    whole = len(set(slices)) == len(slices) == grid.shape[2]
    return Reference(str(first.path.parent), grid.shape, grid.affine, identity, slices if whole else ())


def _identity(study_uid: str, series_uid: str, frame_uid: str, patient_hash: str) -> dict[str, str]:
    if not (study_uid or series_uid or frame_uid):
        return {}
    return {
        "study_uid": study_uid,
        "series_uid": series_uid,
        "frame_of_reference_uid": frame_uid,
        "patient_hash": patient_hash,
    }
