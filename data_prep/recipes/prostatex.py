"""PROSTATEx: a patch around each finding on T2, diffusion of the highest b-value and ADC, with its significance."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Origin, Plan, Recipe, Sample, Selection, option
from data_prep.recipes.checking import check_millimeters, instance_numbers, read_table, unreadable
from medseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from medseg.io import Series

FINDINGS = "ProstateX-Findings-Train.csv"
IMAGES = "ProstateX-Images-Train.csv"
#: Sequence -> what its description (DCMSerDescr) must hold.
SEQUENCES = {"T2": ("t2", "tra"), "DWI": ("BVAL",), "ADC": ("ADC",)}
CLASSES = {"FALSE": "insignificant", "TRUE": "significant"}
#: Voxels by which `ijk` may miss the rounded position.
_TOLERANCE = 0.02
_PREFIX = re.compile(r"(\d+)(?:\.0+)?-")


@dataclass(frozen=True)
class ProstateXOptions:
    """Options of the recipe ``prostatex``."""

    pixels: int = option("--pixels", 201, "Side of the patches in pixels; odd, so that the finding is the center.")
    spacing: float = option("--spacing", 0.5, "Spacing of the patches in mm, that of most T2 series.")
    z_score: bool = option(
        "--z-score/--no-z-score", True, "Subtract mean and divide by deviation of the patient's whole series."
    )

    def __post_init__(self) -> None:
        if self.pixels < 1 or self.pixels % 2 == 0:
            raise ConfigError(f"--pixels: {self.pixels} given, an odd number expected")
        check_millimeters("--spacing", (self.spacing,))


@dataclass(frozen=True)
class Finding:
    """What the CSVs and the headers say of one finding.

    Attributes:
        position: RAS mm.
        target: its class.
        columns: what cases.csv says of it.
        disagreements: where sources contradict each other.
    """

    position: tuple[float, float, float]
    target: str
    columns: Mapping[str, str]
    disagreements: tuple[str, ...]


class ProstateXRecipe(Recipe):
    """A case is a finding: patches of equal physical size on T2, DWI (calculated, highest b-value) and ADC.

    The two tables are joined on ProxID, fid and pos. Of the series that the table of images names for a finding, those
    of the patient (PatientID) and the number (SeriesNumber in the header) that contain ``pos`` are candidates; the
    three must be of one study. Of several, those are taken whose slices lie nearest to ``pos``, then those acquired
    nearest to each other.

    ``pos`` is in the patient's coordinates (DICOM, LPS mm). The slice is the one nearest to it by the geometry of the
    headers. ``ijk`` is only compared: it is the position in voxels from the corner of the volume, rounded, and so the
    index from 0 or the one after it, with even chances (the thesis says 0-based).

    The column ``patient_class`` is the class of a patient: significant where one of the findings is. A patient may have
    findings of both classes, and a split is stratified by patient.

    Patches are cut by :class:`medseg.transforms.LesionPatch` along the T2's axes. Each series is z-scored over all its
    voxels first, which depends on that patient alone.
    """

    name = "prostatex"
    summary = "PROSTATEx: T2, DWI and ADC patches around each finding, clinically significant or not."
    needs = f"{FINDINGS}, {IMAGES} and the DICOM files"
    makes = "classification"
    Options = ProstateXOptions
    public = True
    origin = Origin(
        "https://doi.org/10.7937/K9TCIA.2017.MURS5CL",
        "CC BY 3.0",
        "Litjens G, Debats O, Barentsz J, Karssemeijer N, Huisman H. SPIE-AAPM PROSTATEx Challenge Data. "
        "The Cancer Imaging Archive, 2017.",
        by_hand="download the images with TCIA's data retriever, and the lesion information (two CSV files)",
    )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._n_findings = 0

    def select(self, source: Path) -> Selection:
        """Join the tables, and find the three series of each finding."""
        from medseg.io import find_series

        findings = _table(source, FINDINGS, ("ProxID", "fid", "pos", "zone", "ClinSig"))
        images = _table(source, IMAGES, ("ProxID", "fid", "pos", "ijk", "DCMSerDescr", "DCMSerNum"))
        rows: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
        for row in images:
            rows[_key(row)].append(row)
        found = find_series(source, workers=self.jobs, progress=self.progress)
        patients: dict[str, list[Series]] = defaultdict(list)
        for series in found:
            if series.kind == "dicom" and series.is_image:
                patients[series.patient_id].append(series)
        answers: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        for row in findings:
            answers[_key(row)].add(row["ClinSig"].upper())
        affected = {row["ProxID"] for row in findings if row["ClinSig"].upper() == "TRUE"}
        seen: set[tuple[str, str, str]] = set()
        names: Counter[tuple[str, str]] = Counter()
        cases = []
        for row in findings:
            patient, lesion, _ = key = _key(row)
            names[patient, lesion] += 1
            n = names[patient, lesion]
            name = f"{patient}_{lesion}" if n == 1 else f"{patient}_{lesion}-{n}"
            if len(answers[key]) > 1:
                both = " and ".join(sorted(answers[key], reverse=True))
                cases.append(Case(name, patient, {}, f"the table of findings lists it with both {both}"))
            elif key in seen:
                cases.append(Case(name, patient, {}, "the table of findings lists it again"))
            else:
                target = CLASSES["TRUE" if patient in affected else "FALSE"]
                cases.append(_case(name, row, rows.get(key, []), patients.get(patient, []), target))
            seen.add(key)
        self._n_findings = len(findings)
        listed = {row["ProxID"] for row in findings}
        joined, again = sum(key in rows for key in seen), sum(n - 1 for n in names.values())
        notes = [
            f"{len(findings)} findings of {len(listed)} patients, {joined} of them joined with the {len(images)} rows "
            "of images on ProxID, fid and pos",
        ]
        for count, what in (
            (again, "fid(s) occur twice in a patient: the second case is called PATIENT_FID-2"),
            (len(set(rows) - seen), "finding(s) stand in the table of images only"),
            (len(set(patients) - listed), "patient(s) with DICOM images have no finding"),
        ):
            if count:
                notes.append(f"{count} {what}")
        return Selection(cases, unreadable(found), notes)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Three channels, two classes."""
        return Plan(tuple(SEQUENCES), classes={name: number for number, name in enumerate(CLASSES.values())})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read the series, z-score them, cut the patches."""
        import torch
        from monai.data import MetaTensor

        from data_prep.position_picture import Panel, position_picture
        from medseg.io import read_series
        from medseg.transforms import LesionPatch

        finding: Finding = case.detail
        cut = LesionPatch(self.options.pixels, self.options.spacing)
        columns, disagreements = dict(finding.columns), list(finding.disagreements)
        patches: list[MetaTensor] = []
        panels = []
        for sequence, files in case.sources.items():
            image = read_series(files)
            if len(image) != 1:
                raise DatasetError(f"{sequence}: series of {len(image)} volumes found, one expected")
            scaled = _z_scored(image, sequence) if self.options.z_score else image
            patch = cut(scaled, finding.position, like=patches[0] if patches else None)
            k = patch.meta["slice_index"]
            (number,) = instance_numbers(files[k : k + 1])
            if number not in (k + 1, image.shape[3] - k):
                disagreements.append(
                    f"{sequence}: the slice has InstanceNumber {number}, it is number {k + 1} upward and "
                    f"{image.shape[3] - k} downward"
                )
            columns[f"instance_{sequence}"] = str(number)
            columns[f"outside_{sequence}"] = f"{patch.meta['outside']:.4g}"
            patches.append(patch)
            panels.append(Panel(image, patch, k))
        columns["disagreements"] = "; ".join(disagreements)
        stacked = MetaTensor(torch.cat([patch.as_tensor() for patch in patches]), affine=patches[0].affine)
        picture = position_picture(panels, finding.position)
        return Sample(stacked, None, columns, finding.target, {"position.png": picture})

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Count: exported + errors = findings; and tell of contradictions, repeats and padding."""
        exported = len(columns)
        notes = [f"{exported} exported + {self._n_findings - exported} errors = {self._n_findings} findings"]
        rows = list(columns.values())
        for column, what in (
            ("disagreements", "the sources contradict each other"),
            ("alternatives", "further series (repeats or visits) would have done as well"),
        ):
            found = sum(bool(row.get(column)) for row in rows)
            if found:
                notes.append(f"{found} finding(s) of which {what} (column {column})")
        wrong = {name: sum(_off_by_thesis(row, name) for row in rows) for name in SEQUENCES}
        if any(wrong.values()):
            listed = ", ".join(f"{n} of {exported} on {name}" for name, n in wrong.items())
            notes.append(f"InstanceNumber = k of ijk + 1 (as in the thesis) would have taken another slice: {listed}")
        padded = sum(any(float(row.get(f"outside_{name}") or 0) > 0 for name in SEQUENCES) for row in rows)
        if padded:
            notes.append(f"{padded} patch(es) reach beyond an image (columns outside_*): 0 stands there")
        return notes


