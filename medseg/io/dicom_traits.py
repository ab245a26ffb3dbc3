"""What a header says of a frame beside its place: echo, b-value, time and the like, which tell volumes apart."""

import struct
from collections.abc import Iterator
from typing import Any

from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from .dicom_values import first, first_item, first_number, integer, is_list, numbers
from .text import one_line

Traits = tuple[tuple[str, Any], ...]

_B_VALUE = Tag("DiffusionBValue")
_GE_COMPONENTS = ("MAGNITUDE", "PHASE", "REAL", "IMAGINARY")


def traits(ds: Dataset, modality: str) -> Traits:
    """Return the traits of an object whose frames share one header, the absent ones left out."""
    return tuple(_present(_classic(ds, modality)))


def frame_traits(ds: Dataset, group: Dataset, shared: Dataset) -> Traits:
    """Return the traits of a frame of an enhanced object (DICOM PS3.3 C.7.6.16), the absent ones left out."""
    return tuple(_present(_enhanced(ds, group, shared)))


def _present(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    return (pair for pair in pairs if pair[1] is not None and pair[1] != "")


def _classic(ds: Dataset, modality: str) -> Iterator[tuple[str, Any]]:
    if modality == "MR":
        b_value, direction = _diffusion(ds)
        yield "b", b_value
        yield "direction", direction
        yield "kind", _kind(ds.get("ImageType"), _ge_component(ds))
        yield "echo_time", first_number(ds, "EchoTime")
        yield "echo", integer(ds, "EchoNumbers")
        yield "inversion_time", first_number(ds, "InversionTime")
        yield "flip_angle", first_number(ds, "FlipAngle")
        yield "time", integer(ds, "TemporalPositionIdentifier")
    else:
        yield "kind", _kind(ds.get("ImageType"), "")
        if modality != "CT":
            yield "frame_time", first_number(ds, "FrameReferenceTime")
    yield "trigger", first_number(ds, "TriggerTime")
    yield "time of acquisition", _moment(ds)
    yield "acquisition", integer(ds, "AcquisitionNumber")
    yield "number", integer(ds, "InstanceNumber")


def _enhanced(ds: Dataset, group: Dataset, shared: Dataset) -> Iterator[tuple[str, Any]]:
    def item(keyword: str) -> Dataset:
        return first_item(group, shared, keyword)

    content, diffusion = item("FrameContentSequence"), item("MRDiffusionSequence")
    frame_type = Dataset()
    for name in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
        frame_type = frame_type or item(name)
    b_value = first_number(diffusion, "DiffusionBValue")
    toward = first_item(diffusion, diffusion, "DiffusionGradientDirectionSequence")
    yield "stack", one_line(content.get("StackID") or "")
    yield "b", b_value
    yield "direction", _direction(b_value, numbers(toward, "DiffusionGradientOrientation", 3))
    yield (
        "kind",
        _kind(
            frame_type.get("FrameType") or ds.get("ImageType"), one_line(frame_type.get("ComplexImageComponent") or "")
        ),
    )
    yield "echo_time", first_number(item("MREchoSequence"), "EffectiveEchoTime")
    yield "inversion_time", first_number(item("MRModifierSequence"), "InversionTimes")
    yield "flip_angle", first_number(item("MRTimingAndRelatedParametersSequence"), "FlipAngle")
    yield "contrast", one_line(first(item("ContrastBolusUsageSequence").get("ContrastBolusAgentPhase")) or "")
    yield "time", integer(content, "TemporalPositionIndex")
    yield "trigger", first_number(item("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime")
    yield "time of acquisition", one_line(content.get("FrameAcquisitionDateTime") or "") or _moment(ds)
    acquisition = integer(content, "FrameAcquisitionNumber")
    yield "acquisition", integer(ds, "AcquisitionNumber") if acquisition is None else acquisition
    index = content.get("DimensionIndexValues")
    for axis, value in enumerate(index if is_list(index) else []):
        yield f"index {axis + 1}", int(value)
    yield "number", integer(ds, "InstanceNumber")


def _diffusion(ds: Dataset) -> tuple[float | None, tuple[float, ...] | None]:
    """Return b-value (s/mm²) and gradient direction, from the standard's attributes or the vendor's own."""
    if _B_VALUE in ds and (b_value := first_number(ds, "DiffusionBValue")) is not None:
        return b_value, _direction(b_value, numbers(ds, "DiffusionGradientOrientation", 3))
    if found := _private(ds, 0x0019, 0x0C, "SIEMENS MR HEADER"):
        return found[0], _direction(found[0], _private(ds, 0x0019, 0x0E, "SIEMENS MR HEADER", count=3, binary=True))
    if found := _private(ds, 0x2001, 0x03, "PHILIPS IMAGING DD 001", binary=True):
        return found[0], None
    if found := _private(ds, 0x0043, 0x39, "GEMS_PARM_01"):
        # Some GE sequences add 10^9 to the b-value; no scanner reaches 100,000 s/mm².
        value = found[0] % 100_000
        axes = [_private(ds, 0x0019, element, "GEMS_ACQU_01") for element in (0xBB, 0xBC, 0xBD)]
        return value, _direction(value, tuple(axis[0] for axis in axes if axis))
    return None, None


def _direction(b_value: float | None, direction: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if not b_value or direction is None or len(direction) != 3 or not any(direction):
        return None
    return tuple(round(value, 4) + 0.0 for value in direction)


def _ge_component(ds: Dataset) -> str:
    found = _private(ds, 0x0043, 0x2F, "GEMS_PARM_01")
    return _GE_COMPONENTS[int(found[0])] if found and found[0] in range(4) else ""


def _private(
    ds: Dataset, group: int, element: int, creator: str, *, count: int = 1, binary: bool = False
) -> tuple[float, ...] | None:
    """Return the first numbers of a private element. Archives often lose its VR; ``binary`` numbers are floats then."""
    # A vendor's block is where its creator says (PS3.5 7.8.1): the first in most files, a later one in some.
    block = 0x10
    while (mark := BaseTag(group << 16 | block)) in ds and str(ds[mark].value).strip().upper() != creator:
        block += 1
    tag = BaseTag(group << 16 | block << 8 | element)
    if mark not in ds or tag not in ds:
        return None
    value = ds[tag].value
    try:
        if isinstance(value, bytes):
            if binary:
                code = "f" if len(value) == 4 * count else "d"
                value = struct.unpack(f"<{count}{code}", value)
            else:
                value = value.decode("ascii").strip(" \0").split("\\")
        return tuple(float(part) for part in (list(value) if is_list(value) else [value])[:count])
    except (TypeError, ValueError, struct.error):
        return None


def _kind(image_type: Any, component: str) -> str:
    values = image_type if is_list(image_type) else [image_type or ""]
    return "\\".join([one_line(value).upper() for value in values] + [component.upper()] * bool(component))


def _moment(ds: Dataset) -> str:
    """Return date and time of the acquisition as one text that sorts by time."""
    whole = "AcquisitionDateTime" in ds and ds.AcquisitionDateTime
    return one_line(whole or f"{ds.get('AcquisitionDate') or ''}{ds.get('AcquisitionTime') or ''}")
