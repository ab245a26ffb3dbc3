"""A DICOM image series as one volume."""

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError, GeometryError, MedsegError, ReadError
from .dicom_geometry import assemble
from .dicom_header import Instance, integer, place_of
from .dicom_pixels import check_promise, dataset_of, decode, forget_pixels, rescale
from .suv import suv_factor
from .volume import Volume

PET_UNITS = ("SUVbw", "stored")


def read_volume(instances: Sequence[Instance], *, pet_units: str = "SUVbw") -> Volume:
    """Read the pixels of one series, whose instances hold their datasets (``read_instance(..., pixels=True)``).

    Raises:
        ReadError: no pixels, pixels that cannot be decoded, or several series.
        GeometryError: see `assemble`.
        MissingTagError: an attribute that SUVbw needs is absent (PET only).
    """
    if pet_units not in PET_UNITS:
        raise ConfigError(f"pet_units: {pet_units!r} found, expected one of {', '.join(PET_UNITS)}")
    try:
        return _volume(instances, pet_units)
    except MedsegError:
        raise
    except Exception as error:  # values of damaged elements, which pydicom parses only when they are asked for
        raise ReadError(
            f"{place_of(instances)}: damaged DICOM: an element cannot be parsed ({type(error).__name__})"
        ) from error


def _volume(instances: Sequence[Instance], pet_units: str) -> Volume:
    where = place_of(instances)
    first = instances[0]
    for item in instances:
        if not item.is_image:
            raise ReadError(f"{item.path}: no image: a DICOM object of modality {item.modality or 'unknown'}")
    if len({item.patient_id for item in instances}) > 1:
        raise ReadError(f"{where}: files of different patients share one SeriesInstanceUID: set them apart")
    grid = assemble(instances)
    columns, rows, count = grid.shape
    samples = {integer(dataset_of(item), "SamplesPerPixel") or 1 for item in instances}
    palette = dataset_of(first).get("PhotometricInterpretation") == "PALETTE COLOR"
    channels = 3 if palette else samples.pop()
    if samples and not palette:
        raise GeometryError(f"{where}: gray and color slices in one series")
    check_promise(instances, columns * rows * count * channels)

    stack = np.empty((count, rows, columns, channels), dtype=np.float32)
    slots: dict[int, list[tuple[int, int]]] = {}
    for slot, (i, frame) in enumerate(grid.order):
        slots.setdefault(i, []).append((frame, slot))
    units = set()
    for i, wanted in slots.items():
        item = instances[i]
        ds = dataset_of(item)
        pet = suv_factor(ds, name=str(item.path)) if item.modality == "PT" and pet_units == "SUVbw" else None
        frames = sorted(wanted)
        for (frame, slot), pixels in zip(frames, decode(item, [frame for frame, _ in frames]), strict=True):
            if pixels.shape[:2] != (rows, columns):
                raise ReadError(f"{item.path}: pixels of {pixels.shape}, expected {rows} rows and {columns} columns")
            units.add(rescale(item, frame, pixels, stack[slot]))
            if pet is not None:
                stack[slot] *= np.float32(pet)
        forget_pixels(ds)
    unit = "SUVbw" if first.modality == "PT" and pet_units == "SUVbw" else units.pop() if len(units) == 1 else "stored"
    return Volume(
        voxels=stack.transpose(3, 2, 1, 0),
        affine=grid.affine,
        modality=first.modality,
        units=unit,
        has_geometry=grid.has_geometry,
        dicom={
            "study_uid": first.study_uid,
            "series_uid": first.series_uid,
            "frame_of_reference_uid": first.frame_of_reference_uid,
            "patient_hash": first.hashed_patient(),
        },
    )
