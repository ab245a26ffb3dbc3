"""Studies that were never made into a dataset: lists of DICOM series for inference."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from medseg.errors import ReadError
from medseg.io import find_series, match_series


def study_datalist(root: str | os.PathLike[str], modalities: Mapping[str, str]) -> list[dict[str, Any]]:
    """Find the DICOM studies below a folder that have an image of every modality.

    Args:
        root: a folder, at any depth of which studies lie.
        modalities: key in the list and DICOM modality, such as ``{"ct": "CT", "pet": "PT"}``.

    Returns:
        an entry per study: under each key the files of its series, and under ``case`` a name made from the
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
