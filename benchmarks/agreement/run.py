"""What medseg makes of every file of a folder of real data, and which independent reader it agrees with.

    python benchmarks/agreement/run.py DATA docs/explanation/agreement          # write the tables
    python benchmarks/agreement/run.py DATA docs/explanation/agreement --check  # compare with those that stand there

Every DICOM series and every other file gets a row: read, refused and why, or no image at all. What is read is compared,
voxel by voxel after reorientation, with a reference: the NIfTI or MHA that lies beside it, else dcm2niix (DICOM),
nibabel (NIfTI), SimpleITK (MHD, NRRD), imagecodecs (pictures), or pydicom where a DICOM picture has no geometry. The
values must be equal up to float32's rounding and the affines within 1e-3 mm. Masks of structure sets are compared with
the area of their contours × the distance of their planes (shapely).
"""

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medseg.errors import MedsegError
from medseg.io import Series, atomic_write_text, find_series, list_rois, read_rtstruct, read_seg, read_series

if TYPE_CHECKING:
    import SimpleITK as sitk

SAME_AFFINE = 1e-3  # mm


@dataclass(frozen=True)
class Row:
    """A file or a series.

    Attributes:
        name: the folder of a series, or the file.
        what: modality or kind.
        result: ``read``, ``refused``, ``listed`` (a DICOM object that is no image) or ``no image``.
        detail: the grid and what was mended, or the reason.
        reference: what it was compared with.
        agreement: ``equal``, or how far apart and why.
    """

    name: str
    what: str
    result: str
    detail: str
    reference: str = ""
    agreement: str = ""


def places(root: Path) -> Iterator[Path]:
    """Give every folder that holds files and no folders, and every file of the other folders."""
    for folder, below, names in os.walk(root):
        below.sort()
        if below:
            yield from (Path(folder) / name for name in sorted(names))
        elif names:
            yield Path(folder)


def rows_of(place: Path, root: Path) -> list[Row]:
    """Describe what lies in one place."""
    series = find_series(place)
    if place.is_file() and any(place not in item.files for item in series):
        return [Row(str(place.relative_to(root)), "DICOMDIR", "listed", f"an index of {len(series)} series")]
    covered = {path for item in series for path in item.files}
    every = [place] if place.is_file() else [path for path in place.iterdir() if path.is_file()]
    rows = [row_of(item, series, root) for item in series]
    rows += [
        Row(str(path.relative_to(root)), path.suffix.lstrip(".").lower() or "file", "no image", why_none(path, series))
        for path in every
        if path not in covered
    ]
    return sorted(rows, key=lambda row: row.name)


def why_none(path: Path, series: Sequence[Series]) -> str:
    """Say what a file is that no series has."""
    if path.suffix.lower() in (".raw", ".zraw"):
        return "the voxels of a header beside it"
    if any(item.notes and item.files[0].parent == path.parent for item in series if item.kind == "dicom"):
        return "a copy that was dropped"
    return "passed over"


def row_of(item: Series, others: Sequence[Series], root: Path) -> Row:
    """Read one series and compare it."""
    where = item.files[0] if item.n_files == 1 else item.files[0].parent
    name = str(where.relative_to(root))
    if item.n_files > 1 and item.description:
        name += f" ({item.description[:30]}{', ' + item.stack if item.stack else ''})"
    what = item.modality or item.kind

    def short(text: str) -> str:
        return text.replace(f"{where}: ", "").replace(f"{root}/", "").replace(str(root), "")

    if item.kind == "dicom" and not item.is_image and not item.problems:
        if what == "RTSTRUCT":
            return structures_row(item, others, name, root)
        return segments_row(item, name, root) if what == "SEG" else Row(name, what, "listed", "no image")
    try:
        image = read_series(item, pet_units="stored")
    except MedsegError as error:
        return Row(name, what, "refused", short(str(error)))
    detail = "×".join(str(n) for n in image.shape[1:])
    if image.shape[0] > 1:
        detail += f", {image.shape[0]} channels"
    if image.meta["has_geometry"]:
        detail += ", " + " × ".join(f"{n:.3g}" for n in image.pixdim.tolist()) + " mm"
    if volumes := image.meta.get("volumes"):
        detail += f"; volumes: {volumes}"
    if mended := image.meta.get("mended"):
        detail += f"; {short(mended)}"
    if problems := image.meta.get("problems"):
        detail += f"; {short(problems)}"
    reference, agreement = compare(item, image, root)
    return Row(name, what, "read", detail, reference, agreement)


