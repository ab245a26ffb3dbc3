"""What recipes of ready image files share: finding them, and reading them onto one grid."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.recipes.base import Plan
from medseg.errors import DatasetError, MedsegError

if TYPE_CHECKING:
    from monai.data import MetaTensor

#: Files that belong to a header of the same name and are not read by themselves.
COMPANIONS = {".raw", ".zraw", ".img"}
#: Headers whose voxels may lie in other files.
HEADERS = {".mhd", ".mha", ".hdr", ".nhdr", ".nrrd"}
_NRRD_DATA = re.compile(rb"^data ?file:[ \t]*(.+?)[ \t\r]*$", re.MULTILINE | re.IGNORECASE)


def entries(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder by stem; a DICOM series may be a folder of its own. Hidden files are not looked at.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.mhd", "b.raw", "a.nii.gz", "._a.nii.gz"):
        ...     (folder / name).touch()
        >>> {stem: [file.name for file in files] for stem, files in entries(folder).items()}
        {'a': ['a.nii.gz'], 'b': ['b.mhd', 'b.raw']}
    """
    from medseg.io.series import walk

    found: dict[str, list[Path]] = defaultdict(list)
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    claimed = _claimed(paths)
    for path in paths:
        if path.is_dir():
            found[path.name] += [file for file in walk(path) if file not in claimed]
        elif path not in claimed and (path.is_file() or path.is_symlink()):  # a pipe would never end
            found[stem(path)] += with_voxels(path)
    return {name: files for name, files in found.items() if files}


def with_voxels(path: Path) -> tuple[Path, ...]:
    r"""An image file, and the files in which its voxels lie: those that its header names, and those of its name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.nhdr").write_text("NRRD0004\ndata file: other.raw.gz\n")
        >>> (folder / "other.raw.gz").touch()
        >>> [file.name for file in with_voxels(folder / "a.nhdr")]
        ['a.nhdr', 'other.raw.gz']
    """
    if path.suffix.lower() not in HEADERS or not path.is_file():
        return (path,)
    beside = [path.with_suffix(suffix) for suffix in sorted(COMPANIONS)]
    return tuple(dict.fromkeys((path, *(file for file in (*_named(path), *beside) if file.is_file()))))


def _named(path: Path) -> tuple[Path, ...]:
    """The files that a header names for its voxels; none where it cannot be read, as the reader will say."""
    from medseg.io.metaimage import inside, read_meta_header

    try:
        if path.suffix.lower() in (".mhd", ".mha"):
            return read_meta_header(path).files
        with path.open("rb") as file:
            match = _NRRD_DATA.search(file.read(1 << 16).partition(b"\n\n")[0])
        return (inside(path, match[1].decode()),) if match else ()
    except (MedsegError, OSError, UnicodeDecodeError):
        return ()


def _claimed(paths: Iterable[Path]) -> set[Path]:
    """Files that others of them name for their voxels, or that are named after them."""
    return {file for path in paths if path.suffix.lower() in HEADERS for file in with_voxels(path)[1:]}


def stem(path: Path) -> str:
    """The name without its suffix, of which ``.nii.gz`` is one."""
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem


def readable(files: Sequence[Path]) -> Path | list[Path]:
    """What to hand to the reader: the header of a header-and-data pair, or all files of a series."""
    claimed = _claimed(files)
    heads = [path for path in files if path not in claimed and path.suffix.lower() not in COMPANIONS] or list(files)
    return heads[0] if len(heads) == 1 else heads


def read_channels(sources: Mapping[str, Sequence[Path]]) -> "MetaTensor":
    """Read images that must lie on one grid, and stack them.

    Args:
        sources: files by the name of the channel.

    Returns:
        [channel, x, y, z]; a picture is one slice, and a channel per color.

    Raises:
        GeometryError: another grid than that of the first.
    """
    import torch
    from monai.data import MetaTensor

    from data_prep.resample import check_same_grid
    from medseg.io import read_image

    images = {name: as_volume(read_image(readable(files))) for name, files in sources.items()}
    (first, reference), *others = images.items()
    for name, image in others:
        check_same_grid(reference, image, name, first)
    return MetaTensor(torch.cat([image.as_tensor() for image in images.values()]), affine=reference.affine)


def read_mask(files: Sequence[Path], image: "MetaTensor", what: str = "the label") -> "MetaTensor":
    """Read a label map that must lie on the grid of its image.

    Args:
        files: of the one label.
        image: [channel, x, y, z].
        what: what messages call it.

    Returns:
        [1, x, y, z], whole numbers as stored, with the affine of the image.

    Raises:
        ReadError: values that are no labels.
        GeometryError: another grid than that of the image.
    """
    from monai.data import MetaTensor

    from data_prep.resample import check_same_grid
    from medseg.io import read_label

    path = readable(files)
    if not isinstance(path, Path):
        raise DatasetError(f"{what} is {len(path)} files ({path[0].name}, …): expected one file")
    label = as_volume(read_label(path))
    check_same_grid(image, label, what, "the image")
    return MetaTensor(label.as_tensor(), affine=image.affine)


def renumber(label: "MetaTensor", plan: Plan) -> "MetaTensor":
    """The values that a plan gives to those of the source.

    Args:
        label: [1, x, y, z], values of the source.
        plan: its ``remapped``, or its ``labels`` where values stay.

    Returns:
        [1, x, y, z], uint8.

    Raises:
        DatasetError: a value that the plan does not know.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> plan = Plan(("CT",), {"background": 0, "vessel": 1}, {"0": 0, "255": 1})
        >>> renumber(MetaTensor(torch.tensor([[[[0, 255]]]])), plan).tolist()
        [[[[0, 1]]]]
    """
    import torch
    from monai.data import MetaTensor

    values = label.as_tensor()
    numbers = {int(key): number for key, number in plan.remapped.items()} or {n: n for n in plan.labels.values()}
    result, known = torch.zeros(values.shape, dtype=torch.uint8), 0
    for value, number in numbers.items():
        inside = values == value
        known += int(inside.sum())
        result.masked_fill_(inside, number)
    if known < values.numel():
        unknown = sorted(set(values.unique().tolist()) - set(numbers))
        raise DatasetError(f"the label holds the values {unknown}: expected {sorted(numbers)}")
    return MetaTensor(result, affine=label.affine)


def respaced(
    image: "MetaTensor", label: "MetaTensor | None", spacing: tuple[float, float, float] | None
) -> "tuple[MetaTensor, MetaTensor | None]":
    """An image (linearly) and its label (nearest neighbor) at another spacing in mm; None leaves them."""
    from data_prep.resample import resample, spaced_grid

    if spacing is None:
        return image, label
    grid = spaced_grid(image, spacing)
    return resample(image, grid, "linear", edge=True), None if label is None else resample(label, grid, "nearest")


def as_volume(image: "MetaTensor") -> "MetaTensor":
    """[channel, x, y, z], a picture as one slice."""
    if image.ndim == 3:
        from monai.data import MetaTensor

        return MetaTensor(image.as_tensor()[..., None], affine=image.affine)
    return image
