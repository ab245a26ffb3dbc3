import random

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, generate_uid

from medseg.errors import ConfigError, GeometryError, MissingTagError, ReadError
from medseg.io import find_series, read_image, read_series

from .conftest import NAME, PATIENT

STORED = np.arange(4 * 3 * 5, dtype=np.int16).reshape(4, 3, 5)  # slices, rows, columns
RAS_AFFINE = [[-1.5, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]]


def expect(image, stored, affine=RAS_AFFINE):
    np.testing.assert_array_equal(image.numpy()[0], stored.transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-6)


def test_a_plain_series(tmp_path, make_series, uids):
    make_series(tmp_path / "ct", STORED)
    image = read_image(tmp_path / "ct")
    expect(image, STORED)
    assert (image.meta["modality"], image.meta["units"], image.meta["has_geometry"]) == ("CT", "HU", True)
    assert image.meta["dicom"]["study_uid"] == uids["study"]
    assert image.meta["dicom"]["frame_of_reference_uid"] == uids["frame"]
    assert NAME not in repr(image.meta)
    assert PATIENT not in repr(image.meta)


def test_neither_file_names_nor_instance_numbers_give_the_order(tmp_path, make_series):
    numbers = [7, 2, 9, 1]
    make_series(
        tmp_path,
        STORED,
        names=["c", "a.dcm", "d.x", "b"],
        change=lambda i, ds: setattr(ds, "InstanceNumber", numbers[i]),
    )
    expect(read_image(tmp_path), STORED)


def test_slices_written_from_top_to_bottom_come_out_ascending(tmp_path, make_series):
    make_series(tmp_path, STORED, step=-3.0, origin=(-10, -20, 39))
    expect(read_image(tmp_path), STORED[::-1])


def test_a_list_of_files_in_any_order_is_one_series(tmp_path, make_series):
    files = make_series(tmp_path, STORED)
    random.Random(0).shuffle(files)
    expect(read_image(files), STORED)
    expect(read_series([str(file) for file in files]), STORED)


def test_slope_and_intercept_are_those_of_each_slice(tmp_path, make_series):
    slopes, intercepts = [1, 2, 0.5, 3], [-1024, 0, 10, -1]
    make_series(tmp_path, STORED, slopes=slopes, intercepts=intercepts)
    expected = STORED * np.reshape(slopes, (4, 1, 1)) + np.reshape(intercepts, (4, 1, 1))
    expect(read_image(tmp_path), expected)


def test_unsigned_and_signed_values(tmp_path, make_series):
    high = np.full((2, 3, 5), 40000, np.uint16)
    make_series(tmp_path / "u", high, modality="MR")
    assert read_image(tmp_path / "u").unique().tolist() == [40000]
    make_series(tmp_path / "s", np.full((2, 3, 5), -2000, np.int16), intercepts=[24, 24])
    assert read_image(tmp_path / "s").unique().tolist() == [-1976]


def test_a_sagittal_series(tmp_path, make_series):
    # Rows run to the back (+y), columns down (-z): the normal of these is -x in LPS, +x (right to left) in RAS.
    make_series(tmp_path, STORED, orientation=(0, 1, 0, 0, 0, -1), origin=(8, -20, 50))
    affine = [[0, 0, 3, -8], [-1.5, 0, 0, 20], [0, -2, 0, 50], [0, 0, 0, 1]]
    expect(read_image(tmp_path), STORED, affine)


def test_an_oblique_series(tmp_path, make_series):
    cos, sin = np.cos(0.3), np.sin(0.3)
    make_series(tmp_path, STORED, orientation=(cos, 0, sin, 0, 1, 0), origin=(0, 0, 0))
    affine = np.diag([-1, -1, 1, 1]) @ np.array(
        [[1.5 * cos, 0, -3 * sin, 0], [0, 2, 0, 0], [1.5 * sin, 0, 3 * cos, 0], [0, 0, 0, 1]]
    )
    expect(read_image(tmp_path), STORED, affine)


def test_a_single_slice_is_as_thick_as_its_header_says(tmp_path, make_series):
    file = make_series(tmp_path, STORED[:1], step=4.0)[0]
    image = read_image(file)
    assert image.shape == (1, 5, 3, 1)
    assert image.affine[2, 2] == 4


