"""The report in a dataset's folder: what a person checks before training."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from ..errors import DatasetError, GeometryError, ReadError
from ..io.atomic import atomic_path
from ..io.threads import in_order
from ..metrics import outliers
from .case_picture import HEIGHT, LABEL_COLORS, alignment_picture, jpeg
from .figures import distribution_plot
from .page import data_uri, embed, environment

VOLUME = "volume_ml_"
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
    pictures: Mapping[str, bytes] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``report.html`` into a dataset's folder: summary, findings, distributions, failures, pictures of all cases.

    The same dataset and findings give the same bytes. Cases are shown worst first: those with the most errors, then
    those with the most warnings, then from the smallest label. No more cases are in memory than there are workers.

    Args:
        dataset_dir: the folder that ``data_prep build`` wrote.
        findings: what :func:`medseg.data.check_dataset` returned; without it the report says that nothing was checked.
        pictures: JPEG of cases that were drawn already, when their files were read for another purpose
            (``medseg.report.case_picture.draw_case``); the files of the others are read here.
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
    given = {key: info.get(key, {}) for key in ("channel_names", "labels", "classes")}
    for key, names in given.items():
        if not isinstance(names, dict):
            what = f"{root / 'dataset.json'}: {key} is a {type(names).__name__}, names and values expected"
            raise DatasetError(f"{what}; build the dataset again")
    labels = {str(name): value for name, value in given["labels"].items() if isinstance(value, int) and value}
    classes = [str(name) for name in given["classes"]]
    # In the order of their numbers, as text: "10" comes after "9".
    channels = [str(name) for _, name in sorted(given["channel_names"].items(), key=lambda item: (len(item[0]), item))]
    if not channels:
        raise DatasetError(f"{root / 'dataset.json'}: no channel_names in it; build the dataset again")
    cases = _read_cases(root / "cases.csv")
    manifest = _read_json(root / "manifest.json")
    parts = _parts(_read_json(root / "splits.json"))
    volumes = {label: _numbers(cases, f"{VOLUME}{label}") for label in labels if f"{VOLUME}{label}" in cases}
    voxels = np.nanprod(_axes(cases["shape"]), axis=1)
    spacings = {
        axis: values for axis, values in zip("xyz", _axes(cases["spacing"]).T, strict=True) if np.isfinite(values).any()
    }
    of_case: dict[str, list[_Found]] = defaultdict(list)
    for found in findings or ():
        of_case[found.case].append(found)
    order = _worst_first(cases, volumes, of_case)
    attached = _attachments(root, cases["case"])

    def row_of(position: int) -> dict[str, Any]:
        case = cases.iloc[position]
        found = of_case[case["case"]]
        drawn = (pictures or {}).get(case["case"])
        shown, problem = _pictures_of(root, case, channels, labels, attached[case["case"]], drawn)
        return {
            **{key: case[key] for key in ("case", "patient", "stratum", "class", "lesion", "shape", "spacing")},
            "part": ", ".join(parts.get(case["case"], [])),
            "voxels": float(voxels[position]),
            "volumes": [float(values[position]) for values in volumes.values()],
            "found": found,
            "rank": sum(1000 if item.severity == "error" else 1 for item in found),
            "picture_problem": problem,
            "pictures": shown,
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


def _pictures_of(
    root: Path,
    row: "pd.Series[str]",
    channels: Sequence[str],
    labels: Mapping[str, int],
    attached: Sequence[Path],
    drawn: bytes | None,
) -> tuple[list[tuple[str, str]], str]:
    """Pictures of a case, each with its name, as data URIs, and a problem or nothing."""
    case = row["case"]
    if Path(case).name != case:
        return [], "no file name"
    pictures: list[tuple[str, str]] = []
    problems: list[str] = []
    try:
        if drawn is None:
            drawn = jpeg(_draw(root, case, channels, labels, row["position"], problems))
        pictures.append((case, data_uri("jpeg", drawn)))
    except (ReadError, GeometryError) as error:
        problems.append(str(error))
    for path in attached:
        if path.suffix == ".png":
            try:
                pictures.append((path.name, data_uri("jpeg", jpeg(_attached_picture(path)))))
            except (OSError, SyntaxError, ValueError):
                problems.append(f"{path.name} cannot be read")
    return pictures, "; ".join(problems)


def _draw(
    root: Path, case: str, channels: Sequence[str], labels: Mapping[str, int], position: str, problems: list[str]
) -> Image.Image:
    images = [root / "imagesTr" / f"{case}_{channel:04d}.nii.gz" for channel in range(len(channels))]
    if not all(image.is_file() for image in images):
        raise ReadError("image absent")
    label = root / "labelsTr" / f"{case}.nii.gz"
    outlined = bool(labels) and label.is_file()
    if labels and not outlined:
        problems.append("no label file")
    return alignment_picture(images, label if outlined else None, channels, position=position)


def _attached_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        if picture.width * picture.height > _MOST_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        small = picture.convert("RGB")
    small.thumbnail((4 * HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    return small


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


def _axes(column: "pd.Series[str]") -> NDArray[np.float64]:
    """Three numbers of each text such as ``96x96x40``; NaN where there is none."""
    axes = column.str.split("x", expand=True).reindex(columns=range(3))
    return axes.apply(pd.to_numeric, errors="coerce").to_numpy(float)


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
    entries = manifest.get(key) or []
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, dict):
            sources = entry.get("sources")
            text = ", ".join(map(str, sources)) if isinstance(sources, list) else ""
            rows.append({"case": str(entry.get("case", "")), "sources": text, "what": str(entry.get("what", ""))})
        else:
            rows.append({"case": "", "sources": "", "what": str(entry)})
    return rows
