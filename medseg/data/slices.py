"""The slice store: all slices of a dataset in one HDF5 file, and the torch dataset that reads it.

The layout is that of Moe, "Deep learning for automatic delineation of tumours from PET/CT images" (2019), table 4.1: a
group per part (``train``, ``val``, ``test``), and in each group datasets that share their first axis:

========== ============== ======= ==================================================
images     [n, x, y, c]   float32 input channels, in the units of the dataset
masks      [n, x, y, m]   float32 0 or 1, one channel per label but the background
patient_id [n]            uint32  index into the file's attribute ``patients``
slice_id   [n]            uint32  index of the slice in its case's 3D image
case_id    [n]            uint32  index into the group's attribute ``cases``
voxels     [n, m]         uint32  foreground voxels of each mask: which slice holds what, without reading the masks
========== ============== ======= ==================================================

Attributes of the file, all JSON: ``channel_names``, ``labels`` (name to value), ``patients``, ``settings`` (fold, keep,
axis, size), and, plain, ``version`` and ``source_sha256`` (see ``source_hash``). Attribute of a group: ``cases``, a
JSON list of ``{"index", "case", "patient", "spacing", "shape", "axcodes"}``; spacing (mm), shape and the anatomical
directions to which the axes run (``LPS``) are those of the case in the dataset, its slice axis moved to the end. A
chunk is one slice. Nothing is compressed by default: reading a slice at random takes then a tenth of the time that lzf
takes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from medseg.data.folder import DatasetFolder
from medseg.errors import ConfigError, DatasetError, LeakageError
from medseg.io import atomic_path, read_image
from medseg.io.same_grid import millimeters_apart
from medseg.io.threads import in_order

PARTS = ("train", "val", "test")
#: What is kept of a part unless the caller says otherwise: empty slices teach little but count in an evaluation.
KEEP = {"train": "foreground", "val": "all", "test": "all"}
VERSION = 2
_PER_SLICE = ("images", "masks", "patient_id", "slice_id", "case_id", "voxels")
# A fixed file format, so that the same dataset gives the same bytes; 1.10 holds attributes of more than 64 KiB.
_LIBVER = ("v110", "v110")
_AIR_HU = -1024.0
_AXIS_OF = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


def write_slices(
    dataset_dir: str | os.PathLike[str],
    *,
    keep: Mapping[str, str] | None = None,
    axis: int = 2,
    size: Sequence[int] | None = None,
    fold: int = 0,
    out: str | os.PathLike[str] | None = None,
    compression: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the slices of a dataset to one HDF5 file (layout: see the module :mod:`medseg.data.slices`).

    Cases are read one after another, a few at a time, so memory holds a few cases and never the dataset. The file
    appears under its name when it is complete; the same dataset and arguments give the same bytes.

    Args:
        dataset_dir: a dataset folder with ``splits.json``.
        keep: ``"foreground"`` (slices with any label but the background) or ``"all"`` for ``train``, ``val`` and
            ``test``; default: foreground for train, all for val and test. Scores of volumes need all.
        axis: array axis along which the images are cut; 2 is the slice axis of a DICOM series.
        size: (x, y) of the slices. Images are cropped or padded about their center; without it all cases must have
            slices of one size. A CT channel is padded with -1024 HU, any other channel with its minimum in the case.
        fold: which fold of ``splits.json``.
        out: the file; default ``slices.h5`` in the dataset folder.
        compression: ``None``, ``"lzf"`` or ``"gzip"``.
        workers: threads that read cases; default: one per core, four at most.
        progress: called with (cases done, cases in all).

    Returns:
        the path of the file.

    Raises:
        DatasetError: no labels, slices of several sizes and no ``size``, a ``size`` that cuts foreground off, a label
            on another grid than its image or with a value that ``dataset.json`` does not name, cases sliced along
            different anatomical axes, no slice left in the train part.
        LeakageError: a patient stands in two parts of ``splits.json``.
        ReadError: a file cannot be read.
    """
    folder = DatasetFolder(dataset_dir)
    unknown = set(keep or {}) - set(PARTS)
    if unknown or set((keep or {}).values()) - {"foreground", "all"}:
        raise DatasetError(f"keep: {dict(keep or {})} given, foreground or all for {', '.join(PARTS)} expected")
    keep = {**KEEP, **(keep or {})}
    if axis not in (0, 1, 2):
        raise DatasetError(f"axis: {axis} given, 0, 1 or 2 expected")
    if folder.classes:
        raise DatasetError(f"{folder.root}: its cases have classes, not labels; slices are made of labeled images")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise DatasetError(f"size: {tuple(size)} given, two positive numbers expected")
    cases, splits = folder.cases, folder.splits
    lists = {part: folder.datalist(part, fold) for part in PARTS}
    for entry in (entry for entries in lists.values() for entry in entries):
        if not entry.get("label"):
            raise DatasetError(f"{folder.root}: case {entry['case']} has no label; slices are made of labeled cases")

    channels = list(folder.channel_names)
    labels = {name: int(value) for name, value in folder.labels.items()}
    foreground = [value for value in labels.values() if value]
    patients = sorted(set(cases["patient"].astype(str)))
    patient_index = {patient: index for index, patient in enumerate(patients)}
    in_plane = tuple(size) if size is not None else _common_size(cases, axis)
    total, done = sum(map(len, lists.values())), 0
    workers = workers or min(4, len(os.sched_getaffinity(0)))
    path = Path(out) if out is not None else folder.root / "slices.h5"
    first: _Case | None = None

    with atomic_path(path) as temporary, h5py.File(temporary, "w", libver=_LIBVER) as file:
        file.attrs["version"] = VERSION
        file.attrs["source_sha256"] = source_hash(cases, splits, fold)
        for name, value in {
            "channel_names": channels,
            "labels": labels,
            "patients": patients,
            "settings": {"fold": fold, "keep": keep, "axis": axis, "size": list(size) if size is not None else None},
        }.items():
            file.attrs[name] = json.dumps(value)
        for part, entries in lists.items():
            group = file.create_group(part)
            _create(group, in_plane, len(channels), len(foreground), compression)
            table = []

            def read(entry: Mapping[str, Any], kept: str = keep[part]) -> "_Case":
                return _read_case(entry, channels, foreground, axis, in_plane, kept)

            for index, case in enumerate(in_order(read, entries, workers)):
                first = first or case
                if _AXIS_OF[case.axcodes[2]] != _AXIS_OF[first.axcodes[2]]:
                    raise DatasetError(
                        f"{folder.root}: axis {axis} of case {case.name} runs to {case.axcodes[2]}, that of case "
                        f"{first.name} to {first.axcodes[2]}; build the dataset with one orientation"
                    )
                _append(
                    group,
                    images=case.images,
                    masks=case.masks,
                    slice_id=case.slices,
                    patient_id=np.full(len(case.slices), patient_index[case.patient]),
                    case_id=np.full(len(case.slices), index),
                    voxels=np.count_nonzero(case.masks, axis=(1, 2)),
                )
                row = {"index": index, "case": case.name, "patient": case.patient}
                table.append({**row, "spacing": case.spacing, "shape": case.shape, "axcodes": case.axcodes})
                done += 1
                if progress:
                    progress(done, total)
            group.attrs["cases"] = json.dumps(table)
        if not len(file["train/images"]):
            raise DatasetError(f"{folder.root}: the train part has no slice with foreground; check the labels")
    return path