def structures_row(item: Series, others: Sequence[Series], name: str, root: Path) -> Row:
    """Read the masks of a structure set on an image of the same folder or of the one beside it."""
    path = item.files[0]

    def short(error: MedsegError) -> str:
        return str(error).removeprefix(f"{path}: ").replace(f"{root}/", "")

    try:
        rois = list_rois(path)
    except MedsegError as error:
        return Row(name, "RTSTRUCT", "refused", short(error))
    detail = f"{len(rois)} ROIs"
    images = [other for other in others if other.is_image]
    if not images:
        near = [folder for folder in path.parent.parent.iterdir() if folder.is_dir() and folder != path.parent]
        near += [folder for folder in path.parent.iterdir() if folder.is_dir()]
        images = [other for folder in near for other in find_series(folder) if other.is_image and not other.problems]
    reasons = []
    for image in images:
        try:
            masks = read_rtstruct(path, image)
        except MedsegError as error:
            reasons.append(short(error))
            continue
        how = next(iter(masks.values())).meta["matched_by"]
        detail += f", masks of {len(masks)} with closed contours, matched by {how}"
        agreement = contour_agreement(path, masks)
        reference = "contour area × plane distance" if agreement else "none: too few planes, or partly outside"
        return Row(name, "RTSTRUCT", "read", detail, reference, agreement)
    if reasons:
        return Row(name, "RTSTRUCT", "refused", f"{detail}; {reasons[0]}")
    return Row(name, "RTSTRUCT", "listed", f"{detail}; no image beside it to draw them on")


def segments_row(item: Series, name: str, root: Path) -> Row:
    """Read the segments of a DICOM SEG and count their voxels beside pydicom."""
    import pydicom

    path = item.files[0]
    try:
        masks = read_seg(path)
    except MedsegError as error:
        return Row(name, "SEG", "refused", str(error).removeprefix(f"{path}: ").replace(f"{root}/", ""))
    ds = pydicom.dcmread(path)
    frames = ds.pixel_array if int(ds.get("NumberOfFrames") or 1) > 1 else ds.pixel_array[None]
    counts: dict[int, int] = {}
    for group, frame in zip(ds.PerFrameFunctionalGroupsSequence, frames, strict=True):
        if ds.SegmentationType == "LABELMAP":
            numbers = {int(value): frame == value for value in np.unique(frame)}
        else:
            half = (int(ds.MaximumFractionalValue) + 1) // 2 if ds.SegmentationType == "FRACTIONAL" else 1
            identity = group.get("SegmentIdentificationSequence") or ds.SharedFunctionalGroupsSequence[0].get(
                "SegmentIdentificationSequence"
            )
            numbers = {int(identity[0].ReferencedSegmentNumber): frame >= half}
        for number, pixels in numbers.items():
            counts[number] = counts.get(number, 0) + int(pixels.sum())
    mask = next(iter(masks.values()))
    detail = f"{'×'.join(str(n) for n in mask.shape[1:])}, {len(masks)} segments"
    apart = [one for one in masks.values() if int(one.sum()) != counts.get(one.meta["segment"]["number"], 0)]
    agreement = "equal" if not apart else f"{len(apart)} of {len(masks)} segments differ"
    return Row(name, "SEG", "read", detail, "pydicom, voxels of each segment", agreement)


