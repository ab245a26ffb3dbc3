"""How long medseg takes to read DICOM, beside the other tools that do so, and how much memory.

    MEDSEG_TEST_DATA=DATA python benchmarks/dicom/run.py

Three jobs on one series (the thorax CT of DATA, or without DATA the package's own phantom):

- convert: a series into NIfTI, .nii and .nii.gz, as float32 and int16;
- structures: all ROIs of the plan as masks;
- read: the first 64 slices of the series in several compressed transfer syntaxes.

Every measurement is a process of its own that imports, does the job on six slices (so that nothing is imported, and no
plugin looked for, while the clock runs), does it once, which gives peak_mib and first_s, and where it is short removes
what it wrote and does it again, which gives wall_s and cpu_s: in the first call a virtual machine may have to get the
memory from its host, which takes longer than the job and spares those by chance who free much before they take more.

The tools take turns, and what the one before left to be written to disk is written before the next starts. medseg
returns when its file is on the disk, the others when it is in the system's cache: flush_s is medseg's wait for that,
and ratio_without_flush leaves it out. medseg works in one thread; nothing limits those of the others.

A peer counts only where its result is right: every voxel equal and the affine within 1e-3 mm (read: every voxel equal),
or the volume of each mask within 2 % of the area of its contours × the distance of their planes; ROIs that a peer gets
wrong are left out of its comparison. dcm2niix, shown beside, gets a copy of the thorax CT with one study time, as it
makes a file of every slice where the study times differ.

medseg, pydicom, nibabel and SimpleITK are those of this environment. The other tools get virtual environments of their
own below --work, made by the first run from the requirements files here.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "dicom.json"
SAME_AFFINE = 1e-3  # mm
SAME_VOLUME = 0.02

# tool and type of voxel; None is what the tool gives when it is told nothing
CONVERTERS = [
    ("medseg", "float32"),
    ("pydicom + nibabel", "float32"),
    ("SimpleITK", "float32"),
    ("medseg", "int16"),
    ("pydicom + nibabel", "int16"),
    ("SimpleITK", "int16"),
    ("SimpleITK", None),
    ("dicom2nifti", None),
    ("dcm2niix", None),
]
LIMITS = {"pydicom + nibabel": 1.2, "SimpleITK": 0.6, "dicom2nifti": 0.4, "dcmrtstruct2nii": 0.5}
MEMORY_LIMIT = 3.0
SYNTAXES = {
    "JPEG lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS lossless": "1.2.840.10008.1.2.4.80",
    "JPEG 2000 lossless": "1.2.840.10008.1.2.4.90",
    "RLE": "1.2.840.10008.1.2.5",
}
Result = dict[str, Any]


# --- the tools -------------------------------------------------------------------------------------------------------


def environment(work: Path, name: str) -> str:
    """Return the Python of the environment of a requirements file; make it where it is not there."""
    folder, wanted = work / name, (HERE / f"requirements-{name}.txt").read_text()
    python, made = folder / "bin" / "python", folder / "made.txt"
    if not made.is_file() or made.read_text() != wanted:
        print(f"Making the environment {folder}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / f"requirements-{name}.txt")]
        subprocess.run(install, check=True)
        made.write_text(wanted)
    return str(python)


def interpreters(work: Path) -> dict[str, str]:
    """Return the Python of every tool."""
    conversion, structures = environment(work, "conversion"), environment(work, "structures")
    own = dict.fromkeys(("medseg", "pydicom + nibabel", "SimpleITK"), sys.executable)
    peers = dict.fromkeys(("dicom2nifti", "dcm2niix", "rt-utils"), conversion)
    return own | peers | {"dcmrtstruct2nii": structures}


def run(python: str, job: dict[str, Any]) -> Result:
    """Run one tool in a process of its own; what it took, its imports apart, and the whole process."""
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(
        [python, str(HERE / "tools.py"), json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    process_s = time.perf_counter() - start
    text = done.stdout.decode(errors="replace")
    try:
        result: Result = json.loads(text[text.rindex('{"import_s"') :])
    except ValueError:
        result = {"error": f"ended with status {done.returncode}"}
    return result | {"process_s": process_s}


def summary(results: list[Result]) -> Result:
    """Median and least of the times, the most of the memory, and what was the same in every run."""
    first = results[0]
    kept: Result = {key: first[key] for key in ("tool", "dtype", "error", "wrong", "bytes") if key in first}
    for key in ("wall_s", "first_s", "cpu_s", "read_s", "flush_s", "import_s", "process_s"):
        if values := [result[key] for result in results if key in result]:
            kept[key] = round(statistics.median(values), 4)
            if key in ("wall_s", "cpu_s"):
                kept[f"{key[:-2]}_min_s"] = round(min(values), 4)
    if "peak_mib" in first:
        kept["peak_mib"] = round(max(result["peak_mib"] for result in results), 1)
    return kept


# --- the series ------------------------------------------------------------------------------------------------------


def prepare(work: Path, data: str | None) -> tuple[str, Path, Path]:
    """Return the name of the series, its folder and its structure set."""
    if data:
        plan = Path(data) / "dicom" / "ct_rtstruct_lung"
        return "thorax CT (ct_rtstruct_lung)", plan / "CT", plan / "RTSTRUCT.dcm"
    folder = work / "phantom"
    if not (folder / "CT").is_dir():
        from data_prep.phantom import simulate_patient, write_patient

        print(f"Simulating a patient in {folder} (a minute)", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        write_patient(simulate_patient(1, image_size=512, slices=128), folder)
    structures = next(path for path in folder.rglob("*.dcm") if path.parent.name not in ("CT", "PT"))
    return "phantom (data_prep)", folder / "CT", structures


def by_position(folder: Path) -> list[Path]:
    """Return the files of a series in the order of their slices."""
    from pydicom import dcmread

    def height(file: Path) -> float:
        ds = dcmread(file, stop_before_pixels=True)
        row, column = np.array(ds.ImageOrientationPatient, dtype=float).reshape(2, 3)
        return float(np.cross(row, column) @ np.array(ds.ImagePositionPatient, dtype=float))

    return sorted(folder.iterdir(), key=height)


def one_study_time(source: Path, target: Path) -> Path:
    """Copy a series, every file with the study time of the first: dcm2niix makes a volume only of such."""
    from pydicom import dcmread

    if not target.is_dir():
        time_of_first = dcmread(min(source.iterdir()), stop_before_pixels=True).StudyTime
        unfinished = target.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for file in source.iterdir():
            ds = dcmread(file)
            ds.StudyTime = time_of_first
            ds.save_as(unfinished / file.name)
        unfinished.rename(target)
    return target


def copy_some(files: list[Path], target: Path) -> Path:
    """Copy files into a fresh folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        shutil.copy(file, target)
    return target


