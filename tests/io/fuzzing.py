"""Damaged files by the thousand: what medseg.io does with them.

A command of its own, so that a crash of a decoder ends a child process and not the tests:

    python tests/io/fuzzing.py run --count 300        damage 300 files, read each, print what went wrong
    python tests/io/fuzzing.py one 123 --keep DIR     make mutant 123 again in DIR and read it here

Mutant n is the same on every machine for one set of seeds. Anything is accepted as a result, and so is an error of
medseg on one printable line; any other exception, a crash, a hang, memory and files written are failures.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HANG_SECONDS = 20
MEMORY_BYTES = 1_000_000_000
NAME = "Doe^Jane"
OUTCOMES: Counter[str] = Counter()


@dataclass(frozen=True)
class Seed:
    """A sound case: a folder, the files of it that are damaged, and how it is read (`image`, `rtstruct`, `seg`)."""

    name: str
    folder: Path
    targets: tuple[Path, ...]
    door: str = "image"


# ---------------------------------------------------------------------------------------------------------- seeds


def make_seeds(root: Path, data: Path | None = None) -> list[Seed]:
    """Write the sound cases below ``root``; with the real data, add every small file of it."""
    seeds = [*_dicom_seeds(root), *_other_seeds(root)]
    if data:
        seeds.extend(_real_seeds(data))
    return seeds


def _dicom_seeds(root: Path) -> Iterator[Seed]:
    import imagecodecs
    import numpy as np
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import generate_uid

    rng = np.random.default_rng(0)

    def uid(*words: object) -> str:
        return generate_uid(entropy_srcs=["medseg fuzzing", *map(str, words)])

    def sequence(**attributes: object) -> list[Dataset]:
        item = Dataset()
        for keyword, value in attributes.items():
            setattr(item, keyword, value)
        return [item]

    def base(name: str, number: int, modality: str, sop_class: str, syntax: str) -> Dataset:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid(name, number)
        ds.PatientName, ds.PatientID, ds.Modality = NAME, "ID-4711", modality
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uid("study"), uid(name), uid("frame")
        ds.SeriesNumber, ds.InstanceNumber, ds.SeriesDescription, ds.StudyDate = 3, number, name, "20240131"
        return ds

    def image(name: str, number: int, pixels: "np.ndarray", modality: str = "CT", syntax: str = "1.2.1") -> Dataset:
        ds = base(name, number, modality, "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008." + syntax)
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-10, -20, 30 + 3 * number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [2, 1.5], 3
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Rows, ds.Columns = pixels.shape[-3:-1] if pixels.shape[-1] == 3 else pixels.shape[-2:]
        ds.SamplesPerPixel = 3 if pixels.shape[-1] == 3 else 1
        ds.PhotometricInterpretation = "RGB" if ds.SamplesPerPixel == 3 else "MONOCHROME2"
        if ds.SamplesPerPixel == 3:
            ds.PlanarConfiguration = 0
        ds.BitsAllocated = 8 * pixels.dtype.itemsize
        ds.BitsStored = 12 if ds.BitsAllocated == 16 else 8
        ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
        if ds.SamplesPerPixel == 1:
            ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 2, -1024, 40, 400
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
        return ds

    def planes(count: int = 3, shape: tuple[int, ...] = (16, 12), kind: str = "uint16") -> "np.ndarray":
        return rng.integers(0, 4096 if kind == "uint16" else 256, (count, *shape)).astype(kind)

    def save(name: str, datasets: list[Dataset], door: str = "image", suffix: str = ".dcm", **how: bool) -> Seed:
        folder = root / name
        folder.mkdir(parents=True)
        files = []
        for i, ds in enumerate(datasets):
            files.append(folder / f"{i}{suffix}")
            pydicom.dcmwrite(files[-1], ds, **(how or {"enforce_file_format": True}))
        return Seed(name, folder, tuple(files), door)

    plain = planes()
    for name, syntax in (("explicit", "1.2.1"), ("deflated", "1.2.1.99"), ("implicit", "1.2")):
        yield save(name, [image(name, i, plane, syntax=syntax) for i, plane in enumerate(plain)])
    big = [image("big", i, plane.byteswap(), syntax="1.2.2") for i, plane in enumerate(plain)]
    yield save("big", big)
    bare = [image("bare", i, plane, syntax="1.2") for i, plane in enumerate(plain)]
    for ds in bare:
        del ds.file_meta
    yield save("bare", bare, suffix="", implicit_vr=True, little_endian=True, enforce_file_format=False)
    yield save("rgb", [image("rgb", i, plane, "US") for i, plane in enumerate(planes(1, (16, 12, 3), "uint8"))])
    palette = image("palette", 0, planes(1, kind="uint8")[0], "US")
    palette.PhotometricInterpretation = "PALETTE COLOR"
    for color in ("Red", "Green", "Blue"):
        setattr(palette, f"{color}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(palette, f"{color}PaletteColorLookupTableData", planes(1, (256,))[0].tobytes())
    del palette.RescaleSlope, palette.RescaleIntercept
    yield save("palette", [palette])

    for name, syntax in (("rle", "1.2.5"), ("jpegls", "1.2.4.80"), ("j2k", "1.2.4.90")):
        made = [image(name, i, plane) for i, plane in enumerate(planes(shape=(40, 36)))]
        for ds in made:
            ds.compress("1.2.840.10008." + syntax, generate_instance_uid=False)
        yield save(name, made)
    eight = planes(kind="uint8")
    for name, syntax, stored, encode in (
        ("ljpeg", "1.2.4.70", plain, lambda plane: imagecodecs.ljpeg_encode(plane, bitspersample=12)),
        ("jpeg", "1.2.4.50", eight, lambda plane: imagecodecs.jpeg8_encode(plane, level=90)),
        ("jpeg12", "1.2.4.51", plain, lambda plane: imagecodecs.jpeg8_encode(plane, level=90, bitspersample=12)),
    ):
        made = []
        for i, plane in enumerate(stored):
            ds = image(name, i, plane, syntax=syntax)
            ds.PixelData = encapsulate([bytes(encode(plane))])
            ds["PixelData"].is_undefined_length = True
            made.append(ds)
        yield save(name, made)

    ds = image("enhanced", 0, planes(4), "MR")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    ds.Rows, ds.Columns, ds.NumberOfFrames = 16, 12, 4
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(ds, keyword)
    shared = sequence(
        PlaneOrientationSequence=sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=sequence(PixelSpacing=[2, 1.5], SliceThickness=3),
    )
    ds.SharedFunctionalGroupsSequence = shared
    ds.PerFrameFunctionalGroupsSequence = [
        sequence(
            PlanePositionSequence=sequence(ImagePositionPatient=[0, 0, 3 * i]),
            PixelValueTransformationSequence=sequence(RescaleSlope=2, RescaleIntercept=1, RescaleType="US"),
            FrameContentSequence=sequence(DimensionIndexValues=[1, i + 1], InStackPositionNumber=i + 1, StackID="1"),
        )[0]
        for i in range(4)
    ]
    yield save("enhanced", [ds])

    ds = image("mosaic", 0, planes(1, (32, 24))[0], "MR")
    ds.ImageType, ds.Manufacturer = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "SIEMENS"
    ds.AcquisitionMatrix = [0, 12, 16, 0]
    block = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0A, "US", 4)
    block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    csa = b"SV10\x04\x03\x02\x01" + (2).to_bytes(4, "little") + (77).to_bytes(4, "little")
    for tag, values in ((b"NumberOfImagesInMosaic", [b"4"]), (b"SliceNormalVector", [b"0.0", b"0.0", b"1.0"])):
        csa += tag.ljust(64, b"\0") + len(values).to_bytes(4, "little") + b"US\0\0" + (6).to_bytes(4, "little")
        csa += (6).to_bytes(4, "little") + (77).to_bytes(4, "little")
        for i in range(6):
            value = values[i] + b"\0" if i < len(values) else b""
            csa += b"".join(n.to_bytes(4, "little") for n in (len(value), len(value), 77, len(value)))
            csa += value.ljust(-(-len(value) // 4) * 4, b"\0")
    block.add_new(0x10, "OB", csa)
    yield save("mosaic", [ds])

    made = [image("pet", i, plane, "PT") for i, plane in enumerate(plain)]
    for ds in made:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.128"
        ds.Units, ds.CorrectedImage, ds.DecayCorrection, ds.PatientWeight = "BQML", ["ATTN", "DECY"], "START", 70
        ds.SeriesDate = ds.AcquisitionDate = "20240131"
        ds.SeriesTime = ds.AcquisitionTime = "120000"
        ds.RadiopharmaceuticalInformationSequence = sequence(
            RadionuclideTotalDose=3.5e8, RadionuclideHalfLife=6586.2, RadiopharmaceuticalStartTime="110000"
        )
    yield save("pet", made)
    made = [image("tilt", i, plane) for i, plane in enumerate(plain)]
    for i, ds in enumerate(made):
        ds.ImagePositionPatient = [0, 1.5 * i, 3 * i]
    yield save("tilt", made)
    made = [image("times", i, plane, "MR") for i, plane in enumerate(planes(4))]
    for i, ds in enumerate(made):
        ds.ImagePositionPatient, ds.EchoTime, ds.EchoNumbers = [0, 0, 3 * (i % 2)], 10 * (i // 2), i // 2 + 1
        ds.AcquisitionTime, ds.TemporalPositionIdentifier = f"12000{i // 2}", i // 2 + 1
    yield save("times", made)

    slices = [image("rtstruct", i, plane) for i, plane in enumerate(plain)]
    ds = base("structures", 1, "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.1.2.1")
    del ds.FrameOfReferenceUID
    ds.ReferencedFrameOfReferenceSequence = sequence(
        FrameOfReferenceUID=uid("frame"),
        RTReferencedStudySequence=sequence(RTReferencedSeriesSequence=sequence(SeriesInstanceUID=uid("rtstruct"))),
    )
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (roi, kind) in enumerate(((",1 SUV/max", "CLOSED_PLANAR"), ("points", "POINT")), start=1):
        ds.StructureSetROISequence.extend(
            sequence(ROINumber=number, ROIName=roi, ReferencedFrameOfReferenceUID=uid("frame"))
        )
        contours = []
        for i in range(3):
            z = 30 + 3 * i
            points = [-8, -18, z] if kind == "POINT" else [-8, -18, z, 2, -18, z, 2, 5, z, -8, 5, z]
            contours.extend(
                sequence(
                    ContourGeometricType=kind,
                    NumberOfContourPoints=len(points) // 3,
                    ContourData=points,
                    ContourImageSequence=sequence(ReferencedSOPInstanceUID=uid("rtstruct", i)),
                )
            )
        ds.ROIContourSequence.extend(sequence(ReferencedROINumber=number, ContourSequence=contours))
    seed = save("rtstruct", [*slices, ds], "rtstruct")
    yield Seed(seed.name, seed.folder, seed.targets[-1:], seed.door)

    yield _segmentation(root)
    yield _index(root, [image("dir", i, plane) for i, plane in enumerate(plain)])


def _segmentation(root: Path) -> Seed:
    import highdicom
    import numpy as np
    import pydicom
    from pydicom.sr.coding import Code

    folder = root / "seg"
    folder.mkdir()
    source = [pydicom.dcmread(path) for path in sorted((root / "explicit").iterdir())]
    for ds in source:
        ds.AccessionNumber = ds.StudyID = ds.PatientSex = ds.PatientBirthDate = ""
        ds.StudyTime = "120000"
    mask = np.zeros((3, 16, 12), np.uint8)
    mask[:, 3:9, 2:8] = 1
    uids = [f"2.25.{number}" for number in (11, 12)]
    segment = highdicom.seg.SegmentDescription(
        1,
        "tumor",
        Code("49755003", "SCT", "Morphologically Altered Structure"),
        Code("108369006", "SCT", "Neoplasm"),
        highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    ds = highdicom.seg.Segmentation(
        source, mask, "BINARY", [segment], uids[0], 9, uids[1], 1, "medseg", "fuzzing", "1", "0"
    )
    for keyword in ("ContentDate", "ContentTime", "SeriesDate", "SeriesTime", "InstanceCreationDate"):
        if keyword in ds:
            setattr(ds, keyword, "20240131" if keyword.endswith("Date") else "120000")
    ds.InstanceCreationTime = "120000"
    ds.save_as(folder / "seg.dcm")
    return Seed("seg", folder, (folder / "seg.dcm",), "seg")


def _index(root: Path, datasets: list) -> Seed:
    from pydicom.fileset import FileSet

    folder = root / "dicomdir"
    files = FileSet()
    files.UID = "2.25.13"
    for ds in datasets:
        ds.StudyTime, ds.StudyID = "120000", "1"
        files.add(ds)
    files.write(folder)
    return Seed("dicomdir", folder, (folder / "DICOMDIR",), "dicomdir")


def _other_seeds(root: Path) -> Iterator[Seed]:
    import imagecodecs
    import nibabel as nib
    import numpy as np
    import SimpleITK as sitk
    from PIL import Image

    rng = np.random.default_rng(1)
    voxels = rng.integers(0, 200, (7, 6, 5)).astype(np.int16)
    affine = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])

    def folder(name: str) -> Path:
        (root / name).mkdir()
        return root / name

    def one(name: str, file: str, save: Callable[[Path], object], target: str = "") -> Seed:
        path = folder(name) / file
        save(path)
        target = target or file
        return Seed(name, path.parent, tuple(path.parent / item for item in target.split()))

    color = np.zeros((7, 6, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, file, image in (
        ("nifti", "a.nii", nib.Nifti1Image(voxels, affine)),
        ("niftigz", "a.nii.gz", nib.Nifti1Image(voxels.astype(np.float32), affine)),
        ("nifti2", "a.nii", nib.Nifti2Image(voxels, affine)),
        ("nifti4d", "a.nii.gz", nib.Nifti1Image(np.stack([voxels] * 3, -1), affine)),
        ("niftirgb", "a.nii", nib.Nifti1Image(color, affine)),
        ("niftibig", "a.nii", nib.Nifti1Image(voxels, affine, nib.Nifti1Header(endianness=">"))),
    ):
        yield one(name, file, lambda path, image=image: nib.save(image, path))
    yield one("pair", "a.hdr", lambda path: nib.save(nib.Nifti1Pair(voxels, affine), path), "a.hdr a.img")

    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((2, 1.5, 3))
    image.SetDirection((0.8, 0, -0.6, 0, 1, 0, 0.6, 0, 0.8))

    def write(packed: bool) -> Callable[[Path], object]:
        return lambda path: sitk.WriteImage(image, str(path), useCompression=packed)

    yield one("mhd", "a.mhd", write(False), "a.mhd a.raw")
    yield one("zraw", "a.mhd", write(True), "a.mhd a.zraw")
    yield one("mha", "a.mha", write(False))
    yield one("zmha", "a.mha", write(True))
    yield one("nrrd", "a.nrrd", write(False))
    yield one("znrrd", "a.nrrd", write(True))
    yield one("nhdr", "a.nhdr", write(False), "a.nhdr a.raw")
    vector = sitk.GetImageFromArray(np.stack([voxels] * 2, -1), isVector=True)
    yield one("vector", "a.nrrd", lambda path: sitk.WriteImage(vector, str(path)))
    listed = folder("list")
    for i, plane in enumerate(voxels):
        (listed / f"s{i}.raw").write_bytes(plane.tobytes())
    (listed / "a.mhd").write_text(
        "NDims = 3\nDimSize = 5 6 7\nElementType = MET_SHORT\nElementDataFile = LIST\n"
        + "".join(f"s{i}.raw\n" for i in range(7))
    )
    yield Seed("list", listed, (listed / "a.mhd",))

    gray, rgb = rng.integers(0, 255, (20, 16), dtype=np.uint8), rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)
    for name, array in (("gray", gray), ("rgb", rgb), ("deep", gray.astype(np.uint16) * 200)):
        for suffix in ("png", "tif", "jpg", "gif", "bmp"):
            if name != "deep" or suffix in ("png", "tif"):
                picture = Image.fromarray(array)
                yield one(f"{name}-{suffix}", f"a.{suffix}", picture.save)
    deep = imagecodecs.png_encode(rgb.astype(np.uint16) * 200)
    yield one("deep-rgb", "a.png", lambda path: path.write_bytes(deep))
    packed = Image.fromarray(rgb)
    yield one("lzw-tif", "a.tif", lambda path: packed.save(path, compression="tiff_lzw"))


def _real_seeds(data: Path) -> Iterator[Seed]:
    """Every small file of the real data, damaged in a folder of its own."""
    for part in ("odd", "dicom", "mhd", "hippocampus", "drive", "brain_mri"):
        files = [path for path in sorted((data / part).rglob("*")) if path.is_file() and 0 < path.stat().st_size < 4e5]
        for path in files[:: max(1, len(files) // 250)]:
            yield Seed(str(path.relative_to(data)), path.parent, (path,), "real")


# ------------------------------------------------------------------------------------------------------ mutations

EXTREMES = (0, 1, -1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, -(2**31), 2**32 - 1)
_WORDS = """
0 -1 1 2 7 255 65535 65536 99999999999 -99999999999 4294967295 2147483648 1e308 -1e308 1e400 nan inf -inf 1e-300 0.0
0x10 1,5 True LOCAL LIST none ../../etc/passwd /etc/passwd %d.raw MET_DOUBLE MET_UCHAR gzip bzip2 raw ascii hex
"""
WORDS = [*_WORDS.split(), "", " ", "1 1 1", "(nan,0,0)", "(0,0,0) (0,0,0) (0,0,0)", "2 2 2 2 2", "\x1b[31m", "é" * 9]


def mutate(content: bytes, other: bytes, rng: random.Random, name: str = "") -> bytes:
    """Return ``content`` with one to four kinds of damage; ``other`` is a second file to splice with."""
    choices = [_flip, _fill, _cut, _insert, _repeat, _length, _length]
    start = content[:512]
    if start[128:132] == b"DICM" or b"1.2.840.10008" in start:
        choices += [_dicom] * 10
    elif re.match(rb"(NRRD|ObjectType|NDims)", start):
        choices += [_text] * 10
    elif b"n+1" in start or b"n+2" in start or b"ni1" in start:
        choices += [_nifti] * 8
    elif start[:2] == b"\x1f\x8b":
        choices += [_inside_gzip] * 10
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        splice = rng.random() < 0.05
        content = _splice(content, other, rng) if splice else rng.choice(choices)(content, rng)
    return content


def _place(content: bytes, rng: random.Random) -> int:
    """Choose a place, more often near the start, where headers are."""
    size = max(len(content), 1)
    return rng.randrange(size) if rng.random() < 0.4 else rng.randrange(min(size, rng.choice((64, 400, 2000, 8000))))


def _flip(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if out else 0):
        out[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _fill(content: bytes, rng: random.Random) -> bytes:
    at, length = _place(content, rng), rng.choice((1, 2, 4, 16, 100, 1000))
    length = min(length, len(content) - at)
    return content[:at] + rng.choice((b"\0", b"\xff", b"\x80", b"9")) * length + content[at + length :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return content[: _place(content, rng)]
    at = _place(content, rng)
    return content[:at] + content[at + rng.choice((1, 2, 4, 100, 1000)) :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.randbytes(rng.choice((1, 2, 4, 16, 300))) + content[at:]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    at, length = _place(content, rng), rng.choice((4, 16, 100, 2000))
    return content[:at] + content[at : at + length] * rng.choice((2, 2, 3, 50)) + content[at + length :]


def _length(content: bytes, rng: random.Random) -> bytes:
    """Set two, four or eight bytes to a number that lengths and counts stumble over."""
    width = rng.choice((2, 4, 4, 8))
    at = _place(content, rng) & ~1
    number = rng.choice(EXTREMES) % (1 << 8 * width)
    return content[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + content[at + width :]


def _splice(content: bytes, other: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + other[rng.choice((at, _place(other, rng))) :]


def _text(content: bytes, rng: random.Random) -> bytes:
    """Damage a text header: numbers and values replaced, lines dropped, doubled or swapped."""
    end = content.find(b"\n\n") + 2 if content.startswith(b"NRRD") else content.find(b"\n", content.find(b"DataFile"))
    end = end if end > 2 else min(len(content), 800)
    head, tail = content[:end].decode("latin-1"), content[end:]
    action = rng.randrange(5)
    lines = head.split("\n")
    at = rng.randrange(len(lines))
    if action <= 1:
        numbers = list(re.finditer(r"-?\d+(\.\d+)?(e-?\d+)?", head))
        if numbers:
            found = rng.choice(numbers)
            head = head[: found.start()] + rng.choice(WORDS) + head[found.end() :]
    elif action == 2:
        mark = "=" if "=" in lines[at] else ":"
        lines[at] = lines[at].partition(mark)[0] + mark + " " + rng.choice(WORDS)
        head = "\n".join(lines)
    elif action == 3:
        lines[at : at + 1] = [] if rng.random() < 0.5 else [lines[at]] * 2
        head = "\n".join(lines)
    else:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
        head = "\n".join(lines)
    return head.encode("latin-1") + tail


def _nifti(content: bytes, rng: random.Random) -> bytes:
    """Set fields of a NIfTI header: dimensions, type, offset, scale, geometry."""
    import nibabel as nib
    import numpy as np

    kind = nib.Nifti2Header if content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Header
    try:
        header = kind(content[: kind.sizeof_hdr], check=False)
    except Exception:
        return _flip(content, rng)
    fields = np.array(header.structarr)
    name = rng.choice(fields.dtype.names)
    target = np.atleast_1d(fields[name])
    if target.dtype.kind in "SV":
        return _fill(content, rng)
    place = (rng.randrange(target.size),)
    numbers = EXTREMES if target.dtype.kind in "iu" else (*EXTREMES, np.nan, np.inf, -np.inf, 1e-40, 1e30, 0.5)
    if name == "datatype":
        numbers = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 0, -1)
    with np.errstate(all="ignore"):
        number = np.array(rng.choice(numbers))
        target[place] = number.astype(np.int64).astype(target.dtype) if target.dtype.kind in "iu" else number
    fields[name] = target if fields[name].ndim else target[0]
    return fields.tobytes() + content[kind.sizeof_hdr :]


def _inside_gzip(content: bytes, rng: random.Random) -> bytes:
    try:
        inner = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return _flip(content, rng)
    return gzip.compress(mutate(inner, inner[::-1], rng), 1, mtime=0)


def _dicom(content: bytes, rng: random.Random) -> bytes:
    """Change the value of an element, at any depth, or drop it; where pydicom cannot write that, flip bits."""
    import pydicom
    from pydicom.dataelem import DataElement

    try:
        ds = pydicom.dcmread(io.BytesIO(content), force=True)
        found = [(place, element) for place in (ds.file_meta, ds) for element in _elements(place)]
        holder, element = rng.choice(found)
        if isinstance(holder, pydicom.Dataset) and rng.random() < 0.6:
            likely = [pair for pair in found if _KEYWORDS.search(pair[1].keyword)]
            holder, element = rng.choice(likely or found)
        action = rng.random()
        parent = _parent(ds, element)
        if action < 0.15:
            del parent[element.tag]
        elif element.VR == "SQ":
            parent[element.tag].value = (
                []
                if action < 0.5
                else list(element.value) * rng.choice((2, 3)) + [pydicom.Dataset()] * rng.randrange(2)
            )
        elif element.VR in ("US", "SS", "UL", "SL", "FL", "FD"):
            width = {"U": 0, "S": 1, "F": 2}[element.VR[0]]
            pool = (
                [n for n in EXTREMES if 0 <= n < 65536],
                [n for n in EXTREMES if -32769 < n < 32768],
                [*map(float, EXTREMES), float("nan"), float("inf")],
            )[width]
            value = rng.choice(pool)
            parent[element.tag] = DataElement(element.tag, element.VR, value if rng.random() < 0.9 else [value] * 3)
        elif isinstance(element.value, bytes):
            parent[element.tag].value = mutate(element.value, element.value[::-1], rng)
        else:
            value = rng.choice(WORDS)
            count = element.VM if rng.random() < 0.8 else rng.choice((0, 1, 2, 7))
            values = [str(v) for v in (element.value if element.VM > 1 else [element.value] * count)]
            if values:
                values[rng.randrange(len(values))] = value
            raw = "\\".join(values).encode("latin-1", "replace")
            return _replace_value(content, element, raw)
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, ds, enforce_file_format=False)
        return stream.getvalue()
    except Exception:
        return _flip(content, rng)


_KEYWORDS = re.compile(
    "Rows|Columns|Bits|Pixel|Frames|Samples|Photometric|Position|Orientation|Spacing|Rescale|Syntax|Planar|Dose|Life|"
    "Time|Weight|Contour|ROI|Offset|Palette|Modality|Segment|Dimension|Record|Image|Number"
)


def _elements(ds: "object") -> Iterator:
    for element in ds:  # type: ignore[attr-defined]
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)


def _parent(ds: "object", element: "object") -> "object":
    for place in (ds.file_meta, ds):  # type: ignore[attr-defined]
        pending = [place]
        while pending:
            here = pending.pop()
            for candidate in here:
                if candidate is element:
                    return here
                if candidate.VR == "SQ":
                    pending.extend(candidate.value)
    return ds


def _replace_value(content: bytes, element: "object", raw: bytes) -> bytes:
    """Replace text in the bytes themselves, for pydicom writes no value that it finds wrong."""
    tag, vr = element.tag, element.VR  # type: ignore[attr-defined]
    head = tag.group.to_bytes(2, "little") + tag.elem.to_bytes(2, "little")
    at = content.find(head + vr.encode())
    raw += b" " * (len(raw) % 2)
    if at >= 0 and vr not in ("OB", "OW", "UN", "UT"):
        length = int.from_bytes(content[at + 6 : at + 8], "little")
        return content[: at + 6] + len(raw).to_bytes(2, "little") + raw + content[at + 8 + length :]
    at = content.find(head)
    if at < 0:
        return content
    length = int.from_bytes(content[at + 4 : at + 8], "little")
    return content[: at + 4] + len(raw).to_bytes(4, "little") + raw + content[at + 8 + length :]


# --------------------------------------------------------------------------------------------------------- reading


def make_mutant(seeds: list[Seed], number: int, folder: Path) -> tuple[Seed, Path]:
    """Write mutant ``number`` into ``folder``: a sound case with one file of it damaged."""
    rng = random.Random(f"medseg {number}")
    made = [seed for seed in seeds if seed.door != "real"]
    real = seeds[len(made) :]
    # Half of the mutants are of made cases, each as often as any other.
    seed = rng.choice(real) if real and rng.random() < 0.5 else made[number % len(made)]
    target = rng.choice(seed.targets)
    other = rng.choice(rng.choice(seeds).targets).read_bytes()
    damaged = mutate(target.read_bytes(), other, rng, target.name)
    shutil.rmtree(folder, ignore_errors=True)
    if seed.door == "real":
        folder.mkdir(parents=True)
        for beside in target.parent.glob(target.stem + ".*"):
            if beside.is_file() and beside.stat().st_size < 1e7:
                shutil.copyfile(beside, folder / beside.name)
        path = folder / target.name
    else:
        shutil.copytree(seed.folder, folder)
        path = folder / target.relative_to(seed.folder)
    path.write_bytes(damaged)
    return seed, path


def calls(seed: Seed, folder: Path, path: Path, number: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give every way into medseg.io for this case, by name."""
    from medseg import io as room

    def options(names: str) -> dict[str, str]:
        import inspect

        known = inspect.signature(room.read_image).parameters
        chosen = [{}, {"gaps": "interpolate", "tilt": "keep"}, {"pet_units": "stored", "tilt": "refuse"}][number % 3]
        return {key: value for key, value in chosen.items() if key in known}

    several = len(seed.targets) > 1 and path.suffix in ("", ".dcm")
    header = next((item for item in sorted(folder.iterdir()) if item.suffix in (".mhd", ".nhdr", ".hdr")), path)
    image = folder if several else header if not several and path.suffix in (".raw", ".zraw", ".img") else path
    yield "find_series", lambda: room.find_series(path if seed.door == "dicomdir" else folder)
    if seed.door == "rtstruct":
        yield "list_rois", lambda: room.list_rois(path)
        yield "read_rtstruct", lambda: room.read_rtstruct(path, folder)
        return
    yield "read_image", lambda: room.read_image(image, **options("gaps tilt pet_units"))
    if seed.door == "real" and path.suffix == ".dcm" and number % 2:
        yield "list_rois", lambda: room.list_rois(path)
    if hasattr(room, "read_volumes"):
        yield "read_volumes", lambda: room.read_volumes(image, **options("gaps tilt pet_units"))
    if hasattr(room, "read_label") and path.suffix not in ("", ".dcm"):
        yield "read_label", lambda: room.read_label(image)
    if hasattr(room, "read_seg") and seed.door == "seg":
        yield "read_seg", lambda: room.read_seg(path)


