"""Lists of what was never made into a dataset: studies and images for inference."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.phantom import write_cohort
from medseg.data import image_datalist, study_datalist
from medseg.errors import ConfigError, ReadError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def cases(root: Path, pattern: str = "*.nii.gz") -> list[str]:
    return [entry["case"] for entry in image_datalist(root, pattern)]


def test_images_are_listed_sorted_with_the_name_of_their_file(tmp_path: Path):
    touch(tmp_path, "b.nii.gz", "a.1.nii.gz", "notes.txt", "._a.nii.gz", "deeper/c.nii.gz")
    assert image_datalist(tmp_path) == [
        {"image": str(tmp_path / "a.1.nii.gz"), "case": "a.1"},
        {"image": str(tmp_path / "b.nii.gz"), "case": "b"},
    ]
    assert cases(tmp_path, "**/*.nii.gz") == ["a.1", "b", "deeper_c"]
    assert cases(tmp_path, "*.txt") == ["notes"]
    assert cases(tmp_path, "deeper") == ["deeper"]  # a folder, such as one with a DICOM series


def test_names_that_would_be_the_same_are_told_apart(tmp_path: Path):
    touch(tmp_path, "a b.nii.gz", "a_b.nii.gz", "c.nii.gz")
    first, second, third = cases(tmp_path)
    assert first != second
    assert all(re.fullmatch(r"a_b_[0-9a-f]{12}", name) for name in (first, second))
    assert third == "c"
    # the same name whatever else is there, as long as there are two
    touch(tmp_path, "0.nii.gz")
    assert cases(tmp_path)[1:] == [first, second, third]


def test_names_are_short_enough_for_a_file_and_hidden_folders_are_left_out(tmp_path: Path):
    deep = f"{'a' * 200}/{'b' * 200}"
    touch(tmp_path, f"{deep}/c.nii.gz", f"{deep}/d.nii.gz", ".trash/e.nii.gz", "x/.trash/e.nii.gz")
    first, second = cases(tmp_path, "**/*.nii.gz")
    assert first != second
    for name in (first, second):
        assert re.fullmatch(r"a{150}_[0-9a-f]{12}", name)
        (tmp_path / f"{name}_postprocessed.nii.gz").touch()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(st.text("aA_ -.é/äß", min_size=1, max_size=8), min_size=1, max_size=6))
def test_case_names_are_file_names_and_differ(tmp_path_factory: pytest.TempPathFactory, names: set[str]):
    root = tmp_path_factory.mktemp("images")
    for name in names:
        touch(root, f"x{name.replace('/', '/y').replace('..', '')}.nii.gz")
    found = cases(root, "**/*.nii.gz")
    assert found
    assert len({case.lower() for case in found}) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", case) and not case.startswith(".") for case in found)


def test_a_folder_without_images_is_refused_by_name(tmp_path: Path):
    touch(tmp_path, "a.mha")
    with pytest.raises(ReadError, match=r"found no \*\.nii\.gz in it, expected images; name their folder, or another"):
        image_datalist(tmp_path)
    with pytest.raises(ReadError, match="no such folder"):
        image_datalist(tmp_path / "absent")
    for pattern in ("", "/etc/*", "../*"):
        with pytest.raises(ConfigError, match="pattern: found"):
            image_datalist(tmp_path, pattern)


def test_studies_are_listed_under_names_that_say_nothing(tmp_path: Path):
    write_cohort(tmp_path / "dicom", patients=2, seed=1, image_size=24, slices=6)
    entries = study_datalist(tmp_path / "dicom", {"ct": "CT", "pet": "PT"})
    assert len(entries) == 2
    for entry in entries:
        assert set(entry) == {"ct", "pet", "case"}
        assert re.fullmatch(r"study_[0-9a-f]{12}", entry["case"])
    moved = shutil.move(tmp_path / "dicom", tmp_path / "elsewhere")
    again = study_datalist(moved, {"ct": "CT", "pet": "PT"})
    assert [entry["case"] for entry in again] == [entry["case"] for entry in entries]


def test_a_folder_without_a_whole_study_is_refused_by_name(tmp_path: Path):
    write_cohort(tmp_path / "dicom", patients=1, seed=1, image_size=24, slices=6)
    with pytest.raises(ReadError, match="expected a study with CT and MR"):
        study_datalist(tmp_path / "dicom", {"ct": "CT", "mr": "MR"})
