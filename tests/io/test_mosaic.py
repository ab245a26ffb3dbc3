"""Siemens mosaics, made on the spot, against nibabel's and dcm2niix's reading of them."""

import struct
import subprocess

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.nicom.dicomwrappers import wrapper_from_data

from medseg.errors import GeometryError, MedsegError
from medseg.io import find_series, read_image, read_volumes

from .test_realdata import agree

OBLIQUE = (1, 0, 0, 0, np.cos(0.3), np.sin(0.3))


def csa(tags):
    """A CSA header of the second kind ("SV10"), as nibabel's documentation describes it."""
    content = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, (vr, values) in tags.items():
        content += struct.pack("<64si4s3i", name.encode(), len(values), vr.encode(), 0, max(6, len(values)), 77)
        for k in range(max(6, len(values))):
            text = str(values[k]).encode() + b"\0" if k < len(values) else b""
            content += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
    return content


def tags_of(slices, normal):
    return {
        "NumberOfImagesInMosaic": ("US", [slices]),
        "SliceNormalVector": ("FD", [f"{x:.8f}" for x in normal]),
        "AcquisitionMatrixText": ("SH", ["8p*8"]),
    }


def tile_up(volume):
    """Put slices [slice, row, column] into one square picture."""
    n = int(np.ceil(np.sqrt(len(volume))))
    picture = np.zeros((n * volume.shape[1], n * volume.shape[2]), volume.dtype)
    for k, plane in enumerate(volume):
        r, c = divmod(k, n)
        picture[r * volume.shape[1] : (r + 1) * volume.shape[1], c * volume.shape[2] : (c + 1) * volume.shape[2]] = (
            plane
        )
    return picture


@pytest.fixture
def make_mosaics(make_series):
    def make(folder, volumes, *, orientation=OBLIQUE, sense=1, header=None, change=None, spacing=(2.0, 1.5), gap=4.0):
        normal = sense * np.cross(orientation[:3], orientation[3:])

        def alter(i, ds):
            ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
            ds.Manufacturer, ds.AcquisitionNumber = "SIEMENS", i + 1
            ds.AcquisitionTime = f"1000{2 * i:02d}.000000"
            ds.SpacingBetweenSlices = gap
            rows, columns = volumes[i].shape[1:]
            ds.AcquisitionMatrix = [rows, 0, 0, columns]
            ds.SoftwareVersions, ds.MagneticFieldStrength, ds.EchoTime, ds.RepetitionTime = "syngo MR B17", 3, 30, 2000
            ds.PatientPosition = "HFS"
            block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
            block.add_new(0x08, "CS", "IMAGE NUM 4")
            block.add_new(0x10, "OB", csa(tags_of(len(volumes[i]), normal)) if header is None else header)
            if change:
                change(i, ds)

        pictures = np.stack([tile_up(volume) for volume in volumes])
        positions = [(-100.0, -90.0, 20.0)] * len(volumes)
        return make_series(
            folder,
            pictures,
            modality="MR",
            orientation=orientation,
            spacing=spacing,
            positions=positions,
            step=gap,
            change=alter,
        )

    return make


def volumes(times=1, slices=7, rows=8, columns=8):
    return np.random.default_rng(0).integers(0, 4000, (times, slices, rows, columns)).astype(np.int16)


@pytest.mark.parametrize("sense", [1, -1])
@pytest.mark.parametrize(("slices", "rows", "columns"), [(7, 8, 8), (9, 6, 6), (1, 8, 8), (12, 6, 10)])
def test_a_mosaic_equals_nibabels_reading(tmp_path, make_mosaics, sense, slices, rows, columns):
    (stored,) = volumes(1, slices, rows, columns)
    (file,) = make_mosaics(tmp_path, [stored], sense=sense)
    image = read_image(file)
    # Slices ascend along the normal of the picture, whichever way the tiles run.
    np.testing.assert_array_equal(image[0].numpy().T, stored[::sense])
    reference = wrapper_from_data(pydicom.dcmread(file))
    assert reference.is_mosaic
    # nibabel's axes are row, column and slice; its affine is in LPS.
    theirs = np.diag([-1, -1, 1, 1]) @ reference.affine[:, [1, 0, 2, 3]]
    agree(image, np.asarray(reference.get_data()).transpose(1, 0, 2), theirs)
    (series,) = find_series(file)
    assert (series.shape, series.problems) == ((columns, rows, slices), ())
    np.testing.assert_array_equal(series.affine, image.affine)


def test_the_first_slice_lies_around_the_center_of_the_picture(tmp_path, make_mosaics):
    # 4 × 4 tiles of 8 × 8 pixels of 2 × 2 mm: the picture is 64 mm wide, a slice 16 mm, so it begins 24 mm further in.
    make_mosaics(tmp_path, volumes(1, 16), orientation=(1, 0, 0, 0, 1, 0), spacing=(2.0, 2.0))
    affine = read_image(tmp_path).affine.numpy()
    np.testing.assert_allclose(affine, [[-2, 0, 0, 76], [0, -2, 0, 66], [0, 0, 4, 20], [0, 0, 0, 1]])


