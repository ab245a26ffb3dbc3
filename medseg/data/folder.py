"""The dataset on disk: a folder that nnU-Net v2 and MONAI both read as it is.

::

    DATASET/
      dataset.json                 nnU-Net v2 keys, and the Decathlon lists that MONAI reads
      imagesTr/CASE_0000.nii.gz    one file per channel, float32
      labelsTr/CASE.nii.gz         uint8, labels 0 … n-1 (a classification has none: its classes stand in the lists)
      attachments/CASE_NAME        what else a recipe keeps of a case, such as the transform of a registration
      cases.csv                    a row per case
      splits.json                  which case is in which part, by patient
      splits_final.json            the same folds as nnU-Net wants them
      manifest.json                recipe, options, versions, hashes of the sources, what failed and why

While ``data_prep build`` is at work there is a folder ``.build`` in it; a dataset with that folder is unfinished.
"""

import difflib
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medseg.data.splits import check_splits
from medseg.errors import ConfigError, DatasetError
from medseg.io import atomic_write_text

if TYPE_CHECKING:
    from monai.data import MetaTensor

FILE_ENDING = ".nii.gz"
#: The folder of a build under way; a dataset that has it is not finished.
UNFINISHED = ".build"
#: Columns of cases.csv that are text, whatever they look like ("001" stays "001").
TEXT_COLUMNS = (
    *("case", "patient", "stratum", "class", "lesion", "position", "shape", "spacing", "image_sha256", "label_sha256"),
)
#: Columns that stand in the lists of dataset.json too, where a dataset has them.
LISTED = ("lesion", "position")
_DECATHLON = {"training": "train", "validation": "val"}
PARTS = ("train", "val", "test", "all")