def contour_agreement(path: Path, masks: dict) -> str:
    """Compare volumes with those of the contours; contours that are stored twice count once."""
    import pydicom
    from shapely.geometry import Polygon

    ds = pydicom.dcmread(path, force=True)
    contours = {int(item.ReferencedROINumber): item.get("ContourSequence") or [] for item in ds.ROIContourSequence}
    worst, compared = 0.0, 0
    for mask in masks.values():
        affine = mask.affine.numpy()
        normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
        planes: dict[float, Polygon] = {}
        seen = set()
        for contour in contours[mask.meta["roi"]["number"]]:
            if not str(contour.get("ContourGeometricType")).startswith("CLOSED"):
                continue
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) * [-1, -1, 1]
            key = tuple(np.round(points[np.lexsort(points.T)], 3).ravel())
            if key in seen or len(points) < 3:
                continue
            seen.add(key)
            flat = (points - affine[:3, 3]) @ (affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0))
            height = round(float(points[0] @ normal), 2)
            shape = Polygon(flat).buffer(0)
            planes[height] = planes[height].symmetric_difference(shape) if height in planes else shape
        heights = np.sort(np.array(list(planes)))
        if len(heights) < 2 or mask.meta["roi"]["outside"]:
            continue
        distance = float(np.median(np.diff(heights)))
        truth = sum(shape.area for shape in planes.values()) * distance
        volume = float(mask.sum()) * abs(float(np.linalg.det(affine[:3, :3])))
        worst, compared = max(worst, abs(volume / truth - 1)), compared + 1
    return f"within {100 * worst:.1f} % ({compared} of {len(masks)} compared)" if compared else ""


def compare(item: Series, image, root: Path) -> tuple[str, str]:
    """Return the reference, and how it agrees."""
    if item.kind == "dicom":
        if truth := ground_truth(item):
            beside = difference(image, *nifti_or_itk(truth))
            if beside == "equal":
                return truth.name, beside
            reference, agreement = compare_dicom(item, image)
            return f"{truth.name}; {reference}", f"{beside}; {agreement}"
        return compare_dicom(item, image)
    path = item.files[0]
    if item.kind == "nifti":
        return "nibabel", difference(image, *nibabel_array(path))
    if item.kind == "picture":
        return compare_picture(path, image)
    return "SimpleITK", difference(image, *itk_array(path))


def ground_truth(item: Series) -> Path | None:
    folder = item.files[0].parent
    beside = Path(f"{folder}_ground_truth.nii.gz")
    if beside.exists():
        return beside
    expected = folder.parents[2] / "expected" / folder.parents[1].name if len(folder.parents) > 2 else folder
    short = {"t2_tse_sag": "sag", "t2_tse_tra": "t2w", "t2_tse_cor": "cor"}.get(item.description)
    short = short or ("adc" if item.description.endswith("ADC") else "hbv" if "CALC_BVAL" in item.description else None)
    found = list(expected.glob(f"*_{short}.mha")) if short and expected.is_dir() else []
    return found[0] if found else None


def nifti_or_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    return nibabel_array(path) if path.name.endswith(".nii.gz") else itk_array(path)


