import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from monai.transforms import Orientation, Spacing
from shapely.geometry import Point
from shapely.geometry import Polygon as Shape

from medseg.errors import GeometryError, ReadError
from medseg.io import find_series, list_rois, read_image, read_rtstruct, write_nifti
from medseg.io.rtstruct import fill_even_odd

SHAPE = (6, 20, 24)  # slices, rows, columns; spacing 3, 2 and 1.5 mm from (-10, -20, 30)


@pytest.fixture
def ct(tmp_path, make_series):
    make_series(tmp_path / "ct", np.zeros(SHAPE, np.int16))
    return tmp_path / "ct"


def box(columns, rows, slice_number, reverse=False):
    """Return a rectangle around pixels first..last along columns and rows, in patient coordinates."""
    x0, x1 = (-10 + 1.5 * (c + s) for c, s in zip(columns, (-0.5, 0.5), strict=True))
    y0, y1 = (-20 + 2.0 * (r + s) for r, s in zip(rows, (-0.5, 0.5), strict=True))
    points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    return np.array([[x, y, 30 + 3 * slice_number] for x, y in (points[::-1] if reverse else points)])


def expected(*boxes):
    mask = np.zeros(SHAPE[::-1], np.uint8)
    for columns, rows, k in boxes:
        mask[columns[0] : columns[1] + 1, rows[0] : rows[1] + 1, k] ^= 1
    return mask


@pytest.mark.parametrize("kind", ["image", "folder", "series", "nifti", "files"])
def test_a_mask_on_any_kind_of_reference(ct, tmp_path, make_rtstruct, kind):
    write_nifti(read_image(ct), tmp_path / "ct.nii.gz")
    reference = {
        "image": read_image(ct),
        "folder": ct,
        "series": find_series(ct)[0],
        "nifti": tmp_path / "ct.nii.gz",
        "files": sorted(ct.iterdir()),
    }[kind]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2), box((3, 6), (4, 9), 3)]})
    mask = read_rtstruct(rs, reference)["GTV"]
    np.testing.assert_array_equal(mask.numpy()[0], expected(((3, 7), (4, 9), 2), ((3, 6), (4, 9), 3)))
    np.testing.assert_allclose(mask.affine.numpy(), read_image(ct).affine.numpy(), atol=1e-4)
    assert mask.dtype.is_floating_point is False
    assert mask.meta["matched_by"] == ("geometry" if kind == "nifti" else "series")


def test_identical_contours_count_once_however_they_run(ct, tmp_path, make_rtstruct):
    first = box((3, 7), (4, 9), 2)
    again = [np.roll(first, 2, axis=0), first[::-1], np.vstack([first, first[:1]])]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [first, *again]})
    mask = read_rtstruct(rs, ct)["GTV"]
    np.testing.assert_array_equal(mask.numpy()[0], expected(((3, 7), (4, 9), 2)))
    assert mask.meta["roi"]["duplicates"] == 3


def test_nested_contours_make_holes_and_islands(ct, tmp_path, make_rtstruct):
    nested = [((1, 18), (1, 16), 2), ((4, 12), (4, 12), 2), ((6, 8), (6, 8), 2)]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box(*entry) for entry in nested]})
    np.testing.assert_array_equal(read_rtstruct(rs, ct)["GTV"].numpy()[0], expected(*nested))


def test_a_keyhole_contour_leaves_the_hole_and_no_line(ct, tmp_path, make_rtstruct):
    outer, inner = box((1, 18), (1, 16), 2), box((4, 12), (4, 12), 2, reverse=True)
    keyhole = np.vstack([outer, outer[:1], inner[-1:], inner, outer[:1]])
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [keyhole]})
    mask = read_rtstruct(rs, ct)["GTV"].numpy()[0]
    np.testing.assert_array_equal(mask, expected(((1, 18), (1, 16), 2), ((4, 12), (4, 12), 2)))


def test_two_contours_side_by_side(ct, tmp_path, make_rtstruct):
    both = [((1, 4), (1, 4), 0), ((5, 9), (1, 4), 0)]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box(*entry) for entry in both]})
    np.testing.assert_array_equal(read_rtstruct(rs, ct)["GTV"].numpy()[0], expected(*both))


def test_contours_off_the_slice_centers_go_to_the_nearest_slice(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) for k in (1.4, 2.4, 3.4)]})
    mask = read_rtstruct(rs, ct)["GTV"].numpy()[0]
    np.testing.assert_array_equal(mask, expected(*(((3, 7), (4, 9), k) for k in (1, 2, 3))))


def test_contours_halfway_between_slices_keep_their_volume(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) for k in (1.5, 2.5, 3.5)]})
    assert int(read_rtstruct(rs, ct)["GTV"].sum()) == 3 * 5 * 6