class DatasetFolder:
    """A dataset on disk: its description, its cases, its parts.

    Nothing is read until it is asked for, and each file is read once.

    Args:
        root: the folder that ``data_prep build`` wrote.

    Raises:
        DatasetError: the folder is no dataset, or its build is unfinished. Every property and method raises it when
            the file that it needs is absent or contradicts another, in one line that names the file.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DatasetError(f"{self.root}: no such folder; give a dataset that `data_prep build` wrote")
        if (self.root / UNFINISHED).exists():
            raise DatasetError(f"{self.root}: its build is unfinished; run the same `data_prep build` again")
        if not (self.root / "dataset.json").is_file():
            raise DatasetError(f"{self.root}: no dataset.json in it; give a dataset that `data_prep build` wrote")

    def __repr__(self) -> str:
        return f"DatasetFolder({str(self.root)!r})"

    @cached_property
    def info(self) -> dict[str, Any]:
        """The content of dataset.json."""
        info = _read_json(self.root / "dataset.json")
        kind = "classes" if isinstance(info, dict) and "classes" in info else "labels"
        for key in ("channel_names", kind):
            if not isinstance(info, dict) or not isinstance(info.get(key), dict) or not info[key]:
                raise DatasetError(f"{self.root / 'dataset.json'}: no {key} in it; build the dataset again")
        names, values = info["channel_names"], info[kind]
        if sorted(names) != sorted(map(str, range(len(names)))) or not all(isinstance(n, str) for n in names.values()):
            raise DatasetError(
                f"{self.root / 'dataset.json'}: channel_names: {names} found, names by number from 0 on expected"
            )
        # Regions of nnU-Net are lists, and Decathlon has the names by value.
        whole = [value for value in values.values() if type(value) is int and value >= 0]
        if len(set(whole)) < len(values):
            raise DatasetError(f"{self.root / 'dataset.json'}: {kind}: {values} found, numbers from 0 by name expected")
        return info

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels, in order, in nnU-Net's words (``CT``)."""
        names = self.info["channel_names"]
        return [names[key] for key in sorted(names, key=int)]

    @property
    def labels(self) -> dict[str, int]:
        """Value of each label by name, ``background`` (0) first; empty for a classification."""
        return dict(sorted(self.info.get("labels", {}).items(), key=lambda item: item[1]))

    @property
    def classes(self) -> dict[str, int]:
        """Of a classification, value of each class by name, 0 first; empty for a segmentation."""
        return dict(sorted(self.info.get("classes", {}).items(), key=lambda item: item[1]))

    @cached_property
    def cases(self) -> pd.DataFrame:
        """The table cases.csv, a row per case.

        Columns: ``case``, ``patient`` (pseudonyms, unless the public identifiers were kept), ``stratum`` (may be
        empty), ``shape`` (``256x256x120``), ``spacing`` (mm, ``1x1x3``), ``volume_ml_<label>`` for every label (or, of
        a classification, ``class``), ``image_sha256`` and ``label_sha256`` (of the pixels, see :func:`pixel_hash`), and
        what the recipe measured.
        """
        path = self.root / "cases.csv"
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        except FileNotFoundError:
            raise DatasetError(f"{path}: no such file; build the dataset again") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: not a table ({' '.join(str(error).split())})") from None
        for column in ("case", "patient"):
            if column not in table:
                raise DatasetError(f"{path}: the column {column} is missing; build the dataset again")
        if table["case"].duplicated().any():
            raise DatasetError(f"{path}: case {table['case'][table['case'].duplicated()].iloc[0]} is listed twice")
        for column in table.columns.difference(list(TEXT_COLUMNS)):
            try:
                table[column] = pd.to_numeric(table[column])
            except ValueError:
                continue
        return table

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return dict(_read_json(self.root / "manifest.json"))

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The content of splits.json, once it is certain that no patient is in two parts.

        Raises:
            LeakageError: a patient is in two parts of a fold.
            DatasetError: there is no splits.json, or it does not fit cases.csv.
        """
        path = self.root / "splits.json"
        if not path.is_file():
            raise DatasetError(f"{path}: no such file; run `data_prep split` on the dataset")
        splits = dict(_read_json(path))
        check_splits(splits, self.cases, name=str(path))
        return splits

    def image_paths(self, case: str) -> list[Path]:
        """Paths of the channels of a case, in order."""
        return [self.root / name for name in image_names(case, len(self.channel_names))]

    def label_path(self, case: str) -> Path:
        """Path of the label of a case."""
        return self.root / label_name(case)

    def datalist(self, split: str, fold: int = 0) -> list[dict[str, Any]]:
        """The cases of one part, as MONAI's datasets take them.

        Args:
            split: ``train``, ``val``, ``test``, or ``all`` (which needs no splits.json).
            fold: which fold, from 0; a split into train, val and test is one fold.

        Returns:
            a dict per case, in the order of splits.json, with ``image`` (absolute paths, one per channel), ``label``
            (absolute path; of a classification, the number of the class), ``case`` and ``patient``, and ``lesion`` and
            ``position`` where the dataset has them.

        Raises:
            ConfigError: no such part.
            DatasetError: no such fold, no splits.json, or a file of a case is missing.
            LeakageError: a patient is in two parts.
        """
        if split not in PARTS:
            near = difflib.get_close_matches(str(split), PARTS, n=1, cutoff=0.3)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ConfigError(f"split: {split!r} given, one of {', '.join(PARTS)} expected{hint}")
        rows = {str(row["case"]): row for row in self.cases.to_dict("records")}
        if split == "all":
            chosen = list(rows)
        else:
            folds = self.splits["folds"]
            if not 0 <= fold < len(folds):
                raise DatasetError(f"{self.root / 'splits.json'}: fold {fold} asked for, it has 0 to {len(folds) - 1}")
            chosen = self.splits["test"] if split == "test" else folds[fold][split]
        entries = []
        for case in chosen:
            images, row = [path.absolute() for path in self.image_paths(case)], rows[case]
            label = None if self.classes else self.label_path(case).absolute()
            for path in (*images, *([label] if label else [])):
                if not path.is_file():
                    raise DatasetError(f"{path}: no such file, though cases.csv lists {case}; build the dataset again")
            entries.append(
                {
                    "image": [str(path) for path in images],
                    "label": str(label) if label else _class_of(row, self.classes),
                    "case": case,
                    "patient": row["patient"],
                    **{column: row[column] for column in LISTED if column in row},
                }
            )
        return entries

    def dataset_hash(self) -> str:
        """SHA-256 of what an experiment depends on: cases.csv (with the hashes of all pixels) and splits.json.

        Two datasets with the same hash hold the same cases, pixels and parts, wherever they lie.
        """
        digest = hashlib.sha256()
        for name in ("cases.csv", "splits.json"):
            path = self.root / name
            content = path.read_bytes() if path.is_file() else b""
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def write_split(self, splits: Mapping[str, Any]) -> None:
        """Keep a split: splits.json, splits_final.json for nnU-Net, and the lists in dataset.json.

        nnU-Net takes everything in imagesTr unless dataset.json has a ``dataset`` key; it gets one with the training
        and validation cases only, and ``numTraining`` to match, so that it never sees a test case. The Decathlon lists
        ``training``, ``validation`` and ``test`` say the same to MONAI; with several folds there is one ``training``
        list whose entries have a ``fold`` (the one that validates on them). A slices.h5 made from another split is
        removed: its groups would mix the parts.

        Args:
            splits: as :func:`medseg.data.make_splits` returns it.

        Raises:
            LeakageError: a patient is in two parts of a fold.
            DatasetError: the splits do not fit cases.csv.
        """
        splits = dict(splits)
        check_splits(splits, self.cases, name="splits")
        text = _to_json(splits)
        path = self.root / "splits.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            (self.root / "slices.h5").unlink(missing_ok=True)
        atomic_write_text(self.root / "dataset.json", _to_json(_with_split(self.info, self.cases, splits)))
        atomic_write_text(self.root / "splits_final.json", _to_json(splits["folds"]))
        atomic_write_text(path, text)  # last: it is the one that medseg reads
        for name in ("info", "splits"):
            self.__dict__.pop(name, None)


def datalist(dataset_dir: str | os.PathLike[str], split: str, fold: int = 0) -> list[dict[str, Any]]:
    """The cases of one part of a dataset: :meth:`DatasetFolder.datalist` in a form for YAML.

    Args:
        dataset_dir: the dataset.
        split: ``train``, ``val``, ``test`` or ``all``.
        fold: which fold, from 0.
    """
    return DatasetFolder(dataset_dir).datalist(split, fold)


def image_names(case: str, n_channels: int) -> list[str]:
    """Paths of the channels of a case, relative to the dataset.

    Example:
        >>> image_names("a1", 2)
        ['imagesTr/a1_0000.nii.gz', 'imagesTr/a1_0001.nii.gz']
    """
    return [f"imagesTr/{case}_{channel:04d}{FILE_ENDING}" for channel in range(n_channels)]


def label_name(case: str) -> str:
    """Path of the label of a case, relative to the dataset.

    Example:
        >>> label_name("a1")
        'labelsTr/a1.nii.gz'
    """
    return f"labelsTr/{case}{FILE_ENDING}"


def attachment_name(case: str, name: str) -> str:
    """Path of a further file of a case, relative to the dataset.

    Example:
        >>> attachment_name("a1", "T1_to_FLAIR.tfm")
        'attachments/a1_T1_to_FLAIR.tfm'
    """
    return f"attachments/{case}_{name}"


def pixel_hash(array: NDArray[Any]) -> str:
    """SHA-256 of an array's type, shape and values in C order: equal for equal pixels, whatever the file.

    Example:
        >>> pixel_hash(np.zeros((1, 2), np.uint8)) == pixel_hash(np.zeros((2, 1), np.uint8))
        False
    """
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.data)
    return digest.hexdigest()


def write_case(
    root: str | Path,
    case: str,
    image: "MetaTensor",
    label: "MetaTensor | None" = None,
    labels: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Write the files of one case and measure it.

    Args:
        root: the dataset.
        case: name of the case.
        image: [channel, x, y, z], float32, with its affine (RAS mm).
        label: of a segmentation, [1, x, y, z], values of ``labels``, on the image's grid. Without ``labels`` the case
            is one of a classification, which has none.
        labels: value by name.

    Returns:
        the row of cases.csv as text, without ``patient`` and ``stratum``.

    Raises:
        DatasetError: an array without affine, a value that is no number in the image, a label on another grid, or a
            value that ``labels`` does not name.
    """
    from medseg.io import write_nifti
    from medseg.io.same_grid import millimeters_apart

    for what, given in (("image", image), ("label", label)):
        if given is not None and not hasattr(given, "affine"):
            raise DatasetError(f"{case}: the {what} is a {type(given).__name__}, a MetaTensor with its affine expected")
    affine = np.asarray(image.affine, dtype=np.float64)
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim != 4 or not pixels.size:
        raise DatasetError(f"{case}: image of shape {pixels.shape}, [channel, x, y, z] expected")
    if not np.isfinite(pixels).all():
        raise DatasetError(f"{case}: {np.count_nonzero(~np.isfinite(pixels))} voxels of the image are no finite number")
    columns = {
        "case": case,
        "shape": "x".join(map(str, pixels.shape[1:])),
        "spacing": "x".join(f"{step:.6g}" for step in np.linalg.norm(affine[:3, :3], axis=0)),
        "image_sha256": pixel_hash(pixels),
    }
    mask = None
    if labels is not None:
        if label is None:
            raise DatasetError(f"{case}: no label, one expected")
        mask = np.asarray(label)[0]
        columns |= _measure(case, mask, pixels.shape[1:], abs(np.linalg.det(affine[:3, :3])) / 1000, labels)
        if apart := millimeters_apart(image.shape[1:], affine, label.affine):
            raise DatasetError(
                f"{case}: the label lies up to {apart:.3g} mm away from the image, one grid (affine) expected; "
                "resample it with nearest neighbor first"
            )
        mask = mask.astype(np.uint8)
    (Path(root) / "imagesTr").mkdir(parents=True, exist_ok=True)
    for channel, name in zip(pixels, image_names(case, len(pixels)), strict=True):
        write_nifti((channel, affine), Path(root) / name)
    if mask is not None:
        (Path(root) / "labelsTr").mkdir(parents=True, exist_ok=True)
        write_nifti((mask, affine), Path(root) / label_name(case))
    return columns


