"""Real files against references that other tools made."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel import orientations
from shapely.geometry import Polygon

from medseg.errors import GeometryError, MedsegError
from medseg.io import find_series, list_rois, read_image, read_rtstruct, read_series

pytestmark = pytest.mark.realdata


def agree(image, reference_voxels, reference_affine):
    """Compare with a reference [X, Y, Z] or [X, Y, Z, C] after reorientation to the axes of ``image``."""
    affine = image.affine.numpy()
    turn = orientations.ornt_transform(
        orientations.io_orientation(reference_affine), orientations.io_orientation(affine)
    )
    voxels = orientations.apply_orientation(reference_voxels, turn)
    moved = reference_affine @ orientations.inv_ornt_aff(turn, reference_voxels.shape[:3])
    np.testing.assert_allclose(moved, affine, atol=1e-3)
    ours = np.moveaxis(image.numpy(), 0, -1)
    # Exact but for the last digit of a float32, where a slope multiplies.
    voxels = voxels.reshape(*voxels.shape[:3], -1).astype(np.float32)
    assert float(np.abs(voxels - ours).max()) <= 2.5e-7 * float(np.abs(ours).max())


def itk(image):
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize(
    "name",
    [
        "anatomical/001",
        "anatomical/001_implicit",
        "failing/slicecount/001",
        "ge/anatomical/001",
        "ge/anatomical/001_implicit",
        "ge/anatomical/001_single_slice",
        "ge/fmri/001",
        "ge/fmri/001_implicit",
        "generic/anatomical/001",
        "generic/anatomical/002_non_isotropic",
        "generic/compressed/001",
        "generic/compressed_j2k/001",
        "generic/compressed_jpeg/001",
        "generic/compressed_jpegls/001",
        "generic/compressed_rle/001",
        "generic/rgb/001",
        "hitachi/anatomical/001",
        "hitachi/anatomical/001_implicit",
        "hyperfine/anatomical/001",
        "philips_enhanced/anatomical/001",
        "philips_enhanced/anatomical/001_implicit",
        "siemens_multiframe/anatomical/001",
    ],
)
def test_vendors_series_equal_their_ground_truth(data, name):
    folder = data / "dicom" / "mr_vendors" / name
    reference = nib.load(f"{folder}_ground_truth.nii.gz")
    voxels = np.asanyarray(reference.dataobj)
    if voxels.dtype.fields:
        voxels = np.stack([voxels[channel] for channel in ("R", "G", "B")], axis=-1).reshape(*voxels.shape[:3], 3)
    agree(read_image(folder), voxels, reference.affine)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mr_vendors/failing/sliceincrement/001", "1 slice missing: a gap of 10.00 mm"),
        ("mr_vendors/failing/sliceorientation/001", "2 stacks of different size, spacing or orientation"),
        ("ct_tilt_gap/GE", "gap between slices changes"),
    ],
)
def test_what_is_no_regular_volume_is_refused(data, name, match):
    with pytest.raises(GeometryError) as error:
        read_image(data / "dicom" / name)
    assert match in str(error.value)


@pytest.mark.parametrize("name", ["dicom/ct_rtstruct_lung/CT", "ct_organs/example_ct_dicom"])
def test_a_ct_series_equals_gdcms_reading(data, name):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(data / name)))
    agree(read_image(data / name), *itk(reader.Execute()))


def test_prostate_series_equal_those_of_another_tool(data):
    series = {item.number: item for item in find_series(data / "prostate" / "dicom")}
    for number, name in {3: "sag", 4: "t2w", 5: "cor", 7: "adc", 8: "hbv"}.items():
        path = data / "prostate" / "expected" / "ProstateX-0000" / f"ProstateX-0000_07-07-2011_{name}.mha"
        agree(read_series(series[number]), *itk(sitk.ReadImage(str(path))))
    assert (series[6].volumes, series[6].channels, series[6].problems) == (("b=50", "b=400", "b=800"), 3, ())


def test_a_missing_slice_of_the_prostate_is_named(data):
    (series,) = find_series(data / "prostate" / "missing_slice")
    assert "1 slice missing: a gap of 6.00 mm where the others are 3.00 mm" in series.problems[0]


@pytest.mark.parametrize("name", ["patient-2mm.mhd", "patient-4mm.mhd", "Case00.mhd", "Case00_segmentation.mhd"])
def test_mhd_equals_simpleitk(data, name):
    (path,) = (data / "mhd").rglob(name)
    agree(read_image(path), *itk(sitk.ReadImage(str(path))))


def test_hippocampus_equals_nibabel(data):
    for path in sorted((data / "hippocampus").rglob("*.nii.gz"))[::60]:
        reference = nib.load(path)
        agree(read_image(path), reference.get_fdata(), reference.affine)


def test_masks_of_the_second_observer_are_zero_and_one(data):
    path = next((data / "drive" / "test" / "2nd_manual").iterdir())
    assert read_image(path).unique().tolist() == [0, 1]


def contour_volume(ds, name, distance):
    """Return area × plane distance in cm³ by shapely; contours that are stored twice count once."""
    number = next(item.ROINumber for item in ds.StructureSetROISequence if item.ROIName == name)
    planes, seen = {}, set()
    for item in ds.ROIContourSequence:
        if item.ReferencedROINumber != number:
            continue
        for contour in item.ContourSequence:
            points = np.array(contour.get_item("ContourData").value.split(b"\\")).astype(float).reshape(-1, 3)
            key = tuple(np.round(points[np.lexsort(points.T)], 3).ravel())
            if key not in seen:
                seen.add(key)
                shape = Polygon(points[:, :2]).buffer(0)
                z = round(points[0, 2], 2)
                planes[z] = planes[z].symmetric_difference(shape) if z in planes else shape
    return sum(shape.area for shape in planes.values()) * distance / 1000


def test_volumes_of_the_thorax_plan(data):
    folder = data / "dicom" / "ct_rtstruct_lung"
    image = read_image(folder / "CT")
    masks = read_rtstruct(folder / "RTSTRUCT.dcm", image)
    assert list(masks) == [
        "Patient", "GTV-1", "PTV-1", "CTV-1", "1,SUV_primair", "Spinal cord", "Lung L", "Lung R"
    ]  # fmt: skip
    voxel = abs(np.linalg.det(image.affine.numpy()[:3, :3])) / 1000
    plan = pydicom.dcmread(folder / "RTSTRUCT.dcm")
    for name, mask in masks.items():
        truth = contour_volume(plan, name, 3.0)
        assert float(mask.sum()) * voxel == pytest.approx(truth, rel=0.02), name
    assert float(masks["1,SUV_primair"].sum()) * voxel == pytest.approx(124, rel=0.02)
    assert {roi.name for roi in list_rois(folder / "RTSTRUCT.dcm") if "POINT" in roi.contour_types} >= {
        "I1",
        "Isocenter 6",
    }


def test_a_mask_of_the_ibsi_phantom(data):
    folder = data / "dicom" / "rtstruct_cases" / "ibsi1_lung_phantom"
    mask = read_rtstruct(folder / "mask" / "DCM_RS_00060.dcm", folder / "image")["GTV-1"]
    voxel = abs(np.linalg.det(mask.affine.numpy()[:3, :3])) / 1000
    truth = contour_volume(pydicom.dcmread(folder / "mask" / "DCM_RS_00060.dcm"), "GTV-1", float(mask.pixdim[2]))
    assert float(mask.sum()) * voxel == pytest.approx(truth, rel=0.02)


def test_the_structure_set_of_another_patient_is_refused(data):
    folder = data / "dicom" / "ct_other_patients_rtstruct"
    with pytest.raises(GeometryError, match="another patient") as error:
        read_rtstruct(folder / "RTSTRUCT_Hashed.dcm", folder)
    assert "\n" not in str(error.value)
    nothing = nib.load(data / "ct_organs" / "example_ct.nii.gz").get_filename()
    with pytest.raises(GeometryError, match="no voxel"):
        read_rtstruct(data / "dicom" / "ct_rtstruct_lung" / "RTSTRUCT.dcm", nothing, rois="Spinal cord")


def test_odd_files_give_only_errors_of_this_package(data):
    read = 0
    for path in sorted((data / "odd").rglob("*")):
        if path.is_file():
            try:
                read += read_image(path).numel() > 0
            except MedsegError as error:
                assert "\n" not in str(error)  # noqa: PT017
    assert read > 100
    assert len(find_series(data / "odd")) > 50
