"""One tool does one job once, in a process of its own, and prints what that took as JSON.

    python benchmarks/dicom/tools.py '{"task": "convert", "tool": "SimpleITK", "source": "CT", "target": "ct.nii", ...}'

Each tool is a function that imports what it needs and returns the work itself, so that only the work is timed. This
file runs in environments that have no medseg: it needs nothing but the tool.
"""

import contextlib
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Report = dict[str, Any]
MIB = 1 << 20


def medseg() -> Callable[[Job], Report]:
    """What this is about: from DICOM to `read_image` and `write_nifti`."""
    import monai.data  # noqa: F401 (imported when the first image is read)
    import numpy as np

    from medseg.io import read_image, read_rtstruct, write_nifti

    flushed = 0.0
    fsync = os.fsync

    def timed_fsync(descriptor: Any) -> None:
        nonlocal flushed
        start = time.perf_counter()
        fsync(descriptor)
        flushed += time.perf_counter() - start

    os.fsync = timed_fsync

    def work(job: Job) -> Report:
        nonlocal flushed
        flushed, start = 0.0, time.perf_counter()
        if job["task"] == "structures":
            masks = read_rtstruct(job["structures"], job["source"], job["rois"])
            read_s = time.perf_counter() - start
            files = {}
            for number, (name, mask) in enumerate(masks.items()):
                files[name] = f"{job['target']}/{number}.nii"
                write_nifti(mask, files[name])
            return {"read_s": read_s, "flush_s": flushed, "masks": files}
        image = read_image(job["source"])
        read_s = time.perf_counter() - start
        if job["task"] == "read":
            return {"read_s": read_s, "array": lambda: np.asarray(image[0]).T}
        write_nifti(image, job["target"], dtype=job["dtype"])
        return {"read_s": read_s, "flush_s": flushed}

    return work


def pydicom() -> Callable[[Job], Report]:
    """What one writes by hand: dcmread every file, sort by position, rescale, and let nibabel write it."""
    import nibabel as nib
    import numpy as np
    from pydicom import dcmread

    def work(job: Job) -> Report:
        start = time.perf_counter()
        slices = [dcmread(file) for file in Path(job["source"]).iterdir()]
        row, column = np.array(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
        normal = np.cross(row, column)
        slices.sort(key=lambda ds: float(normal @ np.array(ds.ImagePositionPatient, dtype=float)))
        first, last = slices[0], slices[-1]
        voxels = np.empty((len(slices), first.Rows, first.Columns), dtype=job["dtype"])
        for out, ds in zip(voxels, slices, strict=True):
            out[...] = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        corner = np.array(first.ImagePositionPatient, dtype=float)
        affine = np.eye(4)
        affine[:3, 0] = row * float(first.PixelSpacing[1])
        affine[:3, 1] = column * float(first.PixelSpacing[0])
        affine[:3, 2] = (np.array(last.ImagePositionPatient, dtype=float) - corner) / max(len(slices) - 1, 1)
        affine[:3, 3] = corner
        affine[:2] *= -1  # LPS to RAS
        read_s = time.perf_counter() - start
        if job["task"] == "convert":
            nib.save(nib.Nifti1Image(voxels.T, affine), job["target"])
        return {"read_s": read_s, "array": lambda: voxels}

    return work


def simpleitk() -> Callable[[Job], Report]:
    """ITK's series reader with GDCM; it gives 32-bit integers unless it is told the type."""
    import SimpleITK as sitk

    types = {"int16": sitk.sitkInt16, "float32": sitk.sitkFloat32}

    def work(job: Job) -> Report:
        start = time.perf_counter()
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(job["source"]))
        if job["dtype"]:
            reader.SetOutputPixelType(types[job["dtype"]])
        image = reader.Execute()
        read_s = time.perf_counter() - start
        if job["task"] == "convert":
            sitk.WriteImage(image, job["target"])
        return {"read_s": read_s, "array": lambda: sitk.GetArrayViewFromImage(image)}

    return work


def dicom2nifti() -> Callable[[Job], Report]:
    """dicom2nifti, without its reorientation, which takes longer still."""
    import dicom2nifti

    def work(job: Job) -> Report:
        dicom2nifti.dicom_series_to_nifti(job["source"], job["target"], reorient_nifti=False)
        return {}

    return work


