"""Recipes that a YAML file describes: which files make a case, and what is made of them."""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, Unpaired
from data_prep.recipes.description import CLASS, Description, read_description
from data_prep.recipes.reading import as_volume, read_mask, renumber, respaced, with_voxels
from medseg.errors import ConfigError, DatasetError, GeometryError
from medseg.io.text import one_line

if TYPE_CHECKING:
    import torch
    from monai.data import MetaTensor

#: HU of what a CT did not see.
AIR = -1024.0


def described_recipe(file: str, text: str) -> "type[DescribedRecipe]":
    """Make the class of a recipe that a YAML file describes.

    Args:
        file: its name, for messages.
        text: its content.

    Raises:
        ConfigError: the file says something that makes no sense.
    """
    described = read_description(file, text)
    members = {
        "name": described.name,
        "summary": described.summary,
        "needs": f"files as {file} describes them ({described.patterns[0][1].text} is the first)",
        "makes": "classification" if described.classes else "segmentation",
        "public": described.public,
        "described": described,
        "file": file,
        "file_sha256": described.sha256,
    }
    return type("DescribedRecipe", (DescribedRecipe,), members)


@dataclass(frozen=True)
class _Detail:
    """What a case needs besides its files: where each part lies, the fields of its path, its class."""

    paths: dict[str, Path]
    fields: dict[str, str]
    target: str | None = None


@dataclass
class _Found:
    """The files of one case, while the source is looked through."""

    parts: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def files(self) -> tuple[Path, ...]:
        return tuple(file for paths in self.parts.values() for path in paths for file in _files(path))


