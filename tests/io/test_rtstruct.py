import tracemalloc

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from monai.transforms import Orientation, Spacing
from pydicom.dataelem import DataElement
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian
from shapely import contains, distance, points
from shapely.geometry import Point
from shapely.geometry import Polygon as Shape

from medseg.errors import ConfigError, GeometryError, ReadError
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


def test_rounded_coordinates_lose_no_contour_of_an_oblique_plane(tmp_path, make_series, make_rtstruct):
    a, b = np.cos(0.3), np.sin(0.3)
    turn = np.array([[a, 0, b], [0, 1, 0], [-b, 0, a]]) @ np.array([[1, 0, 0], [0, a, -b], [0, b, a]])
    make_series(tmp_path / "ct", np.zeros((9, 40, 40), np.int16), orientation=turn.T.ravel()[:6], step=1.0)
    to_patient = np.diag([-1, -1, 1, 1]) @ read_image(tmp_path / "ct").affine.numpy()
    contours, expected = [], np.zeros((40, 40, 9), np.uint8)
    for k in range(1, 8):
        for x, y, size in ((5, 5, 6), (20, 8, 7), (12, 25, 8)):
            low, high = np.array([x, y]) - 0.4, np.array([x, y]) + size - 0.6
            corners = [[*low, k, 1], [high[0], low[1], k, 1], [*high, k, 1], [low[0], high[1], k, 1]]
            contours.append(np.round(corners @ to_patient.T, 1)[:, :3])
            expected[x : x + size, y : y + size, k] = 1
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": contours})
    np.testing.assert_array_equal(read_rtstruct(rs, tmp_path / "ct")["GTV"].numpy()[0], expected)


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
        (lambda ds: _frame(ds, "1.2.3"), "lies in another frame of reference than"),
        (lambda ds: _roi_frame(ds, "1.2.3"), "refers to .* and yet lies in another frame of reference"),
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
    _roi_frame(ds, uid)


def _roi_frame(ds, uid):
    for roi in ds.StructureSetROISequence:
        roi.ReferencedFrameOfReferenceUID = uid


def _other_references(ds):
    _frame(ds, "1.2.3")
    ds.StudyInstanceUID = "1.2.4"


def _no_references(ds):
    _frame(ds, "UNKNOWN")
    del ds.StudyInstanceUID


def test_geometry_decides_where_no_reference_matches(ct, tmp_path, make_rtstruct):
    contours = [box((3, 7), (4, 9), 2), box((3, 6), (4, 9), 3)]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": contours}, _no_references)
    mask = read_rtstruct(rs, ct)["GTV"]
    assert mask.meta["matched_by"] == "geometry"
    np.testing.assert_array_equal(mask.numpy()[0], expected(((3, 7), (4, 9), 2), ((3, 6), (4, 9), 3)))
    off = make_rtstruct(tmp_path / "off.dcm", {"GTV": [*contours, box((3, 7), (4, 9), 4.2)]}, _no_references)
    with pytest.raises(GeometryError, match="of 3 contours 1 lie between the slices and 0 reach beyond"):
        read_rtstruct(off, ct)
    out = make_rtstruct(tmp_path / "out.dcm", {"GTV": [*contours, box((3, 30), (4, 9), 4)]}, _no_references)
    with pytest.raises(GeometryError, match="of 3 contours 0 lie between the slices and 1 reach beyond"):
        read_rtstruct(out, ct)