def compress(files: list[Path], syntax: str, target: Path) -> Path:
    """Write slices in another transfer syntax, as their own series."""
    from pydicom import dcmread
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        ds = dcmread(file)
        if syntax == SYNTAXES["JPEG lossless"]:
            from imagecodecs import ljpeg_encode

            ds.PixelData = encapsulate([bytes(ljpeg_encode(ds.pixel_array, bitspersample=int(ds.BitsStored)))])
            ds["PixelData"].VR = "OB"
            ds.file_meta.TransferSyntaxUID = UID(syntax)
        else:
            ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(target / file.name)
    return target


# --- what is right ---------------------------------------------------------------------------------------------------


def truth_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels [X, Y, Z] and RAS affine of a plain axial series, by the letter of the standard."""
    from pydicom import dcmread

    slices = [dcmread(file) for file in by_position(folder)]
    voxels = np.stack([(ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)).T for ds in slices], -1)
    row, column = np.array(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    corners = [np.array(ds.ImagePositionPatient, dtype=float) for ds in slices]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * slices[0].PixelSpacing[1], column * slices[0].PixelSpacing[0]
    affine[:3, 2], affine[:3, 3] = (corners[-1] - corners[0]) / (len(slices) - 1), corners[0]
    affine[:2] *= -1
    return voxels, affine


def image_fault(file: Path, truth: tuple[np.ndarray, np.ndarray]) -> str | None:
    """Return what is wrong with a NIfTI file, None where nothing is."""
    import nibabel as nib

    voxels, affine = truth
    wanted = nib.as_closest_canonical(nib.Nifti1Image(voxels.astype(np.float32), affine))
    found = nib.as_closest_canonical(nib.load(file))
    if found.shape != wanted.shape:
        return f"a grid of {found.shape}, expected {wanted.shape}"
    off = float(np.abs(found.affine - wanted.affine).max())
    if off > SAME_AFFINE:
        return f"the affine is {off:.3g} mm off"
    off = float(np.abs(found.get_fdata(dtype=np.float32) - wanted.get_fdata(dtype=np.float32)).max())
    return f"voxels are up to {off:g} off" if off else None


def contour_volumes(structures: Path) -> dict[str, float]:
    """Return milliliters of every closed ROI: area by the even-odd rule × distance of the planes, duplicates once."""
    from pydicom import dcmread
    from shapely import Polygon, normalize, symmetric_difference_all

    ds = dcmread(structures)
    names = {item.ROINumber: str(item.ROIName) for item in ds.StructureSetROISequence}
    volumes = {}
    for roi in ds.ROIContourSequence:
        planes: dict[float, dict[bytes, Any]] = {}
        for contour in roi.get("ContourSequence") or []:
            if contour.ContourGeometricType != "CLOSED_PLANAR":
                continue
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            outline = normalize(Polygon(points[:, :2]).buffer(0))
            planes.setdefault(round(float(points[0, 2]), 2), {})[outline.wkb] = outline
        if len(planes) > 1:
            area = sum(symmetric_difference_all(list(outlines.values())).area for outlines in planes.values())
            volumes[names[roi.ReferencedROINumber]] = area * float(np.diff(sorted(planes)).min()) / 1000
    return volumes


def plain(name: str) -> str:
    """Return a name without what tools replace when they make a file name of it."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def mask_volumes(masks: dict[str, str], voxel: float) -> dict[str, float]:
    """Return milliliters of every mask, by plain name."""
    import nibabel as nib

    def voxels(file: str) -> Any:
        return np.load(file) if file.endswith(".npy") else np.asanyarray(nib.Nifti1Image.from_filename(file).dataobj)

    return {plain(name): np.count_nonzero(voxels(file)) * voxel / 1000 for name, file in masks.items()}


