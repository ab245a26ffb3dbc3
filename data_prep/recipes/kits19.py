"""KiTS19: kidneys and kidney tumors on CT."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Origin, Plan, Recipe, Sample, Selection, Unpaired, option
from data_prep.recipes.checking import check_millimeters
from medseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from monai.data import MetaTensor

#: CT outside the patient, in HU.
AIR = -1024.0
LABELS = {"background": 0, "kidney": 1, "tumor": 2}
#: The axes of every case: to the patient's left, back, and up, as in a DICOM series; the source has IPL, slices first.
AXES = "LPS"
#: Pixels along a slice in the published work.
SIZE = 128
#: What cases.csv takes from kits.json.
CLINICAL = ("malignant", "tumor_histologic_subtype")
#: Cases with published segmentations.
PUBLISHED = 210


@dataclass(frozen=True)
class Kits19Options:
    """Options of the recipe ``kits19``."""

    size: int | None = option(
        "--size",
        None,
        f"Pixels along both sides of a slice; 0 leaves slices as they are.  [default: {SIZE}; with --spacing 0]",
        type=int,
    )
    spacing: tuple[float, float, float] | None = option(
        "--spacing",
        None,
        "Resample to this spacing in mm (left, back, up) instead (linear; labels nearest).",
        nargs=3,
        type=float,
        metavar="X Y Z",
    )

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 0:
            raise ConfigError(f"--size: {self.size} given, a number of pixels expected, or 0")
        check_millimeters("--spacing", self.spacing)
        if self.size and self.spacing is not None:
            raise ConfigError("--size and --spacing exclude each other: pixels, or millimeters")

    def pixels(self) -> int:
        """Pixels along both sides of a slice; 0 where slices are not made one size."""
        return SIZE if self.size is None and self.spacing is None else self.size or 0


class Kits19Recipe(Recipe):
    """Bring KiTS19's CT (HU) and label maps to slices of one size, and turn them so that slices are the last axis.

    SOURCE holds ``case_00000/imaging.nii.gz``, ``case_00000/segmentation.nii.gz`` and so on (or has them in ``data/``),
    and maybe ``kits.json``. A slice that is not square is first padded with air about its center, so that nothing is
    distorted. Images are interpolated linearly with anti-aliasing, slice by slice, labels with nearest neighbor (see
    :class:`medseg.transforms.ResizeSlices`); the work interpolated masks cubically and cut them at 0.2, which moves
    their outlines. Nothing is interpolated across slices, HU are kept, and every slice is: which window the network
    sees, and that it does not train on slices without a kidney, is the training's to say.
    """

    name = "kits19"
    summary = "KiTS19: CT with kidneys and kidney tumors."
    needs = "folders case_00000, case_00001, … with imaging.nii.gz and segmentation.nii.gz"
    Options = Kits19Options
    public = True
    origin = Origin(
        "https://kits19.grand-challenge.org",
        "CC BY-NC-SA 4.0",
        "Heller et al., The KiTS19 Challenge Data, arXiv:1904.00445, 2019",
        "clone https://github.com/neheller/kits19 and run `python3 -m starter_code.get_imaging` in it; it is SOURCE",
    )

    def select(self, source: Path) -> Selection:
        """Find the cases; those without segmentation (the challenge's test cases) are left over by name."""
        root = source if any(source.glob("case_*/")) else source / "data"
        clinical = root / "kits.json"
        known = _read_clinical(clinical) if clinical.is_file() else None
        cases, unpaired, empty = [], [], 0
        for folder in sorted(path for path in root.glob("case_*") if path.is_dir()):
            image, label = folder / "imaging.nii.gz", folder / "segmentation.nii.gz"
            files = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
            other = tuple(path for path in files if path not in (image, label))
            if not files:
                empty += 1
            elif re.fullmatch(r"case_\d{5}", folder.name) is None:
                unpaired.append(Unpaired(tuple(files), "its folder is not called case_ and five digits: is it a copy?"))
                continue
            elif other:
                unpaired.append(Unpaired(other, "neither of the two files that a case has"))
            if image in files and label in files:
                sources = {"CT": (image,), "label": (label,)}
                if known is not None:
                    sources["clinical"] = (clinical,)
                cases.append(Case(folder.name, folder.name, sources))
            elif image in files:
                unpaired.append(Unpaired((image,), "an image without segmentation"))
            elif label in files:
                unpaired.append(Unpaired((label,), "a segmentation without image"))
        notes = [f"{len(cases)} of the {PUBLISHED} cases with a published segmentation"]
        if empty:
            notes.append(f"{empty} case folder(s) are empty")
        if known is None:
            notes.append("no kits.json in it: cases.csv will say nothing of the tumors' histology")
        elif missing := [case.name for case in cases if case.name not in known]:
            notes.append(f"kits.json says nothing of {len(missing)} case(s), such as {missing[0]}")
        return Selection(cases, unpaired, notes)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """One channel, two labels."""
        return Plan(("CT",), dict(LABELS))

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read, make square, resize or resample, turn."""
        import numpy as np
        import torch
        from monai.data import MetaTensor
        from monai.transforms import Orientation, SpatialPad

        from data_prep.recipes.reading import read_mask, respaced
        from medseg.io import read_image
        from medseg.transforms import ResizeSlices

        stored = read_image(case.sources["CT"][0])
        if stored.ndim != 4 or len(stored) != 1:
            raise DatasetError(f"an image of shape {tuple(stored.shape)}: expected one channel and slices")
        image = MetaTensor(stored.as_tensor(), affine=stored.affine)  # no copy: a whole CT takes half a gigabyte
        label = read_mask(case.sources["label"], image)
        if int(label.max()) > max(LABELS.values()):
            raise DatasetError(f"the segmentation holds the value {int(label.max())}: expected 0 to 2")
        columns = {"published_part": _published_part(case.name), "source_shape": "x".join(map(str, image.shape[1:]))}
        if "clinical" in case.sources:
            known = _read_clinical(case.sources["clinical"][0]).get(case.name, {})
            columns |= {name: str(known.get(name, "")).lower() for name in CLINICAL}
        voxel_ml = abs(float(np.linalg.det(np.asarray(image.affine)[:3, :3]))) / 1000
        for name, value in list(LABELS.items())[1:]:
            columns[f"source_ml_{name}"] = f"{torch.count_nonzero(label == value).item() * voxel_ml:.6g}"

        turn = Orientation(AXES, labels=(("L", "R"), ("P", "A"), ("I", "S")))
        pixels = self.options.pixels()
        if pixels:  # small first, then turned
            axis = _slice_axis(image)
            square = [max(n for other, n in enumerate(image.shape[1:]) if other != axis)] * 3
            square[axis] = -1
            image = ResizeSlices((pixels, pixels), "linear", axis)(SpatialPad(square, value=AIR)(image))
            label = ResizeSlices((pixels, pixels), "nearest", axis)(SpatialPad(square, value=0)(label))
        return Sample(*respaced(turn(image), turn(label), self.options.spacing), columns)

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Tell whose tumor was smaller than a voxel of the dataset, and how the cases of the published split lie."""
        notes = []
        lost = [
            case
            for case, row in columns.items()
            if float(row["source_ml_tumor"]) > 0 and not float(row["volume_ml_tumor"])
        ]
        if lost:
            notes.append(f"the tumor of {len(lost)} case(s) fell between the voxels and is lost, such as of {lost[0]}")
        parts = [row["published_part"] for row in columns.values()]
        counted = ", ".join(f"{parts.count(part)} {part}" for part in ("train", "val", "test"))
        notes.append(f"of the published split (column published_part) there are {counted}")
        return notes


def _published_part(case: str) -> str:
    """Part of a case in the split that the work's code has: 120 to 139 validate, 200 to 209 test.

    Example:
        >>> [_published_part(f"case_{number:05d}") for number in (119, 120, 139, 140, 199, 200, 209)]
        ['train', 'val', 'val', 'train', 'train', 'test', 'test']
    """
    number = int(case.removeprefix("case_"))
    return "val" if 120 <= number <= 139 else "test" if 200 <= number <= 209 else "train"


def _read_clinical(path: Path) -> dict[str, dict[str, Any]]:
    """What kits.json says of each case."""
    try:
        return {str(entry["case_id"]): entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path}: not as KiTS19 has it ({type(error).__name__}: {error}): expected a list of objects with case_id"
        ) from None


def _slice_axis(image: "MetaTensor") -> int:
    """Array axis that runs along the body."""
    import nibabel as nib
    import numpy as np

    return [int(axis) for axis in nib.orientations.io_orientation(np.asarray(image.affine))[:, 0]].index(2)