def test_geometry_decides_on_request_but_never_over_the_patient(ct, tmp_path, make_rtstruct):
    rois = {"GTV": [box((3, 7), (4, 9), 2.05)]}
    rs = make_rtstruct(tmp_path / "rs.dcm", rois, _other_references)
    with pytest.raises(GeometryError, match='identity="geometry" lets its geometry decide'):
        read_rtstruct(rs, ct)
    mask = read_rtstruct(rs, ct, identity="geometry")["GTV"]
    assert mask.meta["matched_by"] == "geometry"
    np.testing.assert_array_equal(mask.numpy()[0], expected(((3, 7), (4, 9), 2)))
    other = make_rtstruct(tmp_path / "other.dcm", rois, lambda ds: setattr(ds, "PatientID", "someone else"))
    with pytest.raises(GeometryError, match="another patient"):
        read_rtstruct(other, ct, identity="geometry")
    moved = make_rtstruct(tmp_path / "moved.dcm", {"GTV": [box((3, 7), (4, 9), 9)]}, _other_references)
    with pytest.raises(GeometryError, match="1 reach beyond the grid"):
        read_rtstruct(moved, ct, identity="geometry")
    with pytest.raises(ConfigError, match="identity: 'trust' found, expected one of check, geometry"):
        read_rtstruct(rs, ct, identity="trust")


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


def test_a_deflated_structure_set_is_read_and_a_forged_one_is_not(ct, tmp_path, make_rtstruct, monkeypatch):
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)]})
    ds = pydicom.dcmread(rs)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.add_new(0x00091001, "OB", bytes(60_000))
    pydicom.dcmwrite(tmp_path / "deflated.dcm", ds, enforce_file_format=True)
    assert (tmp_path / "deflated.dcm").stat().st_size < 5000
    mask = read_rtstruct(tmp_path / "deflated.dcm", ct)["GTV"]
    np.testing.assert_array_equal(mask.numpy()[0], expected(((3, 7), (4, 9), 2)))
    monkeypatch.setattr("medseg.io.dicom_header._MOST_BYTES", 50_000)
    with pytest.raises(ReadError, match="inflates to more than 50,000 bytes"):
        read_rtstruct(tmp_path / "deflated.dcm", ct)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 23), st.floats(-3, 23)), min_size=3, max_size=12))
def test_filling_agrees_with_two_other_libraries_off_the_edges(corners):
    polygon = np.array(corners)
    mask = np.zeros((20, 20), np.uint8)
    fill_even_odd([polygon], mask)
    edge = Shape(corners).exterior
    grid = np.array([(r, c) for r in range(20) for c in range(20)])
    inside = Outline(np.vstack([polygon, polygon[:1]])).contains_points(grid).reshape(20, 20)
    simple = Shape(corners).is_valid
    for r, c in grid:
        if simple and edge.distance(Point(r, c)) > 1e-3:
            assert mask[r, c] == Shape(corners).contains(Point(r, c))
            assert mask[r, c] == inside[r, c]


def test_polygons_that_share_edges_neither_overlap_nor_leave_gaps():
    total = np.zeros((12, 12), int)
    for r in range(0, 12, 3):
        for c in range(0, 12, 4):
            one = np.zeros((12, 12), np.uint8)
            fill_even_odd([np.array([[r, c], [r + 3, c], [r + 3, c + 4], [r, c + 4]], float)], one)
            total += one
    assert (total == 1).all()


@st.composite
def polygons_with_holes(draw):
    """A star-shaped polygon around (10, 10), with a smaller copy of itself as its hole."""
    count = draw(st.integers(5, 30))
    radii = draw(st.lists(st.floats(4, 9), min_size=count, max_size=count))
    turn = draw(st.floats(0, 6.2))
    shrink = draw(st.floats(0.2, 0.8))
    angles = turn + np.arange(count) / count * 2 * np.pi
    outer = 10 + np.array(radii)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    return outer, 10 + (outer - 10) * shrink