def test_planes_denser_than_slices_are_not_mixed(ct, tmp_path, make_rtstruct):
    planes = [1.0, 4 / 3, 5 / 3, 2.0]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7 + i), (4, 9), k) for i, k in enumerate(planes)]})
    mask = read_rtstruct(rs, ct)["GTV"].numpy()[0]
    np.testing.assert_array_equal(mask, expected(((3, 7), (4, 9), 1), ((3, 10), (4, 9), 2)))


def test_regular_planes_wider_than_slices_stand_for_slabs(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) for k in (0.5, 2.5, 4.5)]})
    assert read_rtstruct(rs, ct)["GTV"].numpy()[0].any(axis=(0, 1)).tolist() == [True] * 6


def test_an_interrupted_roi_keeps_its_gap(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) for k in (0, 1, 4, 5)]})
    assert read_rtstruct(rs, ct)["GTV"].numpy()[0].any(axis=(0, 1)).tolist() == [True, True, False, False, True, True]


def test_points_make_no_mask_and_are_listed(ct, tmp_path, make_rtstruct):
    square = box((3, 7), (4, 9), 2)
    rs = make_rtstruct(tmp_path / "rs.dcm", {"Iso": [(square[:1], "POINT")], "GTV, left/1": [square], "None": []})
    assert list(read_rtstruct(rs, ct)) == ["GTV, left/1"]
    assert [tuple(roi) for roi in list_rois(rs)] == [
        (1, "Iso", {"POINT": 1}),
        (2, "GTV, left/1", {"CLOSED_PLANAR": 1}),
        (3, "None", {}),
    ]
    with pytest.raises(ReadError, match=r"'Iso' has no closed contour \(it has POINT\)"):
        read_rtstruct(rs, ct, rois="Iso")


def test_names_are_literal_first_and_patterns_next(ct, tmp_path, make_rtstruct):
    square = box((3, 7), (4, 9), 2)
    rs = make_rtstruct(
        tmp_path / "rs.dcm", {name: [square] for name in ("Lung R", "GTV-1", "Lung L", "GTV[1]", "GTV1")}
    )
    assert list(read_rtstruct(rs, ct, rois="GTV[1]")) == ["GTV[1]"]
    assert list(read_rtstruct(rs, ct, rois=["Lung*", "GTV-1"])) == ["Lung R", "GTV-1", "Lung L"]
    with pytest.raises(ReadError, match=r"named 'lung r': it has 'Lung R', 'Lung L', 'GTV-1'"):
        read_rtstruct(rs, ct, rois=["GTV-1", "lung r"])


def test_two_rois_of_one_name(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)], "GTV#2": [box((3, 7), (4, 9), 3)]})
    assert list(read_rtstruct(rs, ct)) == ["GTV", "GTV (2)"]
    with pytest.raises(ReadError, match="2 ROIs are named 'GTV'"):
        read_rtstruct(rs, ct, rois="GTV")


def test_closed_contours_without_a_voxel_are_an_error(ct, tmp_path, make_rtstruct):
    tiny = box((3, 3), (4, 4), 2) * [1, 1, 1]
    tiny[:, :2] = tiny[:, :2].mean(axis=0) + (tiny[:, :2] - tiny[:, :2].mean(axis=0)) * 0.1 + 0.5
    with pytest.raises(GeometryError, match="'GTV' has 1 closed contours and no voxel"):
        read_rtstruct(make_rtstruct(tmp_path / "a.dcm", {"GTV": [tiny]}), ct)
    with pytest.raises(GeometryError, match="1 of them lie outside the grid"):
        read_rtstruct(make_rtstruct(tmp_path / "b.dcm", {"GTV": [box((3, 7), (4, 9), 40)]}), ct)


def test_contours_outside_the_grid_are_counted(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(
        tmp_path / "rs.dcm", {"GTV": [box((20, 40), (4, 9), 5), box((3, 7), (4, 9), 6), box((50, 60), (4, 9), 4)]}
    )
    mask = read_rtstruct(rs, ct)["GTV"]
    np.testing.assert_array_equal(mask.numpy()[0], expected(((20, 23), (4, 9), 5)))
    assert mask.meta["roi"]["outside"] == 2


def test_contours_across_the_slices_are_refused(ct, tmp_path, make_rtstruct):
    tilted = box((3, 7), (4, 9), 2)
    tilted[2:, 2] += 6
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2), box((3, 7), (4, 9), 1), tilted]})
    with pytest.raises(GeometryError, match=r"'GTV' has a contour that is not parallel .* 6\.00 mm"):
        read_rtstruct(rs, ct)


