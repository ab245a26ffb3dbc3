"""CT and PET of one study on one grid, with outlined regions as labels."""

import difflib
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.identity import mask, words_of
from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, Unpaired, option
from data_prep.recipes.checking import check_choice, check_millimeters, unreadable
from medseg.errors import ConfigError, DatasetError, GeometryError, MedsegError

if TYPE_CHECKING:
    import numpy as np
    from monai.data import MetaTensor
    from numpy.typing import NDArray

    from data_prep.resample import Grid
    from medseg.io import Series, Study

#: CT where the scanner saw nothing, in HU.
AIR = -1024.0
#: What is denser than this (HU) is taken for body, table and cushions; the largest connected part is the body.
BODY_ABOVE = -300.0
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_TRIPLE: dict[str, Any] = {"nargs": 3, "type": float, "metavar": "X Y Z"}


@dataclass(frozen=True)
class PetCtOptions:
    """Options of the recipe ``petct``."""

    roi: tuple[str, ...] = option(
        "--roi",
        (),
        'Name or pattern of the ROIs whose union is the class "tumor" (GTV*, case counts); may be repeated.',
        multiple=True,
        metavar="PATTERN",
    )
    roi_class: tuple[str, ...] = option(
        "--roi-class",
        (),
        "ROIs of a class of its own (node=LN*), instead of --roi; where classes overlap, the one named first wins.",
        multiple=True,
        metavar="CLASS=PATTERN",
    )
    structure_sets: str = option(
        "--structure-sets",
        "one",
        'What to do when several structure sets of a study hold such ROIs: "one" refuses the case, "union" joins them.',
        metavar="one|union",
    )
    spacing: tuple[float, float, float] | None = option(
        "--spacing", None, "Spacing of the dataset in mm; without it that of each CT.", **_TRIPLE
    )
    crop: tuple[float, float, float] | None = option("--crop", None, "Crop to a box of this size in mm.", **_TRIPLE)
    crop_center: str = option(
        "--crop-center",
        "body",
        'Center of the box: "body" (center of mass of the body on CT, known for new ones too) or "label" (center of '
        "mass of the label: what a network trained on it knows then is where to look).",
        metavar="body|label",
    )

    def __post_init__(self) -> None:
        check_millimeters("--spacing", self.spacing)
        check_millimeters("--crop", self.crop)
        check_choice("--crop-center", self.crop_center, ("body", "label"))
        check_choice("--structure-sets", self.structure_sets, ("one", "union"))
        if self.roi and self.roi_class:
            raise ConfigError("--roi and --roi-class exclude each other: one class, or several")
        self.classes()

    def classes(self) -> dict[str, list[str]]:
        """Patterns by class, in the order in which the classes were first named."""
        if self.roi:
            return {"tumor": list(self.roi)}
        found: dict[str, list[str]] = defaultdict(list)
        for text in self.roi_class:
            name, _, pattern = text.partition("=")
            if not re.fullmatch(r"\w[\w-]*", name) or name == "background" or not pattern:
                raise ConfigError(f"--roi-class: {text!r} given, CLASS=PATTERN expected (not background)")
            found[name].append(pattern)
        return dict(found)


@dataclass(frozen=True)
class _Outlines:
    """A structure set and its ROIs that were chosen, by class."""

    path: Path
    rois: dict[str, list[str]]