# --- the jobs --------------------------------------------------------------------------------------------------------


def turns(names: list[Any], repeats: int, progress: str) -> Iterator[tuple[int, Any]]:
    """Give every tool in turn, and in another order each time."""
    for turn in range(repeats):
        print(f"{progress} {turn + 1}/{repeats}", flush=True)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            yield turn, name


def convert(pythons: dict[str, str], source: Path, work: Path, suffix: str, repeats: int) -> list[Result]:
    """Time the conversion of a series; check what each tool wrote in its first turn."""
    truth = truth_of(source)
    out = work / "out"
    warm = copy_some(by_position(source)[:6], work / "six_slices")
    mended = one_study_time(source, work / f"one_study_time_{len(list(source.iterdir()))}")
    results: dict[Any, list[Result]] = {key: [] for key in CONVERTERS}
    for turn, (tool, dtype) in turns(CONVERTERS, repeats, suffix):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        job = {"task": "convert", "tool": tool, "dtype": dtype, "target": str(out / f"image{suffix}")}
        job |= {"source": str(mended if tool == "dcm2niix" else source)}
        job |= {"warm_up": {"source": str(warm), "target": str(out / f"warm{suffix}")}, "again": suffix == ".nii"}
        result = run(pythons[tool], job) | {"tool": tool, "dtype": dtype or "its own"}
        written = out / f"image{suffix}"
        if "error" not in result and not written.is_file():
            result["error"] = f"wrote {', '.join(sorted(path.name for path in out.iterdir())) or 'nothing'}"
        if "error" not in result and turn == 0:
            result["bytes"] = written.stat().st_size
            if fault := image_fault(written, truth):
                result["wrong"] = fault
        results[tool, dtype].append(result)
    shutil.rmtree(out, ignore_errors=True)
    return [summary(rows) for rows in results.values()]


