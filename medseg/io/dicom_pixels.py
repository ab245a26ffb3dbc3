"""The pixels of a DICOM file: decoded, and rescaled to the quantity that they stand for."""

from collections.abc import Iterator, Sequence

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder

from ..errors import MedsegError, MissingTagError, ReadError
from .dicom_header import Instance, first_item, integer, numbers, place_of
from .text import one_line


def decode(item: Instance, frames: list[int]) -> Iterator[np.ndarray]:
    """Give the stored values of the wanted frames, in order, as [rows, columns] or [rows, columns, 3] (RGB)."""
    ds = dataset_of(item)
    syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    try:
        if not any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ReadError(f"{item.path}: no pixels: the file has a header and no PixelData (7FE0,0010)")
        if syntax is None:
            syntax = (
                pydicom.uid.ImplicitVRLittleEndian if ds.original_encoding[0] else pydicom.uid.ExplicitVRLittleEndian
            )
        decoder = get_decoder(syntax)
        if not decoder.is_available:
            raise ReadError(
                f"{item.path}: its pixels cannot be decoded: no decoder for {one_line(syntax.name)} is at work here; "
                "install python-gdcm, pyjpegls, pylibjpeg with pylibjpeg-openjpeg and pylibjpeg-rle"
            )
        for pixels, _ in decoder.iter_array(ds, indices=frames, raw=False):
            if ds.PhotometricInterpretation == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, ds)
                if pixels.dtype == np.uint16:  # palettes of 16 bits are meant to be shown with 8
                    pixels = pixels >> 8
            yield pixels
    except (MedsegError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a decoder in Rust is no Exception
        kind = one_line(getattr(syntax, "name", "an unknown transfer syntax"))
        raise ReadError(f"{item.path}: its pixels cannot be decoded ({kind}, {type(error).__name__})") from error


def rescale(item: Instance, frame: int, pixels: np.ndarray, out: np.ndarray) -> str:
    """Write the values of one frame into ``out`` [rows, columns, channels]; return their unit."""
    if pixels.ndim == 3:
        out[...] = pixels
        return "stored"
    ds = dataset_of(item)
    quantity = item.modality in ("CT", "PT", "NM", "MR")
    if not quantity and ds.get("PhotometricInterpretation") == "MONOCHROME1":
        # In MONOCHROME1 the lowest value is shown white. Quantities keep their values, pictures get white high.
        bits = int(ds.BitsStored)
        signed = bool(ds.PixelRepresentation)
        pixels = (-1 if signed else (1 << bits) - 1) - pixels.astype(np.int64)
    source = ds
    if groups := ds.get("PerFrameFunctionalGroupsSequence"):
        shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        source = first_item(groups[frame], shared, "PixelValueTransformationSequence") or ds
    if source.get("ModalityLUTSequence"):
        out[..., 0] = apply_modality_lut(pixels, source)
        return one_line(source.ModalityLUTSequence[0].get("ModalityLUTType") or "stored")
    slope, intercept = numbers(source, "RescaleSlope", 1), numbers(source, "RescaleIntercept", 1)
    out[..., 0] = pixels
    if slope is None and intercept is None:
        return "stored"
    if slope is None or intercept is None:
        absent = "RescaleSlope (0028,1053)" if slope is None else "RescaleIntercept (0028,1052)"
        raise MissingTagError(f"{item.path}: {absent} is missing or unusable although its partner is present")
    if slope[0] != 1:
        out *= np.float32(slope[0])
    if intercept[0] != 0:
        out += np.float32(intercept[0])
    kind = one_line(source.get("RescaleType") or ("HU" if item.modality == "CT" else "stored"))
    return "stored" if kind == "US" else kind


def check_promise(instances: Sequence[Instance], voxels: int) -> None:
    """Refuse before any memory is taken when the headers promise far more than the files can hold."""
    held = sum(item.path.stat().st_size for item in instances)
    if voxels > 3000 * held + (1 << 24):
        raise ReadError(
            f"{place_of(instances)}: the header promises {voxels:,} voxels, the files have {held:,} bytes: "
            "damaged or forged"
        )
    for item in instances:
        ds = dataset_of(item)
        syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
        if syntax is None or syntax.is_compressed or syntax.is_deflated:
            continue
        needed = item.rows * item.columns * len(item.planes) * (integer(ds, "BitsAllocated") or 8) // 8
        if needed > item.path.stat().st_size:
            raise ReadError(
                f"{item.path}: cut short: its header promises {needed:,} bytes of pixels, the file has "
                f"{item.path.stat().st_size:,}; copy it again from its source"
            )


def forget_pixels(ds: Dataset) -> None:
    """Free the pixels of a slice once they are in the volume."""
    for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
        if keyword in ds:
            del ds[keyword]
    ds._pixel_array = None


def dataset_of(item: Instance) -> Dataset:
    """Return the dataset of an instance that was read with its pixels."""
    if item.dataset is None:
        raise ValueError("the instance was read without its dataset")
    return item.dataset
