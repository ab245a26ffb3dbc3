"""What lies in a folder of clinical images: its patients, studies and series, and what is wrong with each."""

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pydicom
from pydicom.dataset import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.identity import identifying_words, mask
from data_prep.progress import progress_bar
from medseg.errors import MedsegError, ReadError
from medseg.io import Series, atomic_write_text, find_series, suv_factor


@dataclass(frozen=True)
class Row:
    """One series as it may be shown: no identifier in it.

    Attributes:
        patient: running number among the patients found, from 1; None where the format knows no patients.
        identifier: PatientID with its middle left out.
        study: running number among the studies found, from 1.
        series: SeriesNumber.
        kind: ``"dicom"``, ``"nifti"``, ``"mhd"``, ``"nrrd"`` or ``"picture"``.
        modality: DICOM modality.
        description: SeriesDescription, or the name of the file.
        size: voxels along X, Y and Z.
        spacing: in mm.
        files: how many files.
        folder: where the first file lies, relative to the folder that was searched.
        problems: what is wrong, one line each.
    """

    patient: int | None
    identifier: str
    study: int | None
    series: int | None
    kind: str
    modality: str
    description: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    files: int
    folder: str
    problems: tuple[str, ...]


def masked_identifier(identifier: str) -> str:
    """An identifier with its middle left out, or wholly where so little is left that it could be guessed.

    Example:
        >>> masked_identifier("PHANTOM-001"), masked_identifier("DOE^JOHN"), masked_identifier("17")
        ('PH…01', '…', '…')
    """
    identifier = identifier.strip()
    telling = len(identifier) < 8 or not re.fullmatch(r"[A-Za-z0-9._-]*[0-9][A-Za-z0-9._-]*", identifier)
    return "…" if telling else f"{identifier[:2]}…{identifier[-2:]}"


def inspect_folder(root: Path) -> list[Row]:
    """Look at every image and DICOM object below a folder, from headers alone.

    Args:
        root: a folder or a file.

    Returns:
        A row per series, by patient and study.

    Raises:
        ReadError: there is no such folder, or no image in it.
    """
    total = sum(len(names) for _, _, names in os.walk(root))
    with progress_bar("Reading headers") as show:
        series = find_series(root, progress=lambda count: show(count, max(total, count)))
    if not series:
        raise ReadError(f"{root}: no image found; expected DICOM, NIfTI, MHD, NRRD or picture files somewhere below it")
    return _rows(series, root)


def _rows(series: Sequence[Series], root: Path) -> list[Row]:
    headers = [_header(item) for item in series]
    words: dict[str, set[str]] = {}
    for item, header in zip(series, headers, strict=True):
        own = words.setdefault(item.patient_id, set())
        own |= {item.patient_id, item.series_uid, item.study_uid, item.frame_of_reference_uid}
        if header is not None:
            own |= identifying_words(header)
    everyone = set().union(*words.values())
    shown = {item.patient_id: masked_identifier(item.patient_id) for item in series}

    def clean(text: str, item: Series) -> str:
        text = re.sub(rf"(?<![^\s'(]){re.escape(str(root))}(/|(?=[:\s]|$))", "", text)
        near = text.casefold()
        # A file without a header of its own may be named after any patient of the folder.
        of_whom = words[item.patient_id] if item.patient_id else everyone
        here = [word for word in of_whom if len(word.strip()) > 1 and word.casefold() in near]
        for word in sorted((word for word in here if len(word) > 4 and word in shown), key=len, reverse=True):
            text = text.replace(word, shown[word])
        return mask(text, {}, here)

    patients: dict[str, int] = {}
    studies: dict[str, int] = {}
    seen: dict[object, int] = {}
    rows = []
    for item, header in zip(series, headers, strict=True):
        of_patient = item.kind == "dicom" and bool(item.patient_id or item.study_uid)
        patient = patients.setdefault(item.patient_id or item.study_uid, len(patients) + 1) if of_patient else None
        study = studies.setdefault(item.study_uid, len(studies) + 1) if item.study_uid else None
        problems = dict.fromkeys((*item.problems, *_pet_problems(item, header)))
        copies = []
        if item.affine is not None and study is not None:
            same = (
                item.patient_id,
                item.study_date,
                item.modality,
                item.description,
                item.shape,
                item.affine.tobytes(),
            )
            first = seen.setdefault(same, study)
            if first != study:
                copies.append(f"a copy of study {first}? Same patient, day, modality, description and grid")
        rows.append(
            Row(
                patient,
                shown[item.patient_id] if of_patient and item.patient_id else "",
                study,
                item.number,
                item.kind,
                clean(item.modality, item),
                clean(item.description, item),
                item.shape,
                tuple(round(value, 4) for value in item.spacing),
                item.n_files,
                clean(str(item.files[0].parent), item) or ".",
                tuple(clean(problem, item) for problem in problems) + tuple(copies),
            )
        )
    return rows