def _measure(
    case: str, mask: NDArray[Any], shape: tuple[int, ...], voxel_ml: float, labels: Mapping[str, int]
) -> dict[str, str]:
    """Volumes and hash of a label map, once it is certain that it holds nothing but ``labels``."""
    if mask.shape != shape:
        raise DatasetError(f"{case}: image of shape {shape}, label of shape {mask.shape}")
    if mask.dtype == np.uint8:  # sorting a large volume takes seconds
        counts = np.bincount(mask.ravel(), minlength=1)
        values = np.nonzero(counts)[0]
        counts = counts[values]
    else:
        values, counts = np.unique(mask, return_counts=True)
    unknown = set(values.tolist()) - set(labels.values())
    if unknown:
        raise DatasetError(f"{case}: label values {sorted(unknown)} are not among {dict(labels)}")
    n_voxels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return {
        **{f"volume_ml_{name}": f"{n_voxels.get(value, 0) * voxel_ml:.6g}" for name, value in labels.items() if value},
        "label_sha256": pixel_hash(mask.astype(np.uint8)),
    }


def write_index(
    root: str | Path,
    *,
    name: str,
    channel_names: Sequence[str],
    labels: Mapping[str, int] | None = None,
    classes: Mapping[str, int] | None = None,
    rows: Sequence[Mapping[str, str]],
    manifest: Mapping[str, Any],
    splits: Mapping[str, Any] | None = None,
) -> None:
    """Write what describes the cases: manifest.json, cases.csv and dataset.json, in this order.

    Args:
        root: the dataset.
        name: what dataset.json calls it.
        channel_names: names of the channels in nnU-Net's words.
        labels: of a segmentation, value by name, ``background`` 0 among them.
        classes: of a classification, value by name; the rows then have a ``class``, a name.
        rows: of cases.csv, each with ``case``, ``patient``, ``stratum`` and what :func:`write_case` returned.
        manifest: content of manifest.json.
        splits: the split that the dataset has already, so that dataset.json keeps to it.

    Raises:
        DatasetError: no row, labels or classes that are not 0 … n-1, a case twice.
    """
    if not rows:
        raise DatasetError(f"{root}: no case to write")
    labels, classes = dict(labels or {}), dict(classes or {})
    if classes:
        if labels or sorted(classes.values()) != list(range(len(classes))):
            raise DatasetError(f"classes: {classes} given with labels {labels}, 0 to n-1 and no labels expected")
    elif sorted(labels.values()) != list(range(len(labels))) or labels.get("background") != 0:
        raise DatasetError(f"labels: {labels} given, background 0 and the others 1 to n-1 expected")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = ["case", "patient", "stratum", *(["class"] if classes else []), "shape", "spacing"]
    volumes = [f"volume_ml_{label}" for label, value in labels.items() if value]
    hashes = ["image_sha256"] if classes else ["image_sha256", "label_sha256"]
    others = [column for column in columns if column not in {*first, *volumes, *hashes}]
    table = pd.DataFrame(list(rows), columns=[*first, *volumes, *others, *hashes]).fillna("").sort_values("case")
    if table["case"].duplicated().any():
        raise DatasetError(f"{root}: case {table['case'][table['case'].duplicated()].iloc[0]} twice")
    text = io.StringIO()
    table.to_csv(text, index=False, lineterminator="\n")
    info: dict[str, Any] = {
        "name": name,
        "channel_names": {str(number): channel for number, channel in enumerate(channel_names)},
        ("classes" if classes else "labels"): dict(sorted((classes or labels).items(), key=lambda item: item[1])),
        "numTraining": len(table),
        "file_ending": FILE_ENDING,
    }
    info["training"] = list(list_entries(info, table).values())
    if splits is not None:
        info = _with_split(info, table, splits)
    atomic_write_text(Path(root) / "manifest.json", _to_json(manifest))
    atomic_write_text(Path(root) / "cases.csv", text.getvalue())
    atomic_write_text(Path(root) / "dataset.json", _to_json(info))


