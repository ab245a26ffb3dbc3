"""Images and labels that lie ready in two folders, paired by name."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, Unpaired, check_pattern, option
from data_prep.recipes.checking import check_millimeters
from data_prep.recipes.reading import entries, read_channels, read_mask, readable, renumber, respaced
from medseg.errors import ConfigError, DatasetError

LAYOUTS = (("images", "labels"), ("imagesTr", "labelsTr"))
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class FolderOptions:
    """Options of the recipe ``folder``."""

    label: tuple[str, ...] = option(
        "--label",
        (),
        "NAME=VALUE of a label in the source (several values: NAME=1,2); in the order given they become 1, 2, …; "
        "background=VALUE becomes 0.",
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
        check_millimeters("--spacing", self.spacing)
        if self.patient_pattern is not None:
            check_pattern("--patient-pattern", self.patient_pattern)

    def labels(self) -> dict[str, list[int]]:
        """Values in the source by name, in the order given; ``background`` may be among them."""
        found: dict[str, list[int]] = {}
        for text in self.label:
            name, _, values = text.partition("=")
            if not re.fullmatch(r"\w[\w .-]*", name) or not re.fullmatch(r"\d+(,\d+)*", values) or name in found:
                raise ConfigError(f"--label: {text!r} given, NAME=VALUE expected, each name once")
            found[name] = [int(value) for value in values.split(",")]
        values_given = [value for values in found.values() for value in values]
        twice = [value for value, n in Counter(values_given).items() if n > 1]
        if twice:
            raise ConfigError(f"--label: the value {twice[0]} is given twice")
        for name in found:
            if 0 in found[name] and name != "background":
                raise ConfigError(f"--label: {name} given the value 0, which is the background")
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
        wanted = " or ".join(f"{a}/ and {b}/" for a, b in LAYOUTS)
        there = [layout for layout in LAYOUTS if all((source / name).is_dir() for name in layout)]
        if not there:
            raise DatasetError(f"{source}: no {wanted} in it; put the images in the one and the labels in the other")
        if len(there) > 1:
            raise DatasetError(f"{source}: two datasets in it; leave either {wanted}")
        ((images_folder, labels_folder),) = there
        images, labels = entries(source / images_folder), entries(source / labels_folder)
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
            patient = self._patient(stem)
            if patient is None:
                problem = f"--patient-pattern {self.options.patient_pattern!r} does not fit its name"
            sources = {f"channel {number}": tuple(group) for number, group in enumerate(groups)}
            cases.append(Case(stem, patient or stem, {**sources, "label": tuple(labels[stem])}, problem))
        for stem in sorted(set(labels) - {case.name for case in cases}):
            unpaired.append(Unpaired(tuple(labels[stem]), "label without an image"))
        if not cases:
            raise DatasetError(
                f"{source}: no image and label of the same name in {images_folder}/ ({len(images)} files) and "
                f"{labels_folder}/ ({len(labels)} files)"
            )
        return Selection(cases, unpaired)

    def survey(self, case: Case) -> dict[str, Any]:
        """Values of the label, and how many channels there are."""
        from medseg.io import read_label

        label = readable(case.sources["label"])
        if not isinstance(label, Path):
            raise DatasetError(f"the label is {len(label)} files: expected one")
        channels = [_count_channels(files) for part, files in case.sources.items() if part != "label"]
        return {"values": read_label(label).unique().tolist(), "channels": sum(channels)}

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Number the labels 0 to n-1, and name the channels."""
        found = sorted({value for survey in surveys.values() for value in survey["values"]} | {0})
        given = self.options.labels()
        background = dict.fromkeys([0, *given.pop("background", [])], 0)
        if given:
            known = {value for values in given.values() for value in values}
            if not known & set(found):
                raise ConfigError(f"--label: the values {sorted(known)} occur nowhere; the labels hold {found}")
            names = list(given)
            remapped = {value: number for number, name in enumerate(names, 1) for value in given[name]}
        else:
            values = [value for value in found if value not in background]
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
        remapped = background | remapped
        changed = any(value != number for value, number in remapped.items())
        return Plan(
            channels,
            {"background": 0, **{name: number for number, name in enumerate(names, 1)}},
            {str(value): number for value, number in remapped.items()} if changed else {},
        )

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read, compare the grids, renumber the labels, resample."""
        image = read_channels({part: files for part, files in case.sources.items() if part != "label"})
        if len(image) != len(plan.channel_names):
            raise DatasetError(f"{len(image)} channels: expected {len(plan.channel_names)} as in the other cases")
        label = renumber(read_mask(case.sources["label"], image), plan)
        return Sample(*respaced(image, label, self.options.spacing))

    def _patient(self, stem: str) -> str | None:
        """The patient of a case by its name, None where the pattern does not fit."""
        if self.options.patient_pattern is None:
            return stem
        match = re.search(self.options.patient_pattern, stem)
        return match[1] if match is not None else None


def _ambiguous(groups: list[list[Path]], source: Path) -> str:
    for group in groups:
        files = readable(group)
        if isinstance(files, list) and any(file.parent.parent == source for file in files):
            names = ", ".join(file.relative_to(source).as_posix() for file in files)
            return f"{names} have the same stem: keep one of them"
    return ""


def _count_channels(files: tuple[Path, ...]) -> int:
    from medseg.io import find_series, read_image

    path = readable(files)
    if isinstance(path, Path):
        found = find_series(path)
        if len(found) == 1 and not found[0].problems:
            return found[0].channels
    return int(read_image(path).shape[0])  # which says what is wrong with it
