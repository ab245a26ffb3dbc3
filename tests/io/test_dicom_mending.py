"""Gantry tilt, missing slices and changing gaps: mended where asked, recorded, and refused otherwise."""

import shutil
import subprocess

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import ConfigError, GeometryError
from medseg.io import Reader, find_series, read_image, read_rtstruct, read_series, read_volumes, write_nifti
from medseg.io.dicom import moved
from medseg.io.dicom_geometry import assemble
from medseg.io.dicom_header import Instance, Plane

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def plane_positions(orientation, spacing, origin, shape):
    """The place of every pixel of a slice by equation C.7.6.2.1-1, [rows, columns, 3] in LPS."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    i, j = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]))  # column index, row index
    return np.asarray(origin) + i[..., None] * spacing[1] * row + j[..., None] * spacing[0] * column


def blob(points, center=(12.0, -3.0, 21.0), width=6.0):
    return 1000 * np.exp(-np.sum((points - np.asarray(center)) ** 2, axis=-1) / (2 * width**2))


def tilted(make_series, folder, degrees=18.0, *, about="x", change=None, modality="CT", keep=None, **more):
    """Write a soft ball at (12, -3, 21) seen by a tilted gantry whose table moves along z."""
    angle = np.radians(degrees)
    orientation = (1, 0, 0, 0, np.cos(angle), -np.sin(angle))
    if about == "y":
        orientation = (np.cos(angle), 0, np.sin(angle), 0, 1, 0)
    spacing, step = (1.0, 0.8), 2.5
    origins = [(-20.0, -40.0, -25.0 + step * k) for k in range(40)]
    if keep is not None:
        origins = [origins[k] for k in keep]
    planes = np.stack([blob(plane_positions(orientation, spacing, origin, (80, 90))) for origin in origins])
    return make_series(
        folder,
        np.rint(planes).astype(np.int16),
        modality=modality,
        orientation=orientation,
        spacing=spacing,
        positions=origins,
        change=change,
        **more,
    )


def places(image):
    """RAS millimetres of every voxel, [3, X, Y, Z]."""
    index = np.indices(image.shape[1:]).reshape(3, -1)
    affine = image.affine.numpy()
    return (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *image.shape[1:])


def center_and_mass(image):
    """Center of mass in LPS, and the integral over space."""
    values = np.maximum(image.numpy()[0].astype(np.float64), 0)
    ras = (places(image) * values).reshape(3, -1).sum(axis=1) / values.sum()
    return ras * [-1, -1, 1], values.sum() * abs(np.linalg.det(image.affine.numpy()[:3, :3]))


@pytest.mark.parametrize("about", ["x", "y"])
@pytest.mark.parametrize("degrees", [18.0, -25.0, 3.0])
def test_tilt_is_corrected_where_things_are(tmp_path, make_series, degrees, about):
    tilted(make_series, tmp_path, degrees, about=about)
    image = read_image(tmp_path)
    affine = image.affine.numpy()
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9, err_msg="upright")
    assert float(image.pixdim[2]) == pytest.approx(2.5 * np.cos(np.radians(degrees)))
    assert f"gantry tilt of {abs(degrees):.1f} degrees corrected" in image.meta["mended"]
    center, mass = center_and_mass(image)
    np.testing.assert_allclose(center, [12, -3, 21], atol=0.05)
    assert mass == pytest.approx(1000 * (2 * np.pi) ** 1.5 * 6.0**3, rel=0.005)
    # Each voxel that a slice reaches is what the ball is there, but for linear interpolation of 1 mm pixels.
    inside = image.numpy()[0] > -1024
    truth = blob(np.moveaxis(places(image), 0, -1) * [-1, -1, 1])
    assert np.abs(image.numpy()[0] - truth)[inside].max() < 5
    assert 0.5 < inside.mean() < 1
    (series,) = find_series(tmp_path)
    assert series.shape == tuple(image.shape[1:])
    assert series.problems == ()
    assert "gantry tilt" in series.notes[0]
    np.testing.assert_array_equal(series.affine, affine)


def test_the_upright_grid_holds_every_slice(tmp_path, make_series):
    def change(i, ds):
        pixels = np.zeros((80, 90), "<i2")
        pixels[[0, 0, -1, -1], [0, -1, 0, -1]] = 700  # the corners
        ds.PixelData = pixels.tobytes()

    tilted(make_series, tmp_path, change=change)
    image = read_image(tmp_path)
    # Linear interpolation shares the value of a corner among two rows, but for what is beyond the centers.
    assert (image[0, [0, -1]] > 0).any(dim=1).all()
    assert (image[0, 1:-1] <= 0).all()
    assert image.shape[2] == 80 + int(np.ceil(39 * 2.5 * np.sin(np.radians(18))))


@pytest.mark.parametrize(("modality", "padding"), [("CT", -1024), ("MR", 0)])
def test_what_no_slice_reaches_is_air_or_nothing(tmp_path, make_series, modality, padding):
    tilted(make_series, tmp_path, modality=modality, change=lambda i, ds: setattr(ds, "PixelData", b"\x05\x00" * 7200))
    image = read_image(tmp_path)
    assert image.unique().tolist() == sorted([padding, 5])


def test_tilt_that_is_kept_is_in_the_affine(tmp_path, make_series):
    files = tilted(make_series, tmp_path / "ct")
    image = read_image(tmp_path / "ct", tilt="keep")
    stored = np.stack([pydicom.dcmread(file).pixel_array for file in files])
    np.testing.assert_array_equal(image[0].numpy().T, stored)
    for k, file in enumerate(files):
        position = np.array([*pydicom.dcmread(file).ImagePositionPatient, 1.0])
        np.testing.assert_allclose(image.affine.numpy() @ [0, 0, k, 1], LPS_TO_RAS @ position, atol=1e-9)
    assert "kept: the affine is sheared" in image.meta["mended"]
    center, mass = center_and_mass(image)
    np.testing.assert_allclose(center, [12, -3, 21], atol=0.01)
    assert mass == pytest.approx(1000 * (2 * np.pi) ** 1.5 * 6.0**3, rel=0.005)
    write_nifti(image, tmp_path / "sheared.nii.gz")
    np.testing.assert_allclose(read_image(tmp_path / "sheared.nii.gz").affine, image.affine, atol=1e-4)


def test_tilt_is_refused_on_request(tmp_path, make_series):
    tilted(make_series, tmp_path)
    with pytest.raises(GeometryError, match=r"gantry tilt of 18\.0 degrees \(the slices shift sideways by 30\.1 mm"):
        read_image(tmp_path, tilt="refuse")
    with pytest.raises(GeometryError, match="gantry tilt"):
        Reader(tilt="refuse").get_data(Reader(tilt="refuse").read(tmp_path))


@pytest.mark.parametrize("option", ["tilt", "gaps"])
def test_unknown_choices_are_named(tmp_path, make_series, option):
    tilted(make_series, tmp_path)
    for read in (read_image, read_volumes):
        with pytest.raises(ConfigError, match=f"{option}: 'bend' found, expected one of .*refuse"):
            read(tmp_path, **{option: "bend"})


def test_a_slant_that_would_need_a_huge_grid_is_refused(tmp_path, make_series):
    make_series(tmp_path, np.zeros((4, 3, 5), np.int16), positions=[(30 * k, 0, 3 * k) for k in range(4)])
    with pytest.raises(GeometryError, match=r"84\.3 degrees: an upright grid would have 65×3 pixels for 5×3"):
        read_image(tmp_path)
    assert read_image(tmp_path, tilt="keep").affine[0, 2] == -30


def test_outlines_on_a_tilted_series(tmp_path, make_series, make_rtstruct):
    files = tilted(make_series, tmp_path / "ct")
    contours = []
    around = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for file in files:
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        origin, orientation = np.array(ds.ImagePositionPatient), np.array(ds.ImageOrientationPatient)
        row, column, normal = orientation[:3], orientation[3:], np.cross(orientation[:3], orientation[3:])
        away = float((origin - [12, -3, 21]) @ normal)
        if abs(away) < 15:
            radius = np.sqrt(225 - away**2)
            middle = np.array([12, -3, 21]) + away * normal
            contours.append(middle + radius * (np.cos(around)[:, None] * row + np.sin(around)[:, None] * column))
    path = make_rtstruct(tmp_path / "rs.dcm", {"ball": contours})
    image = read_image(tmp_path / "ct")
    for reference in (image, tmp_path / "ct"):
        mask = read_rtstruct(path, reference)["ball"]
        assert mask.shape == image.shape
        center, volume = center_and_mass(mask)
        np.testing.assert_allclose(center, [12, -3, 21], atol=0.1)
        assert volume == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.02)


@given(
    shift=st.tuples(st.floats(0, 5), st.floats(0, 5)),
    ramp=st.tuples(st.floats(-10, 10), st.floats(-10, 10)),
)
def test_a_moved_ramp_is_a_ramp(shift, ramp):
    rows, columns = np.indices((7, 9))
    values = (ramp[0] * columns + ramp[1] * rows).astype(np.float32)[..., None]
    out = moved(values, np.array(shift), (12, 14), np.nan)[..., 0]
    rows, columns = np.indices((12, 14))
    expected = ramp[0] * (columns - shift[0]) + ramp[1] * (rows - shift[1])
    inside = ~np.isnan(out)
    np.testing.assert_allclose(out[inside], expected[inside], atol=1e-3)
    # What lies within the centers of the outermost pixels is there; the sixth decimal of a pixel is none.
    near = 1e-5
    held = (columns >= shift[0] + near) & (columns <= shift[0] + 8 - near)
    held &= (rows >= shift[1] + near) & (rows <= shift[1] + 6 - near)
    assert inside[held].all()


# Missing slices and changing gaps

RAMP = np.stack([np.full((3, 5), 10 * k, np.int16) + np.arange(5, dtype=np.int16) for k in range(9)])


@pytest.mark.parametrize(("lost", "places"), [((3,), "39.00"), ((2, 3, 6), "36.00, 39.00, 48.00")])
def test_missing_slices_are_filled_in_on_request(tmp_path, make_series, lost, places):
    files = make_series(tmp_path, RAMP)
    whole = read_image(tmp_path)
    for k in lost:
        files[k].unlink()
    with pytest.raises(GeometryError, match=f"{len(lost)} slices? missing"):
        read_image(tmp_path)
    image = read_image(tmp_path, gaps="interpolate")
    np.testing.assert_allclose(image, whole, atol=1e-5)  # it is linear along the slices
    np.testing.assert_allclose(image.affine, whole.affine)
    assert image.meta["mended"].endswith(f"interpolated linearly at {places} mm along the normal")
    np.testing.assert_array_equal(read_series(find_series(tmp_path)[0], gaps="interpolate"), image)
    np.testing.assert_array_equal(read_volumes(tmp_path, gaps="interpolate")[""], image)


def test_only_missing_slices_are_made_up(tmp_path, make_series):
    stored = np.random.default_rng(0).integers(0, 1000, (9, 3, 5)).astype(np.int16)
    files = make_series(tmp_path, stored)
    files[4].unlink()
    image = read_image(tmp_path, gaps="interpolate").numpy()[0].T
    others = [k for k in range(9) if k != 4]
    np.testing.assert_array_equal(image[others], stored[others])
    np.testing.assert_allclose(image[4], (stored[3].astype(float) + stored[5]) / 2)


def test_changing_gaps_become_regular_on_request(tmp_path, make_series):
    z = [0, 2, 4, 6, 8, 11, 16, 21]
    stored = np.stack([np.full((3, 5), 10 * place, np.int16) for place in z])
    make_series(tmp_path, stored, positions=[(0, 0, place) for place in z])
    with pytest.raises(GeometryError, match="gap between slices changes"):
        read_image(tmp_path)
    image = read_image(tmp_path, gaps="interpolate")
    step = 21 / 10  # of the smallest usual gap, 2 mm, both ends held
    assert image.affine[2, 2] == pytest.approx(step)
    assert image.shape == (1, 5, 3, 11)
    np.testing.assert_allclose(image[0, 0, 0], 10 * step * np.arange(11), rtol=1e-6)
    assert "gaps between slices from 2.00 to 5.00 mm: interpolated linearly to 2.100 mm" in image.meta["mended"]


def test_too_few_slices_make_no_volume(tmp_path, make_series):
    make_series(tmp_path, RAMP[:3], positions=[(0, 0, z) for z in (0, 1, 100)])
    with pytest.raises(GeometryError, match="3 slices would become 101 by interpolation"):
        read_image(tmp_path, gaps="interpolate")


def test_a_missing_slice_of_a_tilted_series(tmp_path, make_series):
    tilted(make_series, tmp_path / "whole")
    tilted(make_series, tmp_path / "lost", keep=[k for k in range(40) if k != 17])
    whole, image = read_image(tmp_path / "whole"), read_image(tmp_path / "lost", gaps="interpolate")
    np.testing.assert_allclose(image.affine, whole.affine, atol=1e-9)
    others = [k for k in range(40) if k != 17]
    np.testing.assert_array_equal(image[..., others], whole[..., others])
    # The slice is made on the upright grid: between the pixels above and below, not between those of one number.
    both = (whole[0, :, :, 16] + whole[0, :, :, 18]) / 2
    np.testing.assert_allclose(image[0, :, :, 17], both, atol=1e-3)
    assert "gantry tilt" in image.meta["mended"]
    assert "1 slice missing" in image.meta["mended"]


# The grid itself


def header(k, orientation, spacing, position, number):
    plane = Plane(tuple(position), tuple(orientation), tuple(spacing), 1.0, (("number", number),))
    return Instance(f"{k}", "1", "1", "1", "", "MR", "", 1, "", f"1.{k}", 7, 9, (plane,), {})


@given(
    turn=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1),
    angle=st.floats(0, 6),
    spacing=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    step=st.floats(0.3, 8),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    order=st.permutations(range(6)),
    numbers=st.permutations(range(6)),
)
def test_a_grid_agrees_with_the_standards_equation(turn, angle, spacing, step, origin, order, numbers):
    from pathlib import Path

    axis = np.array(turn) / np.linalg.norm(turn)
    cross = np.cross(np.eye(3), axis)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    row, column, normal = rotation
    orientation = (*row, *column)
    positions = [np.array(origin) + k * step * normal for k in range(6)]
    instances = [header(k, orientation, spacing, positions[k], numbers[k]) for k in order]
    for instance in instances:
        instance.path = Path(instance.path)
    grid = assemble(instances)
    assert [instances[i].sop_uid for i, _ in grid.order] == [f"1.{k}" for k in range(6)]
    for k in range(6):
        place = plane_positions(orientation, spacing, positions[k], (7, 9))
        for i, j in ((0, 0), (8, 6), (3, 5)):
            ras = grid.affine @ [i, j, k, 1]
            np.testing.assert_allclose(ras[:3] * [-1, -1, 1], place[j, i], atol=1e-6)


def test_orientations_that_differ_in_the_last_digits_give_one_affine(tmp_path, make_series):
    def change(i, ds):
        ds.ImageOrientationPatient = [1, f"{0.00002 * (i % 3):.6f}", 0, 0, 1, f"{-0.00001 * (i % 2):.6f}"]

    files = make_series(tmp_path, RAMP, change=change)
    affines = [read_image(order).affine.numpy() for order in (files, files[::-1], files[4:] + files[:4])]
    np.testing.assert_array_equal(affines[0], affines[1])
    np.testing.assert_array_equal(affines[0], affines[2])


# Real data


@pytest.mark.realdata
def test_a_missing_slice_of_the_prostate_is_interpolated(data):
    (folder,) = (data / "prostate" / "missing_slice").rglob("8.*")
    (full,) = (data / "prostate" / "dicom").rglob("8.*")
    whole, image = read_image(full), read_image(folder, gaps="interpolate")
    assert image.shape == whole.shape
    np.testing.assert_allclose(image.affine, whole.affine, atol=1e-3)
    different = [k for k in range(19) if not np.array_equal(image[..., k], whole[..., k])]
    assert len(different) == 1
    k = different[0]
    np.testing.assert_allclose(image[..., k], (whole[..., k - 1] + whole[..., k + 1]) / 2, atol=1e-3)
    assert "1 slice missing, interpolated linearly at" in image.meta["mended"]


@pytest.mark.realdata
def test_a_real_tilted_head_equals_dcm2niixs_correction(data, tmp_path):
    import dcm2niix

    folder = data / "dicom" / "mr_vendors" / "failing" / "gantrytilting" / "001"
    subprocess.run([dcm2niix.bin, "-z", "n", "-o", tmp_path, "-f", "head", folder], check=True, capture_output=True)
    reference = nib.as_closest_canonical(nib.load(tmp_path / "head_Tilt_1.nii"))
    write_nifti(read_image(folder), tmp_path / "ours.nii")
    ours = nib.as_closest_canonical(nib.load(tmp_path / "ours.nii"))
    np.testing.assert_allclose(ours.affine, reference.affine, atol=1e-3)
    away = np.abs(ours.get_fdata() - np.asanyarray(reference.dataobj))
    # dcm2niix rounds; and it blends the last row of a slice with air, where this keeps what is measured and air apart.
    assert (away > 1).any(axis=(0, 2)).sum() <= 3
    assert away.max(axis=(0, 2)).argsort()[-3:].max() >= 512
    assert (away <= 1).mean() > 0.998
    kept = read_image(folder, tilt="keep")
    last = pydicom.dcmread(folder / "IM-0001-0004.dcm", stop_before_pixels=True)
    np.testing.assert_allclose(
        kept.affine.numpy() @ [0, 0, 3, 1], LPS_TO_RAS @ [*last.ImagePositionPatient, 1], atol=1e-3
    )


@pytest.mark.realdata
def test_a_head_with_tilt_and_changing_gaps(data):
    folder = data / "dicom" / "ct_tilt_gap" / "GE"
    image = read_image(folder, gaps="interpolate")
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(folder.iterdir())]
    assert "gantry tilt of 18.5 degrees corrected" in image.meta["mended"]
    assert "gaps between slices from 1.08 to 7.00 mm" in image.meta["mended"]
    # Of 4.00 mm, the smallest gap that is no exception; first and last slice are held.
    assert float(image.pixdim[2]) == pytest.approx(4.0, abs=0.1)
    for ds, k in ((headers[0], 0), (headers[-1], image.shape[3] - 1)):
        voxel = np.linalg.inv(image.affine.numpy()) @ LPS_TO_RAS @ [*ds.ImagePositionPatient, 1]
        assert voxel[2] == pytest.approx(k, abs=1e-3)
    # The first slice stays as it is stored, on whole pixels.
    voxel = np.linalg.inv(image.affine.numpy()) @ LPS_TO_RAS @ [*headers[0].ImagePositionPatient, 1]
    np.testing.assert_allclose(voxel, np.rint(voxel), atol=1e-3)
    stored = read_image(sorted(folder.iterdir())[0])[0, :, :, 0]
    i, j = round(float(voxel[0])), round(float(voxel[1]))
    np.testing.assert_array_equal(image[0, i : i + 512, j : j + 512, 0], stored)


@pytest.mark.realdata
def test_a_folder_with_a_missing_slice_and_its_full_series(data, tmp_path):
    """Copies of a series fill each other's gaps."""
    (folder,) = (data / "prostate" / "missing_slice").rglob("8.*")
    (full,) = (data / "prostate" / "dicom").rglob("8.*")
    shutil.copytree(folder, tmp_path / "a")
    shutil.copytree(full, tmp_path / "b")
    np.testing.assert_array_equal(read_image(tmp_path), read_image(full))
    assert "18 × copy of a slice left out" in read_image(tmp_path).meta["mended"]
