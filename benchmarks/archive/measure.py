"""How fast the series of an archive are found, and with how much memory, beside plain pydicom over the same files.

    python benchmarks/archive/measure.py --files 100000

A tree is made in a temporary folder: CT series of 200 small slices, each with a header of some hundred elements in
sequences, private groups and all, and a few per cent of NIfTI, MHD, PNG and text files. Then each way of reading runs
in a process of its own: `pydicom.dcmread(stop_before_pixels=True)` over every file, in the order of their names;
`find_series` with one process, with one per core, with an empty cache, with the cache of that run; and `data_prep
inspect`, which masks and prints as well. The files are in the memory of the operating system from the start, so the
disk plays no part. The peak is the most resident memory of the process (VmHWM), and that of any of its workers.
"""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from medseg.io import atomic_write_text, find_series, write_nifti

RESULTS = Path(__file__).parents[1] / "results"
SLICES = 200
# The share of files that are no DICOM.
OTHERS = 0.04


def template() -> bytes:
    """A CT slice as bytes, with places of fixed length for what differs from slice to slice."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid("3", 0, 0)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uid("1", 0), uid("2", 0), uid("4", 0)
    ds.PatientID, ds.PatientName = "BENCH-000000", "Bench^Mark"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "CT", "medseg", "benchmark"
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate"):
        setattr(ds, keyword, "20240131")
    for keyword in ("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime", "InstanceCreationTime"):
        setattr(ds, keyword, "101112.131415")
    for keyword in (
        *("InstitutionName", "InstitutionAddress", "StationName", "StudyDescription", "SeriesDescription"),
        *("ProtocolName", "InstitutionalDepartmentName", "RequestedProcedureDescription", "PatientComments"),
        *("ImageComments", "PerformedProcedureStepDescription", "ContrastBolusAgent", "AdditionalPatientHistory"),
    ):
        setattr(ds, keyword, "thorax with contrast, " + keyword[:8])
    for keyword in ("PatientSex", "PatientAge", "BodyPartExamined", "PatientPosition", "ConvolutionKernel"):
        setattr(ds, keyword, {"PatientAge": "061Y", "PatientSex": "O"}.get(keyword, "CHEST"))
    for keyword in (
        *("KVP", "DataCollectionDiameter", "ReconstructionDiameter", "DistanceSourceToDetector", "TableHeight"),
        *(
            "DistanceSourceToPatient",
            "GantryDetectorTilt",
            "ExposureTime",
            "XRayTubeCurrent",
            "Exposure",
            "PatientSize",
        ),
        *("FilterType", "GeneratorPower", "FocalSpots", "SingleCollimationWidth", "TotalCollimationWidth"),
        *("TableSpeed", "TableFeedPerRotation", "SpiralPitchFactor", "CTDIvol", "PatientWeight", "PatientSize"),
    ):
        setattr(ds, keyword, "12" if keyword == "FilterType" else 12)
    for keyword in ("AccessionNumber", "StudyID", "SoftwareVersions", "DeviceSerialNumber", "PerformedProcedureStepID"):
        setattr(ds, keyword, "B0017")
    for keyword in ("RequestAttributesSequence", "ReferencedImageSequence", "ProcedureCodeSequence"):
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "24627-2", "LN", "Chest CT"
        item.ReferencedSOPInstanceUID = uid("9", 0)
        setattr(ds, keyword, [item])
    for group in (0x0019, 0x0029):
        block = ds.private_block(group, "MEDSEG BENCH", create=True)
        for element in range(8):
            block.add_new(element, "LO", f"private value {element}")
        block.add_new(0x20, "OB", bytes(1024))
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 2, 1, "000000"
    ds.ImagePositionPatient = ["-250.5", "-250.5", "0000000.00"]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [0.98, 0.98], 1.25
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows = ds.Columns = 16
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth, ds.RescaleIntercept, ds.RescaleSlope = 40, 400, -1024, 1
    ds.PixelData = (np.arange(256, dtype="<u2") * 8).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.dcm"
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        return path.read_bytes()


def uid(kind: str, series: int, instance: int = 0) -> str:
    """A UID of always the same length."""
    return f"1.2.826.0.1.3680043.8.498.{kind}.1{series:09d}.1{instance:09d}.123456"


def make_tree(root: Path, files: int) -> None:
    """Write so many files: series by series, and the other kinds spread among them."""
    content = template()
    others = round(files * OTHERS)
    series = 0
    left = files - others
    while left:
        folder = root / f"patient{series // 4:05d}" / f"study{series // 2 % 2}" / f"series{series % 2}"
        folder.mkdir(parents=True)
        shared = content.replace(b"BENCH-000000", f"BENCH-{series // 4:06d}".encode())
        for kind, number in (("1", series // 2), ("2", series), ("4", series // 2)):
            shared = shared.replace(uid(kind, 0).encode(), uid(kind, number).encode())
        for instance in range(min(SLICES, left)):
            one = shared.replace(uid("3", 0).encode(), uid("3", series, instance).encode())
            one = one.replace(b"\\0000000.00", f"\\{1.25 * instance:010.2f}".encode())
            one = one.replace(b"IS\x06\x00000000", f"IS\x06\x00{instance + 1:06d}".encode())
            (folder / f"IM{instance:06d}").write_bytes(one)
        left -= min(SLICES, left)
        series += 1
    folder = root / "others"
    folder.mkdir()
    for number in range(others):
        name = folder / f"{number:06d}"
        if number % 4 == 0:
            write_nifti((np.zeros((4, 4, 4), np.uint8), np.eye(4)), name.with_suffix(".nii.gz"))
        elif number % 4 == 1:
            Image.new("L", (16, 16)).save(name.with_suffix(".png"))
        elif number % 4 == 2:
            name.with_suffix(".mha").write_bytes(
                b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
                + bytes(64)
            )
        else:
            name.with_suffix(".txt").write_text("a note")


def plain_pydicom(root: Path, cache: Path) -> int:
    """Read every header with pydicom alone; return how many there are."""
    read = 0
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            try:
                pydicom.dcmread(Path(folder) / name, stop_before_pixels=True)
                read += 1
            except pydicom.errors.InvalidDicomError:
                continue
    return read


def inspect(root: Path, cache: Path) -> int:
    """List the tree as the command does; return how many series there are."""
    from data_prep.inspect import show

    out = cache.with_suffix(".csv")
    show(root, form="csv", out=out, cache=cache)
    with out.open(newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


WAYS: dict[str, Callable[[Path, Path], int]] = {
    "pydicom.dcmread": plain_pydicom,
    "find_series": lambda root, cache: len(find_series(root)),
    "find_series, all cores": lambda root, cache: len(find_series(root, workers=cores())),
    "find_series, empty cache": lambda root, cache: len(find_series(root, cache=cache)),
    "find_series, second run": lambda root, cache: len(find_series(root, cache=cache)),
    "data_prep inspect, second run": inspect,
}


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def peak_mib() -> float:
    """The most memory that this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def measure(way: str, root: Path, cache: Path) -> dict[str, Any]:
    """Read the tree in one way, in this process."""
    import resource

    start, spent = time.perf_counter(), time.process_time()
    found = WAYS[way](root, cache)
    wall, cpu = time.perf_counter() - start, time.process_time() - spent
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "way": way,
        "found": found,
        "wall_s": wall,
        "cpu_s": cpu + children.ru_utime + children.ru_stime,
        "peak_mib": peak_mib(),
        "peak_of_a_worker_mib": children.ru_maxrss / 1024,
    }