@dataclass(frozen=True)
class _Candidate:
    """A series that contains a finding."""

    series: "Series"
    off_plane: float
    ijk: str
    disagreements: tuple[str, ...]


def _case(
    name: str, row: dict[str, str], images: Sequence[dict[str, str]], there: "Sequence[Series]", patient_class: str
) -> Case:
    """The case of a finding, or the reason why there is none."""
    patient, significant = row["ProxID"], row["ClinSig"].upper()
    position = _position(row["pos"])
    if significant not in CLASSES:
        return Case(name, patient, {}, f"ClinSig {row['ClinSig']!r}: TRUE or FALSE expected")
    if position is None:
        return Case(name, patient, {}, f"pos {row['pos']!r}: three numbers expected")
    if not images:
        return Case(name, patient, {}, "the table of images has no row with its ProxID, fid and pos")
    if not there:
        return Case(name, patient, {}, "no DICOM of this patient (PatientID) in the source")
    candidates: dict[str, list[_Candidate]] = {}
    problems = []
    for sequence, words in SEQUENCES.items():
        own = [image for image in images if all(word in image["DCMSerDescr"] for word in words)]
        candidates[sequence], reasons = _candidates(sequence, own, there, position)
        if not candidates[sequence]:
            problems.append(f"{sequence}: {'; '.join(reasons)}")
    if problems:
        return Case(name, patient, {}, "; ".join(problems))
    trios = [trio for trio in product(*candidates.values()) if len({one.series.study_uid for one in trio}) == 1]
    if not trios:
        return Case(name, patient, {}, "T2, DWI and ADC that contain it are of different studies")
    best = min(trios, key=_preference)
    disagreements = [text for candidate in best for text in candidate.disagreements]
    if len({candidate.series.frame_of_reference_uid for candidate in best}) > 1:
        disagreements.append("T2, DWI and ADC have different frames of reference")
    columns = {"lesion": row["fid"], "position": " ".join(f"{value:.10g}" for value in position), "zone": row["zone"]}
    columns["patient_class"] = patient_class
    others = []
    for (sequence, found), taken in zip(candidates.items(), best, strict=True):
        columns[f"series_{sequence}"] = str(taken.series.number)
        columns[f"ijk_{sequence}"] = taken.ijk
        columns[f"off_plane_mm_{sequence}"] = f"{taken.off_plane:.3g}"
        rest = sorted(one.series.number or 0 for one in found if one is not taken)
        if rest:
            others.append(f"{sequence}: {', '.join(map(str, rest))}")
    columns["alternatives"] = "; ".join(others)
    sources = {sequence: one.series.files for sequence, one in zip(SEQUENCES, best, strict=True)}
    return Case(name, patient, sources, "", Finding(position, CLASSES[significant], columns, tuple(disagreements)))


