"""The report in a dataset's folder: what a person checks before training."""

import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.segmentation import find_boundaries

from ..errors import DatasetError, GeometryError, ReadError
from ..io.atomic import atomic_path
from ..io.position import is_picture, position_index
from ..io.threads import in_order
from ..metrics import outliers
from .figures import ORANGE, SKY, VERMILLION, distribution_plot
from .page import data_uri, embed, environment

LABEL_COLORS = (VERMILLION, SKY, ORANGE, "#F0E442", "#009E73", "#CC79A7")
SOFT_TISSUE = (-160.0, 240.0)  # HU: center 40, width 400
HEIGHT = 150  # pixels of a picture
VOLUME = "volume_ml_"
RED = (255, 0, 0)
# What a picture of a case may take in the page, so that a thousand of them open at once.
_QUALITY = 75
_MOST_PIXELS = 50_000_000  # of an attached picture


class _Found(Protocol):
    """One thing that the check of a dataset found, as :class:`medseg.data.Problem` says it."""

    @property
    def case(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def advice(self) -> str: ...
    @property
    def topic(self) -> str: ...
    @property
    def severity(self) -> str: ...


def dataset_report(
    dataset_dir: Path,
    findings: Sequence[_Found] | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``report.html`` into a dataset's folder: summary, findings, distributions, failures, pictures of all cases.

    The same dataset and findings give the same bytes. Cases are shown worst first: those with the most errors, then
    those with the most warnings, then from the smallest label. No more cases are in memory than there are workers.

    Args:
        dataset_dir: the folder that ``data_prep build`` wrote.
        findings: what :func:`medseg.data.check_dataset` returned; without it the report says that nothing was checked.
        workers: threads that make pictures; default: one per core.
        progress: called with (cases done, cases in all).

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
    classes = [str(name) for name in info.get("classes", {})]
    channels = [str(name) for _, name in sorted(info.get("channel_names", {}).items(), key=lambda item: int(item[0]))]
    if not channels:
        raise DatasetError(f"{root / 'dataset.json'}: no channel_names in it; build the dataset again")
    cases = _read_cases(root / "cases.csv")
    manifest = _read_json(root / "manifest.json")
    parts = _parts(_read_json(root / "splits.json"))
    volumes = {label: _numbers(cases, f"{VOLUME}{label}") for label in labels if f"{VOLUME}{label}" in cases}
    spacings = _spacings(cases)
    of_case: dict[str, list[_Found]] = defaultdict(list)
    for found in findings or ():
        of_case[found.case].append(found)
    order = _worst_first(cases, volumes, of_case)
    attached = _attachments(root, cases["case"])

    def row_of(position: int) -> dict[str, Any]:
        case = cases.iloc[position]
        found = of_case[case["case"]]
        pictures, problem = _pictures_of(root, case, channels, labels, attached[case["case"]])
        return {
            **{key: case[key] for key in ("case", "patient", "stratum", "class", "lesion", "shape", "spacing")},
            "part": ", ".join(parts.get(case["case"], [])),
            "voxels": _product(case["shape"]),
            "volumes": [float(values[position]) for values in volumes.values()],
            "found": found,
            "rank": sum(1000 if item.severity == "error" else 1 for item in found),
            "picture_problem": problem,
            "pictures": pictures,
            "files": [path.name for path in attached[case["case"]] if path.suffix != ".png"],
        }

    def rows() -> Iterator[dict[str, Any]]:
        made = in_order(row_of, order, workers or len(os.sched_getaffinity(0)))
        for number, row in enumerate(made, 1):
            if progress:
                progress(number, len(order))
            yield row

    page = environment().get_template("dataset.html")
    stream = page.generate(
        title=f"Dataset {info.get('name') or ''}".strip(),
        summary=_summary(cases, channels, labels, classes, manifest),
        absent=[] if manifest else ["manifest.json is absent: recipe and failures are unknown."],
        checked=findings is not None,
        topics=_topics(findings or ()),
        general=[found for found in findings or () if found.case not in set(cases["case"])],
        failures=_failures(manifest, "failed"),
        unpaired=_failures(manifest, "unpaired"),
        shapes=_counts(cases["shape"]),
        spacings=_counts(cases["spacing"]),
        strata=_strata(cases, parts),
        parts=_part_names(parts),
        part_volumes=_part_volumes(cases, volumes, parts),
        volume_figure=embed(
            distribution_plot(
                volumes, {name: outliers(v, log=True) for name, v in volumes.items()}, "Label volume (ml)", log=True
            )
        )
        if volumes
        else "",
        spacing_figure=embed(
            distribution_plot(spacings, {axis: outliers(v) for axis, v in spacings.items()}, "Spacing (mm)")
        )
        if cases["spacing"].nunique() > 1
        else "",
        volume_labels=list(volumes),
        show=[
            name
            for name in ("patient", "stratum", "class", "lesion")
            if (cases["patient"] != cases["case"]).any() or name != "patient"
            if cases[name].nunique() > 1 or (name == "class" and classes)
        ],
        label_colors=[(label, LABEL_COLORS[(value - 1) % len(LABEL_COLORS)]) for label, value in labels.items()],
        positions=bool((cases["position"] != "").any()),
        channels=channels,
        flagged=sum(name in of_case for name in cases["case"]),
        classes=classes,
        rows=rows(),
    )
    out = root / "report.html"
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for text in stream:
            file.write(text)
    return out


def alignment_picture(
    images: Sequence[Path], label: Path | None, channels: Sequence[str], height: int = HEIGHT, position: str = ""
) -> Image.Image:
    """One slice of a case, channels side by side, with the outline of every label: does the mask lie on the image?

    The slice is the one with the largest labelled area; without a label it is the one through the position of the
    lesion, which gets a red dot, or the middle one. It is cut across the axis with the thickest slices (foot to head
    where voxels are about as long on all sides), and turned as a radiologist looks at it: the patient's left on the
    right, the front (or the head) at the top. CT is shown from -160 to 240 HU, other channels between the first and
    99th percentile of the slice.

    Args:
        images: one NIfTI file per channel.
        label: NIfTI file of the label map, or None.
        channels: name of each channel.
        height: height of the picture in pixels.
        position: of a lesion, as in cases.csv: RAS mm; of a picture its column and row.

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
    point = position_index(position, shape, affine) if position.strip() else None
    number = int(areas.argmax()) if areas.any() else shape[axis] // 2
    if point is not None and not areas.any():
        number = int(np.clip(np.rint(point[axis]), 0, shape[axis] - 1))
    keep = slice(number, number + 1)
    flat = np.take(mask, [number], axis=axis)
    turn, zooms = _turn(shape, affine)
    outline, spacing = _as_shown(flat, turn, axis, zooms)
    panels = []
    for volume, name in zip(volumes, channels, strict=True):
        picture, _ = _as_shown(_read(volume, keep, axis), turn, axis, zooms)
        panels.append(_panel(picture, outline, spacing, name, height))
        if point is not None and abs(point[axis] - number) <= 1:
            _dot(panels[-1], point, shape, turn, axis)
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


def _dot(panel: Image.Image, point: NDArray[Any], shape: Sequence[int], turn: NDArray[Any], axis: int) -> None:
    """A red dot on a panel, where a point of the array lies."""
    turned, sizes = np.empty(3), np.empty(3)
    for first, (second, sign) in enumerate(turn.astype(int)):
        turned[second] = point[first] if sign > 0 else shape[first] - 1 - point[first]
        sizes[second] = shape[first]
    across, down = sorted({0, 1, 2} - {int(turn[axis, 0])})
    x, y = ((turned[side] + 0.5) / sizes[side] * panel.size[place] for place, side in enumerate((across, down)))
    ImageDraw.Draw(panel).ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=RED)


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
    if is_picture(shape, affine):
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


def _pictures_of(
    root: Path, row: "pd.Series[str]", channels: Sequence[str], labels: Mapping[str, int], attached: Sequence[Path]
) -> tuple[list[tuple[str, str]], str]:
    """Pictures of a case, each with its name, as data URIs, and a problem or nothing."""
    case = row["case"]
    if Path(case).name != case:
        return [], "no file name"
    pictures, problems = [], []
    images = [
        next((path for folder in ("imagesTr", "imagesTs") if (path := root / folder / name).is_file()), None)
        for name in (f"{case}_{channel:04d}.nii.gz" for channel in range(len(channels)))
    ]
    found = [image for image in images if image is not None]
    label = next(
        (path for folder in ("labelsTr", "labelsTs") if (path := root / folder / f"{case}.nii.gz").is_file()), None
    )
    try:
        if len(found) < len(images):
            raise ReadError("image absent")
        pictures.append((case, _jpeg(alignment_picture(found, label, channels, position=row["position"]))))
        if label is None and labels:
            problems.append("no label file")
    except (ReadError, GeometryError) as error:
        problems.append(str(error))
    for path in attached:
        if path.suffix == ".png":
            try:
                pictures.append((path.name, _jpeg(_attached_picture(path))))
            except (OSError, SyntaxError, ValueError):
                problems.append(f"{path.name} cannot be read")
    return pictures, "; ".join(problems)


def _attached_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        if picture.width * picture.height > _MOST_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        small = picture.convert("RGB")
    small.thumbnail((4 * HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    return small


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return data_uri("jpeg", buffer.getvalue())


def _attachments(root: Path, cases: "pd.Series[str]") -> dict[str, list[Path]]:
    """Further files of each case."""
    names = set(cases)
    attached: dict[str, list[Path]] = {case: [] for case in names}
    for path in sorted((root / "attachments").glob("[!.]*")):
        owners = [path.name[:end] for end, letter in enumerate(path.name) if letter == "_" and path.name[:end] in names]
        if owners:
            attached[owners[-1]].append(path)
    return attached


def _topics(findings: Sequence[_Found]) -> list[tuple[str, str, int]]:
    """Severity, topic and number of the findings, the most severe and frequent first."""
    counts = Counter((found.severity, found.topic) for found in findings)
    ordered = sorted(counts.items(), key=lambda item: (item[0][0] != "error", -item[1], item[0][1]))
    return [(severity, topic, number) for (severity, topic), number in ordered]


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
    for column in ("stratum", "class", "lesion", "position", "shape", "spacing"):
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


def _worst_first(
    cases: pd.DataFrame, volumes: Mapping[str, NDArray[np.float64]], of_case: Mapping[str, Sequence[_Found]]
) -> list[int]:
    """Positions by errors, by warnings, then from the smallest volume (as a share of the label's median)."""
    smallest = np.full(len(cases), np.inf)
    for values in volumes.values():
        positive = values[values > 0]
        share = np.nan_to_num(values, nan=np.inf) / (np.median(positive) if len(positive) else 1.0)
        smallest = np.minimum(smallest, share)

    def rank(position: int) -> tuple[Any, ...]:
        case = cases["case"].iloc[position]
        severities = Counter(found.severity for found in of_case.get(case, ()))
        return -severities["error"], -severities["warning"], smallest[position], case

    return sorted(range(len(cases)), key=rank)


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
    classes = [name for name, _ in _counts(cases["class"]) if name]
    for name in classes:
        chosen = cases["class"] == name
        counts = [_size(cases[chosen])] + [_size(cases[chosen & member[part]]) for part in names]
        rows.append({"stratum": f"class {name}", "counts": counts})
    if names or rows:
        rows.append({"stratum": "all", "counts": [_size(cases)] + [_size(cases[member[name]]) for name in names]})
    return rows


def _part_volumes(
    cases: pd.DataFrame, volumes: Mapping[str, NDArray[np.float64]], parts: Mapping[str, Sequence[str]]
) -> list[tuple[str, list[str]]]:
    """Median and quartiles of the volume of each label, in all and in each part."""
    names = _part_names(parts)
    rows = []
    for label, values in volumes.items() if names else ():
        cells = []
        for part in ("", *names):
            inside = cases["case"].map(lambda case, part=part: not part or part in parts.get(case, [])).to_numpy(bool)
            positive = values[inside & (values > 0)]
            text = "–"
            if len(positive):
                low, middle, high = np.percentile(positive, (25, 50, 75))
                text = f"{middle:.3g} ({low:.3g}–{high:.3g})"
            absent = int(np.count_nonzero(values[inside] == 0))
            cells.append(f"{text}, absent in {absent}" if absent else text)
        rows.append((label, cells))
    return rows


def _size(cases: pd.DataFrame) -> str:
    patients = cases["patient"].nunique()
    return f"{patients}" if patients == len(cases) else f"{patients} ({len(cases)} cases)"


def _counts(values: "pd.Series[str]") -> list[tuple[str, int]]:
    """Each value with its number, the most frequent first."""
    counts = values.value_counts()
    return sorted(((str(value), int(count)) for value, count in counts.items()), key=lambda item: (-item[1], item[0]))


def _summary(
    cases: pd.DataFrame,
    channels: Sequence[str],
    labels: Mapping[str, int],
    classes: Sequence[str],
    manifest: Mapping[str, Any],
) -> list[tuple[str, str]]:
    rows = [
        ("Cases", str(len(cases))),
        ("Patients", str(cases["patient"].nunique())),
        ("Channels", ", ".join(channels)),
        ("Classes", ", ".join(f"{name}: {(cases['class'] == name).sum()} cases" for name in classes))
        if classes
        else ("Labels", ", ".join(f"{name} ({value})" for name, value in labels.items()) or "none"),
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