def nibabel_array(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib

    nifti = nib.load(path)
    array = np.asanyarray(nifti.dataobj)
    if array.dtype.fields:
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
    return array, nifti.affine


def itk_array(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    return as_ras(sitk.ReadImage(str(path)))


def as_ras(image: "sitk.Image") -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    count = image.GetDimension()
    affine = np.eye(4)
    matrix = np.array(image.GetDirection()).reshape(count, count) * np.array(image.GetSpacing())
    axes = min(count, 3)
    affine[:axes, :axes] = matrix[:axes, :axes]
    affine[:axes, 3] = image.GetOrigin()[:axes]
    array = sitk.GetArrayFromImage(image)
    array = array.transpose(*range(count - 1, -1, -1), *range(count, array.ndim))
    if count == 2:
        array = array[:, :, None]
    return array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def difference(image, voxels: np.ndarray, affine: np.ndarray) -> str:
    """Say how far an image is from a reference [X, Y, Z, …] after turning that to the image's axes."""
    from nibabel import orientations

    ours = image.numpy()
    if ours.ndim == 3:
        ours = ours[..., None]
    own = image.affine.numpy()
    voxels = np.asarray(voxels)
    while voxels.ndim < 3:
        voxels = voxels[..., None]
    voxels = voxels.reshape(*voxels.shape[:3], -1)
    if voxels.shape[3] == 4 and ours.shape[0] == 3:  # an alpha channel, which DICOM does not have
        voxels = voxels[..., :3]
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.io_orientation(own))
    turned = orientations.apply_orientation(voxels, turn)
    moved = affine @ orientations.inv_ornt_aff(turn, voxels.shape[:3])
    if turned.shape[:3] != ours.shape[1:] or turned.shape[3] != ours.shape[0]:
        return f"another shape: {'×'.join(map(str, turned.shape))}"
    words = []
    apart = float(np.abs(moved - own).max())
    if not apart <= SAME_AFFINE:
        words.append(f"affine {apart:.3g} mm apart")
    theirs = np.moveaxis(turned, -1, 0).astype(np.float64)
    same = np.isclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(np.nanmax(np.abs(theirs)))), equal_nan=True)
    if not same.all():
        worst = float(np.nanmax(np.abs(ours - theirs)))
        words.append(f"{100 * (1 - same.mean()):.3g} % of the voxels differ, by up to {worst:.4g}")
    return ", ".join(words) or "equal"