def _header(series: Series) -> Dataset | None:
    """The header of one file of a DICOM series; find_series has told already what is wrong with a damaged one."""
    if series.kind != "dicom":
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            return pydicom.dcmread(series.files[0], stop_before_pixels=True)
    except Exception:  # pydicom raises many kinds on damaged files
        return None


def _pet_problems(series: Series, header: Dataset | None) -> list[str]:
    """What keeps a PET from being read in SUV."""
    if header is None or series.modality != "PT" or not series.is_image:
        return []
    try:
        suv_factor(header, name=str(series.files[0]))
    except MedsegError as error:
        return [] if str(error) in series.problems else [str(error)]
    return []


def as_table(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(caption=_summary(rows), caption_justify="left", header_style="bold")
    for name in (
        "patient",
        "study",
        "series",
        "modality",
        "description",
        "size",
        "spacing (mm)",
        "files",
        "folder",
        "",
    ):
        table.add_column(name, justify="right" if name in ("study", "series", "files") else "left", overflow="fold")
    before: tuple[int | None, int | None] = (None, None)
    for row in rows:
        new_patient, new_study = row.patient != before[0], row.study != before[1]
        who = f"{row.patient} {row.identifier}".strip() if row.patient and new_patient else ""
        if new_patient and before != (None, None):
            table.add_section()
        table.add_row(
            *(
                Text(value)
                for value in (
                    who,
                    str(row.study) if row.study and (new_patient or new_study) else "",
                    "" if row.series is None else str(row.series),
                    row.modality or row.kind,
                    row.description,
                    "×".join(map(str, row.size)),
                    " × ".join(f"{value:.3g}" for value in row.spacing),
                    str(row.files),
                    row.folder,
                )
            ),
            Text(f"{len(row.problems)} !", "bold red") if row.problems else Text("ok", "green"),
        )
        before = (row.patient, row.study)
    return table


def _summary(rows: Iterable[Row]) -> str:
    rows = list(rows)
    patients = len({row.patient for row in rows if row.patient})
    studies = len({row.study for row in rows if row.study})
    bad = sum(bool(row.problems) for row in rows)

    def count(number: int, one: str, many: str) -> str:
        return f"{number} {one if number == 1 else many}"

    return (
        f"{count(patients, 'patient', 'patients')}, {count(studies, 'study', 'studies')}, {len(rows)} series; "
        f"{count(bad, 'series has', 'series have')} problems"
    )


def as_json(rows: Sequence[Row]) -> str:
    """The rows as JSON: the number of patients and of studies, and the series."""
    content = {
        "patients": len({row.patient for row in rows if row.patient}),
        "studies": len({row.study for row in rows if row.study}),
        "series": [asdict(row) for row in rows],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, with sizes as ``96x96x40`` and problems separated by `` | ``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    for row in rows:
        values = asdict(row) | {
            "size": "x".join(map(str, row.size)),
            "spacing": "x".join(f"{value:g}" for value in row.spacing),
            "problems": " | ".join(row.problems),
        }
        # A spreadsheet would run a description that starts like a formula.
        writer.writerow([f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" and v else v for v in values.values()])
    return text.getvalue()


def show(root: Path, *, form: Literal["table", "json", "csv"] = "table", out: Path | None = None) -> None:
    """Print what lies below a folder, or write it to a file.

    Args:
        root: the folder.
        form: what to print.
        out: write JSON or CSV to this file instead of printing it.

    Raises:
        ReadError: there is no such folder, or no image in it.
    """
    rows = inspect_folder(root)
    if form == "table":
        console = Console()
        if not console.is_terminal:
            console = Console(width=180)
        console.print(as_table(rows))
        for row in rows:
            for problem in row.problems:
                place = f"patient {row.patient}, study {row.study}" if row.patient else row.folder
                console.print(Text(f"{place}, {row.modality or row.kind}: {problem}"), soft_wrap=True)
        return
    text = as_json(rows) if form == "json" else as_csv(rows)
    if out is not None:
        atomic_write_text(out, text)
    else:
        print(text, end="")
