"""A task of the Medical Segmentation Decathlon."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.recipes.base import Case, Origin, Plan, Sample, Selection
from data_prep.recipes.folder import FolderOptions, FolderRecipe
from data_prep.recipes.reading import entries, stem
from medseg.errors import DatasetError

#: From one case to another, the 99th percentile of a channel differs by this factor before it is worth a note.
OTHER_SCALE = 10


@dataclass(frozen=True)
class DecathlonOptions(FolderOptions):
    """Options of the recipe ``decathlon``: those of ``folder``, which go before what dataset.json says."""


class DecathlonRecipe(FolderRecipe):
    """A task folder as the Decathlon's archives hold it; channels and labels are named by its dataset.json.

    SOURCE is the task folder, or a folder with one task folder in it. A copy without dataset.json may have ``images/``
    and ``labels/``, and is named by ``--channel`` and ``--label``. Images of several channels are 4D files. Values are
    kept as they are, whatever their scale; the column ``p99_CHANNEL`` tells the 99th percentile of each case.
    ``imagesTs/`` has no labels and is left.
    """

    name = "decathlon"
    summary = "A task of the Medical Segmentation Decathlon (hippocampus, brain tumor, liver, …)."
    needs = "imagesTr/ and labelsTr/ (or images/ and labels/) with images and labels of the same names"
    Options = DecathlonOptions
    public = True
    origin = Origin(
        "http://medicaldecathlon.com",
        "CC BY-SA 4.0",
        "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13:4128, 2022",
    )

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.channels: tuple[str, ...] = ()
        self.names: dict[int, str] = {}

    def select(self, source: Path) -> Selection:
        """Pair images and labels, and compare them with the lists of dataset.json."""
        root = _task_folder(source)
        notes = []
        selection = super().select(root)
        description = root / "dataset.json"
        if description.is_file():
            self.channels, self.names, listed = _read_description(description)
            there = {case.name for case in selection.cases}
            if missing := len(listed - there):
                notes.append(f"{missing} training case(s) of dataset.json have no image or no label here")
            if unlisted := len(there - listed):
                notes.append(f"{unlisted} image(s) with a label are built, although dataset.json does not list them")
        if (root / "imagesTs").is_dir() and (left := len(entries(root / "imagesTs"))):
            notes.append(f"{left} image(s) of imagesTs/ are left: their labels were not published")
        if any(case.name.startswith("hippocampus_") for case in selection.cases):
            notes.append(
                "the hippocampi are left and right ones of fewer people (195 in all), and nothing tells which belong "
                "together: a split may part two of one person"
            )
        return replace(selection, notes=[*selection.notes, *notes])

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Channels and labels of dataset.json, or of the options."""
        plan = super().plan(surveys)
        if self.names and not self.options.label:
            numbers = {value: number for number, value in enumerate(sorted(self.names))}
            plan = replace(
                plan,
                labels={self.names[value]: number for value, number in numbers.items()},
                remapped={str(v): n for v, n in numbers.items()} if any(v != n for v, n in numbers.items()) else {},
            )
        return replace(plan, channel_names=self.channels) if self.channels and not self.options.channel else plan

    def make(self, case: Case, plan: Plan) -> Sample:
        """As ``folder`` does, and measure the scale of each channel."""
        import numpy as np

        sample = super().make(case, plan)
        scales = np.percentile(np.asarray(sample.image).reshape(len(sample.image), -1), 99, axis=1)
        columns = {f"p99_{name}": f"{scale:.6g}" for name, scale in zip(plan.channel_names, scales, strict=True)}
        return replace(sample, columns=columns)

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Tell which channels are on different scales."""
        notes = []
        for column in sorted({column for row in columns.values() for column in row if column.startswith("p99_")}):
            scales = {case: float(row[column]) for case, row in columns.items() if row.get(column)}
            low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
            if column != "p99_CT" and scales[high] > OTHER_SCALE * scales[low]:
                notes.append(
                    f"{column.removeprefix('p99_')}: the intensities are on different scales (99th percentile "
                    f"{scales[low]:.4g} of {low}, {scales[high]:.4g} of {high}) and are kept: normalize per image"
                )
        return notes


def _task_folder(source: Path) -> Path:
    """The folder itself, or the one task folder in it."""
    if (source / "dataset.json").is_file():
        return source
    inside = sorted(path.parent for path in source.glob("[!.]*/dataset.json"))
    if len(inside) > 1:
        raise DatasetError(f"{source}: {len(inside)} tasks in it ({', '.join(p.name for p in inside)}): name one")
    return inside[0] if inside else source


def _read_description(path: Path) -> tuple[tuple[str, ...], dict[int, str], set[str]]:
    """Channels, label names by value, and the names of the training cases."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        channels = [str(name) for _, name in sorted((int(n), name) for n, name in content["modality"].items())]
        names = {int(value): str(name) for value, name in content["labels"].items()}
        listed = {stem(Path(entry["image"])) for entry in content.get("training", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path}: not as the Decathlon writes it ({type(error).__name__}: {error}): expected modality "
            '{"0": "MRI"}, labels {"0": "background", "1": …} and training, a list'
        ) from None
    if 0 not in names or len(set(names.values())) < len(names) or not channels or min(names) < 0:
        raise DatasetError(f"{path}: labels {content['labels']}: expected 0 for the background, and each name once")
    return tuple(channels), {**names, 0: "background"}, listed
