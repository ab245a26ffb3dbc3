import dataclasses
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medseg.errors import ReadError
from medseg.io import Series, find_series, match_series, read_image, read_series, write_nifti
from medseg.io import series as series_module

from .conftest import NAME, PATIENT

OLD = 1_600_000_000 * 10**9

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
    lost, ct = sorted(find_series(tmp_path), key=lambda series: series.n_files)
    assert ct.n_files == 4
    assert lost.problems == (f"{tmp_path / 'dangling.dcm'}: a link to a file that is not there",)


def test_progress_counts_the_files(archive):
    seen = []
    find_series(archive[0], progress=seen.append)
    assert seen == list(range(1, 11))


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for field in dataclasses.fields(Series):
            one, other = getattr(a, field.name), getattr(b, field.name)
            assert repr(one) == repr(other), field.name
    return True


@pytest.fixture
def small_lots(monkeypatch):
    """Three files a lot: some are read by workers, and they come back in any order."""
    monkeypatch.setattr(series_module, "_LOT", 3)


def age(root):
    """Make the files old enough to be cached."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(OLD, OLD))


def test_the_result_does_not_depend_on_workers_or_cache(archive, make_series, small_lots, tmp_path_factory):
    root, _ = archive
    (root / "text.dcm").write_text("not an image")
    (root / "mixed" / "alone.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = alone.raw\n"
    )
    for patient in range(4):
        make_series(root / f"p{patient}", STORED, series=generate_uid(), names=[f"{9 - i}" for i in range(4)])
    age(root)
    cache = tmp_path_factory.mktemp("cache") / "c"
    plain = find_series(root)
    assert len(plain) == 11
    assert same(plain, find_series(root, workers=2))
    assert same(plain, find_series(root, workers=2, cache=cache))
    assert same(plain, find_series(root, cache=cache))
    assert same(plain, find_series(root, workers=3, cache=cache))


@given(data=st.data())
@settings(max_examples=15)
def test_any_tree_gives_the_same_with_a_cache_of_any_of_its_files(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    names = data.draw(st.lists(st.sampled_from(["a.nii", "b/c.nii", "b/d.png", "e.txt", "é/f.nii"]), unique=True))
    cache = tmp_path_factory.mktemp("cache") / "c"
    for step in range(3):
        for name in names:
            if not (root / name).exists() and data.draw(st.booleans()):
                (root / name).parent.mkdir(exist_ok=True)
                size = data.draw(st.integers(1, 4))
                if name.endswith("nii"):
                    write_nifti((np.zeros((2, 3, size), np.uint8), np.eye(4)), root / name)
                elif name.endswith("png"):
                    Image.fromarray(np.zeros((size, 6), np.uint8)).save(root / name)
                else:
                    (root / name).write_text("x" * size)
                os.utime(root / name, ns=(OLD, OLD + step))
            elif (root / name).exists() and data.draw(st.booleans()):
                (root / name).unlink()
        assert same(find_series(root), find_series(root, cache=cache))


def test_what_is_cached_is_not_opened_again(archive, monkeypatch, tmp_path_factory):
    root, _ = archive
    age(root)
    cache = tmp_path_factory.mktemp("cache") / "c"
    before = find_series(root, cache=cache)
    monkeypatch.setattr(series_module, "_read_header", lambda path: pytest.fail(f"{path} was read"))
    assert same(before, find_series(root, cache=cache))


@pytest.mark.parametrize("changed", ["size", "time"])
def test_a_changed_file_is_read_again(tmp_path, changed):
    path = tmp_path / "tree" / "a.nii"
    path.parent.mkdir()
    for shape in ((2, 3, 4), (2, 4, 3) if changed == "time" else (2, 3, 5)):
        write_nifti((np.zeros(shape, np.uint8), np.eye(4)), path)
        os.utime(path, ns=(OLD, OLD + (changed == "time" and shape == (2, 4, 3))))
        (found,) = find_series(path.parent, cache=tmp_path / "c")
        assert found.shape == shape


def test_voxels_that_come_and_go_in_another_file_are_seen(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = a.raw\n"
    )
    age(root)
    assert find_series(root, cache=tmp_path / "c")[0].problems
    (root / "a.raw").write_bytes(bytes(16))
    assert not find_series(root, cache=tmp_path / "c")[0].problems
    (root / "a.raw").unlink()
    assert find_series(root, cache=tmp_path / "c")[0].problems


def test_a_file_that_kills_its_reader_is_named_and_the_rest_is_found(tmp_path, make_series, small_lots, monkeypatch):
    """Every worker gets a reader that dies of one file, as a crash in a library would have it."""
    make_series(tmp_path / "tree", np.repeat(STORED, 4, axis=0))
    make_series(tmp_path / "tree" / "other", STORED, series=generate_uid())
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfrom medseg.io import series\nread = series._read_header\n"
        "series._read_header = lambda path: os._exit(9) if path.name == '011.dcm' else read(path)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = find_series(tmp_path / "tree", workers=2)
    (broken,) = (series for series in found if not series.is_image)
    assert broken.files == (tmp_path / "tree" / "011.dcm",)
    assert "its worker process ended by itself (status 9)" in broken.problems[0]
    assert sorted(series.n_files for series in found) == [1, 4, 15]


def test_a_script_without_its_main_guard_reads_by_itself(tmp_path, make_series):
    make_series(tmp_path / "tree", np.repeat(STORED, 4, axis=0))
    script = tmp_path / "script.py"
    script.write_text(
        "from medseg.io import find_series, series\nseries._LOT = 3\n"
        f"print([item.n_files for item in find_series({str(tmp_path / 'tree')!r}, workers=2)])\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[16]\n"
    assert "no worker process can be started" in result.stderr


def test_interrupted_it_ends_and_keeps_what_it_read(tmp_path, make_series, small_lots):
    root = tmp_path / "tree"
    make_series(root, np.repeat(STORED, 4, axis=0))
    age(root)

    def stop(count):
        if count == 13:
            raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            find_series(root, workers=workers, cache=tmp_path / f"c{workers}", progress=stop)
        with sqlite3.connect(tmp_path / f"c{workers}") as database:
            assert database.execute("SELECT count(*) FROM headers").fetchone()[0] >= 12


def test_a_folder_that_cannot_be_opened_is_a_problem(tmp_path, make_series, monkeypatch):
    make_series(tmp_path / "ct", STORED)
    make_series(tmp_path / "locked", STORED)
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    ct, locked = sorted(find_series(tmp_path), key=lambda series: series.kind)
    assert (ct.n_files, ct.problems) == (4, ())
    assert (locked.kind, locked.files, locked.is_image) == ("folder", (tmp_path / "locked",), False)
    assert "the folder cannot be opened (Permission denied)" in locked.problems[0]
    assert match_series([ct, locked], ("CT",))[0].series["CT"] == ct


def test_a_file_that_cannot_be_opened_is_a_problem(tmp_path, make_series, monkeypatch):
    files = make_series(tmp_path / "ct", STORED[:3])
    opened = Path.open

    def refuse(path, *arguments, **more):
        if path == files[1]:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    problems = {series.files[0]: series.problems for series in find_series(tmp_path)}
    assert problems[files[1]] == (f"{files[1]}: cannot be opened (Permission denied)",)


def test_a_file_that_goes_away_meanwhile_is_a_problem(tmp_path, monkeypatch):
    write_nifti((np.zeros((2, 3, 4), np.uint8), np.eye(4)), tmp_path / "a.nii")
    monkeypatch.setattr(series_module, "walk", lambda root, unreadable: iter([root / "gone.nii", root / "a.nii"]))
    for cache in (None, tmp_path / "c"):
        sound, gone = find_series(tmp_path, cache=cache)
        assert sound.problems == ()
        assert "cannot be opened (No such file" in gone.problems[0]


@pytest.mark.parametrize("name", ["two\nlines.dcm", "\x1b[31mred.dcm", "bad\udcff.nii", "tab\t.png", "bell\a.nii.gz"])
def test_names_of_files_do_not_steer_the_terminal(tmp_path, name):
    (tmp_path / name).touch()
    for cache in (None, tmp_path / ".c"):
        (series,) = find_series(tmp_path, cache=cache)
        assert len(series.problems) == 1
        assert all(text.isprintable() for text in (series.description, *series.problems))


def test_headers_are_read_with_one_open_each(tmp_path, make_series, monkeypatch):
    make_series(tmp_path, STORED)
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k))
    monkeypatch.setattr("pydicom.filereader.open", lambda *a, **k: pytest.fail("opened by name"), raising=False)
    assert len(find_series(tmp_path)) == 1
    assert sorted(opened) == ["000.dcm", "001.dcm", "002.dcm", "003.dcm"]


def test_series_are_set_apart_by_patient_and_study_too(tmp_path, make_series):
    make_series(tmp_path / "a", STORED)
    make_series(tmp_path / "b", STORED, change=lambda i, ds: setattr(ds, "PatientID", "another"))
    make_series(tmp_path / "c", STORED, change=lambda i, ds: setattr(ds, "StudyInstanceUID", "1.2.3"))
    found = find_series(tmp_path)
    assert [(series.n_files, series.problems) for series in found] == [(4, ())] * 3


def test_headers_that_cannot_be_put_together_are_a_problem(tmp_path, make_series, monkeypatch):
    make_series(tmp_path / "a", STORED)
    make_series(tmp_path / "b", STORED, series=generate_uid(), modality="PT")
    real = series_module._dicom_series
    monkeypatch.setattr(series_module, "_dicom_series", lambda items: [1 / (items[0].modality == "CT")] and real(items))
    ct, pet = sorted(find_series(tmp_path), key=lambda series: series.modality)
    assert (ct.n_files, ct.problems) == (4, ())
    assert pet.n_files == 4
    assert "cannot be put together (ZeroDivisionError)" in pet.problems[0]


def write_dicomdir(path, names):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.DirectoryRecordSequence = []
    for name in names:
        record = Dataset()
        record.DirectoryRecordType = "IMAGE"
        record.ReferencedFileID = name
        ds.DirectoryRecordSequence.append(record)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def test_a_dicomdir_gives_the_files_that_it_names(tmp_path, make_series):
    make_series(tmp_path / "disk" / "dicom", STORED, names=["im1", "Im2", "IM3;1", "IM4"])
    make_series(tmp_path / "disk" / "not_named", STORED, series=generate_uid())
    named = [["DICOM", "IM1"], ["DICOM", "IM2"], ["dicom", "IM3"], ["DICOM", "IM4"], ["DICOM", "IM4"]]
    index = write_dicomdir(tmp_path / "disk" / "DICOMDIR", named)
    (series,) = find_series(index)
    assert (series.n_files, series.shape, series.problems) == (4, (5, 3, 4), ())
    assert same([series], find_series(index, workers=2, cache=tmp_path / "c"))
    assert len(find_series(tmp_path / "disk")) == 2, "inside a tree it is passed over"


def test_a_dicomdir_reaches_nothing_outside_its_folder(tmp_path, make_series):
    disk = tmp_path / "disk"
    (outside,) = make_series(tmp_path / "outside", STORED[:1])
    make_series(disk / "in", STORED[1:2], series=generate_uid())
    (disk / "link").symlink_to(tmp_path / "outside")
    (disk / "file").symlink_to(outside)
    named = [
        ["IN", "000.DCM"],
        ["..", "outside", "000.dcm"],
        ["link", "000.dcm"],
        ["file"],
        [str(outside)],
        ["", "outside"],
        ["in/../../outside/000.dcm"],
        ["in", ".", "000.dcm"],
        ["GONE", "IM1"],
        ["GONE", "IM2"],
    ]
    index = write_dicomdir(disk / "DICOMDIR", named)
    problem, image = sorted(find_series(index), key=lambda series: series.is_image)
    assert image.files == (disk / "in" / "000.dcm",)
    absent, elsewhere = problem.problems
    assert "2 of the 10 files that it names (such as 'GONE/IM1') are absent" in absent
    assert "7 of the 10 files that it names" in elsewhere
    assert "not inside its folder" in elsewhere


def test_damaged_dicomdirs_are_problems(tmp_path):
    whole = write_dicomdir(tmp_path / "DICOMDIR", [["A"], ["B"]])
    (series,) = find_series(write_dicomdir(tmp_path / "empty", []))
    assert "names no file" in series.problems[0]
    content = whole.read_bytes()
    for length in range(140, len(content), 7):
        whole.write_bytes(content[:length])
        for series in find_series(whole):
            assert series.problems
            assert "\n" not in series.problems[0]


@pytest.mark.realdata
def test_real_dicomdirs_name_the_files_beside_them(data):
    folder = data / "odd" / "pydicom" / "test_files" / "dicomdirtests"
    beside = {path for path in folder.rglob("*") if path.is_file() and path.parent != folder}
    for name in ("DICOMDIR", "DICOMDIR-bigEnd", "DICOMDIR-implicit", "DICOMDIR-nooffset", "DICOMDIR-reordered"):
        found = {path for series in find_series(folder / name) for path in series.files}
        assert found == {path for path in beside if "TINY_ALPHA" not in path.parts}, name


@pytest.mark.realdata
@pytest.mark.parametrize("folder", ["dicom", "odd", "prostate"])
def test_real_trees_give_the_same_with_workers_and_cache(data, folder, tmp_path, small_lots):
    plain = find_series(data / folder)
    assert same(plain, find_series(data / folder, workers=2, cache=tmp_path / "c"))
    assert same(plain, find_series(data / folder, cache=tmp_path / "c"))


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