@settings(max_examples=60, deadline=None)
@given(polygons_with_holes(), st.integers(1, 8), st.booleans())
def test_polygons_with_holes_agree_with_shapely(pair, fine, keyhole):
    outer, inner = ((polygon + 0.5) * fine - 0.5 for polygon in pair)
    polygons = [outer, inner]
    if keyhole:
        polygons = [np.vstack([outer, outer[:1], inner[:1], inner[::-1], outer[:1]])]
    mask = np.zeros((20 * fine, 20 * fine), np.uint8)
    fill_even_odd(polygons, mask)
    shape = Shape(outer, [inner])
    rows, columns = np.indices(mask.shape)
    centers = points(rows.ravel(), columns.ravel())
    clear = distance(shape.boundary, centers) > 1e-6
    np.testing.assert_array_equal(mask.ravel()[clear] == 1, contains(shape, centers)[clear])
    # A boundary of length L passes through at most about 1.5 L voxels, half of each being wrong at worst.
    assert abs(int(mask.sum()) - shape.area) <= 0.75 * shape.length


def test_many_edges_in_parts_give_what_they_give_at_once(monkeypatch):
    rng = np.random.default_rng(5)
    polygons = [rng.uniform(-5, 45, (40, 2)) for _ in range(5)]
    whole, parts = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    fill_even_odd(polygons, whole)
    monkeypatch.setattr("medseg.io.rtstruct._CHUNK", 50)
    fill_even_odd(polygons, parts)
    assert 100 < whole.sum() < 1500
    np.testing.assert_array_equal(parts, whole)


def test_a_sagittal_series(tmp_path, make_series, make_rtstruct):
    # Columns run along y, rows down along -z, slices along -x: 3 mm apart.
    turn = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    make_series(
        tmp_path / "mr", np.zeros(SHAPE, np.int16), orientation=(0, 1, 0, 0, 0, -1), origin=turn @ [-10, -20, 30]
    )
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), k) @ turn.T for k in (2, 3)]})
    mask = read_rtstruct(rs, tmp_path / "mr")["GTV"].numpy()[0]
    np.testing.assert_array_equal(mask, expected(((3, 7), (4, 9), 2), ((3, 7), (4, 9), 3)))


def test_sagittal_contours_on_a_transverse_series(ct, tmp_path, make_rtstruct):
    def upright(column):
        x = -10 + 1.5 * column
        return np.array([[x, -13, 31.5], [x, -3, 31.5], [x, -3, 40.5], [x, -13, 40.5]])

    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [upright(column) for column in (5, 6, 7)]})
    mask = expected(*(((5, 7), (4, 8), k) for k in (1, 2, 3)))
    np.testing.assert_array_equal(read_rtstruct(rs, ct)["GTV"].numpy()[0], mask)


@pytest.mark.parametrize("tilt", ["correct", "keep"])
def test_a_tilted_series(tmp_path, make_series, make_rtstruct, tilt):
    # The slices lean by 15 degrees about x, the table moves along z.
    angle = np.radians(15)
    lean = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    step = 3 / np.cos(angle)
    starts = [np.array([-10, -20, 30 + k * step]) for k in range(6)]
    stored = np.random.default_rng(3).integers(0, 100, SHAPE).astype(np.int16)
    make_series(tmp_path / "ct", stored, orientation=(*lean[:, 0], *lean[:, 1]), positions=starts)
    contours = []
    for k in (1, 2, 3, 4):
        corners = np.array([[2.5, 5.5], [8.5, 5.5], [8.5, 12.5], [2.5, 12.5]])
        contours.append(starts[k] + np.column_stack([corners * [1.5, 2.0], np.zeros(4)]) @ lean.T)
    image = read_image(tmp_path / "ct", tilt=tilt)
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": contours})
    mask = read_rtstruct(rs, image)["GTV"]
    assert mask.meta["roi"]["between"] == 0
    volume = float(mask.sum()) * abs(np.linalg.det(mask.affine.numpy()[:3, :3]))
    assert volume == pytest.approx(4 * 3 * 6 * 1.5 * 7 * 2, rel=0.03)
    if tilt == "keep":
        np.testing.assert_array_equal(mask.numpy()[0], expected(*(((3, 8), (6, 12), k) for k in (1, 2, 3, 4))))