class DescribedRecipe(Recipe):
    """What all recipes from YAML have in common; the class of each has its ``described``."""

    described: ClassVar[Description]
    file: ClassVar[str]

    def select(self, source: Path) -> Selection:
        """Read the fields of every path, and put together the files with the same."""
        if self.described.transforms:
            self._transforms()  # so that a wrong one is said before any case is made
        found: dict[tuple[str, ...], _Found] = defaultdict(_Found)
        unpaired, cases = [], []
        for path, relative in _walk(source):
            for key, pattern in self.described.patterns:
                values = pattern.read(relative)
                if values:
                    found[tuple(values[name] for name in self.described.fields)].parts[key].append(path)
                elif values is not None:
                    why = f"its path fits {key} in several ways: put fields into folders, or a fixed text between them"
                    unpaired.append(Unpaired(_files(path), why))
        table = self._read_classes(source)
        named = {key: dict(zip(self.described.fields, key, strict=True)) for key in sorted(found)}
        per_patient = Counter(fields["patient"] for fields in named.values())
        for one, fields in named.items():
            parts, files = found[one].parts, found[one].files()
            missing = [key for key, _ in self.described.patterns if key not in parts]
            given = self._class_values(fields, table)
            if missing or (self.described.classes and not given):
                unpaired.append(Unpaired(files, f"no file for {missing[0]}" if missing else "no row in classes.file"))
                continue
            target, problem = self._target(given)
            several = [f"{len(paths)} files for {key}: expected one" for key, paths in parts.items() if len(paths) > 1]
            name = "_".join(value for field, value in fields.items() if field != CLASS)
            sources = {key: tuple(file for path in parts[key] for file in _files(path)) for key in parts}
            cases.append(
                Case(
                    fields["patient"] if per_patient[fields["patient"]] == 1 else name,
                    fields["patient"],
                    sources,
                    problem or "; ".join(several),
                    _Detail({key: paths[0] for key, paths in parts.items()}, fields, target),
                )
            )
        return Selection(cases, unpaired)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Channels, labels or classes, numbered in the order of the file."""
        described = self.described
        if described.classes is not None:
            return Plan(described.channel_names, classes={name: n for n, name in enumerate(described.classes.names)})
        names = list(described.values or described.masks)
        labels = {"background": 0, **{name: number for number, name in enumerate(names, 1)}}
        remapped = {0: 0, **{value: labels[name] for name, values in described.values.items() for value in values}}
        changed = any(value != number for value, number in remapped.items())
        return Plan(described.channel_names, labels, {str(k): v for k, v in remapped.items()} if changed else {})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read, register, resample, stack the channels, transform."""
        import torch
        from monai.data import MetaTensor

        data, columns = self._read(case.detail.paths, plan)
        attachments = self._register(data, columns)
        first = self.described.channel_names[0]
        self._check_grid(data)
        stacked = torch.cat([data[name].as_tensor() for name in self.described.channel_names])
        image = MetaTensor(stacked, affine=data[first].affine)
        image, label = respaced(image, data.get("label"), self.described.spacing)
        if self.described.transforms:
            image, label = self._transformed(image, label)
        return Sample(image, label, columns, case.detail.target, attachments)

    def identifiers(self, case: Case) -> set[str]:
        """All that the path tells of the case: a visit may be a date."""
        return {case.patient, case.name, *(value for key, value in case.detail.fields.items() if key != CLASS)}

    # Classes

    def _class_values(self, fields: Mapping[str, str], table: Mapping[tuple[str, ...], set[str]]) -> set[str]:
        """What the source says of the class of a case."""
        classes = self.described.classes
        if classes is None or not classes.file:
            return {fields[CLASS]} if CLASS in fields else set()
        return table.get(tuple(fields[name].strip() for name in classes.by or self.described.fields), set())

    def _read_classes(self, source: Path) -> dict[tuple[str, ...], set[str]]:
        """Values of the column, by the columns that name a case."""
        classes = self.described.classes
        if classes is None or not classes.file:
            return {}
        table: dict[tuple[str, ...], set[str]] = defaultdict(set)
        columns = list(classes.by.values()) or self.described.fields
        try:
            with (source / classes.file).open(newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file)
                for column in (*columns, classes.column):
                    if column not in (rows.fieldnames or ()):
                        there = ", ".join(rows.fieldnames or ())
                        raise ConfigError(f"{self.file}: classes.file: no column {column!r} in it; there are {there}")
                for row in rows:
                    table[tuple((row[column] or "").strip() for column in columns)].add(row[classes.column] or "")
        except FileNotFoundError:
            raise ConfigError(f"{self.file}: classes.file: {classes.file}: no such file in SOURCE") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise DatasetError(f"{classes.file}: not a CSV table in UTF-8 ({type(error).__name__})") from None
        return table

    def _target(self, values: set[str]) -> tuple[str | None, str]:
        """The class of a case, or why it has none."""
        classes = self.described.classes
        if classes is None:
            return None, ""
        targets = {classes.of_value(value) for value in values}
        if None in targets:
            expected = ", ".join(value for known in classes.names.values() for value in known)
            return None, f"a class that classes.names does not know: {expected} expected"
        if len(targets) > 1:
            return None, f"{len(targets)} classes in classes.file: one expected"
        return targets.pop(), ""

    # Images

    def _read(self, paths: Mapping[str, Path], plan: Plan) -> "tuple[dict[str, MetaTensor], dict[str, str]]":
        """Channels [1, x, y, z] by name and the ``label``, each on its own grid; columns of cases.csv."""
        from medseg.io import read_image

        data: dict[str, MetaTensor] = {}
        for names in self.described.channels:
            key = f"channels.{', '.join(names)}"
            image = as_volume(read_image(paths[key]))
            if len(image) != len(names):
                raise DatasetError(f"{len(image)} channel(s) in the file of {key}: {len(names)} expected, one per name")
            data |= {name: image[number : number + 1] for number, name in enumerate(names)}
        if not self.described.masks:
            return data, {}
        image = data[self.described.drawn_on]
        if self.described.values:
            data["label"] = renumber(read_mask([paths["label.file"]], image, "the label"), plan)
            return data, {}
        inside: dict[str, torch.Tensor] = {}
        for name, key, _ in self.described.mask_patterns:
            mask = read_mask([paths[key]], image, key).as_tensor() > 0
            inside[name] = inside[name] | mask if name in inside else mask
        data["label"], columns = _united(inside, image, plan)
        return data, columns

    def _check_grid(self, data: "Mapping[str, MetaTensor]") -> None:
        from data_prep.resample import check_same_grid

        first = self.described.channel_names[0]
        for name in data:
            try:
                check_same_grid(data[first], data[name], name, first)
            except GeometryError as error:
                raise GeometryError(f"{error}, or bring it there by the key register of {self.file}") from None

    def _register(self, data: "dict[str, MetaTensor]", columns: dict[str, str]) -> dict[str, bytes]:
        """Bring channels to another in place; the transforms that did it, by file name."""
        from data_prep.resample import Grid, resample

        to, attachments = self.described.register_to, dict[str, bytes]()
        for name, method in self.described.register.items():
            label = ["label"] if "label" in data and self.described.drawn_on == name else []
            if method == "header":
                grid = Grid.of(data[to])
                data[name] = resample(data[name], grid, "linear", outside=AIR if name == "CT" else 0)
                data |= {key: resample(data[key], grid, "nearest") for key in label}
                continue
            from medseg.transforms import Registerd

            given: dict[Any, Any] = dict(data)
            result: dict[Any, Any] = Registerd(name, to, method, mask_keys={name: label})(given)
            registration = result.pop(f"{name}_registration")
            data |= result
            columns |= registration.columns(f"{name}_")
            attachments[f"{name}_to_{to}.tfm"] = registration.to_bytes()
        return attachments

    # Transforms

    def _transforms(self) -> Any:
        """The transforms of the file as one; they are code, which runs here."""
        from monai.bundle import ConfigParser
        from monai.transforms import Compose, MapTransform, Randomizable

        made = []
        for number, given in enumerate(self.described.transforms):
            key = f"{self.file}: transforms.{number}: {given['_target_']}"
            try:
                transform = ConfigParser({"it": given}).get_parsed_content("it")
            except Exception as error:  # whatever a constructor may raise
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                what = f"{type(cause).__name__}: {one_line(cause)[:300]}"
                raise ConfigError(f"{key}: {given['_target_']} cannot be made: {what}") from error
            if not isinstance(transform, MapTransform):
                raise ConfigError(
                    f"{key}: {given['_target_']} found, a dictionary transform expected (its name ends in d)"
                )
            if isinstance(transform, Randomizable):
                raise ConfigError(
                    f"{key}: {given['_target_']} is random: a dataset must be the same each time; use it in training"
                )
            made.append(transform)
        return Compose(made)

    def _transformed(self, image: "MetaTensor", label: "MetaTensor | None") -> "tuple[MetaTensor, MetaTensor | None]":
        """Image and label as the transforms of the file leave them."""
        import torch
        from monai.data import MetaTensor

        from data_prep.resample import check_same_grid

        names = self.described.channel_names
        data: dict[str, Any] = {name: image[n : n + 1] for n, name in enumerate(names)}
        if label is not None:
            data["label"] = label
        data = self._transforms()(data)
        for name in data:
            if not isinstance(data[name], MetaTensor):
                raise DatasetError(f"{name} after the transforms: {type(data[name]).__name__}: expected a MetaTensor")
            check_same_grid(data[names[0]], data[name], f"{name} after the transforms", names[0])
        affine = data[names[0]].affine
        image = MetaTensor(torch.cat([data[name].as_tensor().float() for name in names]), affine=affine)
        if label is None:
            return image, None
        values = data["label"].as_tensor()
        if not torch.equal(values, values.round()):
            raise DatasetError("the transforms left values between whole numbers in the label: use mode nearest for it")
        return image, MetaTensor(values.to(torch.uint8), affine=affine)


