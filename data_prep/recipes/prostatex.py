"""PROSTATEx: a patch around each finding on T2, diffusion of the highest b-value and ADC, with its significance."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Origin, Plan, Recipe, Sample, Selection, option
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
        if not self.spacing > 0:
            raise ConfigError(f"--spacing: {self.spacing:g} given, positive mm expected")


@dataclass(frozen=True)
class Finding:
    """What the CSVs and the headers say of one finding.

    Attributes:
        lesion: its number (fid).
        position: RAS mm.
        zone: PZ, TZ, AS or SV.
        significant: ``TRUE`` or ``FALSE`` (ClinSig).
        series: number of the chosen series, by sequence.
        ijk: what the table of images says of it there.
        disagreements: where sources contradict each other.
        alternatives: series that would have done as well.
    """

    lesion: str
    position: tuple[float, float, float]
    zone: str
    significant: str
    series: Mapping[str, int]
    ijk: Mapping[str, str]
    disagreements: tuple[str, ...]
    alternatives: str


class ProstateXRecipe(Recipe):
    """A case is a finding: patches of equal physical size on T2, DWI (calculated, highest b-value) and ADC.

    The two tables are joined on ProxID, fid and pos. Of the series that the table of images names for a finding, those
    of the patient (PatientID) and the number (SeriesNumber in the header) that contain ``pos`` are candidates; the
    three must be of one study. Of several, those are taken whose slices lie nearest to ``pos``, then those acquired
    nearest to each other.

    ``pos`` is in the patient's coordinates (DICOM, LPS mm). The slice is the one nearest to it by the geometry of the
    headers. ``ijk`` is only compared: it is the position in voxels from the corner of the volume, rounded, and so the
    index from 0 or the one after it, with even chances (the thesis says 0-based).

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
        self._n_findings = self._n_selected = 0

    def select(self, source: Path) -> Selection:
        """Join the tables, and find the three series of each finding."""
        from medseg.io import find_series

        findings = _table(source, FINDINGS, ("ProxID", "fid", "pos", "zone", "ClinSig"))
        images = _table(source, IMAGES, ("ProxID", "fid", "pos", "ijk", "DCMSerDescr", "DCMSerNum"))
        rows: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
        for row in images:
            rows[_key(row)].append(row)
        patients: dict[str, list[Series]] = defaultdict(list)
        for series in find_series(source, workers=self.jobs):
            if series.kind == "dicom" and series.is_image:
                patients[series.patient_id].append(series)
        answers: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        for row in findings:
            answers[_key(row)].add(row["ClinSig"])
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
                cases.append(_case(name, row, rows.get(key, []), patients.get(patient, [])))
            seen.add(key)
        self._n_findings, self._n_selected = len(findings), len(cases)
        joined = sum(key in rows for key in seen)
        notes = [
            f"{len(findings)} findings of {len({row['ProxID'] for row in findings})} patients, {joined} of them joined "
            f"with the {len(images)} rows of images on ProxID, fid and pos",
        ]
        repeated = sum(n - 1 for n in names.values())
        if repeated:
            notes.append(f"{repeated} fid(s) occur twice in a patient: the second case is called PATIENT_FID-2")
        others = len(set(rows) - set(seen))
        if others:
            notes.append(f"{others} finding(s) stand in the table of images only")
        return Selection(cases, [], notes)

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
        columns = {
            "lesion": finding.lesion,
            "position": " ".join(f"{value:.10g}" for value in finding.position),
            "zone": finding.zone,
        }
        disagreements = list(finding.disagreements)
        patches: list[MetaTensor] = []
        panels = []
        for sequence, files in case.sources.items():
            image = read_series(files)
            if len(image) != 1:
                raise DatasetError(f"{sequence}: series of {len(image)} volumes found, one expected")
            scaled = _z_scored(image, sequence) if self.options.z_score else image
            patch = cut(scaled, finding.position, like=patches[0] if patches else None)
            k = patch.meta["slice_index"]
            number = _instance_number(files[k])
            if number not in (k + 1, image.shape[3] - k):
                disagreements.append(
                    f"{sequence}: the slice has InstanceNumber {number}, it is number {k + 1} upward and "
                    f"{image.shape[3] - k} downward"
                )
            columns |= {
                f"series_{sequence}": str(finding.series[sequence]),
                f"ijk_{sequence}": finding.ijk[sequence],
                f"instance_{sequence}": str(number),
                f"off_plane_mm_{sequence}": f"{_off_plane(image, finding.position, k):.3g}",
                f"outside_{sequence}": f"{patch.meta['outside']:.4g}",
            }
            patches.append(patch)
            panels.append(Panel(image, patch, k))
        columns |= {"disagreements": "; ".join(disagreements), "alternatives": finding.alternatives}
        stacked = MetaTensor(torch.cat([patch.as_tensor() for patch in patches]), affine=patches[0].affine)
        picture = position_picture(panels, finding.position)
        return Sample(stacked, None, columns, CLASSES[finding.significant], {"position.png": picture})

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Count: exported + errors = findings; and tell of contradictions, repeats and padding."""
        exported = len(columns)
        errors = self._n_selected - exported
        notes = [f"{exported} exported + {errors} errors = {self._n_findings} findings"]
        if exported + errors != self._n_findings:
            notes = [f"{exported} exported + {errors} errors, but {self._n_findings} findings: a defect of the recipe"]
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
            notes.append(
                f"{padded} patch(es) reach beyond an image (columns outside_*); 0, or its z-score, stands there"
            )
        return notes


def _case(name: str, row: dict[str, str], images: Sequence[dict[str, str]], there: "Sequence[Series]") -> Case:
    """The case of a finding, or the reason why there is none."""
    patient = row["ProxID"]
    position = _position(row["pos"])
    if row["ClinSig"] not in CLASSES:
        return Case(name, patient, {}, f"ClinSig {row['ClinSig']!r}: TRUE or FALSE expected")
    if position is None:
        return Case(name, patient, {}, f"pos {row['pos']!r}: three numbers expected")
    if not images:
        return Case(name, patient, {}, "the table of images has no row with its ProxID, fid and pos")
    if not there:
        return Case(name, patient, {}, "no DICOM of this patient (PatientID) in the source")
    candidates: dict[str, dict[str, list[_Candidate]]] = defaultdict(lambda: defaultdict(list))
    problems = []
    for sequence, words in SEQUENCES.items():
        own = [image for image in images if all(word in image["DCMSerDescr"] for word in words)]
        found, reasons = _candidates(sequence, own, there, position)
        for candidate in found:
            candidates[candidate.series.study_uid][sequence].append(candidate)
        if not found:
            problems.append(f"{sequence}: {'; '.join(reasons)}")
    if problems:
        return Case(name, patient, {}, "; ".join(problems))
    trios = [trio for study in candidates.values() for trio in product(*(study[sequence] for sequence in SEQUENCES))]
    if not trios:
        return Case(name, patient, {}, "T2, DWI and ADC that contain it are of different studies")
    best = min(trios, key=_preference)
    chosen = dict(zip(SEQUENCES, best, strict=True))
    disagreements = [text for candidate in best for text in candidate.disagreements]
    if len({candidate.series.frame_of_reference_uid for candidate in best}) > 1:
        disagreements.append("T2, DWI and ADC have different frames of reference")
    others = []
    for sequence, taken in chosen.items():
        all_of_it = [one for study in candidates.values() for one in study[sequence]]
        rest = sorted(one.series.number or 0 for one in all_of_it if one.series is not taken.series)
        if rest:
            others.append(f"{sequence}: {', '.join(map(str, rest))}")
    finding = Finding(
        row["fid"],
        position,
        row["zone"],
        row["ClinSig"],
        {sequence: candidate.series.number or 0 for sequence, candidate in chosen.items()},
        {sequence: candidate.ijk for sequence, candidate in chosen.items()},
        tuple(disagreements),
        "; ".join(others),
    )
    return Case(name, patient, {sequence: one.series.files for sequence, one in chosen.items()}, "", finding)


@dataclass(frozen=True)
class _Candidate:
    """A series that contains a finding."""

    series: "Series"
    off_plane: float
    ijk: str
    disagreements: tuple[str, ...]


def _candidates(
    sequence: str,
    images: Sequence[dict[str, str]],
    there: "Sequence[Series]",
    position: tuple[float, float, float],
) -> tuple[list[_Candidate], list[str]]:
    """The series of one sequence that contain a finding, and why others do not."""
    found, reasons = [], []
    for number in sorted({image["DCMSerNum"].strip() for image in images}):
        rows = [image for image in images if image["DCMSerNum"].strip() == number]
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
            off = abs(index[2] - round(index[2])) * series.spacing[2]
            off = abs(index[2] - round(index[2])) * series.spacing[2]
            ijk, fits = _nearest_ijk(rows, index)
            texts = _disagreements(sequence, series, rows)
            if not fits:
                expected = " ".join(f"{at + 0.5:.2f}" for at in index)
                texts.append(f"{sequence}: ijk {ijk}, pos gives {expected} from the corner, before rounding")
            found.append(_Candidate(series, off, ijk, tuple(texts)))
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
    """The rows of a CSV file that lies somewhere in the source, as text without spaces around."""
    import pandas as pd

    from medseg.io.series import walk

    found = [path for path in walk(source) if path.name == name]
    if len(found) != 1:
        places = ", ".join(str(path.relative_to(source)) for path in found)
        raise DatasetError(f"{source}: {len(found)} files {name} in it{f' ({places})' * bool(found)}, one expected")
    try:
        table = pd.read_csv(found[0], dtype=str, keep_default_na=False, skipinitialspace=True)
    except ValueError as error:
        raise DatasetError(f"{found[0]}: not a table ({' '.join(str(error).split())})") from None
    table.columns = table.columns.str.strip()
    for column in columns:
        if column not in table:
            hint = "; the challenge's test set has none, and no recipe" if column == "ClinSig" else ""
            raise DatasetError(f"{found[0]}: no column {column!r}{hint}; it has {', '.join(table.columns)}")
    return [{str(key): value.strip() for key, value in row.items()} for row in table[list(columns)].to_dict("records")]


def _key(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["ProxID"], row["fid"], " ".join(row["pos"].split())


def _position(text: str) -> tuple[float, float, float] | None:
    """RAS mm of a position in LPS mm."""
    try:
        x, y, z = (float(word) for word in text.split())
    except ValueError:
        return None
    return -x, -y, z


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
    return bool(k) and f"{int(k[0]) + 1}" != row.get(f"instance_{sequence}")


def _off_plane(image: "MetaTensor", position: tuple[float, float, float], k: int) -> float:
    """How far (mm) a position lies from the plane of slice k."""
    import numpy as np

    affine = np.asarray(image.affine, dtype=np.float64)
    index = np.linalg.inv(affine) @ [*position, 1.0]
    return float(abs(index[2] - k) * np.linalg.norm(affine[:3, 2]))


def _instance_number(file: Path) -> int | None:
    import pydicom

    value = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["InstanceNumber"]).get("InstanceNumber")
    return None if value is None else int(value)