def test_xor_contours_and_open_ones(ct, tmp_path, make_rtstruct):
    nested = [((1, 18), (1, 16), 2), ((4, 12), (4, 12), 2)]
    entries = [(box(*entry), "CLOSEDPLANAR_XOR") for entry in nested]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [*entries, (box((2, 9), (2, 9), 3), "OPEN_PLANAR")]})
    mask = read_rtstruct(rs, ct)["GTV"]
    np.testing.assert_array_equal(mask.numpy()[0], expected(*nested))
    assert mask.meta["roi"]["not_closed"] == 1


def test_crossing_contours_are_counted_and_touching_or_nested_ones_are_not(ct, tmp_path, make_rtstruct):
    sound = [((1, 5), (1, 9), 1), ((6, 9), (1, 9), 1), ((2, 3), (2, 3), 1), ((1, 18), (1, 16), 2), ((1, 8), (1, 8), 2)]
    rs = make_rtstruct(
        tmp_path / "rs.dcm",
        {"Sound": [box(*entry) for entry in sound], "GTV": [box((3, 7), (4, 9), 2), box((5, 9), (4, 9), 2)]},
    )
    masks = read_rtstruct(rs, ct)
    assert masks["Sound"].meta["roi"]["crossing"] == 0
    assert masks["Sound"].meta["problems"] == ""
    assert masks["GTV"].meta["roi"]["crossing"] == 1
    assert "1 of the contours of ROI 'GTV' cross others of their plane" in masks["GTV"].meta["problems"]


def test_names_that_look_like_paths_are_names(ct, tmp_path, make_rtstruct):
    names = ["../../etc/x", "1,SUV\n primair", "a/b", "GTV", "GTV (6)", "GTV#2", "GTV (6)#2"]
    rs = make_rtstruct(tmp_path / "rs.dcm", {name: [box((3, 7), (4, 9), 2)] for name in names})
    assert list(read_rtstruct(rs, ct)) == [
        "../../etc/x", "1,SUV primair", "a/b", "GTV", "GTV (6)", "GTV (6) (6)", "GTV (6) (7)"
    ]  # fmt: skip
    assert list(read_rtstruct(rs, ct, rois="../../etc/x")) == ["../../etc/x"]


def test_rois_without_contours_are_listed_and_left_out(ct, tmp_path, make_rtstruct):
    def change(ds):
        del ds.ROIContourSequence[1].ContourSequence
        del ds.ROIContourSequence[2]

    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)], "Empty": [], "Bare": []}, change)
    assert [roi.name for roi in list_rois(rs)] == ["GTV", "Empty", "Bare"]
    assert list(read_rtstruct(rs, ct)) == ["GTV"]
    with pytest.raises(ReadError, match=r"'Bare' has no closed contour \(it has no contour at all\)"):
        read_rtstruct(rs, ct, rois="Bare")
    nothing = make_rtstruct(tmp_path / "nothing.dcm", {"Empty": []})
    with pytest.raises(ReadError, match="none of its 1 ROIs has a closed contour"):
        read_rtstruct(nothing, ct)


def test_one_number_for_two_rois_is_refused_only_for_these(ct, tmp_path, make_rtstruct):
    def change(ds):
        ds.StructureSetROISequence[1].ROINumber = 1

    rois = {name: [box((3, 7), (4, 9), 2)] for name in ("GTV", "CTV", "PTV")}
    rs = make_rtstruct(tmp_path / "rs.dcm", rois, change)
    with pytest.raises(ReadError, match="1 stands for 'GTV' and for 'CTV': whose the contours are is unknown"):
        read_rtstruct(rs, ct)
    assert list(read_rtstruct(rs, ct, rois="PTV")) == ["PTV"]


def test_contours_of_one_roi_in_two_items_belong_together(ct, tmp_path, make_rtstruct):
    def change(ds):
        ds.ROIContourSequence[1].ReferencedROINumber = 1

    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)], "Rest": [box((3, 7), (4, 9), 3)]}, change)
    mask = read_rtstruct(rs, ct, rois="GTV")["GTV"].numpy()[0]
    np.testing.assert_array_equal(mask, expected(((3, 7), (4, 9), 2), ((3, 7), (4, 9), 3)))


