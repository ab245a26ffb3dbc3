"""Coronal knee MR with maps of femur, tibia and fibula."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, Unpaired, check_pattern, option
from data_prep.recipes.checking import check_choice, check_millimeters
from medseg.errors import ConfigError, DatasetError, GeometryError, ReadError

if TYPE_CHECKING:
    from monai.data import MetaTensor

#: In this order the bones are numbered, and where two overlap the one named first has the voxel.
BONES = ("femur", "tibia", "fibula")
#: The axes of every case: to the patient's left, down, and back, as in a DICOM series of coronal slices.
AXES = "LIP"
#: A joint found further than this (mm) from that of the maps is worth a note.
FAR = 10.0


@dataclass(frozen=True)
class KneeOptions:
    """Options of the recipe ``knee``."""

    maps: str = option(
        "--maps",
        "{name}_{bone}",
        "Where the maps of an image lie, from its folder and without suffix: {bone} is femur, tibia or fibula. Without "
        "{bone} it is one file with three channels in this order, or with the values 1, 2 and 3.",
        metavar="PATTERN",
    )
    bones: str = option(
        "--bones",
        "merged",
        'Labels: "merged" (one, the union of all bones), "three" (femur 1, tibia 2, fibula 3), or one bone by name.',
        metavar="merged|three|femur|tibia|fibula",
    )
    joint_center: str = option(
        "--joint-center",
        "image",
        'Center of the crop: "image" (where the image shows femur and tibia to meet, known for new ones too), "mask" '
        '(where their maps meet: what a network trained on it knows then is where to look) or "middle" (of the image).',
        metavar="image|mask|middle",
    )
    crop_mm: float = option("--crop-mm", 120.0, "Side of the square that is kept, in mm.", type=float)
    size: int = option("--size", 224, "Pixels along both sides of a slice.", type=int)
    slices: int = option("--slices", 24, "Slices: padded at the end, then every k-th kept.", type=int)
    n4: bool = option("--n4", False, "Correct the bias field (N4) of the finished image.", is_flag=True)
    patient_pattern: str | None = option(
        "--patient-pattern",
        None,
        "Regular expression for an image's path below SOURCE; its first group is the patient. Without it each image is "
        "a patient.",
    )

    def __post_init__(self) -> None:
        if "{name}" not in self.maps or os.path.normpath(self.maps) == "{name}":
            raise ConfigError(f"--maps: {self.maps!r} given, a pattern with {{name}} and something more expected")
        check_choice("--bones", self.bones, ("merged", "three", *BONES))
        check_choice("--joint-center", self.joint_center, ("image", "mask", "middle"))
        check_millimeters("--crop-mm", (self.crop_mm,))
        for flag, number in (("--size", self.size), ("--slices", self.slices)):
            if not number > 0:
                raise ConfigError(f"{flag}: {number} given, a positive number expected")
        if self.patient_pattern is not None:
            check_pattern("--patient-pattern", self.patient_pattern)

    def chosen(self) -> tuple[str, ...]:
        """The bones that are labeled."""
        return BONES if self.bones in ("merged", "three") else (self.bones,)


class KneeRecipe(Recipe):
    """Crop coronal knee MR to a square around the joint, and bring all to one number of pixels and slices.

    SOURCE holds MHD or MHA files in any folders; the work had ``epi`` (800x800x41) and ``jopp`` (512x512x24), and does
    not say how its maps are named. Each image is turned (without interpolation) so that its axes run left, down and
    back; cropped to a square around the joint; resized in the plane (see :class:`medseg.transforms.ResizeSlices`);
    and brought to 24 slices without interpolating along z (:class:`medseg.transforms.PadAndStrideSlices`).
    """

    name = "knee"
    summary = "Coronal knee MR (MHD) cropped to the joint, with maps of femur, tibia and fibula."
    needs = "MHD or MHA images, and their maps NAME_femur, NAME_tibia and NAME_fibula beside them (see --maps)"
    Options = KneeOptions

    def select(self, source: Path) -> Selection:
        """Find the images and their maps."""
        from medseg.io.series import walk

        unpaired: list[Unpaired] = []

        def locked(folder: Path, error: OSError) -> None:
            unpaired.append(Unpaired((folder,), f"the folder cannot be opened ({error.strerror})"))

        files = sorted(path for path in walk(source, locked) if path.suffix.lower() in (".mhd", ".mha"))
        by_key: dict[str, list[Path]] = {}
        for path in files:
            by_key.setdefault(_key(path.with_suffix("")), []).append(path)
        maps = {path: self._maps(path, by_key) for path in files}
        used = {file for found in maps.values() for file in found.values()}
        folders = {file.parent for file in used}
        cases = []
        for path in files:
            if path in used or path != by_key[_key(path.with_suffix(""))][0]:
                continue
            if not maps[path]:
                lone = self._looks_like_a_map(path) or ("{bone}" not in self.options.maps and path.parent in folders)
                unpaired.append(Unpaired((path,), "map without an image" if lone else "image without maps"))
                continue
            cases.append(self._case(path, maps[path], by_key, source))
        return Selection(cases, unpaired)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """One channel, and one label or three."""
        names = ("bone",) if self.options.bones == "merged" else self.options.chosen()
        labels = {name: number for number, name in enumerate(names, 1)}
        return Plan(("MRI",), {"background": 0, **labels})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read, find the joint, crop, resize, take the slices."""
        import numpy as np
        import torch
        from monai.data import MetaTensor
        from monai.transforms import Orientation

        from medseg.io import read_image
        from medseg.transforms import CropToJointCenter, PadAndStrideSlices, ResizeSlices

        options = self.options
        stored = read_image(case.sources["image"][0])
        if stored.ndim != 4 or len(stored) != 1:
            raise DatasetError(f"an image of shape {tuple(stored.shape)}: expected one channel and slices")
        upright = Orientation(AXES, labels=(("L", "R"), ("P", "A"), ("I", "S")))
        image = upright(stored)
        masks = {bone: upright(mask) for bone, mask in _read_maps(case, stored).items()}
        center, columns = self._center(image, masks)
        label = torch.zeros(image.shape, dtype=torch.uint8)
        for bone in reversed(options.chosen()):
            label[masks[bone].as_tensor() > 0] = plan.labels.get(bone, 1)
        if options.bones == "three":
            overlap = np.count_nonzero(sum(masks[bone].as_tensor().int() for bone in BONES) > 1)
            columns["overlap_ml"] = f"{overlap * abs(np.linalg.det(np.asarray(image.affine)[:3, :3])) / 1000:.6g}"

        crop = CropToJointCenter(options.crop_mm)
        box = crop.box(image, center)
        whole = int(np.count_nonzero(label))
        cropped = [crop.crop_pad(part, *box) for part in (image, MetaTensor(label, affine=image.affine))]
        left = int(np.count_nonzero(cropped[1]))
        if whole and not left:
            raise GeometryError("no voxel of the maps is left in the crop: choose a larger --crop-mm")
        columns["label_in_crop"] = f"{left / whole:.4g}" if whole else ""  # one bone need not be in view
        columns["source_slices"] = str(image.shape[-1])
        size = (options.size, options.size)
        parts = [ResizeSlices(size, mode)(part) for part, mode in zip(cropped, ("linear", "nearest"), strict=True)]
        image, label = (PadAndStrideSlices(options.slices)(part) for part in parts)
        if options.n4:
            from medseg.transforms import N4BiasFieldCorrection

            image = N4BiasFieldCorrection()(image)
        return Sample(image, label, columns)

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Tell where the joint of the image is not that of the maps, and whose maps the crop has cut."""
        notes = []
        off = {case: float(row["joint_off_mm"]) for case, row in columns.items() if row.get("joint_off_mm")}
        far = [case for case, distance in off.items() if distance > FAR]
        if far:
            worst = max(far, key=off.__getitem__)
            notes.append(
                f"the joint found in the image is more than {FAR:g} mm from that of the maps in {len(far)} of "
                f"{len(off)} cases (joint_off_mm in cases.csv), the most {off[worst]:.0f} mm in {worst}: look at them"
            )
        lost = [case for case, row in columns.items() if not row.get("joint_clarity")]
        if lost:
            notes.append(f"no joint was found in the image alone of {len(lost)} cases, such as {lost[0]}")
        cut = {case: float(row["label_in_crop"]) for case, row in columns.items() if row.get("label_in_crop")}
        if cut:
            least = min(cut, key=cut.__getitem__)
            notes.append(f"the crop keeps {cut[least]:.0%} of the maps or more (least in {least})")
        return notes

    def identifiers(self, case: Case) -> set[str]:
        """The name of the patient, and of every folder and file of the case."""
        return {case.patient, case.name, *case.detail}

    def _maps(self, image: Path, by_key: Mapping[str, list[Path]]) -> dict[str, Path]:
        """Maps of an image that are there, by bone, or the one of all bones as ``maps``."""
        found = {}
        for bone in BONES if "{bone}" in self.options.maps else ("maps",):
            place = self.options.maps.replace("{name}", image.stem).replace("{bone}", bone)
            candidates = by_key.get(_key(image.parent / place), [])
            if candidates and candidates[0] != image:
                found[bone] = candidates[0]
        return found

    def _looks_like_a_map(self, path: Path) -> bool:
        last = re.escape(Path(self.options.maps).name)
        pattern = last.replace(r"\{name\}", ".+").replace(r"\{bone\}", "|".join(BONES).join(("(?:", ")")))
        return "{bone}" in self.options.maps and re.fullmatch(pattern, path.stem, re.IGNORECASE) is not None

    def _case(self, image: Path, maps: Mapping[str, Path], by_key: Mapping[str, list[Path]], source: Path) -> Case:
        from medseg.io.metaimage import read_meta_header

        place = image.relative_to(source).with_suffix("")
        name = "_".join(place.parts)
        problems: list[str] = []
        sources: dict[str, tuple[Path, ...]] = {}
        for part, path in {"image": image, **maps}.items():
            sources[part] = (path,)
            if len(by_key[_key(path.with_suffix(""))]) > 1:
                problems.append(f"both an MHD and an MHA file of the {part} are there: keep one")
            try:
                header = read_meta_header(path)
            except (ReadError, GeometryError) as error:
                problems.append(str(error))
                continue
            sources[part] = (path, *(file for file in header.files if file != path))
            if part == "image":
                problems += [found for found in header.problems if "ElementSpacing" in found]
        missing = [bone for bone in self.options.chosen() if not {bone, "maps"} & set(maps)]
        if missing:
            problems.append(f"no map of the {' and the '.join(missing)}; a bone that is not in view has an empty map")
        patient = name
        if self.options.patient_pattern is not None:
            match = re.search(self.options.patient_pattern, place.as_posix())
            if match is None or not match[1]:
                problems.append(f"--patient-pattern {self.options.patient_pattern!r} does not fit its path")
            else:
                patient = match[1]
        return Case(name, patient, sources, "; ".join(problems), place.parts)

    def _center(
        self, image: "MetaTensor", masks: "Mapping[str, MetaTensor]"
    ) -> tuple[tuple[float, ...], dict[str, str]]:
        """Center of the crop, and what is known of it: both ways to find it are tried, so that they can be compared."""
        import numpy as np

        from medseg.transforms import find_joint_center, joint_center_of_bones

        centers: dict[str, tuple[float, ...]] = {"middle": tuple((n - 1) / 2 for n in image.shape[1:])}
        columns = {"joint_clarity": "", "joint_off_mm": ""}
        try:
            found = find_joint_center(image)
            centers["image"] = found.index
            columns["joint_clarity"] = f"{found.clarity:.3g}"
        except GeometryError as error:
            if self.options.joint_center == "image":
                raise GeometryError(f"{error} (see --joint-center)") from None
        if {"femur", "tibia"} <= set(masks):
            centers["mask"] = joint_center_of_bones(masks["femur"], masks["tibia"])
        elif self.options.joint_center == "mask":
            raise DatasetError("--joint-center mask needs the maps of femur and tibia")
        if {"image", "mask"} <= set(centers):
            spacing = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
            off = (np.subtract(centers["image"], centers["mask"]) * spacing)[:2]
            columns["joint_off_mm"] = f"{np.linalg.norm(off):.3g}"
        return centers[self.options.joint_center], columns


def _key(path: Path) -> str:
    """A path without suffix, so that NAME_Femur is found for NAME_femur."""
    return os.path.normpath(path).casefold()


def _read_maps(case: Case, image: "MetaTensor") -> "dict[str, MetaTensor]":
    """Masks of the bones, 0 and 1, on the grid of the image as stored.

    Raises:
        DatasetError: one file for all bones that has neither three channels nor the values 0 to 3, an empty femur.
        GeometryError: another grid, or the femur lies below the tibia.
    """
    import numpy as np
    import torch
    from monai.data import MetaTensor

    from data_prep.recipes.reading import read_mask
    from data_prep.resample import check_same_grid
    from medseg.io import read_image

    if "maps" not in case.sources:
        there = [bone for bone in BONES if bone in case.sources]
        read = {bone: read_mask(case.sources[bone][:1], image, f"the {bone}").as_tensor() for bone in there}
        masks = {bone: (mask > 0).to(torch.uint8) for bone, mask in read.items()}
    else:
        maps = read_image(case.sources["maps"][0])
        check_same_grid(image, maps, "the maps", "the image")
        values = set(maps.as_tensor().unique().tolist())
        if len(maps) == 3 and len(values) <= 2:
            masks = {bone: (maps.as_tensor()[n : n + 1] > 0).to(torch.uint8) for n, bone in enumerate(BONES)}
        elif len(maps) == 1 and values <= {0, 1, 2, 3}:
            masks = {bone: (maps.as_tensor() == n).to(torch.uint8) for n, bone in enumerate(BONES, 1)}
        else:
            raise DatasetError(
                f"the maps have {len(maps)} channel(s) and {len(values)} values: expected 3 channels of 0 and one "
                "other value, or one channel of 0, 1 (femur), 2 (tibia) and 3 (fibula)"
            )
    height = {}
    for bone in ("femur", "tibia"):
        if bone in masks:
            inside = torch.nonzero(masks[bone][0]).double().mean(0).numpy()
            height[bone] = float((np.asarray(image.affine) @ np.append(inside, 1))[2])
    if height.get("femur", np.inf) < height.get("tibia", -np.inf):
        raise GeometryError("the femur lies below the tibia: are the maps named rightly, and the header's orientation?")
    return {bone: MetaTensor(mask, affine=image.affine) for bone, mask in masks.items()}