def structures(pythons: dict[str, str], source: Path, plan: Path, work: Path, repeats: int) -> dict[str, Any]:
    """Time the masks of all closed ROIs; then of those alone that every tool gets right that gets any."""
    wanted = contour_volumes(plan)
    voxel = abs(float(np.linalg.det(truth_of(source)[1][:3, :3])))
    tools = ["medseg", "dcmrtstruct2nii", "rt-utils"]
    out = work / "out"

    def measure(tool: str, rois: list[str]) -> tuple[Result, dict[str, float]]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        job = {"task": "structures", "tool": tool, "source": str(source), "structures": str(plan), "target": str(out)}
        result = run(pythons[tool], job | {"rois": rois}) | {"tool": tool}
        if "error" in result:
            return result, {}
        found = mask_volumes(result["masks"], voxel)
        off = {name: abs(found.get(plain(name), 0.0) / wanted[name] - 1) for name in rois}
        wrong = {name: share for name, share in off.items() if share > SAME_VOLUME}
        if wrong:
            listed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in wrong.items())
            result["wrong"] = f"{len(wrong)} of {len(rois)} volumes are off: {listed}"
        return result, wrong

    rows, right = [], set(wanted)
    for tool in tools:
        print(f"structures, all: {tool}", flush=True)
        result, wrong = measure(tool, list(wanted))
        rows.append(summary([result]))
        if len(wrong) < len(wanted):
            right -= set(wrong)
    rois = [name for name in wanted if name in right]
    results: dict[str, list[Result]] = {row["tool"]: [] for row in rows if "error" not in row}
    for _, tool in turns(list(results), repeats, f"structures, {len(rois)} of {len(wanted)}"):
        results[tool].append(measure(tool, rois)[0])
    restricted = [summary(rows) for rows in results.values()]
    return {
        "rois": len(wanted),
        "rows": rows,
        "rois_right_in_all": rois,
        "repeats": repeats,
        "rows_of_these": restricted,
    }


def read(pythons: dict[str, str], source: Path, work: Path, repeats: int) -> dict[str, list[Result]]:
    """Time the reading of compressed copies of the first slices of a series."""
    files = by_position(source)[:64]
    table = {}
    tools = [("medseg", "float32"), ("pydicom + nibabel", "float32"), ("SimpleITK", "float32")]
    for name, syntax in {"none": "", **SYNTAXES}.items():
        folder = work / "compressed" / plain(name)
        try:
            folder = compress(files, syntax, folder) if syntax else copy_some(files, folder)
        except Exception as error:  # an encoder that is not installed
            table[name] = [{"error": f"not made: {type(error).__name__}: {error}"}]
            continue
        warm = copy_some(by_position(folder)[:6], work / "six_slices")
        results: dict[Any, list[Result]] = {tool: [] for tool in tools}
        for _, (tool, dtype) in turns(tools, repeats, f"read {name}"):
            job = {"task": "read", "tool": tool, "dtype": dtype, "source": str(folder)}
            result = run(pythons[tool], job | {"warm_up": {"source": str(warm)}, "again": not syntax})
            results[tool, dtype].append(result | {"tool": tool, "dtype": dtype})
        sums = {result.get("checksum") for rows in results.values() for result in rows} - {None}
        rows = [summary(rows) for rows in results.values()]
        if len(sums) > 1:
            rows = [row | {"wrong": "the tools do not agree on the voxels"} for row in rows]
        table[name] = rows
    return table


# --- the report ------------------------------------------------------------------------------------------------------


def ratios(rows: list[Result], key: str = "wall_s") -> list[Result]:
    """Compare medseg with every peer that is right, of the same type of voxel where the peer can choose."""
    compared = []
    mine = {row.get("dtype"): row for row in rows if row["tool"] == "medseg" and key in row}
    for row in rows:
        if row["tool"] == "medseg" or "error" in row or "wrong" in row:
            continue
        for dtype, own in mine.items():
            if row.get("dtype") in (dtype, "its own"):
                ratio = own[key] / row[key]
                limit = LIMITS.get(row["tool"])
                entry = {"dtype": dtype, "peer": row["tool"], "peer_dtype": row.get("dtype"), "ratio": round(ratio, 3)}
                entry["ratio_without_flush"] = round((own[key] - own.get("flush_s", 0)) / row[key], 3)
                entry["cpu_ratio"] = round(own["cpu_s"] / row["cpu_s"], 3)
                compared.append(entry | ({"limit": limit, "kept": ratio <= limit} if limit else {}))
    return compared