def test_an_oblique_frame(tmp_path, make_series, make_rtstruct):
    cos, sin = np.cos(0.4), np.sin(0.4)
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    origin = turn @ [-10, -20, 30]
    make_series(tmp_path / "ct", np.zeros(SHAPE, np.int16), orientation=(cos, 0, sin, 0, 1, 0), origin=origin)
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) @ turn.T for k in (2, 3)]})
    mask = read_rtstruct(rs, tmp_path / "ct")["GTV"].numpy()[0]
    np.testing.assert_array_equal(mask, expected(((3, 7), (4, 9), 2), ((3, 7), (4, 9), 3)))


def test_a_reoriented_and_a_resampled_reference(ct, tmp_path, make_rtstruct):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) for k in (1, 2, 3)]})
    image = read_image(ct)
    turned = read_rtstruct(rs, Orientation(axcodes="SRA")(image))["GTV"]
    np.testing.assert_array_equal(
        Orientation(axcodes="LPS")(turned).numpy()[0], expected(*(((3, 7), (4, 9), k) for k in (1, 2, 3)))
    )
    fine = read_rtstruct(rs, Spacing(pixdim=(0.5, 0.5, 1.0))(image))["GTV"]
    volume = float(fine.sum()) * 0.25
    assert volume == pytest.approx(5 * 1.5 * 6 * 2 * 3 * 3, rel=0.02)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda ds: setattr(ds, "PatientID", "someone else"), r"another patient .*PatientID \(0010,0020\)"),
        (lambda ds: _frame(ds, "1.2.3"), "another frame of reference"),
        (lambda ds: (_frame(ds, "1.2.3"), setattr(ds, "StudyInstanceUID", "1.2.4")), "another study and frame"),
        (lambda ds: (_frame(ds, ""), setattr(ds, "StudyInstanceUID", "1.2.4")), "another study"),
    ],
)
def test_a_structure_set_of_something_else_is_refused(ct, tmp_path, make_rtstruct, change, match):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)]}, change)
    with pytest.raises(GeometryError, match=match) as error:
        read_rtstruct(rs, read_image(ct))
    assert "someone else" not in str(error.value)
    assert "\n" not in str(error.value)


def _frame(ds, uid):
    ds.ReferencedFrameOfReferenceSequence = []
    for roi in ds.StructureSetROISequence:
        roi.ReferencedFrameOfReferenceUID = uid


def test_wrong_references_are_overruled_by_frame_and_study(ct, tmp_path, make_rtstruct, uids):
    def change(ds):
        _frame(ds, uids["frame"])

    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)]}, change)
    assert read_rtstruct(rs, ct)["GTV"].meta["matched_by"] == "frame of reference"
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)]}, lambda ds: _frame(ds, ""))
    assert read_rtstruct(rs, ct)["GTV"].meta["matched_by"] == "study"


def test_what_is_no_structure_set(ct, tmp_path, make_rtstruct):
    with pytest.raises(ReadError, match="modality CT: expected RTSTRUCT"):
        read_rtstruct(sorted(ct.iterdir())[0], ct)
    (tmp_path / "text.dcm").write_text("text")
    with pytest.raises(ReadError, match="not DICOM"):
        read_rtstruct(tmp_path / "text.dcm", ct)
    with pytest.raises(ReadError, match="no such file"):
        list_rois(tmp_path / "absent.dcm")
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)]})
    content = rs.read_bytes()
    rs.write_bytes(content[: len(content) - 40])
    with pytest.raises(ReadError):
        read_rtstruct(rs, ct)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 23), st.floats(-3, 23)), min_size=3, max_size=12))
def test_filling_agrees_with_two_other_libraries_off_the_edges(points):
    polygon = np.array(points)
    mask = np.zeros((20, 20), np.uint8)
    fill_even_odd([polygon], mask)
    edge = Shape(points).exterior
    grid = np.array([(r, c) for r in range(20) for c in range(20)])
    inside = Outline(np.vstack([polygon, polygon[:1]])).contains_points(grid).reshape(20, 20)
    simple = Shape(points).is_valid
    for r, c in grid:
        if simple and edge.distance(Point(r, c)) > 1e-3:
            assert mask[r, c] == Shape(points).contains(Point(r, c))
            assert mask[r, c] == inside[r, c]


def test_polygons_that_share_edges_neither_overlap_nor_leave_gaps():
    total = np.zeros((12, 12), int)
    for r in range(0, 12, 3):
        for c in range(0, 12, 4):
            one = np.zeros((12, 12), np.uint8)
            fill_even_odd([np.array([[r, c], [r + 3, c], [r + 3, c + 4], [r, c + 4]], float)], one)
            total += one
    assert (total == 1).all()