def test_a_missing_slice_is_named_with_its_place(tmp_path, make_series):
    make_series(tmp_path, np.repeat(STORED, 2, axis=0))[3].unlink()
    with pytest.raises(GeometryError, match=r"1 slice missing: a gap of 6\.00 mm .* between 36\.00 and 42\.00 mm"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        ([(0, 0, z) for z in (0, 1, 2.6, 5)], "gap between slices changes"),
        ([(0, 0, z) for z in (0, 3, 3, 6)], r"same position \(001\.dcm and 002\.dcm\) with different pixels"),
        ([(0, 0, 0), (0, 2, 3), (0, 0, 6), (0, 0, 9)], "shift sideways"),
        ([(0, 0, 0), (0, 0, 3), (0, 2, 3), (0, 0, 6)], r"side by side, 2\.00 mm apart .*001\.dcm and 002\.dcm"),
    ],
)
def test_slices_that_form_no_regular_volume_are_refused(tmp_path, make_series, positions, match):
    make_series(tmp_path, STORED, positions=positions)
    with pytest.raises(GeometryError, match=match) as error:
        read_image(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_positions_of_125_hundredths_rounded_to_a_tenth_are_regular(tmp_path, make_series):
    make_series(tmp_path, np.zeros((5, 4, 4), np.int16), positions=[(0, 0, z) for z in (30, 31.2, 32.5, 33.8, 35)])
    assert read_image(tmp_path).pixdim[2] == pytest.approx(1.25)


def test_positions_rounded_to_a_hundredth_are_regular(tmp_path, make_series):
    make_series(tmp_path, STORED, positions=[(0, 0, round(z * 2.3456, 2)) for z in range(4)])
    assert float(read_image(tmp_path).affine[2, 2]) == pytest.approx(2.3456, abs=0.01)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda i, ds: i == 2 and setattr(ds, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]),
            r"2 stacks of different .* orientation.*sagittal \(1 of 5×3 pixels, such as 002\.dcm\)",
        ),
        (lambda i, ds: i == 1 and setattr(ds, "PixelSpacing", [2.5, 1.5]), r"2 stacks .* spacing.*such as 001\.dcm"),
        (
            lambda i, ds: i == 1 and ds.__delattr__("ImagePositionPatient"),
            r"001\.dcm has no usable ImagePositionPatient",
        ),
        (lambda i, ds: setattr(ds, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "perpendicular"),
        (lambda i, ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "mosaic without its CSA"),
    ],
)
def test_headers_that_do_not_fit_together_are_refused(tmp_path, make_series, change, match):
    make_series(tmp_path, STORED, change=change)
    with pytest.raises(GeometryError, match=match):
        read_image(tmp_path)


def test_slices_of_different_size_are_refused(tmp_path, make_series):
    make_series(tmp_path, STORED)
    make_series(tmp_path, np.zeros((1, 4, 5), np.int16), names=["odd.dcm"], origin=(-10, -20, 60))
    with pytest.raises(GeometryError, match=r"2 stacks of different size.*odd\.dcm"):
        read_image(tmp_path)


def test_two_series_in_a_folder_stay_two(tmp_path, make_series):
    make_series(tmp_path, STORED)
    make_series(tmp_path, STORED, series=generate_uid(), names=[f"other{i}" for i in range(4)])
    with pytest.raises(ReadError, match=r"2 DICOM series in one folder.*000\.dcm.*other0") as error:
        read_image(tmp_path)
    assert NAME not in str(error.value)
    assert PATIENT not in str(error.value)
    with pytest.raises(ReadError, match="2 DICOM series"):
        read_image(sorted(tmp_path.iterdir()))


def test_files_of_two_patients_are_never_one_volume(tmp_path, make_series):
    make_series(tmp_path, STORED, change=lambda i, ds: i == 2 and setattr(ds, "PatientID", "other"))
    with pytest.raises(ReadError, match="2 DICOM series"):
        read_image(tmp_path)


def test_a_slope_without_intercept_is_no_guess(tmp_path, make_series):
    make_series(tmp_path, STORED, change=lambda i, ds: ds.__delattr__("RescaleIntercept"))
    with pytest.raises(MissingTagError, match=r"RescaleIntercept \(0028,1052\)"):
        read_image(tmp_path)


def test_ct_without_any_rescale_is_not_called_hu(tmp_path, make_series):
    def change(i, ds):
        del ds.RescaleIntercept, ds.RescaleSlope

    make_series(tmp_path, STORED, change=change)
    assert read_image(tmp_path).meta["units"] == "stored"


def test_monochrome1_is_turned_for_pictures_and_kept_for_quantities(tmp_path, make_series):
    def change(i, ds):
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.BitsStored, ds.HighBit = 12, 11

    values = np.array([[[0, 4095, 95]]], np.uint16)
    make_series(tmp_path / "cr", values, modality="CR", change=change)
    assert read_image(tmp_path / "cr").flatten().tolist() == [4095, 0, 4000]
    make_series(tmp_path / "ct", values, modality="CT", change=change)
    assert read_image(tmp_path / "ct").flatten().tolist() == [0, 4095, 95]


def test_a_color_picture_without_position(tmp_path, make_series):
    colors = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)

    def change(i, ds):
        del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.RescaleSlope, ds.RescaleIntercept
        ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 3, 0, "RGB"
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit = 7
        ds.PixelData = colors.tobytes()

    make_series(tmp_path, np.zeros((1, 4, 6), np.uint16), modality="CR", change=change)
    image = read_image(tmp_path / "000.dcm")
    np.testing.assert_array_equal(image.numpy()[..., 0], colors.transpose(2, 1, 0))
    assert image.meta["has_geometry"] is False


def enhanced(i, ds, order=(2, 0, 1)):
    """Turn one slice into an enhanced multi-frame object whose frames are out of order."""
    frames = STORED[list(order)]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    ds.NumberOfFrames = len(frames)
    ds.PixelData = frames.astype("<i2").tobytes()
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, 3
    plane.ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k in order:
        group, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-10, -20, 30 + 3 * k]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = k + 1, -k, "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [values]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept


def test_an_enhanced_multi_frame_object(tmp_path, make_series):
    make_series(tmp_path, STORED[:1], change=enhanced)
    image = read_image(tmp_path)
    k = np.arange(3).reshape(3, 1, 1)
    expect(image, STORED[:3] * (k + 1) - k)
    assert image.meta["units"] == "HU"


@pytest.mark.parametrize("syntax", [pydicom.uid.RLELossless, pydicom.uid.JPEGLSLossless, pydicom.uid.JPEG2000Lossless])
def test_lossless_compression_changes_nothing(tmp_path, make_series, syntax):
    large = np.repeat(np.repeat(STORED, 32, axis=1), 32, axis=2)
    for file in make_series(tmp_path, large, intercepts=[-1024] * 4):
        ds = pydicom.dcmread(file)
        ds.compress(syntax)
        ds.save_as(file)
    expect(read_image(tmp_path), large - 1024)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ReadError, match="no image in this folder"):
        read_image(tmp_path)


def test_a_folder_of_other_images_says_so(tmp_path):
    from medseg.io import write_nifti

    write_nifti((np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ReadError, match="1 image file of other kinds"):
        read_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is text, not DICOM\n" * 40, b"\0" * 128 + b"DICM", b"\0" * 4000])
def test_a_file_named_dcm_that_is_none(tmp_path, content):
    path = tmp_path / "slice.dcm"
    path.write_bytes(content)
    for target in (path, tmp_path):
        with pytest.raises(ReadError) as error:
            read_image(target)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_dicom_file_cut_short(tmp_path, make_series, keep):
    file = make_series(tmp_path, np.zeros((1, 64, 64), np.int16))[0]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises((ReadError, GeometryError)) as error:
        read_image(tmp_path)
    assert NAME not in str(error.value)
    assert PATIENT not in str(error.value)


def test_a_forged_size_takes_no_memory(tmp_path, make_series):
    def change(i, ds):
        ds.Rows = ds.Columns = 65535

    make_series(tmp_path, STORED[:1], change=change)
    with pytest.raises(ReadError, match="promises"):
        read_image(tmp_path)


def test_hostile_text_stays_on_one_line_and_steers_no_terminal(tmp_path, make_series):
    def change(i, ds):
        ds.SeriesDescription = "first\nsecond\x1b[31m"

    make_series(tmp_path, STORED, change=change)
    make_series(tmp_path, STORED, change=change, series=generate_uid(), names=[f"other{i}" for i in range(4)])
    with pytest.raises(ReadError) as error:
        read_image(tmp_path)
    assert str(error.value).isprintable()


def test_one_bad_file_among_good_ones_is_named(tmp_path, make_series):
    make_series(tmp_path, STORED)
    (tmp_path / "notes.dcm").write_text("not an image")
    with pytest.raises(ReadError, match=r"notes\.dcm"):
        read_image(tmp_path)
    (tmp_path / "notes.dcm").rename(tmp_path / "notes.txt")
    expect(read_image(tmp_path), STORED)


def test_absent_paths_and_empty_lists(tmp_path):
    with pytest.raises(ReadError, match="no such file"):
        read_image(tmp_path / "absent")
    with pytest.raises(ReadError, match="empty list"):
        read_image([])


def test_pet_units_are_one_of_two(tmp_path, make_series):
    make_series(tmp_path, STORED)
    with pytest.raises(ConfigError, match=r"suvbw.*SUVbw, stored"):
        read_image(tmp_path, pet_units="suvbw")


@pytest.mark.parametrize("damage", ["syntax", "flipped", "cut"])
def test_damaged_compressed_pixels(tmp_path, make_series, damage):
    file = make_series(tmp_path, np.repeat(np.repeat(STORED[:1], 32, axis=1), 32, axis=2))[0]
    ds = pydicom.dcmread(file)
    ds.compress(pydicom.uid.RLELossless)
    ds.save_as(file)
    content = file.read_bytes()
    start = content.index(b"\xe0\x7f\x10\x00OB") + 12
    if damage == "syntax":
        content = content.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.77")
    elif damage == "flipped":
        content = content[: start + 24] + b"\xff" * 64 + content[start + 88 :]
    else:
        content = content[:-300]
    file.write_bytes(content)
    with pytest.raises(ReadError) as error:
        read_image(file)
    assert str(error.value).isprintable()


def test_a_small_file_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, "1.2.3", "CT"
    ds.ImageComments = " " * 8000
    ds.add_new(0x00091001, "OB", bytes(60_000))
    pydicom.dcmwrite(tmp_path / "bomb.dcm", ds, enforce_file_format=True)
    assert (tmp_path / "bomb.dcm").stat().st_size < 1000
    monkeypatch.setattr("medseg.io.dicom_header._MOST_BYTES", 50_000)
    with pytest.raises(ReadError, match="inflates to more than 50,000 bytes"):
        read_image(tmp_path / "bomb.dcm")
    (series,) = find_series(tmp_path)
    assert "inflates to more than" in series.problems[0]
