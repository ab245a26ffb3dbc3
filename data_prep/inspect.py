"""What lies in a folder of clinical images: its patients, studies and series, and what is wrong with each."""

import csv
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pydicom
from pydicom.dataset import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.identity import identifying_words, mask
from data_prep.progress import progress_bar
from data_prep.thumbnail import thumbnail
from medseg.errors import MedsegError, ReadError
from medseg.io import Series, atomic_path, atomic_write_text, find_series, suv_factor
from medseg.io.text import one_line
from medseg.io.workers import Workers

# Archives name files by SOPInstanceUID: five numbers or more with points between them.
_UID = re.compile(r"\d+(?:\.\d+){4,}")


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
        problems: what is wrong, one line each; empty where the series can be read.
        notes: what reading it will mend or leave out, one line each.
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
    notes: tuple[str, ...]


def masked_identifier(identifier: str) -> str:
    """An identifier with its middle left out, or wholly where so little is left that it could be guessed.

    Example:
        >>> masked_identifier("PHANTOM-001"), masked_identifier("DOE^JOHN"), masked_identifier("17")
        ('PH…01', '…', '…')
    """
    identifier = identifier.strip()
    telling = len(identifier) < 8 or not re.fullmatch(r"[A-Za-z0-9._-]*[0-9][A-Za-z0-9._-]*", identifier)
    return "…" if telling else f"{identifier[:2]}…{identifier[-2:]}"


def inspect_folder(root: Path, *, jobs: int = 1, cache: Path | None = None) -> list[Row]:
    """Look at every image and DICOM object below a folder, from headers alone.

    Args:
        root: a folder or a file; of a DICOMDIR, the files that it names.
        jobs: processes that read.
        cache: where headers are kept for the next time; see `medseg.io.find_series`.

    Returns:
        A row per series, by patient and study.

    Raises:
        ReadError: there is no such folder, or no image in it.
    """
    return _rows(_find(root, jobs, cache), root)[0]


def _find(root: Path, jobs: int, cache: Path | None) -> list[Series]:
    with progress_bar("Reading headers") as show:
        total = sum(len(names) for _, _, names in os.walk(root))
        series = find_series(root, progress=lambda count: show(count, max(total, count)), workers=jobs, cache=cache)
    if not series:
        raise ReadError(f"{root}: no image found; expected DICOM, NIfTI, MHD, NRRD or picture files somewhere below it")
    return series


