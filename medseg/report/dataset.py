"""The report in a dataset's folder: what a person checks before training."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from skimage.segmentation import find_boundaries

from ..errors import DatasetError, GeometryError, ReadError
from ..io.atomic import atomic_path
from .figures import ORANGE, SKY, VERMILLION, distribution_plot
from .page import data_uri, embed, environment

LABEL_COLORS = (VERMILLION, SKY, ORANGE, "#F0E442", "#009E73", "#CC79A7")
SOFT_TISSUE = (-160.0, 240.0)  # HU: center 40, width 400
HEIGHT = 150  # pixels of a picture
VOLUME = "volume_ml_"


def dataset_report(dataset_dir: Path) -> Path:
    """Write ``report.html`` into a dataset's folder: summary, distributions, a picture of every case, failures.

    The same dataset gives the same bytes. Cases are read one at a time.

    Args:
        dataset_dir: the folder that ``data_prep build`` wrote.

    Returns:
        The file written.

    Raises:
        DatasetError: the folder is no dataset: dataset.json or cases.csv is absent, or lacks what every dataset has.
        ReadError: dataset.json, cases.csv, splits.json or manifest.json is damaged. (Images that cannot be read are
            named in the report.)
    """
    root = Path(dataset_dir)
    info = _read_json(root / "dataset.json", needed=True)
    labels = {str(name): value for name, value in info.get("labels", {}).items() if isinstance(value, int) and value}
    channels = [str(name) for _, name in sorted(info.get("channel_names", {}).items(), key=lambda item: int(item[0]))]
    if not channels:
        raise DatasetError(f"{root / 'dataset.json'}: no channel_names in it; build the dataset again")
    cases = _read_cases(root / "cases.csv")
    manifest = _read_json(root / "manifest.json")
    splits = _read_json(root / "splits.json")
    parts = _parts(splits)
    volumes = {label: _numbers(cases, f"{VOLUME}{label}") for label in labels if f"{VOLUME}{label}" in cases}
    spacings = _spacings(cases)
    odd_volumes = {label: outliers(values, log=True) for label, values in volumes.items()}
    odd_spacings = {axis: outliers(values) for axis, values in spacings.items()}
    flags = _flags(cases, volumes, odd_volumes, odd_spacings)
    order = _worst_first(cases, volumes, flags)

    def rows() -> Iterator[dict[str, Any]]:
        for position in order:
            case = cases.iloc[position]
            picture, problem = _picture_of(root, case["case"], channels, labels)
            yield {
                "case": case["case"],
                "patient": case["patient"],
                "stratum": case["stratum"],
                "part": ", ".join(parts.get(case["case"], [])),
                "shape": case["shape"],
                "spacing": case["spacing"],
                "voxels": _product(case["shape"]),
                "volumes": [float(values[position]) for values in volumes.values()],
                "flags": flags[position] + ([problem] if problem else []),
                "picture": picture,
            }

    page = environment().get_template("dataset.html")
    stream = page.generate(
        title=f"Dataset {info.get('name') or ''}".strip(),
        summary=_summary(cases, channels, labels, manifest),
        absent=[] if manifest else ["manifest.json is absent: recipe and failures are unknown."],
        failures=_failures(manifest, "failed"),
        unpaired=_failures(manifest, "unpaired"),
        shapes=_counts(cases["shape"]),
        spacings=_counts(cases["spacing"]),
        strata=_strata(cases, parts),
        parts=_part_names(parts),
        volume_figure=embed(distribution_plot(volumes, odd_volumes, "Label volume (ml)", log=True)) if volumes else "",
        spacing_figure=embed(distribution_plot(spacings, odd_spacings, "Spacing (mm)"))
        if cases["spacing"].nunique() > 1
        else "",
        volume_labels=list(volumes),
        show_patient=bool((cases["patient"] != cases["case"]).any()),
        show_stratum=cases["stratum"].nunique() > 1,
        label_colors=[(label, LABEL_COLORS[(value - 1) % len(LABEL_COLORS)]) for label, value in labels.items()],
        channels=channels,
        flagged=sum(map(bool, flags)),
        rows=rows(),
    )
    out = root / "report.html"
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for text in stream:
            file.write(text)
    return out


def outliers(values: ArrayLike, log: bool = False) -> NDArray[np.bool_]:
    """Which values lie beyond Tukey's fences (1.5 times the interquartile range from the quartiles).

    Below five values nothing is flagged, and so is nothing within 1 % of the quartiles.

    Args:
        values: numbers; NaN is never flagged.
        log: judge the logarithm, for quantities that vary by factors; 0 and less is then never flagged.

    Example:
        >>> outliers([1.0, 1.0, 1.0, 1.0, 3.0]).tolist()
        [False, False, False, False, True]
    """
    array = np.asarray(values, float)
    usable = np.isfinite(array) & ((array > 0) if log else True)
    if usable.sum() < 5:
        return np.zeros(len(array), bool)
    scaled = np.log(array, where=usable, out=np.full(len(array), np.nan)) if log else array
    low, high = np.percentile(scaled[usable], (25, 75))
    margin_low, margin_high = (0.01, 0.01) if log else (0.01 * abs(low), 0.01 * abs(high))
    reach = 1.5 * (high - low)
    below, above = scaled < low - max(reach, margin_low), scaled > high + max(reach, margin_high)
    return usable & (below | above)


def alignment_picture(
    images: Sequence[Path], label: Path | None, channels: Sequence[str], height: int = HEIGHT
) -> Image.Image:
    """One slice of a case, channels side by side, with the outline of every label: does the mask lie on the image?

    The slice is the one with the largest labelled area, the middle one where there is no label, across the axis with
    the thickest slices (foot to head where voxels are about as long on all sides). It is turned as a radiologist looks
    at it: the patient's left on the right, the front (or the head) at the top. CT is shown from -160 to 240 HU, other
    channels between the first and 99th percentile of the slice.

    Args:
        images: one NIfTI file per channel.
        label: NIfTI file of the label map, or None.
        channels: name of each channel.
        height: height of the picture in pixels.

    Raises:
        ReadError: a file is no readable NIfTI.
        GeometryError: the files differ in shape or affine; the message holds the shapes.
    """
    volumes = [_open(path) for path in images]
    mask_file = _open(label) if label is not None else None
    shape, affine = volumes[0].shape, volumes[0].affine
    for other in [*volumes[1:], *([mask_file] if mask_file is not None else [])]:
        if other.shape != shape:
            what = "label" if other is mask_file else "channel"
            raise GeometryError(f"image {_x(shape)} and {what} {_x(other.shape)} differ in shape")
        if not np.allclose(other.affine, affine, atol=1e-3):
            raise GeometryError(f"image and {'label' if other is mask_file else 'channel'} differ in affine")
    if len(shape) != 3:
        raise GeometryError(f"image {_x(shape)} is not 3D")
    mask = _read(mask_file, slice(None), 0) if mask_file is not None else np.zeros(shape, np.uint8)
    axis = _slice_axis(shape, affine)
    areas = np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis}))
    position = int(areas.argmax()) if areas.any() else shape[axis] // 2
    keep = slice(position, position + 1)
    flat = np.take(mask, [position], axis=axis)
    turn, zooms = _turn(shape, affine)
    outline, spacing = _as_shown(flat, turn, axis, zooms)
    panels = []
    for volume, name in zip(volumes, channels, strict=True):
        picture, _ = _as_shown(_read(volume, keep, axis), turn, axis, zooms)
        panels.append(_panel(picture, outline, spacing, name, height))
    whole = Image.new("RGB", (sum(panel.width for panel in panels) + 3 * (len(panels) - 1), height), "white")
    left = 0
    for panel in panels:
        whole.paste(panel, (left, 0))
        left += panel.width + 3
    return whole


def _panel(
    picture: NDArray[Any], labels: NDArray[Any], spacing: tuple[float, float], channel: str, height: int
) -> Image.Image:
    """A gray picture [row, column] with outlines, its pixels as long as they are in the patient."""
    picture = np.nan_to_num(picture.astype(np.float32))
    ct = channel.upper().split("_")[0] == "CT"
    low, high = SOFT_TISSUE if ct else (float(value) for value in np.percentile(picture, (1, 99)))
    gray = (np.clip((picture - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    rows, columns = gray.shape
    width = round(height * columns * spacing[1] / (rows * spacing[0]))
    size = (min(max(width, 8), 3 * height), height)
    color = np.asarray(Image.fromarray(gray).resize(size, Image.Resampling.BICUBIC).convert("RGB")).copy()
    large = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    for value in np.unique(large[large > 0]):
        # A frame of background outlines also what touches the edge.
        edge = find_boundaries(np.pad(large == value, 1), mode="inner")[1:-1, 1:-1]
        paint = LABEL_COLORS[(int(value) - 1) % len(LABEL_COLORS)]
        color[edge] = [int(paint[place : place + 2], 16) for place in (1, 3, 5)]
    return Image.fromarray(color)


def _slice_axis(shape: Sequence[int], affine: NDArray[Any]) -> int:
    """The axis across the slices."""
    if 1 in shape:
        return list(shape).index(1) if shape[2] != 1 else 2
    zooms = nib.affines.voxel_sizes(affine)
    if zooms.max() > 1.5 * np.median(zooms):
        return int(zooms.argmax())
    return int(np.abs(affine[2, :3] / zooms).argmax())


def _turn(shape: Sequence[int], affine: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """How to reorder and flip the axes to left, posterior, inferior; the spacing of the axes after that."""
    zooms = nib.affines.voxel_sizes(affine)
    if shape[2] == 1 and np.array_equal(np.abs(affine), np.eye(4)):
        return np.array([[0, 1], [1, 1], [2, 1]]), zooms  # a picture: it has no place in a patient
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(("L", "P", "I")))
    turned = np.empty(3)
    turned[turn[:, 0].astype(int)] = zooms
    return turn, turned


def _as_shown(
    flat: NDArray[Any], turn: NDArray[Any], axis: int, zooms: NDArray[Any]
) -> tuple[NDArray[Any], tuple[float, float]]:
    """The slice as rows and columns, with their spacing."""
    across = int(turn[axis, 0])
    first, second = sorted({0, 1, 2} - {across})
    picture = np.take(apply_orientation(flat, turn), 0, axis=across).T
    return picture, (float(zooms[second]), float(zooms[first]))


def _open(path: Path) -> nib.nifti1.Nifti1Image:
    try:
        image = nib.load(path)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise ReadError(f"{path.name} cannot be read") from error
    if not isinstance(image, nib.nifti1.Nifti1Image):
        raise ReadError(f"{path.name} is not a NIfTI file")
    return image


def _read(image: nib.nifti1.Nifti1Image, keep: slice, axis: int) -> NDArray[Any]:
    index = [slice(None)] * 3
    index[axis] = keep
    try:
        return np.asarray(image.dataobj[tuple(index)])
    except Exception as error:  # gzip, zlib and nibabel have each their own
        raise ReadError(f"{Path(image.get_filename() or 'file').name} cannot be read, it may be cut short") from error


def _picture_of(root: Path, case: str, channels: Sequence[str], labels: Mapping[str, int]) -> tuple[str, str]:
    """The picture as a data URI and a problem, either of them empty."""
    if Path(case).name != case:
        return "", "no file name"
    images = []
    for channel in range(len(channels)):
        name = f"{case}_{channel:04d}.nii.gz"
        images.append(
            next(
                (root / folder / name for folder in ("imagesTr", "imagesTs") if (root / folder / name).is_file()), None
            )
        )
    found = [image for image in images if image is not None]
    if len(found) < len(images):
        return "", "image absent"
    label = next(
        (path for folder in ("labelsTr", "labelsTs") if (path := root / folder / f"{case}.nii.gz").is_file()), None
    )
    try:
        picture = alignment_picture(found, label, channels)
    except (ReadError, GeometryError) as error:
        return "", str(error)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80, subsampling=0)
    return data_uri("jpeg", buffer.getvalue()), "no label file" if label is None and labels else ""


def _read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            raise DatasetError(f"{path}: absent; expected a dataset that data_prep build wrote")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadError(f"{path}: not valid JSON ({error}); build the dataset again") from error
    if not isinstance(content, dict):
        raise ReadError(f"{path}: found a {type(content).__name__}, expected an object of names and values")
    return content


def _read_cases(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DatasetError(f"{path}: absent; expected a dataset that data_prep build wrote")
    try:
        cases = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ReadError(f"{path}: not a readable CSV table ({' '.join(str(error).split())})") from error
    for column in ("case", "patient"):
        if column not in cases:
            raise DatasetError(f"{path}: no column {column}; found {', '.join(map(str, cases.columns))}")
    for column in ("stratum", "shape", "spacing"):
        if column not in cases:
            cases[column] = ""
    return cases


def _numbers(cases: pd.DataFrame, column: str) -> NDArray[np.float64]:
    return pd.to_numeric(cases[column], errors="coerce").to_numpy(float)


def _spacings(cases: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    axes: dict[str, list[float]] = {"x": [], "y": [], "z": []}
    for text in cases["spacing"]:
        parts = pd.to_numeric(pd.Series(text.split("x")), errors="coerce").to_list()
        for axis, value in zip(axes, [*parts, np.nan, np.nan, np.nan], strict=False):
            axes[axis].append(float(value))
    return {axis: np.asarray(values) for axis, values in axes.items() if np.isfinite(values).any()}


def _flags(
    cases: pd.DataFrame,
    volumes: Mapping[str, NDArray[np.float64]],
    odd_volumes: Mapping[str, NDArray[np.bool_]],
    odd_spacings: Mapping[str, NDArray[np.bool_]],
) -> list[list[str]]:
    flags: list[list[str]] = [[] for _ in range(len(cases))]
    for position, found in enumerate(flags):
        for label, values in volumes.items():
            if values[position] == 0:
                found.append(f"empty: {label}")
            elif odd_volumes[label][position]:
                found.append(f"{'small' if values[position] < np.nanmedian(values) else 'large'}: {label}")
        if any(odd[position] for odd in odd_spacings.values()):
            found.append("spacing")
    return flags


def _worst_first(
    cases: pd.DataFrame, volumes: Mapping[str, NDArray[np.float64]], flags: Sequence[Sequence[str]]
) -> list[int]:
    """Empty labels, then the flagged, each from the smallest volume (as a share of the label's median)."""
    smallest = np.full(len(cases), np.inf)
    for values in volumes.values():
        positive = values[values > 0]
        share = np.nan_to_num(values, nan=np.inf) / (np.median(positive) if len(positive) else 1.0)
        smallest = np.minimum(smallest, share)
    empty = [sum(flag.startswith("empty: ") for flag in found) for found in flags]
    return sorted(range(len(cases)), key=lambda i: (-empty[i], not flags[i], smallest[i], cases["case"].iloc[i]))


def _parts(splits: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parts of each case: test, train, val, or with several folds the fold whose validation it is."""
    parts: dict[str, list[str]] = {}
    for case in splits.get("test", []):
        parts.setdefault(str(case), []).append("test")
    folds = splits.get("folds", [])
    for number, fold in enumerate(folds):
        names = {"train": "train", "val": "val"} if len(folds) == 1 else {"val": f"val {number}"}
        for part, name in names.items():
            for case in fold.get(part, []):
                parts.setdefault(str(case), []).append(name)
    return parts


def _part_names(parts: Mapping[str, Sequence[str]]) -> list[str]:
    known = dict.fromkeys(part for found in parts.values() for part in found)
    return sorted(known, key=lambda part: (part == "test", part != "train", part))


def _strata(cases: pd.DataFrame, parts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Patients and cases of each stratum, in all and in each part."""
    names = _part_names(parts)
    member = {name: cases["case"].map(lambda case, name=name: name in parts.get(case, [])) for name in names}
    rows = []
    strata = _counts(cases["stratum"])
    for stratum in [name for name, _ in strata] if len(strata) > 1 else []:
        chosen = cases["stratum"] == stratum
        counts = [_size(cases[chosen])] + [_size(cases[chosen & member[name]]) for name in names]
        rows.append({"stratum": stratum or "unknown", "counts": counts})
    if names or rows:
        rows.append({"stratum": "all", "counts": [_size(cases)] + [_size(cases[member[name]]) for name in names]})
    return rows


def _size(cases: pd.DataFrame) -> str:
    patients = cases["patient"].nunique()
    return f"{patients}" if patients == len(cases) else f"{patients} ({len(cases)} cases)"


def _counts(values: "pd.Series[str]") -> list[tuple[str, int]]:
    """Each value with its number, the most frequent first."""
    counts = values.value_counts()
    return sorted(((str(value), int(count)) for value, count in counts.items()), key=lambda item: (-item[1], item[0]))


def _summary(
    cases: pd.DataFrame, channels: Sequence[str], labels: Mapping[str, int], manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    rows = [
        ("Cases", str(len(cases))),
        ("Patients", str(cases["patient"].nunique())),
        ("Channels", ", ".join(channels)),
        ("Labels", ", ".join(f"{name} ({value})" for name, value in labels.items()) or "none"),
    ]
    if isinstance(manifest.get("recipe"), str):
        rows.append(("Recipe", manifest["recipe"]))
    for key, title in (("options", "Options"), ("labels_remapped", "Labels remapped"), ("versions", "Versions")):
        value = manifest.get(key)
        if isinstance(value, dict) and any(value.values()):
            rows.append((title, ", ".join(f"{name}: {_words(item)}" for name, item in value.items() if item)))
    if manifest.get("identifiers"):
        rows.append(("Identifiers", str(manifest["identifiers"])))
    return rows


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _failures(manifest: Mapping[str, Any], key: str) -> list[dict[str, str]]:
    rows = []
    for entry in manifest.get(key) or []:
        if isinstance(entry, dict):
            sources = entry.get("sources")
            text = ", ".join(map(str, sources)) if isinstance(sources, list) else ""
            rows.append({"case": str(entry.get("case", "")), "sources": text, "what": str(entry.get("what", ""))})
        else:
            rows.append({"case": "", "sources": "", "what": str(entry)})
    return rows


def _product(shape: str) -> float:
    parts = pd.to_numeric(pd.Series(shape.split("x")), errors="coerce")
    return float(np.prod(parts.to_numpy(float)))


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
