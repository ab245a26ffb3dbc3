"""Pictures of brains with and without a tumor, one class per folder."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Origin, Plan, Recipe, Sample, Selection, Unpaired, option
from data_prep.recipes.checking import read_table
from data_prep.recipes.reading import entries
from medseg.errors import ConfigError, DatasetError, MedsegError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Folder -> class. The thesis calls them benign and malignant; the source says only whether there is a tumor.
CLASSES = {"no": "no_tumor", "yes": "tumor"}
_DIAGNOSES = {"benign": "no", "no": "no", "0": "no", "malignant": "yes", "yes": "yes", "1": "yes"}
#: Part of the width and of the height that the last crop around a position has.
FRACTION = (1 / 4, 2 / 7)
_PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True)
class BrainMriOptions:
    """Options of the recipe ``brain_mri``."""

    size: int = option("--size", 224, "Side in pixels of the whole pictures; the longer side fills it.")
    annotations: str | None = option(
        "--annotations",
        None,
        "CSV in SOURCE with PatientID (name of a picture), Nodule Center Position (i, j), Diagnosis: crop around it.",
        metavar="NAME",
    )
    enlarge: float = option(
        "--enlarge", 1.5, "How much larger than the last crop (1/4 × 2/7) a crop is, so that it can be rotated first."
    )

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"--size: {self.size} given, at least 1 pixel expected")
        if not 1 <= self.enlarge <= 3:
            raise ConfigError(f"--enlarge: {self.enlarge:g} given, 1 to 3 expected")


class BrainMriRecipe(Recipe):
    """Gray pictures of ``yes/`` and ``no/``; copies of one picture are one patient, so that no split parts them.

    The source has no patients. Pictures that are copies of one another (:func:`data_prep.copies.groups_of_copies`:
    equal, resized, recompressed, cropped, mirrored) get one patient, named after the first; a group with pictures in
    both folders has no class that could be right, and is left out.
    """

    name = "brain_mri"
    summary = "Pictures of brains in yes/ and no/ (tumor or none): one class per folder."
    needs = "pictures in yes/ and in no/"
    makes = "classification"
    Options = BrainMriOptions
    public = True
    origin = Origin(
        "https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection",
        "unstated",
        "Chakrabarty N. Brain MRI Images for Brain Tumor Detection. Kaggle, 2019.",
        by_hand="log in to Kaggle, download the archive and unpack it",
    )

    def select(self, source: Path) -> Selection:
        """Find the pictures, and which are copies."""
        from data_prep.copies import groups_of_copies

        files: list[tuple[str, Path]] = []
        unpaired = []
        for folder in CLASSES:
            if not (source / folder).is_dir():
                raise DatasetError(f"{source}: no folder {folder}/ in it; expected pictures in yes/ and in no/")
            for stem, paths in entries(source / folder).items():
                for path in paths:
                    if path.parent != source / folder:
                        unpaired.append(Unpaired((path,), f"in the folder {stem}/: expected in {folder}/ itself"))
                    elif path.suffix.lower() not in _PICTURES:
                        unpaired.append(Unpaired((path,), f"no picture by its name: {', '.join(_PICTURES)} expected"))
                    else:
                        files.append((folder, path))
        files.sort()
        stems = Counter((folder, file.stem.casefold()) for folder, file in files)
        names = {
            file: re.sub(
                r"[^A-Za-z0-9-]+",
                "_",
                f"{folder}_{file.stem if stems[folder, file.stem.casefold()] == 1 else file.name}",
            )
            for folder, file in files
        }
        pictures, problems = {}, {}
        for _, file in files:
            try:
                pictures[file] = read_gray(file)
            except MedsegError as error:
                problems[file] = str(error)
        readable = list(pictures)
        groups = groups_of_copies([pictures[file] for file in readable]) if readable else []
        first = {file: readable[group] for file, group in zip(readable, groups, strict=True)}
        members: dict[Path, list[tuple[str, Path]]] = defaultdict(list)
        for folder, file in files:
            members[first.get(file, file)].append((folder, file))
        marks, lost = self._annotations(source, names)
        cases = []
        for folder, file in files:
            group = members[first.get(file, file)]
            others = Counter(other for other, _ in group)
            problem = problems.get(file, "")
            if len(others) > 1:
                problem = (
                    f"copies of it lie in both folders ({others['no']} in no/, {others['yes']} in yes/): one is wrong"
                )
            mark = marks.get(file)
            if self.options.annotations is not None and not problem:
                problem = _contradiction(mark, folder)
            patient = names[first.get(file, file)]
            cases.append(Case(names[file], patient, {"picture": (file,)}, problem, (folder, mark, len(group))))
        copied = [group for group in members.values() if len(group) > 1]
        notes = [
            f"{len(files)} pictures in {len(members)} groups: {len(copied)} groups are of copies, "
            f"{sum(map(len, copied))} pictures in all; a group is a patient, so that no split parts it",
            "other slices or sequences of one patient cannot be told: the source does not say whose a picture is",
        ]
        if lost:
            why = f"{lost} row(s) name no picture of the source"
            unpaired.append(Unpaired((source / str(self.options.annotations),), why))
        return Selection(cases, unpaired, notes)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """One gray channel, two classes."""
        return Plan(("MR",), classes={name: number for number, name in enumerate(CLASSES.values())})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Turn gray; crop around the position, or bring the whole picture to the size."""
        import numpy as np
        import torch
        from monai.data import MetaTensor
        from monai.transforms import Resize, SpatialPad

        from data_prep.position_picture import Panel, position_picture
        from medseg.transforms import CropFraction

        (file,) = case.sources["picture"]
        folder, mark, copies = case.detail
        image = MetaTensor(torch.from_numpy(read_gray(file))[None, ..., None], affine=torch.eye(4).double())
        columns = {"copies": str(copies - 1)}
        if mark is None:
            flat = MetaTensor(image.as_tensor()[..., 0])
            small = Resize(self.options.size, size_mode="longest", mode="bicubic", anti_aliasing=True)(flat)
            square = SpatialPad((self.options.size, self.options.size))(small.clamp(0, float(image.max())))
            affine = torch.eye(4).double()
            return Sample(
                MetaTensor(square.as_tensor()[..., None], affine=affine), target=CLASSES[folder], columns=columns
            )
        i, j, fid, _ = mark
        crop = CropFraction([self.options.enlarge * part for part in FRACTION])(image, (i, j))
        if float(crop.max()) <= 0.05 * float(image.max()):
            raise DatasetError(f"the crop around ({i:g}, {j:g}) is black: is its position in the annotations right?")
        columns |= {"lesion": fid, "position": f"{i:g} {j:g} 0", "outside": f"{crop.meta['outside']:.4g}"}
        limits = (0.0, float(np.asarray(image).max()))
        picture = position_picture([Panel(image, crop, 0, limits)], (i, j, 0))
        return Sample(crop, None, columns, CLASSES[folder], {"position.png": picture})

    def _annotations(
        self, source: Path, names: Mapping[Path, str]
    ) -> tuple[dict[Path, tuple[float, float, str, str]], int]:
        """Column i, row j, lesion and folder by picture, and how many rows name none."""
        if self.options.annotations is None:
            return {}, 0
        called: dict[str, set[Path]] = defaultdict(set)
        for file, name in names.items():
            for word in (file.name, file.stem, name):
                called[word.casefold()].add(file)
        path = source / self.options.annotations
        marks: dict[Path, tuple[float, float, str, str]] = {}
        lost = 0
        for row in read_table(path, ("PatientID", "Nodule Center Position", "Diagnosis")):
            line, name = f"{path}: line {row['line']}", row["PatientID"].casefold()
            values = re.findall(r"-?\d+(?:\.\d+)?", row["Nodule Center Position"])
            folder = _DIAGNOSES.get(row["Diagnosis"].casefold())
            if len(values) != 2 or folder is None:
                raise DatasetError(
                    f"{line}: {row['Nodule Center Position']!r} and {row['Diagnosis']!r} found, expected two numbers, "
                    "and benign or malignant"
                )
            meant = called.get(name) or called.get(
                re.sub(rf"({'|'.join(map(re.escape, _PICTURES))})$", "", name), set()
            )
            if len(meant) > 1:
                which = " or ".join(sorted(names[file] for file in meant))
                raise DatasetError(f"{line}: {row['PatientID']!r} may be several pictures: expected {which}")
            if not meant:
                lost += 1
            for file in meant:
                if file in marks:
                    raise DatasetError(f"{line}: {row['PatientID']!r} again: expected each picture once")
                marks[file] = float(values[0]), float(values[1]), row.get("fid") or "1", folder
        return marks, lost


def read_gray(file: Path) -> "NDArray[np.float32]":
    """Read a picture of any mode as gray, whatever its name says it is.

    Color becomes 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); what is transparent is black.

    Args:
        file: of 8 or 16 bits, gray or color, with a palette or transparency or neither.

    Returns:
        [x, y]: columns from the left, rows from the top.

    Raises:
        ReadError: no picture.
    """
    import numpy as np

    from medseg.io import read_image

    pixels = np.asarray(read_image(file), dtype=np.float32)
    gray = pixels[0] if len(pixels) < 3 else np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), pixels[:3], 1)
    if len(pixels) in (2, 4):
        gray = gray * pixels[-1] / (65535 if pixels.max() > 255 else 255)
    return np.ascontiguousarray(gray, dtype=np.float32)


def _contradiction(mark: tuple[float, float, str, str] | None, folder: str) -> str:
    if mark is None:
        return "the annotations do not name it"
    if mark[3] != folder:
        return f"the annotations say {CLASSES[mark[3]]}, its folder {CLASSES[folder]}: which is right?"
    return ""
