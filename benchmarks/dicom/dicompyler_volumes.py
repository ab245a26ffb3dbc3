"""Volumes of the structures of an RTSTRUCT by dicompyler-core, which the tests compare masks with.

dicompyler-core needs pydicom below 3, so it gets an environment of its own:

    python -m venv /tmp/dicompyler
    /tmp/dicompyler/bin/pip install "pydicom<3" shapely scikit-image dicompyler-core==0.5.6
    /tmp/dicompyler/bin/python benchmarks/dicom/dicompyler_volumes.py RTSTRUCT.dcm ...

It prints a line of JSON per file: the volume of each structure in cm³, twice. "volumes" are those that
``CalculateStructureVolume`` gives, which counts the first and the last plane half and rounds their areas down; "full"
are the same function's plane by plane, where each counts whole, as in a mask.
"""

import argparse
import json
import warnings
from pathlib import Path

from dicompylercore import dicomparser


def volumes(path: Path) -> dict[str, dict[str, float]]:
    """Return the volumes of every structure that has contours, in cm³."""
    parser = dicomparser.DicomParser(str(path))
    found: dict[str, dict[str, float]] = {"volumes": {}, "full": {}}
    for number, structure in sorted(parser.GetStructures().items()):
        coords = parser.GetStructureCoordinates(number)
        if not any(contour["type"] == "CLOSED_PLANAR" for plane in coords.values() for contour in plane):
            continue
        thickness = parser.CalculatePlaneThickness(coords)
        found["volumes"][structure["name"]] = round(parser.CalculateStructureVolume(coords, thickness), 3)
        planes = ({z: plane} for z, plane in coords.items())
        found["full"][structure["name"]] = round(
            sum(parser.CalculateStructureVolume(one, thickness) for one in planes), 3
        )
    return found


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("files", nargs="+", type=Path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in arguments.parse_args().files:
            print(json.dumps({"file": file.name, **volumes(file)}, ensure_ascii=False))