class PetCtRecipe(Recipe):
    """CT (HU) and PET (SUVbw) of one study on the CT's grid, and chosen ROIs of its structure set as labels.

    The source is any heap of DICOM. A case is a study with one CT and one PET series on one frame of reference and a
    structure set that holds a chosen ROI. Both are brought to one grid along the CT's axes, linearly and in one step;
    ROIs are filled on the CT's own grid and then brought along with nearest neighbor. Where PET saw nothing it
    is 0, where CT saw nothing -1024 HU.
    """

    name = "petct"
    summary = "CT and PET of a study on one grid, and outlined regions (RTSTRUCT) as labels."
    needs = "a study with a CT and a PT series on one frame of reference"
    Options = PetCtOptions

    def select(self, source: Path) -> Selection:
        """Find the studies with CT, PET and a structure set with the chosen ROIs."""
        from medseg.io import find_series, match_series

        series = find_series(source, workers=self.jobs, progress=self.progress)
        studies = match_series(series, ("CT", "PT"))
        if not studies:
            return Selection([], _left_over(series, set()))
        per_patient = Counter(_patient(study) for study in studies)
        cases, names_seen, used = [], Counter[str](), set[Path]()
        matched: Counter[str] = Counter()
        for study in studies:
            words = set[str]().union(
                *(words_of(found.files[0]) for found in (*study.series.values(), *study.structures))
            )
            case, names = self._case(study, words, alone=per_patient[_patient(study)] == 1)
            names_seen.update({mask(name, {}, words) for name in names})
            matched.update({pattern for pattern in self._patterns() if _fits(names, pattern)})
            cases.append(case)
            used.update(case.files)
            used.update(file for structure in study.structures for file in structure.files)
        self._check_patterns(matched, names_seen)
        notes = [
            f"{len(studies)} studies of {len(per_patient)} patients with CT and PT",
            "ROIs: " + ", ".join(f"{name} in {count}" for name, count in sorted(names_seen.items())[:30]),
        ]
        nameless = sum(not study.patient_id.strip() for study in studies)
        if nameless:
            notes.append(f"{nameless} studies have no PatientID: each is taken for a patient of its own")
        return Selection(cases, _left_over(series, used), notes)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Two channels, and a label per class."""
        labels = {name: number for number, name in enumerate(self.options.classes(), 1)}
        return Plan(("CT", "PET"), {"background": 0, **labels})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read, fill the outlines, choose the grid, resample."""
        import numpy as np
        import torch
        from monai.data import MetaTensor

        from data_prep.resample import Grid, resample, spaced_grid
        from medseg.io import read_series

        ct, pet = read_series(case.sources["CT"]), read_series(case.sources["PT"])
        masks = self._masks(case, ct)
        mapped = np.zeros(ct.shape, np.uint8)
        for name in reversed(masks):
            mapped[masks[name]] = plan.labels[name]
        label = MetaTensor(torch.from_numpy(mapped), affine=ct.affine)
        grid = Grid.of(ct) if self.options.spacing is None else spaced_grid(ct, self.options.spacing)
        columns: dict[str, str] = {}
        if len(plan.labels) > 2:
            overlap = np.count_nonzero(sum(inside.astype(np.uint8) for inside in masks.values()) > 1)
            columns["overlap_ml"] = f"{overlap * _voxel_ml(Grid.of(ct)):.6g}"
        if self.options.crop is not None:
            whole = np.count_nonzero(resample(label, grid, "nearest"))
            grid = self._box(grid, ct, mapped[0] > 0)
        on_grid = resample(label, grid, "nearest")
        n_voxels = int(np.count_nonzero(on_grid))
        if self.options.crop is not None:
            columns["label_in_crop"] = f"{n_voxels / whole if whole else 0:.4g}"
        if not n_voxels:
            raise GeometryError(
                "no voxel of the label is left: it lies outside the crop or is smaller than a voxel; "
                "choose a larger --crop, another --crop-center or a finer --spacing"
            )
        channels = (
            resample(ct, grid, "linear", outside=AIR, edge=self.options.crop is None),
            resample(pet, grid, "linear"),
        )
        image = MetaTensor(torch.cat([channel.as_tensor() for channel in channels]), affine=on_grid.affine)
        return Sample(image, on_grid, columns)

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Tell whose label the crop has cut."""
        cut = {
            case: float(row["label_in_crop"]) for case, row in columns.items() if row.get("label_in_crop", "1") != "1"
        }
        if not cut:
            return []
        worst = min(cut, key=cut.__getitem__)
        return [
            f"the crop cut the label of {len(cut)} of {len(columns)} cases (label_in_crop in cases.csv); the most of "
            f"{worst}, of which {cut[worst]:.0%} is left: consider a larger --crop"
        ]

    def identifiers(self, case: Case) -> set[str]:
        """Names, numbers and dates of the patient in the headers."""
        found = {case.patient, case.name}
        for files in case.sources.values():
            found |= words_of(files[0])
        return found

    def _patterns(self) -> list[str]:
        return [pattern for patterns in self.options.classes().values() for pattern in patterns]

    def _case(self, study: "Study", words: set[str], *, alone: bool) -> tuple[Case, list[str]]:
        """The case of a study, and the names of all ROIs with closed contours in it."""
        from medseg.io import list_rois

        problems = list(study.problems)
        outlines, seen = [], []
        for structure in study.structures:
            try:
                names = [roi.name for roi in list_rois(structure.files[0]) if set(roi.contour_types) & set(_CLOSED)]
            except MedsegError as error:
                problems.append(str(error))
                continue
            seen += names
            rois = self._choose(names)
            if rois:
                outlines.append(_Outlines(structure.files[0], rois))
        if not outlines and not problems:
            wanted, there = ", ".join(self._patterns()), ", ".join(mask(name, {}, words) for name in seen)
            problems.append(
                f"no ROI fits {wanted}: its {len(study.structures)} structure set(s) hold {there or 'none'}"
                if study.structures
                else "its study has no structure set (RTSTRUCT)"
            )
        if len(outlines) > 1 and self.options.structure_sets == "one":
            problems.append(
                f"{len(outlines)} structure sets hold ROIs that fit {', '.join(self._patterns())}: leave one in the "
                "source, or join them by --structure-sets union"
            )
        sources = {name: found.files for name, found in study.series.items()}
        if outlines:
            sources["RTSTRUCT"] = tuple(outline.path for outline in outlines)
        patient = _patient(study)
        name = patient if alone else f"{patient} {study.study_uid}"
        return Case(name, patient, sources, "; ".join(problems), tuple(outlines)), seen

    def _choose(self, names: Sequence[str]) -> dict[str, list[str]]:
        """ROIs by class; one that fits two classes goes to the first."""
        rest, chosen = list(names), {}
        for name, patterns in self.options.classes().items():
            fit = [roi for roi in rest if any(_fits([roi], pattern) for pattern in patterns)]
            rest = [roi for roi in rest if roi not in fit]
            if fit:
                chosen[name] = fit
        return chosen

    def _check_patterns(self, matched: Mapping[str, int], names: Mapping[str, int]) -> None:
        """A pattern that fits nothing in the whole source is a typing error."""
        there = ", ".join(sorted(names)) or "none"
        if not self._patterns():
            raise ConfigError(f"--roi PATTERN or --roi-class CLASS=PATTERN is missing; the source has the ROIs {there}")
        for pattern in self._patterns():
            if not matched.get(pattern):
                near = difflib.get_close_matches(pattern.rstrip("*"), names, n=3, cutoff=0.4)
                hint = f"nearest: {', '.join(near)}; " if near else ""
                raise ConfigError(f"--roi: {pattern!r} fits no ROI of the source ({hint}there are {there})")

    def _masks(self, case: Case, ct: "MetaTensor") -> "dict[str, NDArray[np.bool_]]":
        """Union of the ROIs of each class on the CT's grid, in the order of the classes."""
        import numpy as np

        from medseg.io import read_rtstruct

        masks: dict[str, NDArray[np.bool_]] = {}
        for name in self.options.classes():
            for outlines in case.detail:
                if name not in outlines.rois:
                    continue
                for filled in read_rtstruct(outlines.path, ct, outlines.rois[name]).values():
                    inside = np.asarray(filled) > 0
                    masks[name] = masks[name] | inside if name in masks else inside
        if not masks:
            raise DatasetError(f"no ROI fits {', '.join(self._patterns())}")
        return masks

    def _box(self, grid: "Grid", ct: "MetaTensor", inside: "NDArray[np.bool_]") -> "Grid":
        """The part of a grid that is the crop; whole voxels, so that crops of one study lie on one grid."""
        import numpy as np

        from data_prep.resample import Grid

        own = Grid.of(ct)
        if self.options.crop_center == "label":
            center = np.array([where.mean() for where in np.nonzero(inside)])
        else:
            center = body_center(np.asarray(ct)[0], own.spacing)
        world = own.affine @ np.append(center, 1)
        index = (np.linalg.inv(grid.affine) @ world)[:3]
        x, y, z = (int(n) for n in np.maximum(1, np.rint(np.array(self.options.crop) / grid.spacing)))
        start = np.rint(index - (np.array([x, y, z]) - 1) / 2).astype(np.int64)
        return grid.part(start, (x, y, z))


