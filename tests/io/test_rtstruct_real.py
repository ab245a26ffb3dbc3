"""Structure sets of archives: what becomes of each, and its volumes against other tools."""

from contextlib import suppress

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from shapely import make_valid
from shapely.geometry import Polygon

from medseg.errors import GeometryError, MedsegError
from medseg.io import find_series, list_rois, read_image, read_rtstruct, read_series

pytestmark = pytest.mark.realdata

CASES = "dicom/rtstruct_cases"
RTKIT = "RS1.3.6.1.4.1.2452.6.727319383.1116259385.3336283576.3074434425.dcm"
PHANTOM = ["External", "Big", "Small", "Circle", "BigH_SmallV", "BigV_SmallH", "Star"]
FOUR = ["ROI-1", "ROI-2", "ROI-3", "ROI-4"]

# The structure set, the image, and what comes of it: what ties the two and the names, or the reason of the refusal.
OUTCOMES = {
    "thorax plan": ("dicom/ct_rtstruct_lung/RTSTRUCT.dcm", "dicom/ct_rtstruct_lung/CT", "series", [
        "Patient", "GTV-1", "PTV-1", "CTV-1", "1,SUV_primair", "Spinal cord", "Lung L", "Lung R"
    ]),
    "another patient's": (
        "dicom/ct_other_patients_rtstruct/RTSTRUCT_Hashed.dcm", "dicom/ct_other_patients_rtstruct",
        "belongs to another patient than", None,
    ),
    "one slice of a plan": (
        f"{CASES}/dicompyler_core_no_full_ct/example_data/rtss.dcm",
        f"{CASES}/dicompyler_core_no_full_ct/example_data", "'Borders' has 2 closed contours and no voxel", None,
    ),
    "without ContourImageSequence": (
        f"{CASES}/ibsi1_lung_phantom/mask/DCM_RS_00060.dcm", f"{CASES}/ibsi1_lung_phantom/image", "series", ["GTV-1"],
    ),
    "the same beside its images": (
        f"{CASES}/ibsi1_lung_phantom/image/DCM_RS_00060.dcm", f"{CASES}/ibsi1_lung_phantom/image", "series", ["GTV-1"],
    ),
    "an image apart": (f"{CASES}/rt_utils/empty/dummy_rt.dcm", f"{CASES}/rt_utils/mock_data", "series", FOUR),
    "references to images that are not there": (
        f"{CASES}/rt_utils/mock_data/invalid_reference_rt.dcm", f"{CASES}/rt_utils/mock_data", "series", FOUR,
    ),
    "no references": (
        f"{CASES}/rt_utils/mock_data/non_existent_reference_rt.dcm", f"{CASES}/rt_utils/mock_data",
        "frame of reference", FOUR,
    ),
    "a frame of reference of its own": (
        f"{CASES}/rt_utils/mock_data/rt.dcm", f"{CASES}/rt_utils/mock_data",
        "refers to .* and yet lies in another frame of reference", None,
    ),
    "a phantom beside plans and doses": (
        f"{CASES}/rtkit/simple_phantom_case/{RTKIT}", f"{CASES}/rtkit/simple_phantom_case", "series", PHANTOM,
    ),
    "a phantom": (
        f"{CASES}/rtkit/simple_phantom_contours/{RTKIT}", f"{CASES}/rtkit/simple_phantom_contours", "series", PHANTOM,
    ),
    "points beside contours": (
        f"{CASES}/rtkit/single_struct/rtstruct.dcm", f"{CASES}/rtkit/simple_phantom_contours", "series",
        ["External", "Small"],
    ),
    "of another phantom": (
        "odd/pydicom/test_files/rtstruct.dcm", f"{CASES}/rtkit/simple_phantom_contours",
        "belongs to another patient than", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTCOMES)
def test_what_becomes_of_each_structure_set(data, case):
    structures, image, outcome, names = OUTCOMES[case]
    if names is None:
        with pytest.raises(GeometryError, match=outcome) as error:
            read_rtstruct(data / structures, data / image)
        assert "\n" not in str(error.value)
        return
    masks = read_rtstruct(data / structures, data / image)
    assert list(masks) == names
    assert {mask.meta["matched_by"] for mask in masks.values()} == {outcome}


def test_the_table_names_every_structure_set(data):
    found = set()
    for path in [*(data / "dicom").rglob("*.dcm"), data / "odd/pydicom/test_files/rtstruct.dcm"]:
        header = pydicom.dcmread(path, specific_tags=["Modality"], force=True)
        if header.get("Modality") == "RTSTRUCT":
            found.add(path.relative_to(data).as_posix())
    assert found == {structures for structures, *_ in OUTCOMES.values()}


def volume(mask):
    """Volume in cm³."""
    return float(mask.sum()) * abs(np.linalg.det(mask.affine.numpy()[:3, :3])) / 1000


def closed_contours(path, name):
    """The closed contours of an ROI, points × 3, duplicates once."""
    ds = pydicom.dcmread(path, force=True)
    numbers = {item.ROIName: item.ROINumber for item in ds.StructureSetROISequence}
    unique = {}
    for item in ds.ROIContourSequence:
        if item.ReferencedROINumber == numbers[name]:
            for contour in item.ContourSequence:
                points = np.array([float(number) for number in contour.ContourData]).reshape(-1, 3)
                unique.setdefault(np.round(points[np.lexsort(points.T)], 3).tobytes(), points)
    return list(unique.values())


def contour_area(contours):
    """The area in mm² of contours of transverse planes, by shapely; contours of one plane even-odd."""
    planes = {}
    for points in contours:
        z = round(float(points[:, 2].mean()), 1)
        planes[z] = planes.get(z, Polygon()).symmetric_difference(make_valid(Polygon(points[:, :2])))
    return sum(plane.area for plane in planes.values())


# cm³ by dicompyler-core 0.5.6, as `benchmarks/dicom/dicompyler_volumes.py` prints them under "volumes".
DICOMPYLER = {
    "Patient": 27448.773, "GTV-1": 155.615, "PTV-1": 588.877, "CTV-1": 274.871, "Spinal cord": 43.793,
    "Lung L": 2218.563, "Lung R": 2957.113,
}  # fmt: skip
# The same under "full": dicompyler-core counts the first and the last plane half, which takes 4 % from a phantom of 26
# planes and 20 % from one of 5; here every plane counts whole.
DICOMPYLER_FULL = {
    "ibsi1_lung_phantom/image": {"GTV-1": 358.661},
    "rtkit/simple_phantom_contours": {
        "External": 937.5, "Big": 1327.5, "Small": 600.0, "Circle": 1005.401, "BigH_SmallV": 943.887,
        "BigV_SmallH": 917.917, "Star": 928.23,
    },
}  # fmt: skip


def test_volumes_of_the_thorax_plan_against_shapely_and_dicompyler(data):
    folder = data / "dicom" / "ct_rtstruct_lung"
    masks = read_rtstruct(folder / "RTSTRUCT.dcm", folder / "CT")
    for name, mask in masks.items():
        truth = contour_area(closed_contours(folder / "RTSTRUCT.dcm", name)) * 3 / 1000
        assert volume(mask) == pytest.approx(truth, rel=0.02), name
        assert mask.meta["roi"]["between"] == mask.meta["roi"]["outside"] == mask.meta["roi"]["crossing"] == 0
    for name, figure in DICOMPYLER.items():
        assert volume(masks[name]) == pytest.approx(figure, rel=0.02), name
    # Each of its contours is stored twice, which dicompyler-core counts twice: 247.757 cm³.
    assert volume(masks["1,SUV_primair"]) == pytest.approx(124, rel=0.02)
    assert masks["1,SUV_primair"].meta["roi"]["duplicates"] == 85


@pytest.mark.parametrize("case", DICOMPYLER_FULL)
def test_volumes_of_phantoms_against_shapely_and_dicompyler(data, case):
    folder = data / CASES / case
    (path,) = [file for file in folder.iterdir() if "RS" in file.name]
    masks = read_rtstruct(path, folder)
    assert list(masks) == list(DICOMPYLER_FULL[case])
    for name, mask in masks.items():
        truth = contour_area(closed_contours(path, name)) * float(mask.pixdim[2]) / 1000
        assert volume(mask) == pytest.approx(truth, rel=0.02), name
        assert volume(mask) == pytest.approx(DICOMPYLER_FULL[case][name], rel=0.02), name


def test_areas_on_the_slices_that_are_there(data):
    """Of two plans only some slices were published: the contours of these have their area in the mask."""
    for structures, image in [
        (f"{CASES}/rt_utils/mock_data/invalid_reference_rt.dcm", f"{CASES}/rt_utils/mock_data"),
        (
            f"{CASES}/dicompyler_core_no_full_ct/example_data/rtss.dcm",
            f"{CASES}/dicompyler_core_no_full_ct/example_data",
        ),
    ]:
        ct = read_image(data / image)
        inverse = np.linalg.inv(ct.affine.numpy())
        compared = 0
        for roi in list_rois(data / structures):
            if not roi.contour_types:
                continue
            contours = [
                points
                for points in closed_contours(data / structures, roi.name)
                if -0.5 <= inverse[2, :3] @ (points.mean(axis=0) * [-1, -1, 1]) + inverse[2, 3] < ct.shape[3] - 0.5
            ]
            try:
                mask = read_rtstruct(data / structures, ct, rois=roi.name)[roi.name]
            except GeometryError:
                assert not contours, roi.name
                continue
            compared += 1
            assert mask.meta["roi"]["outside"] == mask.meta["roi"]["contours"] - len(contours)
            area = float(mask.sum()) * float(mask.pixdim[0] * mask.pixdim[1])
            assert area == pytest.approx(contour_area(contours), rel=0.02), roi.name
        assert compared >= 1


def test_the_mask_is_the_same_where_no_reference_matches(data, tmp_path):
    folder = data / "dicom" / "ct_rtstruct_lung"
    image = read_image(folder / "CT")
    truth = read_rtstruct(folder / "RTSTRUCT.dcm", image, rois="GTV-1")["GTV-1"]
    ds = pydicom.dcmread(folder / "RTSTRUCT.dcm")
    del ds.ReferencedFrameOfReferenceSequence, ds.StudyInstanceUID
    for item in ds.StructureSetROISequence:
        del item.ReferencedFrameOfReferenceUID
    ds.save_as(tmp_path / "absent.dcm")
    ds.StudyInstanceUID = generate_uid()
    for item in ds.StructureSetROISequence:
        item.ReferencedFrameOfReferenceUID = generate_uid()
    ds.save_as(tmp_path / "wrong.dcm")
    for path, identity in [(tmp_path / "absent.dcm", "check"), (tmp_path / "wrong.dcm", "geometry")]:
        mask = read_rtstruct(path, image, rois="GTV-1", identity=identity)["GTV-1"]
        assert mask.meta["matched_by"] == "geometry"
        assert bool((mask == truth).all())
    with pytest.raises(GeometryError, match="another study and frame of reference"):
        read_rtstruct(tmp_path / "wrong.dcm", image, rois="GTV-1")
    (series,) = (item for item in find_series(data / "prostate" / "dicom") if item.number == 4)
    ds.PatientID = series.patient_id
    ds.save_as(tmp_path / "pelvis.dcm")
    with pytest.raises(GeometryError, match="is not parallel to the slices"):
        read_rtstruct(tmp_path / "pelvis.dcm", series, rois="GTV-1", identity="geometry")


def test_a_frame_of_reference_of_its_own_is_read_on_request(data):
    folder = data / CASES / "rt_utils" / "mock_data"
    mask = read_rtstruct(folder / "rt.dcm", folder, identity="geometry")["ROI-1"]
    area = float(mask.sum()) * float(mask.pixdim[0] * mask.pixdim[1])
    # The contours run along the centers of their outermost voxels, of which only those on one side count.
    assert area == pytest.approx(contour_area(closed_contours(folder / "rt.dcm", "ROI-1")), rel=0.03)
    assert mask.meta["matched_by"] == "geometry"


@pytest.mark.parametrize(
    ("name", "number"),
    [(f"{CASES}/rt_utils/oriented_data", None), ("prostate/dicom", 3), ("prostate/dicom", 4), ("prostate/dicom", 5)],
    ids=["oblique", "sagittal", "transverse", "coronal"],
)
def test_contours_on_oblique_sagittal_and_coronal_series(data, tmp_path, make_rtstruct, name, number):
    folder = data / name
    if number is None:  # each of its three slices names another study
        folder = tmp_path / "oblique"
        folder.mkdir()
        for path in (data / name).iterdir():
            ds = pydicom.dcmread(path)
            ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.4"
            ds.save_as(folder / path.name)
    (series,) = (item for item in find_series(folder) if item.is_image and number in (None, item.number))
    image = read_series(series)
    corners = np.array([[9.5, 19.5], [30.5, 19.5], [30.5, 60.5], [9.5, 60.5]])
    contours = []
    for k in (0, 1):
        index = np.column_stack([corners, np.full(4, k), np.ones(4)])
        contours.append((index @ image.affine.numpy().T)[:, :3] * [-1, -1, 1])

    def change(ds):
        ds.PatientID = series.patient_id
        ds.StudyInstanceUID = series.study_uid
        ds.ReferencedFrameOfReferenceSequence = []
        for roi in ds.StructureSetROISequence:
            roi.ReferencedFrameOfReferenceUID = series.frame_of_reference_uid

    rs = make_rtstruct(tmp_path / "rs.dcm", {"Box": contours}, change)
    expected = np.zeros(image.shape[1:], np.uint8)
    expected[10:31, 20:61, :2] = 1
    for reference in (series, image):
        mask = read_rtstruct(rs, reference)["Box"]
        np.testing.assert_array_equal(mask.numpy()[0], expected)
        assert mask.meta["matched_by"] == "frame of reference"
        assert mask.meta["roi"]["between"] == 0


def test_no_structure_set_fits_the_images_of_the_others(data):
    """Each structure set on each other folder's image, geometry deciding: refused, or it is of the same patient."""
    images = {}
    for structures, image, *_ in OUTCOMES.values():
        images.setdefault(image, []).append(structures)
    read = []
    for image in images:
        (series,) = (
            item for item in find_series(data / image) if item.is_image and item.modality == "CT" and not item.problems
        )
        for other, mine in images.items():
            if other == image:
                continue
            for structures in mine:
                with suppress(MedsegError):
                    read_rtstruct(data / structures, series, identity="geometry")
                    read.append((structures, image))
    same = {f"{CASES}/rtkit/simple_phantom_case", f"{CASES}/rtkit/simple_phantom_contours"}
    assert {image for _, image in read} <= same
