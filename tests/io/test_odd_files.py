"""The test files of other projects: each is read or refused by one of medseg's own errors, within 1 GB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.realdata

# Each file alone, in one child: the kernel tells the peak of each.
CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fuzzing import _peak, _reset_peak, complaint
from medseg import io as room

doors = [getattr(room, name) for name in ("read_image", "read_label", "read_volumes", "read_seg", "list_rois")
         if hasattr(room, name)]
for door in doors:
    for path in sorted(Path(sys.argv[1]).rglob("*")):
        if not path.is_file():
            continue
        print(json.dumps({"begin": f"{door.__name__} {path}"}), flush=True)
        _reset_peak()
        resting = _peak()
        try:
            door(path)
            wrong, how = None, "read"
        except Exception as error:
            wrong, how = complaint(error), f"refused: {error}"
        if _peak() - resting > 1_000_000_000:
            wrong = f"took {_peak() - resting:,} bytes"
        print(json.dumps({"door": door.__name__, "path": str(path), "how": how, "wrong": wrong}), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(data):
    command = [sys.executable, "-c", CHILD, str(data / "odd"), str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert ended.returncode == 0, f"{found[-1:]} {ended.stderr[-3000:]}"
    return [item for item in found if "door" in item]


def test_every_file_is_read_or_refused_by_name(outcomes, data):
    assert len(outcomes) > 300
    assert [item for item in outcomes if item["wrong"]] == []


# Files with voxels that are no images by themselves, or that are broken: the words of the refusal.
REFUSED = {
    "mhd_broken/imaging_deprecated__garf__data__ct.mhd": "git-LFS pointer",
    "mhd_broken/benchmarks__benchImageNavigators__pet__data__brain_phantom.mhd": "absent",
    "nibabel/tests/data/analyze.hdr": "Analyze 7.5",
    "nibabel/tests/data/nifti1.hdr": "'nifti1.img' with its voxels is absent",
    "nibabel/tests/data/row_major.dconn.nii": "6 axes|1, 1, 1, 1, 10, 10",
    "nibabel/tests/data/tiny.mnc": "MINC",
    "nibabel/tests/data/small.mnc": "HDF5",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_of_a_refusal(outcomes, data, name):
    import re

    (how,) = [
        item["how"] for item in outcomes if item["path"] == str(data / "odd" / name) and item["door"] == "read_image"
    ]
    assert re.search(REFUSED[name], how)