class _Words:
    """Words that may stand in a text, found without trying each of them.

    Every word is filed under its last letters, six at most.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._by_end: dict[str, list[str]] = {}
        for word in words:
            near = word.casefold()
            if len(word.strip()) > 1:
                self._by_end.setdefault(near[-6:], []).append(word)

    def in_text(self, text: str) -> list[str]:
        """Return the words that stand in a text, be it in other letter case."""
        near = text.casefold()
        pieces = {near[i : i + length] for length in range(1, 7) for i in range(len(near) - length + 1)}
        ends = pieces & self._by_end.keys()
        return sorted(word for end in ends for word in self._by_end[end] if word.casefold() in near)


class _Mask:
    """Makes texts about series fit to be shown.

    Args:
        root: the folder that was searched, which is left out of paths.
        words: what the headers say of who each patient is, by PatientID.
    """

    def __init__(self, root: Path, words: Mapping[str, set[str]]) -> None:
        base = re.escape(one_line(root if root.is_dir() else root.parent))
        self._base = re.compile(rf"(?<![^\s'(]){base}(/|(?=[:\s]|$))")
        self._own = {patient: _Words(own) for patient, own in words.items() if patient}
        # A file without a header of its own may be named after any patient of the folder.
        self._everyone = _Words(set().union(*words.values()))
        self.shown = {patient: masked_identifier(patient) for patient in words}

    def __call__(self, text: str, item: Series) -> str:
        """Return a text on one line, without what tells who the patient is."""
        text = self._base.sub("", one_line(text))
        here = self._own.get(item.patient_id, self._everyone).in_text(text)
        for word in sorted((word for word in here if len(word) > 4 and word in self.shown), key=len, reverse=True):
            text = text.replace(word, self.shown[word])
        return _UID.sub(lambda found: "…" + found[0][-4:], mask(text, {}, here))


def _rows(series: Sequence[Series], root: Path) -> tuple[list[Row], _Mask]:
    words: dict[str, set[str]] = {}
    pet_problems: list[list[str]] = []
    with progress_bar("Reading patients") as show:
        for count, item in enumerate(series, start=1):
            header = _header(item)
            own = words.setdefault(item.patient_id, set())
            own |= {item.patient_id, item.series_uid, item.study_uid, item.frame_of_reference_uid}
            if header is not None:
                own |= identifying_words(header)
            pet_problems.append(_pet_problems(item, header))
            show(count, len(series))
    clean = _Mask(root, words)
    patients: dict[str, int] = {}
    studies: dict[str, int] = {}
    seen: dict[object, int] = {}
    rows = []
    for item, wrong in zip(series, pet_problems, strict=True):
        of_patient = item.kind == "dicom" and bool(item.patient_id or item.study_uid)
        patient = patients.setdefault(item.patient_id or item.study_uid, len(patients) + 1) if of_patient else None
        study = studies.setdefault(item.study_uid, len(studies) + 1) if item.study_uid else None
        problems = dict.fromkeys((*item.problems, *wrong))
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
                clean.shown[item.patient_id] if of_patient and item.patient_id else "",
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
                tuple(clean(note, item) for note in item.notes),
            )
        )
    return rows, clean


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
            "notes": " | ".join(row.notes),
        }
        # A spreadsheet would run a description that starts like a formula.
        writer.writerow([f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" and v else v for v in values.values()])
    return text.getvalue()


def _write_html(
    series: Sequence[Series], rows: Sequence[Row], clean: Callable[[str, Series], str], out: Path, jobs: int
) -> None:
    """Write one page that needs nothing else: a row per series with a picture of its middle slice.

    Pictures are made by worker processes and kept in a temporary file until the page is written, so memory does not
    grow with their number.

    Args:
        series: what was found.
        rows: the same as it may be shown.
        clean: makes a text about a series fit to be shown.
        out: the file.
        jobs: processes that make pictures.
    """
    from medseg.report.page import data_uri, environment

    tasks = [
        (number, (item.kind, item.files[len(item.files) // 2], item.modality))
        for number, item in enumerate(series)
        if item.is_image
    ]
    places: dict[int, tuple[int, int]] = {}
    reasons: dict[int, str] = {}
    with tempfile.TemporaryFile() as pictures:
        with progress_bar("Making pictures") as show, Workers(jobs) as workers:
            for count, (number, made) in enumerate(workers.each(thumbnail, tasks, ahead=jobs), start=1):
                if isinstance(made, bytes):
                    places[number] = pictures.seek(0, os.SEEK_END), len(made)
                    pictures.write(made)
                else:
                    reasons[number] = clean(f"no picture: {made}", series[number])
                show(count, len(tasks))

        def filled() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(rows):
                uri = ""
                if number in places:
                    start, length = places[number]
                    pictures.seek(start)
                    uri = data_uri("jpeg", pictures.read(length))
                yield {"row": row, "picture": uri, "reason": reasons.get(number, "")}

        page = (
            environment()
            .get_template("archive.html")
            .generate(title="Archive", summary=_summary(rows), kinds=_kinds(rows), rows=filled())
        )
        with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for text in page:
                file.write(text)


def _kinds(rows: Iterable[Row]) -> list[tuple[str, int, int, int]]:
    """Modality or kind with its series, files, and series with problems; the most frequent first."""
    counted: dict[str, list[int]] = {}
    for row in rows:
        here = counted.setdefault(row.modality or row.kind, [0, 0, 0])
        here[0] += 1
        here[1] += row.files
        here[2] += bool(row.problems)
    found = [(kind, series, files, broken) for kind, (series, files, broken) in counted.items()]
    return sorted(found, key=lambda item: (-item[1], item[0]))


def show(
    root: Path,
    *,
    form: Literal["table", "json", "csv", "html"] = "table",
    out: Path | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
) -> None:
    """Print what lies below a folder, or write it to a file.

    Args:
        root: the folder.
        form: what to print.
        out: write JSON, CSV or HTML to this file instead of printing it; HTML needs it.
        jobs: processes that read; by default one per core.
        cache: where headers are kept for the next time.

    Raises:
        ReadError: there is no such folder, or no image in it.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    series = _find(root, jobs, cache)
    rows, clean = _rows(series, root)
    if form == "html" and out is not None:
        _write_html(series, rows, clean, out, jobs)
        return
    if form == "table":
        console = Console()
        if not console.is_terminal:
            console = Console(width=180)
        console.print(as_table(rows))
        for row in rows:
            place = f"patient {row.patient}, study {row.study}" if row.patient else row.folder
            for text in (*row.problems, *(f"note: {note}" for note in row.notes)):
                console.print(Text(f"{place}, {row.modality or row.kind}: {text}"), soft_wrap=True)
        return
    text = as_json(rows) if form == "json" else as_csv(rows)
    if out is not None:
        atomic_write_text(out, text)
    else:
        print(text, end="")