def _candidates(
    sequence: str,
    images: Sequence[dict[str, str]],
    there: "Sequence[Series]",
    position: tuple[float, float, float],
) -> tuple[list[_Candidate], list[str]]:
    """The series of one sequence that contain a finding, and why others do not."""
    found, reasons = [], []
    for number in sorted({image["DCMSerNum"] for image in images}):
        rows = [image for image in images if image["DCMSerNum"] == number]
        same = [series for series in there if str(series.number) == number]
        if not same:
            reasons.append(f"series {number} is missing")
        for series in same:
            if series.problems:
                reasons.append(f"series {number}: {'; '.join(series.problems)}")
                continue
            index = _index(series, position)
            if index is None or any(not -0.5 <= at <= n - 0.5 for at, n in zip(index, series.shape, strict=True)):
                place = "no geometry" if index is None else " ".join(f"{at:.3g}" for at in index)
                size = "x".join(map(str, series.shape))
                reasons.append(f"series {number}: pos lies outside (index {place} of {size})")
                continue
            off_plane = abs(index[2] - round(index[2])) * series.spacing[2]
            ijk, fits = _nearest_ijk(rows, index)
            texts = _disagreements(sequence, series, rows)
            if not fits:
                expected = " ".join(f"{at + 0.5:.2f}" for at in index)
                texts.append(f"{sequence}: ijk {ijk}, pos gives {expected} from the corner, before rounding")
            found.append(_Candidate(series, off_plane, ijk, tuple(texts)))
    if not images:
        reasons.append(f"the table of images names no series with {' and '.join(SEQUENCES[sequence])}")
    return found, reasons