def complaint(error: BaseException) -> str | None:
    """Return what is wrong with an error, None where it is a proper one."""
    from medseg.errors import MedsegError

    if not isinstance(error, MedsegError):
        return "".join(traceback.format_exception(error))[-3000:]
    text = str(error)
    if not text or not text.isprintable():
        return f"the message is not one printable line: {text!r}"
    if "Doe" in text or "4711" in text:
        return f"the message names the patient: {text!r}"
    return None


def read_one(seeds: list[Seed], number: int, folder: Path) -> list[dict]:
    """Make and read one mutant; return what went wrong."""
    seed, path = make_mutant(seeds, number, folder)
    before = _tree(folder)
    failures = []
    for name, call in calls(seed, folder, path, number):
        _reset_peak()
        start, resting = time.monotonic(), _peak()
        try:
            call()
            wrong = None
            OUTCOMES["read"] += 1
        except Exception as error:
            wrong = complaint(error)
            OUTCOMES["refused"] += 1
        seconds, taken = time.monotonic() - start, _peak() - resting
        if wrong is None and taken > MEMORY_BYTES:
            wrong = f"took {taken:,} bytes of memory"
        if wrong is None and seconds > HANG_SECONDS:
            wrong = f"took {seconds:.1f} s"
        if wrong:
            failures.append({"number": number, "seed": seed.name, "call": name, "wrong": wrong})
    after = _tree(folder)
    if after != before:
        failures.append({"number": number, "seed": seed.name, "call": "", "wrong": f"wrote {set(after) ^ set(before)}"})
    return failures