def list_entries(info: Mapping[str, Any], table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The entry of every case in the lists of dataset.json."""
    classes = info.get("classes", {})
    entries = {}
    for row in table.to_dict("records"):
        images = image_names(row["case"], len(info["channel_names"]))
        entries[row["case"]] = {
            "image": images[0] if len(images) == 1 else images,
            "label": _class_of(row, classes) if classes else label_name(row["case"]),
            "case": row["case"],
            "patient": row["patient"],
            **{column: row[column] for column in LISTED if column in row},
        }
    return entries


def _class_of(row: Mapping[Any, Any], classes: Mapping[str, int]) -> int:
    name = str(row.get("class"))
    if name not in classes:
        raise DatasetError(
            f"cases.csv: case {row['case']} has the class {name!r}, one of {', '.join(classes)} expected"
        )
    return classes[name]


def _with_split(info: Mapping[str, Any], cases: pd.DataFrame, splits: Mapping[str, Any]) -> dict[str, Any]:
    """The content of dataset.json for a split: what nnU-Net may see, and the lists that MONAI reads."""
    n_channels = len(info["channel_names"])
    entries = list_entries(info, cases)
    folds = splits["folds"]
    used = [case for case in entries if case not in set(splits["test"])]
    lists: dict[str, list[dict[str, Any]]]
    if len(folds) == 1:
        lists = {part: [entries[case] for case in folds[0][key]] for part, key in _DECATHLON.items()}
    else:
        fold_of = {case: {"fold": number} for number, fold in enumerate(folds) for case in fold["val"]}
        lists = {"training": [entries[case] | fold_of.get(case, {}) for case in used]}
    lists["test"] = [entries[case] for case in splits["test"]]
    derived = {"training", "validation", "test", "dataset"}
    result = {
        **{key: value for key, value in info.items() if key not in derived},
        "numTraining": len(used),
        # MONAI's reader fails on an empty list.
        **{part: members for part, members in lists.items() if members},
    }
    if "classes" not in info:  # nnU-Net segments only
        result["dataset"] = {
            case: {"images": image_names(case, n_channels), "label": label_name(case)} for case in used
        }
    return result


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; build the dataset again") from None
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON ({error})") from None