def test_a_time_series_of_mosaics(tmp_path, make_mosaics):
    stored = volumes(3)
    make_mosaics(tmp_path, stored)
    image = read_image(tmp_path)
    assert image.meta["volumes"] == "time 1; time 2; time 3"
    np.testing.assert_array_equal(image.numpy().transpose(0, 3, 2, 1), stored)
    assert list(read_volumes(tmp_path)) == ["time 1", "time 2", "time 3"]
    (series,) = find_series(tmp_path)
    assert (series.n_files, series.shape, series.channels) == (3, (8, 8, 7), 3)


def test_mosaics_equal_dcm2niixs_reading(tmp_path, make_mosaics):
    import dcm2niix

    stored = volumes(3, 7, 16, 16)
    make_mosaics(tmp_path / "in", stored)
    (tmp_path / "out").mkdir()
    command = [dcm2niix.bin, "-z", "n", "-b", "n", "-o", tmp_path / "out", "-f", "mosaic", tmp_path / "in"]
    subprocess.run(command, check=True, capture_output=True)
    reference = nib.load(tmp_path / "out" / "mosaic.nii")
    agree(read_image(tmp_path / "in"), np.asanyarray(reference.dataobj), reference.affine)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, ds: ds.__delitem__((0x0029, 0x1010)), "mosaic without its CSA header"),
        (lambda i, ds: ds.__delitem__((0x0029, 0x0010)), "mosaic without its CSA header"),
        (lambda i, ds: ds.__delattr__("SpacingBetweenSlices"), "mosaic without SpacingBetweenSlices"),
    ],
)
def test_a_mosaic_that_lost_its_geometry_is_refused(tmp_path, make_mosaics, change, match):
    make_mosaics(tmp_path, volumes(), change=change)
    with pytest.raises(GeometryError, match=match):
        read_image(tmp_path)
    (series,) = find_series(tmp_path)
    assert match in series.problems[0]
    assert series.is_image


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (csa(tags_of(5000, (0, 0, 1))), "does not say how many slices"),
        (csa(tags_of(0, (0, 0, 1))), "does not say how many slices"),
        (csa(tags_of(40, (0, 0, 1))), "tiles for 40 slices do not divide"),
        (csa(tags_of(7, (1, 0, 0))), "no usable SliceNormalVector"),
        (csa({"NumberOfImagesInMosaic": ("US", [7])}), "no usable SliceNormalVector"),
        (csa(tags_of(7, (0, 0, 1)))[:200], "damaged"),
        (b"SV10", "damaged"),
        (b"", "(damaged|without)"),
    ],
)
def test_a_damaged_csa_header_is_refused(tmp_path, make_mosaics, header, match):
    make_mosaics(tmp_path, volumes(), orientation=(1, 0, 0, 0, 1, 0), header=header)
    with pytest.raises(GeometryError, match=match) as error:
        read_image(tmp_path)
    assert "\n" not in str(error.value)


@given(place=st.integers(0, 700), value=st.binary(min_size=1, max_size=8))
def test_mutated_csa_headers_give_only_our_errors(place, value):
    from pathlib import Path

    from medseg.io.dicom_header import Plane
    from medseg.io.mosaic import cut

    content = csa(tags_of(7, (0, 0, 1)))
    place %= len(content)
    ds = pydicom.Dataset()
    ds.Rows = ds.Columns = 24
    ds.SpacingBetweenSlices = 4
    block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x10, "OB", content[:place] + value + content[place + len(value) :])
    try:
        tiles, rows, columns, planes = cut(Path("a"), ds, Plane((0, 0, 0), (1, 0, 0, 0, 1, 0), (1, 1), 4.0))
        assert tiles * rows == tiles * columns == 24
        assert (tiles - 1) ** 2 < len(planes) <= tiles**2
    except MedsegError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.realdata
def test_a_real_csa_header(data):
    """The pixels of this file are gone; what its header says of the slices is nibabel's own test."""
    path = data / "odd" / "nibabel" / "nicom" / "tests" / "data" / "csa_slice_norm.dcm"
    (series,) = find_series(path)
    reference = wrapper_from_data(pydicom.dcmread(path))
    assert series.shape == (*reference.image_shape[1::-1], reference.image_shape[2])
    theirs = np.diag([-1, -1, 1, 1]) @ reference.affine[:, [1, 0, 2, 3]]
    if theirs[:3, 2] @ series.affine[:3, 2] < 0:  # the tiles run against the normal: the last comes first
        theirs[:3, 3] += theirs[:3, 2] * (series.shape[2] - 1)
        theirs[:3, 2] *= -1
    np.testing.assert_allclose(series.affine, theirs, atol=1e-3)
