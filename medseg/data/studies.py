"""Images that were never made into a dataset: lists of DICOM series or of files for inference."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.errors import ConfigError, ReadError
from medseg.io import find_series, match_series

#: Characters of a case's name, so that what is made of it has a name of less than 256 with any suffix.
_LONGEST = 150


def study_datalist(root: str | os.PathLike[str], modalities: Mapping[str, str]) -> list[dict[str, Any]]:
    """Find the DICOM studies below a folder that have an image of every modality.

    Args:
        root: a folder, at any depth of which studies lie.
        modalities: key in the list and DICOM modality, such as ``{"ct": "CT", "pet": "PT"}``.

    Returns:
        an entry per study, under each key the files of its series, and under ``case`` a name made from the
        StudyInstanceUID by SHA-256, which says nothing of the patient and is the same every time.

    Raises:
        ReadError: no study below `root` has them all, or one has two series to choose from.
    """
    found = find_series(root)
    studies = match_series(found, tuple(modalities.values()))
    if not studies:
        seen = sorted({series.modality or series.kind for series in found})
        raise ReadError(
            f"{root}: found {len(found)} series ({', '.join(seen) or 'none'}), expected a study with "
            f"{' and '.join(modalities.values())} on one frame of reference; name the folder of such a study"
        )
    entries = []
    for study in studies:
        name = "study_" + hashlib.sha256(study.study_uid.encode()).hexdigest()[:12]
        if study.problems:
            raise ReadError(
                f"{root}: {name}: {'; '.join(study.problems)}; name the folder of one study that is in order"
            )
        files = {key: [str(f) for f in study.series[modality].files] for key, modality in modalities.items()}
        entries.append({**files, "case": name})
    return sorted(entries, key=lambda entry: str(entry["case"]))


def image_datalist(root: str | os.PathLike[str], pattern: str = "*.nii.gz") -> list[dict[str, str]]:
    """Find the images of a folder, one file (or DICOM series folder) each.

    Args:
        root: the folder.
        pattern: which names in it are images, such as ``*.nii.gz``, or ``**/*.mha`` for those of folders in it as well.
            Names that start with a dot are left out, and folders with such a name.

    Returns:
        an entry per image, sorted, with its path under ``image``, and under ``case`` a name for what is made of it: the
        path below `root` without suffix, in letters, digits, dots, dashes and underscores; where two images would have
        the same name, and where it would be too long for a file's, it is followed by the first digits of the path's
        SHA-256.

    Raises:
        ReadError: there is no such folder, or nothing in it fits `pattern`.
        ConfigError: a pattern that is empty, absolute or leads out of `root`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("knee 2.nii.gz", "knee_1.nii.gz"):
        ...     (folder / name).touch()
        >>> [entry["case"] for entry in image_datalist(folder)]
        ['knee_2', 'knee_1']
    """
    root = Path(root)
    if not root.is_dir():
        raise ReadError(f"{root}: no such folder, expected one with images; name it with --dataset_dir")
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise ConfigError(f"pattern: found {pattern!r}, expected one of names in a folder, such as *.nii.gz")
    found = [path.relative_to(root) for path in root.glob(pattern)]
    files = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise ReadError(f"{root}: found no {pattern} in it, expected images; name their folder, or another --pattern")
    cases = [_case_name(path) for path in files]
    often = Counter(case.lower() for case in cases)  # some file systems take a and A for the same
    entries = []
    for path, case in zip(files, cases, strict=True):
        if often[case.lower()] > 1 or len(case) > _LONGEST:
            case = f"{case[:_LONGEST]}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
        entries.append({"image": str(root / path), "case": case})
    return entries


def _case_name(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    stem = name[: -len(Path(name).suffix)] if Path(name).suffix else name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join([*path.parts[:-1], stem]))