def _united(inside: "dict[str, torch.Tensor]", image: "MetaTensor", plan: Plan) -> "tuple[MetaTensor, dict[str, str]]":
    """One label of the masks of all classes; where they overlap, the class named first has the voxel."""
    import torch
    from monai.data import MetaTensor

    label = torch.zeros((1, *image.shape[1:]), dtype=torch.uint8)
    for name in reversed(inside):
        label[inside[name]] = plan.labels[name]
    columns = {}
    if len(inside) > 1:
        overlap = int((torch.stack(list(inside.values())).sum(0) > 1).sum())
        columns["overlap_ml"] = f"{overlap * abs(float(torch.linalg.det(image.affine[:3, :3]))) / 1000:.6g}"
    return MetaTensor(label, affine=image.affine), columns


def _walk(source: Path) -> Iterator[tuple[Path, str]]:
    """Every file and folder below a folder with its path from there, hidden ones left out."""
    for root, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(root)
        for name in folders:
            yield base / name, (base / name).relative_to(source).as_posix() + "/"
        for name in sorted(files):
            if not name.startswith("."):
                yield base / name, (base / name).relative_to(source).as_posix()


def _files(path: Path) -> tuple[Path, ...]:
    """The files that a path stands for: those of a folder, or a header and its data."""
    from medseg.io.series import walk

    if path.is_dir():
        return tuple(walk(path))
    return with_voxels(path)