@click.command()
@click.option("--files", default=100_000, show_default=True, help="How many files the tree shall have.")
@click.option("--folder", type=click.Path(path_type=Path), default=None, help="Where to make it; it is kept there.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "archive.json", help="Where the result goes.")
@click.option("--way", type=click.Choice(list(WAYS)), default=None, hidden=True)
@click.option("--cache", type=click.Path(path_type=Path), default=None, hidden=True)
def main(files: int, folder: Path | None, out: Path, way: str | None, cache: Path | None) -> None:
    """Measure how fast the series of an archive are found."""
    if way is not None and folder is not None and cache is not None:
        click.echo(json.dumps(measure(way, folder, cache)))
        return
    machine = {
        "cores": cores(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "pydicom": pydicom.__version__,
    }
    temporary = Path(tempfile.mkdtemp(prefix="medseg-archive-"))
    root = folder or temporary / "tree"
    try:
        if not root.exists():
            make_tree(root, files)
        count = sum(len(names) for _, _, names in os.walk(root))
        time.sleep(2.5)  # the cache keeps no file that was changed within two seconds
        results = []
        for name in WAYS:
            command = [sys.executable, __file__, "--way", name, "--folder", str(root)]
            command += ["--cache", str(temporary / "headers.sqlite")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            result["files_per_s"] = count / result["wall_s"]
            results.append(result)
            click.echo(
                f"{name}: {result['wall_s']:.2f} s, {result['files_per_s']:.0f} files/s, "
                f"{result['peak_mib']:.0f} MiB, found {result['found']}"
            )
        cache_bytes = (temporary / "headers.sqlite").stat().st_size
    finally:
        shutil.rmtree(temporary)
    content = {"machine": machine, "files": count, "cache_bytes": cache_bytes, "runs": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