class SliceDataset(Dataset[dict[str, Any]]):
    """The slices of one part of a slice store, in the order of the file, read from disk one by one.

    Every process opens the file for itself, and only when it reads its first slice, so the dataset can be pickled and
    used by any number of forked or spawned workers.

    Args:
        path: the HDF5 file that :func:`write_slices` wrote.
        group: ``"train"``, ``"val"`` or ``"test"``.
        transform: applied to the dictionary of each slice.

    A slice is a dictionary:

    - ``image``: float32 tensor [c, x, y]; ``label``: float32 tensor [m, x, y] of 0 and 1, one channel per label but the
      background;
    - ``case``, ``patient``: str; ``slice``: int, the position in the case's 3D image;
    - ``spacing``: float32 tensor [3]: mm along x, along y and between slices; ``axcodes``: where the three axes run to,
      such as ``LPS``.

    Attributes:
        channel_names: names of the image channels.
        labels: value of each label by name, background included.
        fold: which fold of ``splits.json`` the slices are of.
        cases: a table with a row per case (case, patient, spacing, shape, axcodes), also of those with no slice kept.

    Raises:
        DatasetError: no such file or group, or a file that is not a complete slice store.
        LeakageError: a patient of this group stands in another group too.

    Example:
        >>> dataset = SliceDataset("DATASET/slices.h5", "train")                          # doctest: +SKIP
        >>> dataset[0]["image"].shape, dataset[0]["label"].shape                          # doctest: +SKIP
        (torch.Size([2, 256, 256]), torch.Size([1, 256, 256]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        group: str,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.group = group
        self.transform = transform
        self._file: h5py.File | None = None
        self._pid = -1
        with _open(self.path) as file:
            _check_store(file, self.path)
            if group not in file:
                raise DatasetError(f"{self.path}: no group {group!r}; there are {', '.join(file)}")
            self.channel_names: list[str] = json.loads(file.attrs["channel_names"])
            self.labels: dict[str, int] = json.loads(file.attrs["labels"])
            self.fold = int(json.loads(file.attrs["settings"])["fold"])
            patients = json.loads(file.attrs["patients"])
            cases = json.loads(file[group].attrs["cases"])
            self._case_id = file[group]["case_id"][:]
            self._slice_id = file[group]["slice_id"][:]
            self._voxels = file[group]["voxels"][:]
            self._size = file[group]["masks"].shape[1:3]
        self._foreground = [name for name, value in sorted(self.labels.items(), key=lambda item: item[1]) if value]
        self.cases = pd.DataFrame(cases, columns=["case", "patient", "spacing", "shape", "axcodes"])
        if len(self) and (self._case_id.max() >= len(cases) or not set(self.cases["patient"]) <= set(patients)):
            raise DatasetError(f"{self.path}: slices of cases that are not listed; run `data_prep slices` again")
        self._names = [(str(case["case"]), str(case["patient"])) for case in cases]
        self._spacing = [torch.tensor(case["spacing"], dtype=torch.float32) for case in cases]

    def __len__(self) -> int:
        return len(self._case_id)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        index = range(len(self))[index]
        group = self._opened()[self.group]
        try:
            image, mask = group["images"][index], group["masks"][index]
        except OSError as error:
            raise DatasetError(f"{self.path}: slice {index} of {self.group} cannot be read ({error})") from error
        case = int(self._case_id[index])
        name, patient = self._names[case]
        item = {
            "image": _channel_first(image),
            "label": _channel_first(mask),
            "case": name,
            "patient": patient,
            "slice": int(self._slice_id[index]),
            "spacing": self._spacing[case].clone(),
            "axcodes": str(self.cases["axcodes"].iat[case]),
        }
        return item if self.transform is None else self.transform(item)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Of every slice, the row of its case in ``cases`` and its position in the case's 3D image: [n, 2]."""
        return np.stack([self._case_id, self._slice_id], axis=1).astype(np.int64)

    @property
    def class_counts(self) -> dict[str, int]:
        """Voxels of every label in the slices of this part, background included; no mask is read."""
        foreground = [int(n) for n in self._voxels.sum(axis=0)]
        counts = dict(zip(self._foreground, foreground, strict=True))
        background = int(np.prod(self._size)) * len(self) - sum(foreground)
        return {name: counts.get(name, background) for name in sorted(self.labels, key=self.labels.__getitem__)}

    def has_label(self, name: str) -> NDArray[np.bool_]:
        """Say for every slice whether a voxel of it has this label; no mask is read.

        Args:
            name: one of ``labels`` but the background.

        Raises:
            ConfigError: there is no such label.
        """
        if name not in self._foreground:
            raise ConfigError(f"label: {name!r} given, one of {', '.join(self._foreground)} expected")
        return self._voxels[:, self._foreground.index(name)] > 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_pid": -1}

    def close(self) -> None:
        """Close the file; the next slice opens it again."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file = None

    def _opened(self) -> h5py.File:
        # A handle that came through a fork belongs to the parent: the child opens its own and leaves that one alone.
        if self._file is None or self._pid != os.getpid():
            self._file = _open(self.path)
            self._pid = os.getpid()
        return self._file


def source_hash(cases: pd.DataFrame, splits: Mapping[str, Any], fold: int) -> str:
    """SHA-256 of what a slice store is made of: the cases of every part of a fold and the hashes of their voxels.

    A store whose attribute ``source_sha256`` differs was written before the dataset or its split changed.
    """
    hashed = cases.assign(case=cases["case"].astype(str)).set_index("case")[["image_sha256", "label_sha256"]]
    voxels = {case: [str(value) for value in row] for case, row in zip(hashed.index, hashed.to_numpy(), strict=True)}
    parts = {**splits["folds"][fold], "test": splits["test"]}
    source = {part: {case: voxels.get(case) for case in parts[part]} for part in PARTS}
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


def stored_source_hash(path: str | os.PathLike[str]) -> tuple[int, str]:
    """Fold and source hash that a slice store was written from; see :func:`source_hash`.

    Raises:
        DatasetError: the file is not a complete slice store.
        LeakageError: a patient stands in two of its groups.
    """
    with _open(Path(path)) as file:
        _check_store(file, Path(path))
        return int(json.loads(file.attrs["settings"])["fold"]), str(file.attrs["source_sha256"])


@dataclass(frozen=True)
class _Case:
    name: str
    patient: str
    images: NDArray[np.float32]
    masks: NDArray[np.float32]
    slices: NDArray[np.intp]
    spacing: list[float]
    shape: list[int]
    axcodes: str


def _read_case(
    entry: Mapping[str, Any],
    channels: Sequence[str],
    foreground: Sequence[int],
    axis: int,
    size: tuple[int, ...],
    keep: str,
) -> _Case:
    """Read the slices that are kept of one case: images [n, x, y, c] and masks [n, x, y, m]."""
    name = str(entry["case"])
    image, label = read_image(entry["image"]), read_image(entry["label"])
    if image.shape[1:] != label.shape[1:] or len(image) != len(channels):
        raise DatasetError(
            f"case {name}: {len(image)} channel(s) of {_by(image.shape[1:])} and a label of {_by(label.shape[1:])}, "
            f"{len(channels)} channel(s) of one shape expected; run `data_prep check`"
        )
    if apart := millimeters_apart(image.shape[1:], image.affine, label.affine):
        raise DatasetError(
            f"case {name}: the label lies up to {apart:.3g} mm away from the image, one grid (affine) expected; "
            "run `data_prep check`"
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    order = [other for other in range(3) if other != axis] + [axis]
    voxels = image.numpy().transpose(0, *(1 + a for a in order))
    truth = label.numpy()[0].transpose(order)
    unknown = sorted(set(np.unique(truth).tolist()) - {0, *foreground})
    if unknown:
        raise DatasetError(
            f"case {name}: the label has the value(s) {', '.join(f'{value:g}' for value in unknown)}, which "
            "dataset.json does not name; run `data_prep check`"
        )
    named = list(zip(channels, voxels, strict=True))
    fill = [_AIR_HU if channel.upper() == "CT" else float(volume.min()) for channel, volume in named]
    fitted = _fit(truth, size, 0)
    if np.count_nonzero(fitted) != np.count_nonzero(truth):
        lost = np.count_nonzero(truth) - np.count_nonzero(fitted)
        raise DatasetError(
            f"case {name}: slices of {_by(size)} cut {lost} foreground voxels off its {_by(truth.shape[:2])}; "
            "choose a larger --size"
        )
    kept = np.flatnonzero(fitted.any(axis=(0, 1))) if keep == "foreground" else np.arange(truth.shape[-1])
    filled = list(zip(voxels, fill, strict=True))
    images = np.stack([_fit(channel[..., kept], size, value) for channel, value in filled], axis=-1)
    masks = np.stack([fitted[..., kept] == value for value in foreground], axis=-1)
    return _Case(
        name=name,
        patient=str(entry["patient"]),
        images=images.transpose(2, 0, 1, 3).astype(np.float32),
        masks=masks.transpose(2, 0, 1, 3).astype(np.float32),
        slices=kept,
        spacing=[round(float(s), 6) for s in nib.affines.voxel_sizes(affine)[order]],
        shape=[int(n) for n in truth.shape],
        axcodes="".join(np.asarray(nib.orientations.aff2axcodes(affine))[order]),
    )


def _fit(volume: NDArray[Any], size: Sequence[int], value: float) -> NDArray[Any]:
    """Crop or pad the first two axes about their center."""
    result = np.full((*size, volume.shape[2]), value, dtype=volume.dtype)
    source, target = [], []
    for have, want in zip(volume.shape[:2], size, strict=True):
        n = min(have, want)
        source.append(slice((have - n) // 2, (have - n) // 2 + n))
        target.append(slice((want - n) // 2, (want - n) // 2 + n))
    result[tuple(target)] = volume[tuple(source)]
    return result


def _common_size(cases: pd.DataFrame, axis: int) -> tuple[int, ...]:
    sizes: dict[tuple[int, ...], list[str]] = {}
    for case, shape in zip(cases["case"].astype(str), cases["shape"].astype(str), strict=True):
        edges = [int(edge) for edge in shape.split("x")]
        del edges[axis]
        sizes.setdefault(tuple(edges), []).append(case)
    if len(sizes) > 1:
        found = sorted(sizes.items(), key=lambda item: (-len(item[1]), item[0]))
        described = ", ".join(f"{_by(size)} ({len(names)}, such as {names[0]})" for size, names in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        largest = " ".join(str(max(size[i] for size in sizes)) for i in range(2))
        raise DatasetError(
            f"cases: slices of {len(sizes)} sizes: {described}{more}; one size expected: "
            f"crop or pad them with --size X Y (--size {largest} crops none)"
        )
    return next(iter(sizes))


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(int(edge)) for edge in shape)


def _create(group: h5py.Group, size: tuple[int, ...], c: int, m: int, compression: str | None) -> None:
    for name, channels in (("images", c), ("masks", m)):
        group.create_dataset(
            name,
            shape=(0, *size, channels),
            maxshape=(None, *size, channels),
            chunks=(1, *size, channels),
            dtype="<f4",
            compression=compression,
            track_times=False,
        )
    for name in ("patient_id", "slice_id", "case_id"):
        group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(1024,), dtype="<u4", track_times=False)
    group.create_dataset("voxels", shape=(0, m), maxshape=(None, m), chunks=(1024, m), dtype="<u4", track_times=False)


def _append(group: h5py.Group, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        start = len(group[name])
        group[name].resize(start + len(array), axis=0)
        group[name][start:] = array


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; `data_prep slices` writes it")
    try:
        # A finished store never changes, so it needs no lock, and no cache: every chunk is read whole.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=0)
    except OSError as error:
        raise DatasetError(f"{path}: not a complete HDF5 file ({error}); run `data_prep slices` again") from error


def _check_store(file: h5py.File, path: Path) -> None:
    """Check that a file is a slice store and that no patient stands in two of its groups."""
    if any(name not in file.attrs for name in ("version", "source_sha256", "channel_names", "labels", "patients")):
        raise DatasetError(f"{path}: an HDF5 file, but not a slice store; `data_prep slices` writes one")
    if file.attrs["version"] != VERSION:
        raise DatasetError(
            f"{path}: a slice store of version {file.attrs['version']}, {VERSION} expected; "
            "run `data_prep slices` again"
        )
    patients = json.loads(file.attrs["patients"])
    where: dict[str, str] = {}
    for part, group in file.items():
        missing = [name for name in _PER_SLICE if name not in group]
        if missing or "cases" not in group.attrs:
            raise DatasetError(f"{path}: the group {part} has no {missing[0] if missing else 'attribute cases'}")
        lengths = {name: len(group[name]) for name in _PER_SLICE}
        if len(set(lengths.values())) > 1:
            raise DatasetError(f"{path}: the datasets of {part} differ in length: {lengths}")
        members = {case["patient"] for case in json.loads(group.attrs["cases"])}
        members |= {patients[i] if i < len(patients) else f"number {i}" for i in np.unique(group["patient_id"][:])}
        for patient in sorted(members):
            other = where.setdefault(patient, part)
            if other != part:
                raise LeakageError(
                    f"{path}: patient {patient} has slices in {other} and in {part}; a patient may be in one part "
                    "only: correct splits.json and run `data_prep slices` again"
                )


def _channel_first(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))
