import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from medseg.errors import ReadError
from medseg.io import Series, find_series, match_series, read_image, read_series, write_nifti

from .conftest import NAME, PATIENT

STORED = np.arange(4 * 3 * 5, dtype=np.int16).reshape(4, 3, 5)


@pytest.fixture
def archive(tmp_path, make_series, make_rtstruct):
    """A study with CT, PET and a structure set in one folder, and files of other kinds beside it."""
    files = make_series(tmp_path / "mixed", STORED, names=["d", "a", "c", "b"])
    pet = generate_uid()
    make_series(tmp_path / "mixed", STORED[:2], modality="PT", series=pet, names=["p1", "p0"], step=-4)
    square = np.array([[-8.5, -19, 30], [-4, -19, 30], [-4, -15, 30], [-8.5, -15, 30]])
    make_rtstruct(tmp_path / "mixed" / "rs.dcm", {"GTV": [square]})
    write_nifti((np.zeros((2, 4, 5, 6), np.uint8), np.diag([2, 2, 3, 1])), tmp_path / "image.nii.gz")
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("notes")
    return tmp_path, files


def test_what_is_found(archive):
    root, files = archive
    by_modality = {series.modality or series.kind: series for series in find_series(root)}
    assert set(by_modality) == {"CT", "PT", "RTSTRUCT", "nifti", "picture"}
    ct = by_modality["CT"]
    assert (ct.shape, ct.spacing, ct.n_files, ct.number, ct.problems) == ((5, 3, 4), (1.5, 2.0, 3.0), 4, 3, ())
    assert ct.files == tuple(files), "in the order of positions"
    np.testing.assert_allclose(ct.affine, read_series(ct).affine.numpy())
    assert [path.name for path in by_modality["PT"].files] == ["p0", "p1"]
    assert not by_modality["RTSTRUCT"].is_image
    assert by_modality["RTSTRUCT"].problems == ()
    assert (by_modality["nifti"].shape, by_modality["nifti"].channels) == ((4, 5, 6), 2)
    assert (by_modality["picture"].shape, by_modality["picture"].spacing) == ((6, 4), ())


def test_a_series_shows_neither_name_nor_id(archive):
    text = repr(find_series(archive[0])) + repr(match_series(find_series(archive[0])))
    assert NAME not in text
    assert PATIENT not in text


def test_problems_are_told_and_never_raised(tmp_path, make_series):
    make_series(tmp_path / "gap", np.repeat(STORED, 2, axis=0))[3].unlink()
    (tmp_path / "text.dcm").write_text("not an image")
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "pointer.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "alone.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = alone.raw\n"
    )
    found = {series.files[0].name: series.problems for series in find_series(tmp_path)}
    assert len(found) == 6
    expected = {
        "000.dcm": "1 slice missing",
        "text.dcm": "not DICOM",
        "empty.nii.gz": "empty file",
        "pointer.nii.gz": "git-LFS pointer",
        "cut.png": "damaged picture",
        "alone.mhd": "'alone.raw' is absent",
    }
    for name, words in expected.items():
        assert len(found[name]) == 1, name
        assert words in found[name][0]
        assert "\n" not in found[name][0]


def test_links_in_a_circle_end(tmp_path, make_series):
    make_series(tmp_path / "a" / "ct", STORED)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.dcm").symlink_to(tmp_path / "absent")
    assert [series.n_files for series in find_series(tmp_path)] == [4]


def test_progress_counts_the_files(archive):
    seen = []
    find_series(archive[0], progress=seen.append)
    assert seen == list(range(1, 11))


def test_an_empty_and_an_absent_folder(tmp_path):
    assert find_series(tmp_path) == []
    with pytest.raises(ReadError, match="no such file or folder"):
        find_series(tmp_path / "absent")


def test_a_single_file_is_a_series(tmp_path):
    write_nifti((np.zeros((4, 5, 6), np.uint8), np.eye(4)), tmp_path / "a.nii")
    assert [series.kind for series in find_series(tmp_path / "a.nii")] == ["nifti"]


def test_ct_and_pet_of_a_study_are_matched(archive, uids):
    (study,) = match_series(find_series(archive[0]))
    assert study.study_uid == uids["study"]
    assert {key: series.modality for key, series in study.series.items()} == {"CT": "CT", "PT": "PT"}
    assert [series.modality for series in study.structures] == ["RTSTRUCT"]
    assert study.problems == ()
    assert match_series(find_series(archive[0]), ("CT", "MR")) == []


def series(modality, uid, frame="f", study="s", **more):
    from pathlib import Path

    return Series(
        "dicom", (Path(uid),), modality, series_uid=uid, study_uid=study, frame_of_reference_uid=frame,
        patient_id="p", shape=(2, 2, 2), **more,
    )  # fmt: skip


def test_series_of_different_frames_or_studies_do_not_match():
    assert match_series([series("CT", "1", "f"), series("PT", "2", "g")]) == []
    assert match_series([series("CT", "1", study="s"), series("PT", "2", study="t")]) == []


def test_an_ambiguous_study_says_so_and_localizers_do_not_count():
    scout = series("CT", "0", tags={"ImageType": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    (study,) = match_series([scout, series("CT", "1"), series("PT", "2")])
    assert (study.series["CT"].series_uid, study.problems) == ("1", ())
    (study,) = match_series([series("CT", "1"), series("CT", "3"), series("PT", "2")])
    assert study.series["CT"].series_uid == "1"
    assert "2 CT series" in study.problems[0]


def test_a_sound_series_goes_before_a_broken_one():
    (study,) = match_series([series("CT", "1", problems=("1 slice missing",)), series("CT", "3"), series("PT", "2")])
    assert (study.series["CT"].series_uid, study.problems) == ("3", ())
    (study,) = match_series([series("CT", "1", problems=("1 slice missing",)), series("PT", "2")])
    assert study.problems == ("1 slice missing",)


def test_a_folder_with_one_image_series_and_its_structure_set_is_read(tmp_path, make_series, make_rtstruct):
    make_series(tmp_path, STORED)
    make_rtstruct(tmp_path / "rs.dcm", {})
    assert read_image(tmp_path).shape == (1, 5, 3, 4)