def compare_dicom(item: Series, image) -> tuple[str, str]:
    """Compare with dcm2niix; where that differs, with GDCM (several files) or pydicom (one file)."""
    results, single = [], []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        source.mkdir()
        out.mkdir()
        for number, path in enumerate(item.files):
            shutil.copyfile(path, source / f"{number:05d}.dcm")
        # Slices of one series stay together; Philips' display scaling, that is RescaleSlope; 16 bits as they are.
        options = ["-b", "n", "-z", "n", "-m", "y", "-p", "n", "-l", "o", "-f", "%s_%d"]
        command = [dcm2niix(), *options, "-o", str(out), str(source)]
        subprocess.run(command, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
        for path in sorted(out.glob("*.nii")):
            try:
                voxels, affine = nibabel_array(path)
            except Exception as error:  # dcm2niix may leave a file that nibabel cannot read
                results.append(type(error).__name__)
                continue
            results.append(difference(image, voxels, affine))
            if voxels.ndim < 5 and len(single) < 100:
                volumes = voxels.reshape(*voxels.shape[:3], -1)
                single += [(volumes[..., k], affine) for k in range(volumes.shape[3])]
    if "equal" in results:
        return "dcm2niix", "equal"
    if single and all(any(difference(one[None], *other) == "equal" for other in single) for one in image):
        if len(single) > len(image):
            return "dcm2niix", f"equal to {len(image)} of its {len(single)} volumes"
        return "dcm2niix", "equal, there in several files" if len(
            results
        ) > 1 else "equal, its volumes in another order"
    theirs = min(results, key=lambda words: (words.startswith("another"), len(words)), default="makes no image of it")
    if item.n_files > 1:
        gdcm = gdcm_difference(item.files, image)
        return ("SimpleITK with GDCM", gdcm) if gdcm == "equal" else ("dcm2niix", theirs)
    if image.shape[-1] > 1 and image.meta["has_geometry"]:
        return "dcm2niix", theirs
    values = pydicom_difference(item.files[0], image)
    if not image.meta["has_geometry"] or not results:
        return "pydicom", values
    return "dcm2niix, pydicom", f"{theirs}; values by pydicom: {values}"


def gdcm_difference(files: Sequence[Path], image) -> str:
    """Compare with SimpleITK's reading by GDCM of the files in their order."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    try:
        return difference(image, *as_ras(reader.Execute()))
    except RuntimeError:
        return "cannot be read there"


def pydicom_difference(path: Path, image) -> str:
    """Compare the values of one file with pydicom's."""
    import pydicom

    ds = pydicom.dcmread(path, force=True)
    try:
        theirs = ds.pixel_array
    except Exception as error:  # of many kinds, from its decoders
        return f"cannot be decoded there ({type(error).__name__})"
    if ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        theirs = pydicom.pixels.apply_color_lut(theirs, ds)
        theirs = theirs >> 8 if theirs.dtype == np.uint16 else theirs
    theirs = theirs * float(ds.get("RescaleSlope") or 1) + float(ds.get("RescaleIntercept") or 0)
    color = theirs.ndim > 2 and theirs.shape[-1] == 3
    theirs = theirs if color else theirs[..., None]
    theirs = (theirs if theirs.ndim == 4 else theirs[None]).transpose(3, 2, 1, 0)
    ours = image.numpy()
    ours = ours if ours.ndim == 4 else ours[..., None]
    if ours.shape != theirs.shape:
        return f"another shape: {'×'.join(map(str, theirs.shape))}"
    same = np.isclose(ours, theirs, rtol=1e-5, atol=1e-4)
    if same.all():
        return "equal"
    if ds.get("PhotometricInterpretation") == "MONOCHROME1" and np.ptp(ours + theirs) < 1e-2:
        return "equal after inversion: MONOCHROME1 is read with white high"
    return f"{100 * (1 - same.mean()):.3g} % of the pixels differ"


def dcm2niix() -> str:
    found = shutil.which("dcm2niix") or shutil.which("dcm2niix", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("dcm2niix is not installed: pip install dcm2niix")
    return found


def compare_picture(path: Path, image) -> tuple[str, str]:
    import imagecodecs

    content = path.read_bytes()
    decode = next(
        (
            function
            for start, function in (
                (b"\x89PNG", imagecodecs.png_decode),
                (b"\xff\xd8", imagecodecs.jpeg8_decode),
                (b"GIF8", imagecodecs.gif_decode),
                (b"BM", imagecodecs.bmp_decode),
            )
            if content.startswith(start)
        ),
        None,
    )
    if decode is None:
        import tifffile

        array = tifffile.imread(io.BytesIO(content))
        name = "tifffile"
    else:
        array = decode(content)
        name = "imagecodecs"
    array = np.asarray(array)
    array = array[..., None] if array.ndim == 2 else array
    theirs = array.transpose(2, 1, 0).astype(np.float64)
    ours = image.numpy()
    if theirs.shape[0] > ours.shape[0] and name == "imagecodecs":  # gray or a palette shown as color, opaque alpha
        theirs = theirs[: ours.shape[0]]
    if theirs.shape != ours.shape:
        return name, f"another shape: {'×'.join(map(str, theirs.shape))}"
    if set(np.unique(ours)) <= {0.0, 1.0}:  # a palette of two colors is read as a mask
        theirs = (theirs > theirs.mean()).astype(np.float64)
    apart = float(np.abs(ours - theirs).max())
    return name, "equal" if apart == 0 else f"up to {apart:.3g} apart ({100 * float((ours != theirs).mean()):.2g} %)"


def tables(data: Path, *, workers: int, only: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Return the rows of every folder of ``data``, or of those that are named."""
    result = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for folder in sorted(path for path in data.iterdir() if path.is_dir() and (not only or path.name in only)):
            found = pool.map(rows_of, *zip(*((place, data) for place in places(folder)), strict=True), chunksize=4)
            result[folder.name] = [row for rows in found for row in rows]
    return result


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of real data")
    parser.add_argument("out", type=Path, help="where the tables are")
    parser.add_argument("--check", action="store_true", help="compare with the tables there; exit 1 where they differ")
    parser.add_argument("--only", nargs="*", help="these folders of DATA only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    data = chosen.data.resolve()
    different = []
    for name, rows in tables(data, workers=chosen.workers, only=chosen.only or ()).items():
        path = chosen.out / f"{name}.csv"
        if chosen.check:
            old = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
            different += sorted(set(as_csv(rows).splitlines()) ^ old)
        else:
            chosen.out.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, as_csv(rows))
    for line in different:
        print(line)
    if different:
        raise SystemExit(f"{len(different)} lines differ from the tables in {chosen.out}")


if __name__ == "__main__":
    main()