def write_contour_data(rs, *texts):
    """Put texts in the place of the first values of ContourData; pydicom writes them as they are."""
    ds = pydicom.dcmread(rs)
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # long texts do not fit the explicit one
    for contour, text in zip(ds.ROIContourSequence[0].ContourSequence, texts, strict=False):
        contour[0x30060050] = DataElement(0x30060050, "OB", text)
    pydicom.dcmwrite(rs, ds, implicit_vr=True, little_endian=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"1\\2\\nan\\4\\5\\6", "NaN or infinite"),
        (b"1\\2\\1e400\\4\\5\\6 ", "NaN or infinite"),
        (b"1\\2\\1e300\\4\\5\\6 ", r"a coordinate of 1e\+300 mm"),
        (b"1e9\\2\\3\\4\\5\\6 ", r"a coordinate of 1e\+09 mm"),
        (b"1\\2\\3\\4\\5", "not triples of numbers"),
        (b"1\\2\\3\\4,5\\5\\6", "not triples of numbers"),
        (b"1\\2\\3\\\\5\\6", "not triples of numbers"),
        (b"1\\2\\3\\x\\5\\6 ", "not triples of numbers"),
        (b"1\\2\\3\\4\\5\\6\\", "not triples of numbers"),
        (b"1\\2\\3\\4\\5\\6 ", r"of 2 points where NumberOfContourPoints \(3006,0046\) is 4"),
        (b"", r"of 0 points where NumberOfContourPoints \(3006,0046\) is 4"),
    ],
)
def test_damaged_contours_are_refused_where_they_are_wanted(ct, tmp_path, make_rtstruct, text, match):
    square = box((3, 7), (4, 9), 2)
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [square], "CTV": [square]})
    write_contour_data(rs, text)
    with pytest.raises(ReadError, match=match) as error:
        read_rtstruct(rs, ct)
    assert "'GTV'" in str(error.value)
    assert list(read_rtstruct(rs, ct, rois="CTV")) == ["CTV"]


def test_a_count_below_the_points_is_overruled_by_them(ct, tmp_path, make_rtstruct):
    def change(ds):
        ds.ROIContourSequence[0].ContourSequence[0].NumberOfContourPoints = 2

    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 2)]}, change)
    np.testing.assert_array_equal(read_rtstruct(rs, ct)["GTV"].numpy()[0], expected(((3, 7), (4, 9), 2)))


def test_many_points_and_far_ones_cost_little_memory(ct, tmp_path, make_rtstruct):
    zigzag = np.zeros((100_000, 3))
    zigzag[:, 0] = np.linspace(-10, 20, len(zigzag))
    zigzag[:, 1] = np.where(np.arange(len(zigzag)) % 2, -9e5, 9e5)
    zigzag[:, 2] = 36
    repeated = np.repeat(box((3, 7), (4, 9), 3), 60_000, axis=0)
    alternating = np.tile(box((3, 7), (4, 9), 4)[[0, 1, 2]], (30_000, 1))
    contours = [box((3, 7), (4, 9), 1), zigzag, zigzag, repeated, repeated[::-1], alternating]
    rs = make_rtstruct(tmp_path / "rs.dcm", {"GTV": [box((3, 7), (4, 9), 1)] * len(contours)})
    write_contour_data(
        rs, *("\\".join(map(str, np.round(contour, 3).ravel().tolist())).encode() for contour in contours)
    )
    tracemalloc.start()
    mask = read_rtstruct(rs, ct)["GTV"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.meta["roi"]["duplicates"] == 2
    np.testing.assert_array_equal(mask.numpy()[0, :, :, 3], expected(((3, 7), (4, 9), 3))[:, :, 3])
    assert peak < 150e6