def body_center(ct: "NDArray[np.float32]", spacing: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Center of mass of the body on a CT, as an index.

    The body is the largest connected part above -300 HU on a grid of about 4 mm, once thin things (table, cables) are
    opened away. It needs no label, so a crop around it can be made for a new patient just so.

    Args:
        ct: [x, y, z] in HU.
        spacing: mm.

    Raises:
        GeometryError: nothing on the CT is as dense as a body.

    Example:
        >>> import numpy as np
        >>> ct = np.full((20, 20, 20), -1000, np.float32)
        >>> ct[5:15, 7:17, 2:12] = 40
        >>> body_center(ct, np.array([4.0, 4.0, 4.0])).tolist()
        [9.5, 11.5, 6.5]
    """
    import numpy as np
    from scipy import ndimage

    steps = np.maximum(1, np.rint(4 / spacing)).astype(int)
    dense = ct[:: steps[0], :: steps[1], :: steps[2]] > BODY_ABOVE
    opened = ndimage.binary_opening(dense, ndimage.generate_binary_structure(3, 3)) if min(dense.shape) > 4 else dense
    parts, _ = ndimage.label(opened if opened.any() else dense)
    sizes = np.bincount(parts.ravel())[1:]
    if not sizes.size:
        raise GeometryError(f"nothing on the CT is above {BODY_ABOVE:g} HU: no body to center the crop on")
    center = np.array([where.mean() for where in np.nonzero(parts == 1 + int(sizes.argmax()))])
    return np.asarray(center * steps)


def _fits(names: Sequence[str], pattern: str) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def _patient(study: "Study") -> str:
    return study.patient_id.strip() or study.study_uid


def _left_over(series: "Sequence[Series]", used: set[Path]) -> list[Unpaired]:
    """CT, PET and structure sets that belong to no case, by study, and what could not be read."""
    studies: dict[str, list[Series]] = defaultdict(list)
    unpaired = unreadable([found for found in series if not found.study_uid])
    for found in series:
        if found.modality in ("CT", "PT", "RTSTRUCT") and not set(found.files) & used:
            studies[found.study_uid].append(found)
    for members in studies.values():
        counts = Counter(found.modality for found in members)
        what = ", ".join(f"{count} {modality}" for modality, count in sorted(counts.items()))
        files = tuple(file for found in members for file in found.files)
        unpaired.append(Unpaired(files, f"series of a study that are in no case ({what})"))
    return unpaired


def _voxel_ml(grid: "Grid") -> float:
    import numpy as np

    return float(abs(np.linalg.det(grid.affine[:3, :3]))) / 1000
