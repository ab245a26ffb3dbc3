"""Pictures show what the files hold, upright, beside the files or in the same tree, and nothing else is touched."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from PIL import Image
from pydicom.pixels import apply_windowing

from data_prep.cli import main
from data_prep.phantom import write_cohort
from data_prep.png import PROBLEMS, Look, Pictures, _settle_names, _stem, write_pictures
from data_prep.png import Source as PngSource
from medseg.errors import ConfigError, ReadError
from medseg.transforms import DicomWindow, RescaleTo8Bit


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("png") / "cohort"
    write_cohort(out, patients=1, seed=0, image_size=32, slices=8)
    return out


@pytest.fixture
def ct(cohort: Path, tmp_path: Path) -> Path:
    """A copy of one CT series."""
    return Path(shutil.copytree(cohort / "PHANTOM-001" / "CT", tmp_path / "heap" / "CT"))


def run(*words: object) -> Result:
    """Run the command, in this process unless the words say otherwise."""
    return CliRunner().invoke(main, ["png", "--jobs", "1", *map(str, words)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine), path)
    return path


def volume(values: np.ndarray, codes: str, spacing: tuple[float, float, float] = (1, 1, 1)) -> MetaTensor:
    """A volume given along right, anterior, superior, stored along other axes."""
    ras = nib.Nifti1Image(values.astype(np.float32), np.diag([*spacing, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(codes))
    turned = ras.as_reoriented(turn)
    array = np.ascontiguousarray(turned.get_fdata(dtype=np.float32))
    return MetaTensor(
        torch.from_numpy(array)[None], affine=torch.from_numpy(turned.affine), meta={"has_geometry": True}
    )


# -- which way is up


def test_the_patients_right_is_on_the_left_the_front_and_the_head_are_up() -> None:
    values = np.zeros((5, 7, 9))
    values[4, 6, 8] = 1  # the rightmost, foremost and uppermost voxel
    for axis, expected in (("z", (7, 5)), ("y", (9, 5)), ("x", (9, 7))):
        pictures = Pictures(volume(values, "RAS"), Look(axis=axis))
        assert pictures.names[-1] == f"_{axis}{len(pictures) - 1:03d}"
        last = pictures[len(pictures) - 1]
        assert last.shape == expected
        assert last[0, 0] == 255
        assert np.count_nonzero(last) == 1


def test_an_axial_picture_by_hand() -> None:
    right_to_left_front_to_back = np.array([[1, 2, 3], [4, 5, 6]])  # what the picture must show
    values = right_to_left_front_to_back[::-1, ::-1].T[:, :, None]  # along right, anterior
    picture = Pictures(volume(values, "RAS"), Look(labels=True))[0]
    np.testing.assert_array_equal(picture, right_to_left_front_to_back)


@given(st.permutations(["RL", "AP", "SI"]), st.tuples(*[st.integers(0, 1)] * 3), st.sampled_from("xyz"))
def test_pictures_do_not_depend_on_how_the_volume_is_stored(order: list[str], ends: tuple, axis: str) -> None:
    values = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    codes = "".join(pair[end] for pair, end in zip(order, ends, strict=True))
    look = Look(axis=axis, labels=True)
    expected, found = Pictures(volume(values, "LPS"), look), Pictures(volume(values, codes), look)
    assert expected.names == found.names
    # numbers are those of the stored voxels, which may run the other way
    backwards = codes.find({"x": "R", "y": "A", "z": "I"}[axis]) >= 0
    for number in range(len(expected)):
        other = len(expected) - 1 - number if backwards else number
        np.testing.assert_array_equal(found[other], expected[number])


@given(st.permutations(["RL", "AP", "SI"]), st.tuples(*[st.integers(0, 1)] * 3))
def test_as_stored_is_voxel_for_voxel(order: list[str], ends: tuple) -> None:
    codes = "".join(pair[end] for pair, end in zip(order, ends, strict=True))
    image = volume(np.arange(60).reshape(3, 4, 5), codes, spacing=(1, 2, 7))
    pictures = Pictures(image, Look(labels=True, as_stored=True))
    assert len(pictures) == image.shape[3]
    for number in range(len(pictures)):
        np.testing.assert_array_equal(pictures[number], image[0, :, :, number].numpy().T)


def test_slices_are_those_that_are_stored_and_the_letter_tells_their_axis() -> None:
    image = volume(np.zeros((3, 4, 5)), "PIR")
    assert Pictures(image, Look()).names == ["_x000", "_x001", "_x002"]
    assert Pictures(image, Look(axis="z")).names == [f"_z00{n}" for n in range(5)]


def test_a_flat_image_is_shown_as_it_is_whatever_the_axis() -> None:
    for codes in ("RAS", "SAR", "ASL"):
        for axis in ("slices", "x", "y", "z"):
            pictures = Pictures(volume(np.ones((3, 4, 1)), codes), Look(axis=axis))
            assert pictures.names == [""]
            assert pictures[0].shape == (4, 3)


def test_pixels_become_square_about_their_centers() -> None:
    values = np.zeros((2, 1, 3))
    values[:, 0, 1] = 100
    image = volume(values, "RAS", spacing=(1, 1, 4))
    picture = Pictures(image, Look(window=(50.5, 101)))[0]
    assert picture.shape == (12, 2)
    column = picture[:, 0].astype(float)
    np.testing.assert_array_equal(column, column[::-1])
    # linear between the centers of slices, at rows 1.5, 5.5 and 9.5: row 2 is an eighth on the way
    np.testing.assert_allclose(column[:6], np.array([0, 0, 0.125, 0.375, 0.625, 0.875]) * 255, atol=1)
    labels = Pictures(image, Look(labels=True))[0]
    np.testing.assert_array_equal(labels[:, 0], [0] * 4 + [100] * 4 + [0] * 4)
    assert Pictures(image, Look(as_stored=True))[0].shape == (3, 2)


def test_a_pixel_of_absurd_length_is_refused_unless_as_stored() -> None:
    image = volume(np.zeros((2, 3, 1)), "RAS", spacing=(1, 1e9, 1))
    with pytest.raises(ReadError, match=r"give --as-stored"):
        Pictures(image, Look())
    assert Pictures(image, Look(as_stored=True))[0].shape == (3, 2)


# -- gray levels


def test_the_window_of_the_tags_is_that_of_pydicom(ct: Path) -> None:
    for path in ct.iterdir():
        ds = pydicom.dcmread(path)
        ds.WindowCenter, ds.WindowWidth = [40, -600], [400, 1500]
        ds.save_as(path)
    assert run(ct).exit_code == 0
    for path in ct.glob("*.dcm"):
        ds = pydicom.dcmread(path)
        hu = pydicom.pixels.apply_modality_lut(ds.pixel_array, ds)
        simple = pydicom.Dataset()
        simple.PhotometricInterpretation, simple.PixelRepresentation, simple.BitsStored = "MONOCHROME2", 0, 8
        simple.WindowCenter, simple.WindowWidth = 40, 400
        np.testing.assert_allclose(pixels(path.with_suffix(".png")), apply_windowing(hu, simple), atol=0.5001)


def test_given_window_percentiles_and_the_guarded_8_bits(tmp_path: Path) -> None:
    values = np.arange(-30, 30, dtype=np.float32).reshape(4, 5, 3)
    source = nifti(tmp_path / "a.nii.gz", values)
    middle = values[:, :, 1].T
    for words, expected in (
        (["--window", 2, 20], np.rint(DicomWindow(2, 20)(middle))),
        (["--percentiles", 10, 90], RescaleTo8Bit(*np.percentile(values, [10, 90]))(middle)),
        ([], RescaleTo8Bit(-30, 29)(middle)),
    ):
        assert run(source, *words).exit_code == 0
        np.testing.assert_array_equal(pixels(tmp_path / "a_z001.png"), expected)
    assert run(source, "--bits", 16).exit_code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a_z001.png"), np.rint((middle + 30) * (65535 / 59)))
    assert pixels(tmp_path / "a_z001.png").dtype == np.uint16


@pytest.mark.parametrize("value", [0, 7, -3e8, np.nan])
@pytest.mark.parametrize("words", [[], ["--bits", 16], ["--percentiles", 1, 99]])
def test_a_constant_image_is_black(value: float, words: list, tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", np.full((4, 5, 1), value, np.float32))
    assert run(tmp_path, *words).exit_code == 0
    assert not pixels(tmp_path / "a.png").any()


def test_what_is_no_number_is_black_or_the_end(tmp_path: Path) -> None:
    values = np.array([[[np.nan], [-np.inf], [0], [10], [np.inf]]], np.float32)
    with np.errstate(invalid="raise"):  # a cast of NaN is not the same on every machine
        assert Pictures(volume(values, "LPS"), Look(window=(5, 10)))[0].min() == 0
    nifti(tmp_path / "a.nii", values)
    for words in ([], ["--window", 5, 10], ["--bits", 16]):
        assert run(tmp_path, *words).exit_code == 0
        found = pixels(tmp_path / "a.png")[:, 0]
        assert found[0] == found[1] == found[2] == 0
        assert found[3] == found[4] == found.max() > 0


def test_labels_are_written_as_they_are(tmp_path: Path) -> None:
    values = np.array([[[0], [1]], [[2], [17]]], np.float32)
    nifti(tmp_path / "a.nii", values + np.float32(-3e-8))
    assert run(tmp_path, "--labels").exit_code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), values[:, :, 0].T)
    nifti(tmp_path / "b.nii", values + 0.5)
    nifti(tmp_path / "c.nii", values * 100)
    result = run(tmp_path, "--labels")
    assert result.exit_code == 1
    assert "failed: b.nii: not labels of 8 bits: expected whole numbers from 0 to 255" in result.stderr
    assert "failed: c.nii: not labels of 8 bits: values from 0 to 1700 found, expected 0 to 255" in result.stderr
    assert run(tmp_path / "c.nii", "--labels", "--bits", 16).exit_code == 0
    assert pixels(tmp_path / "c.png").max() == 1700


# -- names and formats


def test_every_format_and_the_tree(ct: Path, tmp_path: Path) -> None:
    heap = tmp_path / "heap"
    rng = np.random.default_rng(0)
    nifti(heap / "a" / "time.nii.gz", rng.normal(size=(4, 5, 3, 2)).astype(np.float32))
    nifti(heap / "a" / "flat.nii", rng.normal(size=(4, 5)).astype(np.float32))
    image = sitk.GetImageFromArray(rng.normal(size=(3, 5, 4)).astype(np.float32))
    sitk.WriteImage(image, heap / "a" / "raw.mhd")
    sitk.WriteImage(image, heap / "a" / "other.nrrd")
    (heap / "a" / "notes.txt").write_text("no image")
    Image.new("L", (4, 4)).save(heap / "a" / "photo.png")
    before = {path: path.stat().st_mtime_ns for path in heap.rglob("*")}
    result = run(heap, "--out", tmp_path / "out")
    slices = len(list(ct.iterdir()))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path / 'out'}: {slices + 6 + 1 + 3 + 3} pictures written\n"
    assert names(tmp_path / "out") == sorted(
        [f"CT/{path.stem}.png" for path in ct.iterdir()]
        + [f"a/time_t0{t}_z00{z}.png" for t in range(2) for z in range(3)]
        + ["a/flat.png"]
        + [f"a/{name}_z00{z}.png" for name in ("raw", "other") for z in range(3)]
    )
    assert {path: path.stat().st_mtime_ns for path in heap.rglob("*")} == before


def test_dicom_objects_without_image_are_passed_over(cohort: Path, tmp_path: Path) -> None:
    result = run(cohort, "--out", tmp_path)
    assert result.exit_code == 0
    assert result.stdout.endswith("pictures written, 1 without image passed over\n")


def test_color_is_color_and_times_are_times(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (3, 4, 2, 3), np.uint8)
    colored = rgb.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nifti(tmp_path / "rgb.nii", colored)
    nifti(tmp_path / "times.nii", rgb)
    vector = sitk.GetImageFromArray(rgb.transpose(2, 1, 0, 3), isVector=True)
    sitk.WriteImage(vector, tmp_path / "vector.mha")
    sitk.WriteImage(sitk.Cast(vector, sitk.sitkVectorFloat32), tmp_path / "field.mha")
    assert run(tmp_path).exit_code == 0
    for name in ("rgb", "vector"):
        np.testing.assert_array_equal(pixels(tmp_path / f"{name}_z001.png"), rgb[:, :, 1].transpose(1, 0, 2))
    for name in ("times", "field"):
        assert len(list(tmp_path.glob(f"{name}_t0?_z00?.png"))) == 6


def test_dicom_color(ct: Path) -> None:
    path = min(ct.iterdir())
    rgb = np.random.default_rng(2).integers(0, 256, (5, 4, 3), np.uint8)
    ds = pydicom.dcmread(path)
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 5, 4, 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = rgb.tobytes()
    ds.save_as(path)
    assert run(path).exit_code == 0
    np.testing.assert_array_equal(pixels(path.with_suffix(".png")), rgb)


def enhanced(path: Path, frames: np.ndarray, heights: list[float]) -> Path:
    """Make a file of one slice one of several frames, at these heights."""
    ds = pydicom.dcmread(path)
    shared, groups = pydicom.Dataset(), []
    measures, orientation = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 1
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    for height in heights:
        position, group = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = [0, 0, height]
        group.PlanePositionSequence = [position]
        groups.append(group)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], groups
    del ds.ImagePositionPatient
    ds.NumberOfFrames, ds.Rows, ds.Columns = frames.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 1, 0, 128, 256
    ds.PixelData = frames.tobytes()
    ds.save_as(path)
    return path


@pytest.mark.parametrize("heights", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 9]])
def test_frames_are_shown_even_where_they_form_no_volume(heights: list[float], ct: Path) -> None:
    frames = np.random.default_rng(2).integers(0, 256, (6, 5, 4), np.uint8)
    path = enhanced(min(ct.iterdir()), frames, heights)
    assert run(path).exit_code == 0
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(pixels(path.parent / f"{path.stem}_z00{number}.png"), frame)
    assert run(path, "--axis", "x").exit_code == (heights[-1] != 5)


def test_frames_without_place_are_shown_in_their_order(ct: Path) -> None:
    path = min(ct.iterdir())
    ds = pydicom.dcmread(path)
    frames = np.random.default_rng(2).integers(0, 256, (3, 5, 4), np.uint8)
    del ds.ImagePositionPatient
    ds.Rows, ds.Columns, ds.NumberOfFrames, ds.Modality = 5, 4, 3, "US"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 1, 0, 128, 256
    ds.PixelData = frames.tobytes()
    ds.save_as(path)
    assert run(path).exit_code == 0
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(pixels(path.parent / f"{path.stem}_t0{number}.png"), frame)


def test_a_series_is_one_volume_where_it_is_cut(ct: Path, tmp_path: Path) -> None:
    count = len(list(ct.iterdir()))
    first = min(path.stem for path in ct.iterdir())
    assert run(tmp_path / "heap", "--axis", "y", "--out", tmp_path / "out").exit_code == 0
    assert names(tmp_path / "out") == [f"CT/{first}_y{n:03d}.png" for n in range(32)]
    from medseg.io import read_image

    image = read_image(ct)
    rows = round(count * float(image.pixdim[2] / image.pixdim[0]))
    assert pixels(tmp_path / "out" / "CT" / f"{first}_y010.png").shape == (rows, 32)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.dcm", "a"),
        ("a.NII.GZ", "a"),
        ("1.2.840.7", "1.2.840.7"),
        ("1.2.840.7.dcm", "1.2.840.7"),
        ("IM0001", "IM0001"),
        ("a.mhd", "a"),
        ("v1.5", "v1.5"),
    ],
)
def test_stems(name: str, stem: str) -> None:
    assert _stem(name) == stem


@given(st.lists(st.sampled_from(["a", "A", "a_z000", "a_t00_z001", "a.nii", "b"]), min_size=1), st.data())
def test_no_two_sources_share_a_picture(stems: list[str], data: st.DataObject) -> None:
    files = {data.draw(st.sampled_from([stem, f"{stem}.dcm", f"{stem}.nii.gz", f"{stem}.mhd"])) for stem in stems}
    sources = [PngSource((Path(name),), name, "dicom", Path(), name) for name in sorted(files)]
    clashing = _settle_names(sources)
    good = [source.name.casefold() for source in sources if source not in clashing]
    possible = [name + number for name in good for number in ("", "_z000", "_z001", "_t00_z000", "_t00_z001", "_t01")]
    assert len(set(possible)) == len(possible)


def test_files_of_one_stem_keep_their_suffix(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz", "b.nii"):
        nifti(tmp_path / name, np.zeros((3, 3, 1), np.float32))
    assert run(tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.nii.gz.png", "a.nii.png", "b.png"]


# -- again, interrupted, and what is not ours


def test_a_second_run_writes_nothing_and_a_change_is_seen(tmp_path: Path) -> None:
    source = nifti(tmp_path / "a.nii", np.arange(24, dtype=np.float32).reshape(4, 3, 2))
    nifti(tmp_path / "b.nii", np.zeros((3, 3, 1), np.float32))
    assert run(tmp_path).stdout == f"{tmp_path}: 3 pictures written\n"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run(tmp_path).stdout == f"{tmp_path}: 0 pictures written, 3 already there\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    nifti(source, np.ones((4, 3, 2), np.float32))
    assert run(tmp_path).stdout == f"{tmp_path}: 2 pictures written, 1 already there\n"
    assert run(tmp_path, "--window", 1, 2).stdout == f"{tmp_path}: 3 pictures written\n"
    assert run(tmp_path, "--window", 1, 2, "--force").stdout == f"{tmp_path}: 3 pictures written\n"
    (tmp_path / "a_z001.png").unlink()
    assert run(tmp_path, "--window", 1, 2).stdout == f"{tmp_path}: 1 picture written, 2 already there\n"


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr", "a.hdr"])
def test_voxels_beside_an_unchanged_header_are_seen_too(name: str, tmp_path: Path) -> None:
    for value in (0, 200):
        voxels = np.full((4, 4, 2), value, np.uint8)
        if name == "a.hdr":
            nib.save(nib.Nifti1Pair(voxels, np.eye(4)), tmp_path / name)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(voxels.T), tmp_path / name)
        os.utime(tmp_path / name, ns=(0, 0))
        assert run(tmp_path, "--labels").stdout == f"{tmp_path}: 2 pictures written\n"
        assert {pixels(path).min() for path in tmp_path.glob("*.png")} == {value}
    assert run(tmp_path, "--labels").stdout == f"{tmp_path}: 0 pictures written, 2 already there\n"


def test_what_a_killed_run_left_half_written_goes_away_but_not_at_once(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", np.zeros((3, 3, 1), np.float32))
    for name in (".tmp-0123456789abcdef.png", ".tmp-0123456789abcde0.png", ".tmp-mine.png"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".tmp-0123456789abcdef.png", (0, 0))
    os.utime(tmp_path / ".tmp-mine.png", (0, 0))
    run(tmp_path)
    assert names(tmp_path) == [".tmp-0123456789abcde0.png", ".tmp-mine.png", "a.nii", "a.png"]


def test_slices_that_a_source_no_longer_has_go_away(tmp_path: Path) -> None:
    source = nifti(tmp_path / "a.nii", np.zeros((3, 3, 5), np.float32))
    run(tmp_path)
    run(tmp_path, "--axis", "x")
    (tmp_path / "a_z7.png").write_bytes(b"mine")
    nifti(source, np.zeros((3, 3, 2), np.float32))
    run(tmp_path)
    left = {path.name for path in tmp_path.glob("*.png")}
    assert left == {"a_z000.png", "a_z001.png", "a_x000.png", "a_x001.png", "a_x002.png", "a_z7.png"}


def test_a_picture_of_others_is_not_replaced(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", np.zeros((3, 3, 2), np.float32))
    nifti(tmp_path / "b.nii", np.zeros((3, 3, 1), np.float32))
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a_z001.png")
    theirs = (tmp_path / "a_z001.png").read_bytes()
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "failed: a.nii: a_z001.png is there already, and medseg did not make it" in result.stderr
    assert (tmp_path / "a_z001.png").read_bytes() == theirs
    assert not (tmp_path / "a_z000.png").exists()
    assert (tmp_path / "b.png").exists()
    assert run(tmp_path, "--force").exit_code == 0
    assert (tmp_path / "a_z001.png").read_bytes() != theirs


def test_a_dangling_link_in_the_place_of_a_picture_is_not_followed(tmp_path: Path) -> None:
    nifti(tmp_path / "heap" / "a.nii", np.zeros((3, 3, 1), np.float32))
    (tmp_path / "heap" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert run(tmp_path / "heap").exit_code == 1
    assert run(tmp_path / "heap", "--force").exit_code == 0
    assert not (tmp_path / "elsewhere.png").exists()
    assert not (tmp_path / "heap" / "a.png").is_symlink()


@pytest.mark.parametrize("place", ["beside", "out"])
def test_nothing_is_written_outside_by_a_link(place: str, tmp_path: Path) -> None:
    nifti(tmp_path / "heap" / "b.nii", np.zeros((3, 3, 1), np.float32))
    (tmp_path / "outside").mkdir()
    if place == "beside":
        nifti(tmp_path / "outside" / "a.nii", np.zeros((3, 3, 1), np.float32))
        (tmp_path / "heap" / "sub").symlink_to(tmp_path / "outside")
        result = run(tmp_path / "heap")
    else:
        nifti(tmp_path / "heap" / "sub" / "a.nii", np.zeros((3, 3, 1), np.float32))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sub").symlink_to(tmp_path / "outside")
        result = run(tmp_path / "heap", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "by a link" in result.stderr
    assert not list((tmp_path / "outside").glob("*.png"))
    assert len(list(tmp_path.rglob("b.png"))) == 1


def test_a_bad_file_does_not_stop_the_others(ct: Path, tmp_path: Path) -> None:
    heap = tmp_path / "heap"
    good = len(list(ct.iterdir()))
    (ct / "notes.dcm").write_text("call the ward")
    cut = ct / "cut.dcm"
    cut.write_bytes(min(ct.iterdir(), key=lambda path: path.name != "IM0001.dcm").read_bytes()[:-300])
    (heap / "empty.nii.gz").touch()
    for jobs in (1, 2):
        result = run(heap, "--jobs", jobs, "--out", tmp_path / "out", "--force")
        assert result.exit_code == 1
        assert result.stdout == f"{tmp_path / 'out'}: {good} pictures written, 3 failed\n"
        lines = result.stderr.splitlines()
        assert [line.split(": ")[:2] for line in lines[:3]] == [
            ["failed", "CT/cut.dcm"],
            ["failed", "CT/notes.dcm"],
            ["failed", "empty.nii.gz"],
        ]
        assert str(tmp_path) not in "".join(lines[:3])
        listing = (tmp_path / "out" / PROBLEMS).read_text().splitlines()
        assert [line.split("\t")[0] for line in listing[1:]] == ["CT/cut.dcm", "CT/notes.dcm", "empty.nii.gz"]
    for name in ("CT/cut.dcm", "CT/notes.dcm", "empty.nii.gz"):
        (heap / name).unlink()
    assert run(heap, "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / PROBLEMS).exists()


def test_a_list_of_others_is_not_replaced(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", np.zeros((3, 3, 1), np.float32))
    (tmp_path / PROBLEMS).write_text("mine")
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "not written by medseg" in result.stderr
    assert (tmp_path / PROBLEMS).read_text() == "mine"


def test_any_number_of_processes_writes_the_same_bytes(ct: Path, tmp_path: Path) -> None:
    nifti(ct.parent / "a.nii.gz", np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    for jobs in (1, 2):
        assert run(ct.parent, "--out", tmp_path / str(jobs), "--jobs", jobs).exit_code == 0
    assert pictures_of(tmp_path / "1") == pictures_of(tmp_path / "2")


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        nifti(tmp_path / "heap" / f"{number}.nii", rng.normal(size=(64, 64, 40)).astype(np.float32))
    command = [sys.executable, "-m", "data_prep", "png", str(tmp_path / "heap"), "--jobs", "1", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "out").glob("*.png"))) < 50:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = pictures_of(tmp_path / "out")
    for left in (tmp_path / "out").glob(".tmp-*"):
        os.utime(left, (0, 0))
    result = run(tmp_path / "heap", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"{sum(not name.startswith('.') for name in partial)} already there" in result.stdout
    run(tmp_path / "heap", "--out", tmp_path / "straight")
    assert pictures_of(tmp_path / "out") == pictures_of(tmp_path / "straight")
    assert len(pictures_of(tmp_path / "out")) == 240


# -- privacy


def test_pictures_hold_nothing_but_pixels_and_the_text_of_files_makes_no_name(ct: Path, tmp_path: Path) -> None:
    for path in ct.iterdir():
        ds = pydicom.dcmread(path)
        ds.PatientName, ds.PatientID, ds.SeriesDescription = "../../Nordmann^Kari", "120570-33117", "/tmp/../Nordmann"
        ds["SeriesInstanceUID"]._value = "../../../escape"
        ds.save_as(path)
    for axis in ("slices", "x"):
        assert run(ct, "--axis", axis, "--out", tmp_path / axis).exit_code == 0
        for path in (tmp_path / axis).iterdir():
            assert path.name.startswith("IM")
            assert b"Nordmann" not in path.read_bytes()
            assert set(Image.open(path).info) == {"Software"}
            assert Image.open(path).info["Software"].startswith("medseg png ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heap", "slices", "x"]


def test_the_terminal_does_not_say_who_it_is(ct: Path) -> None:
    path = min(ct.iterdir())
    ds = pydicom.dcmread(path)
    ds.PatientName = "Nordmann^Kari"
    ds.PixelData = ds.PixelData[:10]
    ds.save_as(path)
    path.rename(ct / "nordmann_kari.dcm")
    (ct / "IM\x1b[31m.dcm").write_text("red")
    Image.new("L", (4, 4)).save(ct / "kari.png")
    shutil.copy(max(ct.glob("IM00*.dcm")), ct / "kari.dcm")
    edited = pydicom.dcmread(ct / "kari.dcm")
    edited.PatientName = "Nordmann^Kari"
    edited.save_as(ct / "kari.dcm")
    result = run(ct)
    assert result.exit_code == 1
    assert "nordmann" not in result.output.casefold()
    assert "kari" not in result.output.casefold()
    assert "\x1b" not in result.output
    assert "failed: [masked]_[masked].dcm: " in result.stderr


# -- bad usage


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    for root, reason in ((tmp_path / "absent", "no such file or folder"), (tmp_path, "no image found")):
        result = run(root)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {root}: {reason}")
        assert result.stderr.count("\n") == 1
    Image.new("L", (4, 4)).save(tmp_path / "photo.png")
    assert "no image found" in run(tmp_path).stderr
    assert names(tmp_path) == ["photo.png"]


def test_bad_options(tmp_path: Path) -> None:
    source = nifti(tmp_path / "a.nii", np.zeros((3, 3, 1), np.float32))
    for words in (["--axis", "w"], ["--window", 1], ["--window", 1, 2, "--labels"], ["--bits", 12], ["--jobs", 0]):
        assert run(tmp_path, *words).exit_code == 2
    for words in (["--window", 40, 0], ["--percentiles", 60, 40], ["--out", source]):
        result = run(tmp_path, *words)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    with pytest.raises(ConfigError, match="exclude each other"):
        write_pictures(tmp_path, look=Look(window=(1, 2), labels=True))
    assert names(tmp_path) == ["a.nii"]


# -- real data


@pytest.mark.realdata
def test_the_same_pictures_come_from_dicom_and_from_another_tools_mha(data: Path, tmp_path: Path) -> None:
    look = Look(window=(400, 800))
    write_pictures(data / "prostate" / "dicom", out=tmp_path / "dicom", look=look, jobs=1)
    write_pictures(data / "prostate" / "expected", out=tmp_path / "mha", look=look, jobs=1)
    for series, name in (("3.000000", "sag"), ("4.000000", "t2w"), ("5.000000", "cor"), ("7.000000", "adc")):
        (folder,) = (path for path in (tmp_path / "dicom").glob("*/*/*") if path.name.startswith(series))
        own = sorted(pixels(path).tobytes() for path in folder.glob("*.png"))
        others = sorted(pixels(path).tobytes() for path in (tmp_path / "mha").glob(f"*/*_{name}_*.png"))
        assert len(own) >= 15
        assert own == others


@pytest.mark.realdata
def test_odd_files_are_shown_or_listed(data: Path, tmp_path: Path) -> None:
    result = write_pictures(data / "odd", out=tmp_path, jobs=1)
    assert result.written > 500
    assert not result.traces
    assert all("unexpected" not in problem for _, problem in result.failed)