def _nearest_ijk(rows: Sequence[dict[str, str]], index: tuple[float, ...]) -> tuple[str, bool]:
    """The ``ijk`` of the rows (several visits may share a number) nearest to a position, and whether it fits."""

    def distance(ijk: str) -> float:
        try:
            given = [float(word) for word in ijk.split()]
            return max(abs(at + 0.5 - n) for at, n in zip(index, given, strict=True))
        except ValueError:
            return float("inf")

    ijk = min((row["ijk"] for row in rows), key=distance)
    return ijk, distance(ijk) <= 0.5 + _TOLERANCE


def _disagreements(sequence: str, series: "Series", rows: Sequence[dict[str, str]]) -> list[str]:
    """Where the folder's name, the header and the table of images say different things of a series."""
    texts = []
    match = _PREFIX.match(series.files[0].parent.name)
    if match and int(match[1]) != series.number:
        texts.append(f"{sequence}: the folder's prefix is {match[1]}, SeriesNumber in the header {series.number}")
    described = sorted({row["DCMSerDescr"] for row in rows})
    if series.description not in described:
        texts.append(f"{sequence}: the header calls it {series.description}, the table {' or '.join(described)}")
    return texts


def _preference(trio: "tuple[_Candidate, ...]") -> tuple[float, int, list[int]]:
    """Slices near the finding first, then series acquired near each other."""
    numbers = [candidate.series.number or 0 for candidate in trio]
    return round(sum(candidate.off_plane for candidate in trio), 1), max(numbers) - min(numbers), numbers


def _table(source: Path, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that lies somewhere in the source."""
    from medseg.io.series import walk

    found = [path for path in walk(source) if path.name == name]
    if len(found) != 1:
        places = ", ".join(str(path.relative_to(source)) for path in found)
        raise DatasetError(f"{source}: {len(found)} files {name} in it{f' ({places})' * bool(found)}, one expected")
    try:
        return read_table(found[0], columns)
    except DatasetError as error:
        hint = "; the challenge's test set has none, and no recipe" if "'ClinSig'" in str(error) else ""
        raise DatasetError(f"{error}{hint}") from None


def _key(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["ProxID"], row["fid"], " ".join(row["pos"].split())


def _position(text: str) -> tuple[float, float, float] | None:
    """RAS mm of a position in LPS mm."""
    try:
        x, y, z = (float(word) for word in text.split())
    except ValueError:
        return None
    return (-x, -y, z) if math.isfinite(x + y + z) else None


def _index(series: "Series", position: tuple[float, float, float]) -> tuple[float, ...] | None:
    import numpy as np

    if series.affine is None or len(series.shape) != 3:
        return None
    return tuple(float(at) for at in (np.linalg.inv(series.affine) @ [*position, 1.0])[:3])


def _z_scored(image: "MetaTensor", sequence: str) -> "MetaTensor":
    """All voxels of the series to mean 0 and standard deviation 1."""
    import numpy as np
    import torch
    from monai.data import MetaTensor

    voxels = np.asarray(image, dtype=np.float64)
    deviation = voxels.std()
    if not deviation > 0:
        raise DatasetError(f"{sequence}: all voxels of the series are {voxels.flat[0]:g}: nothing to z-score")
    scaled = ((voxels - voxels.mean()) / deviation).astype(np.float32)
    return MetaTensor(torch.from_numpy(scaled), affine=image.affine)


def _off_by_thesis(row: Mapping[str, str], sequence: str) -> bool:
    k = row.get(f"ijk_{sequence}", "").split()[-1:]
    return bool(k) and k[0].isdecimal() and f"{int(k[0]) + 1}" != row.get(f"instance_{sequence}")
