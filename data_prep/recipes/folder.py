"""Images and labels that lie ready in two folders, paired by name."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, Unpaired, option
from medseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import numpy as np
    from monai.data import MetaTensor
    from numpy.typing import NDArray

LAYOUTS = (("images", "labels"), ("imagesTr", "labelsTr"))
#: Files that belong to a header of the same name and are not read by themselves.
COMPANIONS = {".raw", ".zraw", ".img"}
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class FolderOptions:
    """Options of the recipe ``folder``."""

    label: tuple[str, ...] = option(
        "--label",
        (),
        "NAME=VALUE of a label in the source (several values: NAME=1,2); in the order given they become 1, 2, ….",
        multiple=True,
        metavar="NAME=VALUE",
    )
    channel: tuple[str, ...] = option(
        "--channel", (), "Name of a channel in nnU-Net's words (CT, PET, …); repeat per channel.", multiple=True
    )
    spacing: tuple[float, float, float] | None = option(
        "--spacing", None, "Resample to this spacing in mm (linear; labels nearest).", nargs=3, type=float
    )
    patient_pattern: str | None = option(
        "--patient-pattern",
        None,
        "Regular expression for a case's name; its first group is the patient. Without it each case is a patient.",
    )

    def __post_init__(self) -> None:
        self.labels()
        if self.spacing is not None and min(self.spacing) <= 0:
            raise ConfigError(f"--spacing: {' '.join(map(str, self.spacing))} given, positive mm expected")
        if self.patient_pattern is not None:
            try:
                groups = re.compile(self.patient_pattern).groups
            except re.error as error:
                raise ConfigError(f"--patient-pattern: {self.patient_pattern!r} is no pattern ({error})") from None
            if groups < 1:
                raise ConfigError(f"--patient-pattern: {self.patient_pattern!r} has no group, e.g. '(.+)_scan'")

    def labels(self) -> dict[str, list[int]]:
        """Values in the source by name, in the order given."""
        found: dict[str, list[int]] = {}
        for text in self.label:
            name, _, values = text.partition("=")
            if not re.fullmatch(r"\w[\w .-]*", name) or not re.fullmatch(r"-?\d+(,-?\d+)*", values) or name in found:
                raise ConfigError(f"--label: {text!r} given, NAME=VALUE expected, each name once")
            found[name] = [int(value) for value in values.split(",")]
        values_given = [value for values in found.values() for value in values]
        twice = [value for value, n in Counter(values_given).items() if n > 1]
        if twice:
            raise ConfigError(f"--label: the value {twice[0]} is given twice")
        found.pop("background", None)
        return found


class FolderRecipe(Recipe):
    """Pair ``images/`` and ``labels/`` (or ``imagesTr/`` and ``labelsTr/``) by name.

    A file is paired with the label of the same stem; ``NAME_0000``, ``NAME_0001``, … are the channels of label
    ``NAME``. Any format that :func:`medseg.io.read_image` reads will do. Pictures become X×Y×1, a channel per color.
    """

    name = "folder"
    summary = "Images and labels that lie ready in two folders, paired by name."
    needs = "an image and a label of the same name"
    Options = FolderOptions

    def select(self, source: Path) -> Selection:
        """Pair the files of the two folders."""
        for layout in LAYOUTS:
            if all((source / name).is_dir() for name in layout):
                images, labels = (_entries(source / name) for name in layout)
                break
        else:
            wanted = " or ".join(f"{a}/ and {b}/" for a, b in LAYOUTS)
            raise DatasetError(f"{source}: no {wanted} in it; put the images in the one and the labels in the other")
        cases, unpaired = [], []
        channels: dict[str, dict[int, str]] = defaultdict(dict)
        for stem in images:
            match = _CHANNEL.fullmatch(stem)
            if stem not in labels and match:
                channels[match["case"]][int(match["channel"])] = stem
            else:
                channels[stem][-1] = stem
        for stem, numbered in sorted(channels.items()):
            parts = [numbered[number] for number in sorted(numbered)]
            groups = [images[part] for part in parts]
            if stem not in labels:
                files = tuple(file for group in groups for file in group)
                unpaired.append(Unpaired(files, "image without a label"))
                continue
            problem = _ambiguous([*groups, labels[stem]], source)
            if -1 in numbered and len(numbered) > 1:
                problem = f"both {stem} and {parts[1]} are there: one file of all channels, or one file per channel"
            elif -1 not in numbered and sorted(numbered) != list(range(len(numbered))):
                given = ", ".join(f"_{number:04d}" for number in sorted(numbered))
                problem = f"channels {given} are there: expected _0000 and on without a gap"
            sources = {f"channel {number}": tuple(group) for number, group in enumerate(groups)}
            cases.append(Case(stem, self._patient(stem), {**sources, "label": tuple(labels[stem])}, problem))
        for stem in sorted(set(labels) - {case.name for case in cases}):
            unpaired.append(Unpaired(tuple(labels[stem]), "label without an image"))
        if not cases:
            raise DatasetError(
                f"{source}: no image and label of the same name in {layout[0]}/ ({len(images)} files) and {layout[1]}/ "
                f"({len(labels)} files)"
            )
        return Selection(cases, unpaired)

    def survey(self, case: Case) -> dict[str, Any]:
        """Values of the label, and how many channels there are."""
        import numpy as np

        from medseg.io import read_image

        n_channels = sum(_count_channels(files) for part, files in case.sources.items() if part != "label")
        label = _integers(_single(read_image(_readable(case.sources["label"]))), "the label")
        return {"values": [int(value) for value in np.unique(label)], "channels": n_channels}

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Number the labels 0 to n-1, and name the channels."""
        found = sorted({value for survey in surveys.values() for value in survey["values"]} | {0})
        given = self.options.labels()
        if given:
            known = {0} | {value for values in given.values() for value in values}
            if not known & set(found) - {0}:
                raise ConfigError(f"--label: the values {sorted(known - {0})} occur nowhere; the labels hold {found}")
            names = list(given)
            remapped = {value: number for number, name in enumerate(names, 1) for value in given[name]}
        else:
            values = [value for value in found if value]
            if len(values) > 255:
                raise DatasetError(
                    f"the labels hold {len(values)} values: expected at most 255; is labels/ the folder of the images? "
                    "If they are right, choose some by --label NAME=VALUE"
                )
            names = [f"label_{number}" for number in range(1, len(values) + 1)]
            remapped = {value: number for number, value in enumerate(values, 1)}
        counts = Counter(survey["channels"] for survey in surveys.values())
        n_channels = max(counts, key=lambda n: (counts[n], n)) if counts else 1
        if self.options.channel and counts and len(self.options.channel) not in counts:
            raise ConfigError(f"--channel: {len(self.options.channel)} named, the images have {n_channels}")
        channels = self.options.channel or tuple(f"channel_{number}" for number in range(n_channels))
        changed = any(value != number for value, number in remapped.items())
        return Plan(
            channels,
            {"background": 0, **{name: number for number, name in enumerate(names, 1)}},
            {str(value): number for value, number in {0: 0, **remapped}.items()} if changed else {},
        )

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read, compare the grids, renumber the labels, resample."""
        import numpy as np
        import torch
        from monai.data import MetaTensor

        from data_prep.resample import check_same_grid, resample, spaced_grid
        from medseg.io import read_image

        channels = [_spatial(read_image(_readable(files))) for part, files in case.sources.items() if part != "label"]
        source_label = _spatial(_single(read_image(_readable(case.sources["label"]))))
        for number, channel in enumerate(channels[1:], 1):
            check_same_grid(channels[0], channel, f"channel {number}", "channel 0")
        check_same_grid(channels[0], source_label, "the label", "the image")
        image = MetaTensor(torch.cat([channel.as_tensor() for channel in channels]), affine=channels[0].affine)
        if len(image) != len(plan.channel_names):
            raise DatasetError(f"{len(image)} channels: expected {len(plan.channel_names)} as in the other cases")
        values = _integers(source_label, "the label")
        numbers = {int(key): number for key, number in plan.remapped.items()} or {n: n for n in plan.labels.values()}
        unknown = sorted(set(np.unique(values).tolist()) - set(numbers) - {0})
        if unknown:
            raise DatasetError(f"the label holds the values {unknown}: expected {sorted(numbers)}; see --label")
        mapped = np.zeros(values.shape, np.uint8)
        for value, number in numbers.items():
            mapped[values == value] = number
        label = MetaTensor(torch.from_numpy(mapped), affine=image.affine)
        if self.options.spacing is not None:
            grid = spaced_grid(image, self.options.spacing)
            image, label = resample(image, grid, "linear", edge=True), resample(label, grid, "nearest")
        return Sample(image, label)

    def _patient(self, stem: str) -> str:
        if self.options.patient_pattern is None:
            return stem
        match = re.search(self.options.patient_pattern, stem)
        if match is None or match[1] is None:
            raise ConfigError(f"--patient-pattern: {self.options.patient_pattern!r} does not fit the case {stem}")
        return match[1]


def _entries(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder by stem; a DICOM series may be a folder of its own. Hidden files are not looked at."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found[path.name] += sorted(file for file in path.rglob("*") if file.is_file())
        else:
            found[_stem(path)].append(path)
    return {stem: files for stem, files in found.items() if files}


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii") if path.name.endswith(".nii.gz") else path.stem


def _readable(files: tuple[Path, ...]) -> Path | list[Path]:
    """What to hand to the reader: the header of a header-and-data pair, or all files of a series."""
    heads = [file for file in files if file.suffix.lower() not in COMPANIONS] or list(files)
    return heads[0] if len(heads) == 1 else heads


def _ambiguous(groups: list[list[Path]], source: Path) -> str:
    for files in groups:
        readable = _readable(tuple(files))
        if isinstance(readable, list) and any(file.parent.parent == source for file in readable):
            names = ", ".join(file.relative_to(source).as_posix() for file in readable)
            return f"{names} have the same stem: keep one of them"
    return ""


def _count_channels(files: tuple[Path, ...]) -> int:
    from medseg.io import find_series, read_image

    readable = _readable(files)
    if isinstance(readable, Path):
        found = find_series(readable)
        if len(found) == 1 and not found[0].problems:
            return found[0].channels
    return int(read_image(readable).shape[0])  # which says what is wrong with it


def _spatial(image: "MetaTensor") -> "MetaTensor":
    """[channel, x, y, z], a picture as one slice."""
    if image.ndim == 3:
        from monai.data import MetaTensor

        return MetaTensor(image.as_tensor()[..., None], affine=image.affine)
    return image


def _single(label: "MetaTensor") -> "MetaTensor":
    """One channel; a picture that was saved in color may have several equal ones."""
    if len(label) > 1 and not all(bool((label[n] == label[0]).all()) for n in range(1, min(len(label), 3))):
        raise DatasetError(f"the label has {len(label)} different channels: expected one")
    return label[:1]


def _integers(label: "MetaTensor", what: str) -> "NDArray[np.int64]":
    """Whole numbers, where a rounding error of up to 0.001 is forgiven."""
    import numpy as np

    values = np.asarray(label, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DatasetError(f"{what} holds values that are no finite numbers")
    rounded = np.rint(values)
    off = np.abs(values - rounded) > 1e-3
    if off.any():
        raise DatasetError(
            f"{what} holds {np.count_nonzero(off)} values that are no whole numbers, such as "
            f"{values[off].flat[0]:.6g}; a mask interpolated linearly? Give it with nearest neighbor"
        )
    return rounded.astype(np.int64)