def memory(rows: list[Result], shape: tuple[int, ...]) -> dict[str, Result]:
    """Compare medseg's peak memory with the volume: as float32, as `read_image` gives it, and as int16."""
    count = float(np.prod(shape)) / (1 << 20)
    table = {}
    for row in rows:
        if row["tool"] == "medseg" and "peak_mib" in row:
            peak = row["peak_mib"]
            table[row["dtype"]] = {
                "peak_mib": peak,
                "of_float32_volume": round(peak / (4 * count), 2),
                "of_int16_volume": round(peak / (2 * count), 2),
                "limit": MEMORY_LIMIT,
                "kept": peak / (2 * count) <= MEMORY_LIMIT,
            }
    return table


def machine() -> Result:
    """Return what the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def show(title: str, rows: list[Result]) -> None:
    """Print one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("tool", "voxels", "s (median)", "s (least)", "CPU s", "peak MiB", "process s", "", title=title)
    for row in rows:
        numbers = [row.get(key) for key in ("wall_s", "wall_min_s", "cpu_s", "peak_mib", "process_s")]
        texts = ["" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in numbers]
        note = row.get("error") or row.get("wrong") or "right"
        table.add_row(row.get("tool", ""), row.get("dtype", ""), *texts, note[:60])
    Console(width=140).print(table)


def versions(pythons: dict[str, str]) -> dict[str, Any]:
    """Return the versions of what each tool consists of."""
    return {tool: run(python, {"task": "versions", "tool": tool}).get("versions") for tool, python in pythons.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("MEDSEG_TEST_DATA"), help="folder of the real data")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medseg-benchmarks"
    parser.add_argument("--work", type=Path, default=cache, help=f"environments and files (default: {cache})")
    parser.add_argument("--repeats", type=int, default=5, help="of .nii (default: 5); of the long ones fewer")
    parser.add_argument("--jobs", default="nii,gz,structures,read", help="which to do (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()

    from medseg.io import atomic_write_text

    content: Result = {"machine": machine()}
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pythons = interpreters(work)
    name, source, plan = prepare(work, arguments.data)
    shape = truth_of(source)[0].shape
    content["series"] = {"name": name, "shape": shape}
    content["versions"] = versions(pythons)
    fewer = min(2, arguments.repeats)
    jobs: dict[str, Callable[[], None]] = {}

    def conversion(key: str, suffix: str, repeats: int) -> None:
        rows = convert(pythons, source, work, suffix, repeats)
        show(f"{name} to {suffix}", rows)
        content[key] = {"repeats": repeats, "rows": rows, "ratios": ratios(rows), "memory": memory(rows, shape)}

    def masks() -> None:
        found = structures(pythons, source, plan, work, 1)
        show(f"masks of {found['rois']} ROIs", found["rows"])
        show(f"masks of the {len(found['rois_right_in_all'])} that all get right", found["rows_of_these"])
        content["structures"] = found | {"ratios": ratios(found["rows_of_these"])}

    def reading() -> None:
        table = read(pythons, source, work, fewer)
        for syntax, rows in table.items():
            show(f"reading 64 slices, compression: {syntax}", rows)
        content["read_64_slices"] = {"repeats": fewer, "rows": table}

    jobs["nii"] = lambda: conversion("convert_nii", ".nii", arguments.repeats)
    jobs["gz"] = lambda: conversion("convert_nii_gz", ".nii.gz", fewer)
    jobs["structures"], jobs["read"] = masks, reading
    for job in arguments.jobs.split(","):
        jobs[job]()
    for key in ("convert_nii", "convert_nii_gz", "structures"):
        for entry in content.get(key, {}).get("ratios", []):
            verdict = f"limit {entry['limit']}: {'kept' if entry['kept'] else 'MISSED'}" if "limit" in entry else ""
            voxels = f" ({entry['dtype']}, peer {entry['peer_dtype']})" if entry["dtype"] else ""
            print(f"{key}{voxels}: {entry['ratio']:.2f} × {entry['peer']} {verdict}")
        for dtype, entry in content.get(key, {}).get("memory", {}).items():
            print(
                f"{key} ({dtype}): peak {entry['peak_mib']:.0f} MiB, {entry['of_float32_volume']:.2f} × the float32 "
                f"volume, {entry['of_int16_volume']:.2f} × the int16 volume"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