def _tree(*roots: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def _reset_peak() -> None:
    """Let the kernel forget the peak of this process's memory, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(arguments: argparse.Namespace) -> None:
    """Be the child: read mutants one after the other, and say before each which it is."""
    place = Path(arguments.place)
    seeds = make_seeds_once(place / "seeds", arguments.data)
    _warm_up(seeds)
    private = [place / name for name in ("cwd", "home", "tmp")]
    before = _tree(*private)
    # A guard for the machine; what the test asks for is measured.
    limit = 8 << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for number in range(arguments.first, arguments.last):
        print(json.dumps({"begin": number}), flush=True)
        for failure in read_one(seeds, number, place / "mutant"):
            _keep(place / "mutant", arguments.keep, failure)
            print(json.dumps(failure), flush=True)
        if _tree(*private) != before:
            wrote = [name for name in _tree(*private) if name not in before]
            print(json.dumps({"number": number, "seed": "", "call": "", "wrong": f"wrote outside: {wrote}"}))
            before = _tree(*private)
    print(json.dumps({"outcomes": OUTCOMES}), flush=True)


def _warm_up(seeds: list[Seed]) -> None:
    """Import what reading imports; some libraries write caches into HOME when they are first imported."""
    import matplotlib.pyplot  # noqa: F401

    from medseg.io import read_image

    for seed in seeds[:2]:
        read_image(seed.folder)


def make_seeds_once(root: Path, data: str | None) -> list[Seed]:
    """Write the seeds, or find them again where an earlier child wrote them."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return make_seeds(root, Path(data) if data else None)


def run(first: int, count: int, data: str | None, keep: Path | None = None, say: bool = False) -> list[dict]:
    """Read ``count`` mutants in child processes, a new one after every crash; return every failure."""
    failures: list[dict] = []
    last = first + count
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for name in ("cwd", "home", "tmp"):
            (Path(place) / name).mkdir()
        environment = {
            **os.environ,
            "HOME": f"{place}/home",
            "TMPDIR": f"{place}/tmp",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        while first < last:
            command = [sys.executable, __file__, "work", place, str(first), str(last)]
            command += ["--data", data] if data else []
            command += ["--keep", str(keep.resolve())] if keep else []
            errors = Path(place) / "stderr"
            with errors.open("wb") as stderr:
                child = subprocess.Popen(
                    command, cwd=f"{place}/cwd", env=environment, stdout=subprocess.PIPE, stderr=stderr
                )
            here, hung = first - 1, False
            for line in _lines(child):
                hung = line is None
                found = json.loads(line) if line else {}
                if "begin" in found:
                    here = found["begin"]
                    if say and here % 500 == 0:
                        print(f"{here} {time.monotonic() - begun:.0f} s, {len(failures)} failures", flush=True)
                elif "outcomes" in found:
                    OUTCOMES.update(found["outcomes"])
                elif found:
                    failures.append(found)
            if child.wait() == 0:
                break
            tail = errors.read_text("utf-8", "replace").partition("Extension modules")[0][-2000:]
            wrong = f"hung for {HANG_SECONDS} s" if hung else f"ended with status {child.returncode}: {tail}"
            found = {"number": here, "seed": "", "call": "crash", "wrong": wrong}
            failures.append(found)
            _keep(Path(place) / "mutant", keep, found)
            if here < first:
                break  # the child cannot even start
            first = here + 1
    return failures


def _lines(child: subprocess.Popen) -> Iterator[str | None]:
    """Give the child's lines; end it when it says nothing for too long, and give None then."""
    import selectors

    assert child.stdout is not None
    chooser = selectors.DefaultSelector()
    chooser.register(child.stdout, selectors.EVENT_READ)
    os.set_blocking(child.stdout.fileno(), False)
    pending = b""
    patience = 120.0  # to make the seeds and import
    while True:
        if not chooser.select(timeout=patience):
            child.kill()
            yield None
            return
        chunk = child.stdout.read()
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            patience = 3.0 * HANG_SECONDS  # several calls per mutant
            yield line.decode()


def _keep(mutant: Path, keep: Path | None, found: dict) -> None:
    if keep and mutant.is_dir():
        target = keep / f"{found['number']}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(mutant, target, dirs_exist_ok=True)
        with (keep / "failures.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    many = commands.add_parser("run")
    many.add_argument("--first", type=int, default=0)
    many.add_argument("--count", type=int, default=300)
    many.add_argument("--keep", type=Path)
    single = commands.add_parser("one")
    single.add_argument("number", type=int)
    single.add_argument("--keep", type=Path)
    child = commands.add_parser("work")
    child.add_argument("place")
    child.add_argument("first", type=int)
    child.add_argument("last", type=int)
    child.add_argument("--keep", type=Path)
    for command in (many, single, child):
        command.add_argument("--data", default=os.environ.get("MEDSEG_TEST_DATA") if command is not child else None)
    arguments = parser.parse_args()
    if arguments.command == "work":
        work(arguments)
        return 0
    if arguments.command == "one":
        place = arguments.keep or Path(tempfile.mkdtemp())
        seeds = make_seeds_once(place / "seeds", arguments.data)
        failures = read_one(seeds, arguments.number, place / "mutant")
        print(place / "mutant", *(path.name for path in (place / "mutant").iterdir()))
    else:
        failures = run(arguments.first, arguments.count, arguments.data, arguments.keep, say=True)
    for failure in failures:
        print("-" * 80, *(f"{key}: {value}" for key, value in failure.items()), sep="\n")
    print(f"{len(failures)} failures", *(f"{count} {how}" for how, count in OUTCOMES.items()), sep=", ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
