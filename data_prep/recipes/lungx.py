"""LUNGx (SPIE-AAPM-NCI Lung Nodule Classification Challenge): a crop of the CT slice around each nodule."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Origin, Plan, Recipe, Sample, Selection, Unpaired, option
from data_prep.recipes.checking import instance_numbers, unreadable
from medseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import pandas as pd

    from medseg.io import Series

#: Part of the slice's width and height that the last crop has: 85 of 512 pixels.
FRACTION = 1 / 6
#: CT where there is nothing, in HU.
AIR = -1024.0
#: Center 600 below water, width 1500: the window in which lungs are read.
LUNG = (-1350.0, 150.0)
#: What a diagnosis means, by its first words.
_DIAGNOSES = {
    "benign": "benign",
    "malignant": "malignant",
    "primary lung cancer": "malignant",
    "suspicious": "suspicious",
}
#: Names of the columns, in lower case without footnote marks, in the layouts that go round.
_COLUMNS = {
    "scan": ("scan number", "pid"),
    "nodule": ("nodule number",),
    "xy": ("nodule center x,y position",),
    "x": ("nodule center x position", "nodule_x", "x"),
    "y": ("nodule center y position", "nodule_y", "y"),
    "image": ("nodule center image", "nodule_z", "z"),
    "diagnosis": ("final diagnosis", "diagnosis"),
    "number": ("malignancy", "diag_bin"),
}


@dataclass(frozen=True)
class LungXOptions:
    """Options of the recipe ``lungx``."""

    enlarge: float = option(
        "--enlarge", 1.5, "How much larger than the last crop (1/6 of the slice) a crop is, so that it can be rotated."
    )

    def __post_init__(self) -> None:
        if not 1 <= self.enlarge <= 6:
            raise ConfigError(f"--enlarge: {self.enlarge:g} given, 1 to 6 expected")


@dataclass(frozen=True)
class Nodule:
    """A row of a spreadsheet.

    Attributes:
        scan: name of the scan, in capital letters.
        number: of the nodule in the scan, from 1.
        x, y: pixel, from 1; x counts columns to the right and y rows downward.
        image: InstanceNumber of the slice, from 1.
        diagnosis: ``benign``, ``malignant`` or ``suspicious``.
    """

    scan: str
    number: int
    x: int
    y: int
    image: int
    diagnosis: str


class LungXRecipe(Recipe):
    """A case is a nodule: the slice that the spreadsheets name, cropped around the pixel that they name, in HU.

    All spreadsheets (``.xlsx``, ``.csv``) of the source that have the columns are read, whatever their layout: x and y
    in two columns or in one cell, footnotes below, the diagnosis in words or as a number. A nodule in several of them
    must be the same in all. Positions count from (1, 1), as the spreadsheets' footnote says. "Suspicious malignant
    nodule" is neither class: such nodules are left out, and named.

    A scan is the CT series whose PatientID is the spreadsheet's scan number (capital or small letters), its slice the
    one with the InstanceNumber. HU are kept: a z-score over the whole dataset would carry the test cases' statistics
    into training, and belongs to the training part of a fold (``medseg.data``).
    """

    name = "lungx"
    summary = "LUNGx: a CT crop around each nodule, benign or malignant."
    needs = "the nodule spreadsheets and the DICOM files"
    makes = "classification"
    Options = LungXOptions
    public = True
    origin = Origin(
        "https://doi.org/10.7937/K9/TCIA.2015.UZLSU3FL",
        "CC BY 3.0",
        "Armato SG, Hadjiiski L, Tourassi GD, et al. SPIE-AAPM-NCI Lung Nodule Classification Challenge Dataset. "
        "The Cancer Imaging Archive, 2015.",
        by_hand="download the images with TCIA's data retriever, and the two spreadsheets of nodules",
    )

    def select(self, source: Path) -> Selection:
        """Read the spreadsheets, and find the slice of each nodule."""
        from medseg.io import find_series
        from medseg.io.series import walk

        rows: dict[tuple[str, int], list[Nodule]] = defaultdict(list)
        unpaired, sheets = [], 0
        for path in walk(source):
            if path.suffix.lower() not in (".xlsx", ".xls", ".csv"):
                continue
            nodules, left = read_sheet(path)
            sheets += bool(nodules)
            for nodule in nodules:
                rows[nodule.scan, nodule.number].append(nodule)
            unpaired += [Unpaired((path,), why) for why in left]
        if not rows:
            looked_at = "".join(f"; {item.files[0]}: {item.why}" for item in unpaired[:3])
            raise DatasetError(
                f"{source}: no spreadsheet (.xlsx, .csv) with the nodules' scan, x, y, image and diagnosis{looked_at}"
            )
        found = find_series(source, workers=self.jobs, progress=self.progress)
        scans: dict[str, list[Series]] = defaultdict(list)
        for series in found:
            if series.kind == "dicom" and series.is_image and series.modality == "CT":
                scans[series.patient_id.strip().upper()].append(series)
        cases = []
        for (scan, _), same in sorted(rows.items()):
            if {nodule.diagnosis for nodule in same} == {"suspicious"}:
                continue
            cases.append(_case(same, scans.get(scan, [])))
        counts = Counter(same[0].diagnosis for same in rows.values())
        listed = ", ".join(f"{counts[name]} {name}" for name in ("malignant", "benign", "suspicious"))
        named = {scan for scan, _ in rows}
        notes = [f"{len(rows)} nodules of {len(named)} scans in {sheets} spreadsheet(s): {listed}"]
        if others := len(set(scans) - named):
            notes.append(f"{others} patient(s) with CT have no nodule in the spreadsheets")
        return Selection(cases, [*unpaired, *unreadable(found)], notes)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """One channel, two classes."""
        return Plan(("CT",), classes={"benign": 0, "malignant": 1})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read the slice and crop it."""
        import numpy as np

        from data_prep.position_picture import Panel, position_picture
        from data_prep.recipes.reading import as_volume
        from medseg.io import read_series
        from medseg.transforms import CropFraction

        nodule: Nodule = case.detail
        image = as_volume(read_series(case.sources["CT"]))
        part = min(1.0, self.options.enlarge * FRACTION)
        pixel = (nodule.x - 1, nodule.y - 1)
        crop = CropFraction((part, part), fill=AIR)(image, pixel)
        position = [float(value) for value in np.asarray(image.affine) @ [*pixel, 0, 1]][:3]
        columns = {
            "lesion": str(nodule.number),
            "position": " ".join(f"{value:.10g}" for value in position),
            "instance": str(nodule.image),
            "pixel": f"{nodule.x} {nodule.y}",
            "outside": f"{crop.meta['outside']:.4g}",
        }
        picture = position_picture([Panel(image, crop, 0, LUNG)], position)
        return Sample(crop, None, columns, nodule.diagnosis, {"position.png": picture})

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Tell which crops were padded."""
        padded = sum(float(row.get("outside") or 0) > 0 for row in columns.values())
        return [f"{padded} crop(s) reach beyond the slice (column outside); {AIR:g} HU stands there"] * bool(padded)


def read_sheet(path: Path) -> tuple[list[Nodule], list[str]]:
    """Read a spreadsheet of nodules in any of the layouts that go round.

    Args:
        path: ``.xlsx`` or ``.csv``.

    Returns:
        the nodules; and a line per row that is left out, by its number, or why there is no nodule.

    Raises:
        DatasetError: a row that cannot be understood.
    """
    import pandas as pd

    as_text: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}
    if path.suffix.lower() == ".xls":
        return [], ["a spreadsheet of old Excel, which is not read: save it as .xlsx or .csv"]
    try:
        if path.suffix.lower() == ".csv":
            tables = {"": pd.read_csv(path, skip_blank_lines=False, encoding="utf-8-sig", **as_text)}
        else:
            with warnings.catch_warnings(action="ignore"):  # of extensions that openpyxl passes over
                tables = pd.read_excel(path, sheet_name=None, **as_text)
    except ImportError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # pandas and openpyxl raise many kinds on files that are no spreadsheets
        return [], [f"not a spreadsheet ({type(error).__name__})"]
    nodules: list[Nodule] = []
    left: list[str] = []
    for table in tables.values():
        _read_table(path, table.fillna(""), nodules, left)
    return nodules, left if nodules else ["no nodule in it: expected their scan, x, y and image in the first row"]


def _read_table(path: Path, table: "pd.DataFrame", nodules: list[Nodule], left: list[str]) -> None:
    """Add the nodules of a table, and the rows that are left out."""
    if not len(table):
        return
    titles = [re.sub(r"[\s*]+", " ", str(title)).strip().lower() for title in table.iloc[0]]
    places = {what: titles.index(name) for what, names in _COLUMNS.items() for name in names if name in titles}
    if not {"scan", "image"} <= set(places) or not ("xy" in places or {"x", "y"} <= set(places)):
        return
    counted: Counter[str] = Counter()
    for line, values in enumerate(table.iloc[1:].itertuples(index=False), 2):
        cells = {what: str(values[place]).strip() for what, place in places.items()}
        position = cells["xy"] if "xy" in cells else f"{cells['x']},{cells['y']}"
        if not any(text for what, text in cells.items() if what != "scan"):
            continue  # an empty row, or a footnote
        scan = cells["scan"].upper()
        counted[scan] += 1
        x, _, y = position.partition(",")
        try:
            place = _whole(x), _whole(y), _whole(cells["image"])
            number = _whole(cells["nodule"]) if cells.get("nodule") else counted[scan]
        except (ValueError, OverflowError):
            raise DatasetError(
                f"{path}: row {line}: position {position!r} on image {cells['image']!r}: whole numbers expected"
            ) from None
        if not scan:
            raise DatasetError(f"{path}: row {line}: a nodule without scan: each row must name its scan")
        diagnosis = _diagnosis(cells.get("diagnosis", ""), cells.get("number", ""))
        if not diagnosis:
            raise DatasetError(
                f"{path}: row {line}: diagnosis {cells.get('diagnosis', '')!r}: benign, malignant, Primary lung cancer "
                "or Suspicious malignant nodule expected"
            )
        if diagnosis == "suspicious":
            left.append(f"row {line}: {cells.get('diagnosis') or cells['number']}: neither class, left out")
        nodules.append(Nodule(scan, number, *place, diagnosis))


def _diagnosis(words: str, number: str) -> str:
    """``benign``, ``malignant``, ``suspicious``, or nothing; the number stands where the words are left out."""
    if words:
        return next((kind for start, kind in _DIAGNOSES.items() if words.lower().startswith(start)), "")
    try:
        return {0.0: "benign", 1.0: "malignant"}.get(float(number), "suspicious" if 0 < float(number) < 1 else "")
    except ValueError:
        return ""


def _whole(text: str) -> int:
    value = float(text)
    if value != int(value):
        raise ValueError(text)
    return int(value)


def _case(rows: Sequence[Nodule], series: "Sequence[Series]") -> Case:
    """The case of a nodule, or the reason why there is none."""
    nodule = rows[0]
    patient = series[0].patient_id.strip() if series else nodule.scan
    name = f"{patient}_{nodule.number}"
    different = sorted({f"({row.x}, {row.y}) on image {row.image}, {row.diagnosis}" for row in rows})
    if len(different) > 1:
        return Case(name, patient, {}, f"the spreadsheets disagree: {' or '.join(different)}; leave the right one")
    if not series:
        return Case(name, patient, {}, "no CT of this scan (PatientID) in the source")
    found, ranges, problems = [], [], []
    for one in series:
        if one.problems:
            problems.append("; ".join(one.problems))
            continue
        numbers = instance_numbers(one.files)
        places = [place for place, number in enumerate(numbers) if number == nodule.image]
        known = [number for number in numbers if number is not None]
        ranges.append(f"{min(known)} to {max(known)} in {len(numbers)} files" if known else "absent")
        if len(places) == 1 and places[0] not in (nodule.image - 1, len(numbers) - nodule.image):
            problems.append(
                f"image {nodule.image} is slice {places[0] + 1} of {len(numbers)} by its position: InstanceNumber "
                "counts neither from the one end nor from the other; are slices missing?"
            )
        elif len(places) == 1:
            found.append(one.files[places[0]])
        elif places:
            problems.append(f"{len(places)} files have InstanceNumber {nodule.image}")
    if problems or len(found) > 1:
        why = "; ".join(problems) or f"{len(found)} CT series have an image {nodule.image}: leave one in the source"
        return Case(name, patient, {}, why)
    if not found:
        return Case(name, patient, {}, f"no image {nodule.image}: InstanceNumber is {' and '.join(ranges)}")
    return Case(name, patient, {"CT": (found[0],)}, "", nodule)