def dcm2niix() -> Callable[[Job], Report]:
    """dcm2niix: a program of its own, so that starting it is part of its time."""
    from dcm2niix import bin as binary

    def work(job: Job) -> Report:
        target = Path(job["target"])
        packed = target.name.endswith(".gz")
        options = ["-b", "n", "-z", "i" if packed else "n", "-f", target.name.split(".")[0]]
        command = [binary, *options, "-o", str(target.parent), job["source"]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return {"peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}

    return work


def dcmrtstruct2nii() -> Callable[[Job], Report]:
    """dcmrtstruct2nii: a NIfTI file for every ROI."""
    from dcmrtstruct2nii import dcmrtstruct2nii as run

    def work(job: Job) -> Report:
        options = {"gzip": False, "convert_original_dicom": False, "structures": job["rois"]}
        run(job["structures"], job["source"], job["target"], **options)
        return {"masks": {path.stem.removeprefix("mask_"): str(path) for path in Path(job["target"]).glob("*.nii")}}

    return work


def rt_utils() -> Callable[[Job], Report]:
    """rt-utils: an array for every ROI; writing them is left out, as it writes no NIfTI itself."""
    import numpy as np
    from rt_utils import RTStructBuilder

    def work(job: Job) -> Report:
        structures = RTStructBuilder.create_from(job["source"], job["structures"])
        masks = {name: structures.get_roi_mask_by_name(name) for name in job["rois"]}
        for number, (name, mask) in enumerate(masks.items()):
            masks[name] = f"{job['target']}/{number}.npy"
            np.save(masks[name], mask)
        return {"masks": masks}

    return work


TOOLS = {
    "medseg": (medseg, ["medseg", "pydicom", "nibabel", "numpy", "torch", "monai"]),
    "pydicom + nibabel": (pydicom, ["pydicom", "nibabel", "numpy"]),
    "SimpleITK": (simpleitk, ["SimpleITK"]),
    "dicom2nifti": (dicom2nifti, ["dicom2nifti", "pydicom", "nibabel", "numpy"]),
    "dcm2niix": (dcm2niix, ["dcm2niix"]),
    "dcmrtstruct2nii": (dcmrtstruct2nii, ["dcmrtstruct2nii", "pydicom", "SimpleITK", "numpy", "scikit-image"]),
    "rt-utils": (rt_utils, ["rt-utils", "pydicom", "opencv-python", "numpy"]),
}


def cpu_s() -> float:
    """CPU seconds of this process with all its threads, and of the programs that it ran."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak() -> float:
    """Most memory that this process ever held, in MiB, since `forget_peak` where Linux lets one forget."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else MIB)


def forget_peak() -> None:
    """Let the peak start anew from what is held now: importing may have needed more for a moment."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(work: Callable[[Job], Report], job: Job) -> Report:
    """Do the job once and say what it took."""
    gc.collect()  # what importing and warming up left behind is not this job's
    forget_peak()
    held, cpu, start = peak(), cpu_s(), time.perf_counter()
    report = work(job)
    took: Report = {"wall_s": time.perf_counter() - start, "cpu_s": cpu_s() - cpu, "peak_mib": peak() - held}
    report = took | report
    array = report.pop("array", None)
    if job["task"] == "read" and array is not None:
        report["checksum"] = zlib.crc32(array().astype("int32").tobytes())
    return report


def main() -> None:
    warnings.simplefilter("ignore")
    job: Job = json.loads(sys.argv[1])
    make, packages = TOOLS[job["tool"]]
    start = time.perf_counter()
    work = make()
    result: Report = {"import_s": time.perf_counter() - start, "python": platform.python_version()}
    result["versions"] = {name: version(name) for name in packages}
    try:
        if job.get("warm_up"):
            work(job | job["warm_up"])
        first = measure(work, job)
        result |= first
        if job.get("again"):
            if "target" in job:
                Path(job["target"]).unlink()
            result |= measure(work, job) | {"peak_mib": first["peak_mib"], "first_s": first["wall_s"]}
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
