"""DICOM segmentations, written by highdicom and read back."""

import highdicom
import numpy as np
import pydicom
import pytest
from monai.transforms import Orientation
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from medseg.errors import GeometryError, ReadError
from medseg.io import find_series, read_image, read_label, read_rtstruct, read_seg, write_nifti

SHAPE = (6, 20, 24)  # slices, rows, columns; spacing 3, 2 and 1.5 mm from (-10, -20, 30)


@pytest.fixture
def ct(tmp_path, make_series):
    make_series(tmp_path / "ct", np.zeros(SHAPE, np.int16))
    return tmp_path / "ct"


def write_seg(path, series, array, *, labels=("liver", "tumor"), kind="BINARY", change=None, **more):
    """Write [slice, row, column, segment] (or a label map) as the SEG of the files of a series."""
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type="AUTOMATIC" if number == 1 else "MANUAL",
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                "a", codes.DCM.ArtificialIntelligence, "1"
            )
            if number == 1
            else None,
        )
        for number, label in enumerate(labels, start=1)
    ]
    sources = [pydicom.dcmread(file) for file in series]
    for ds in sources:  # highdicom copies these
        for keyword in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyTime"):
            if keyword not in ds:
                setattr(ds, keyword, "")
    seg = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=array,
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=highdicom.UID(),
        series_number=9,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
        **more,
    )
    if change:
        change(seg)
    seg.save_as(path)
    return path


def two_segments():
    """Two segments that overlap, on slices 1 to 4 of 6; [slice, row, column, segment]."""
    array = np.zeros((*SHAPE, 2), np.uint8)
    array[1:4, 4:10, 3:9, 0] = 1
    array[3:5, 8:14, 5:12, 1] = 1
    return array


def on_image(array):
    """[slice, row, column] as [X, Y, Z]."""
    return array.transpose(2, 1, 0)


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_segments_come_back_on_the_grid_of_the_image(ct, tmp_path, syntax):
    more = {"transfer_syntax_uid": syntax, "kind": "FRACTIONAL"} if syntax else {}
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments(), **more)
    masks = read_seg(path, ct)
    assert list(masks) == ["liver", "tumor"]
    for number, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(mask.numpy()[0], on_image(two_segments()[..., number]))
        np.testing.assert_allclose(mask.affine.numpy(), read_image(ct).affine.numpy(), atol=1e-6)
        assert mask.numpy().dtype == np.uint8
        assert mask.meta["matched_by"] == "series"
    assert dict(masks["tumor"].meta["segment"]) == {
        "number": 2,
        "label": "tumor",
        "algorithm_type": "MANUAL",
        "outside": 0,
        "resampled": 0,
    }


@pytest.mark.parametrize("kind", ["image", "series", "files", "nifti"])
def test_any_kind_of_reference(ct, tmp_path, kind):
    write_nifti(read_image(ct), tmp_path / "ct.nii.gz")
    reference = {
        "image": read_image(ct),
        "series": find_series(ct)[0],
        "files": sorted(ct.iterdir()),
        "nifti": tmp_path / "ct.nii.gz",
    }[kind]
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments())
    mask = read_seg(path, reference, "liver")["liver"]
    np.testing.assert_array_equal(mask.numpy()[0], on_image(two_segments()[..., 0]))
    assert mask.meta["matched_by"] == ("geometry" if kind == "nifti" else "series")


def test_a_grid_of_its_own_begins_and_ends_with_the_frames(ct, tmp_path):
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments())
    mask = read_seg(path)["liver"]
    np.testing.assert_array_equal(mask.numpy()[0], on_image(two_segments()[1:5, ..., 0]))
    affine = read_image(ct).affine.numpy().copy()
    affine[:3, 3] += affine[:3, 2]
    np.testing.assert_allclose(mask.affine.numpy(), affine, atol=1e-6)
    assert mask.meta["matched_by"] == ""


def test_frames_left_out_between_others_are_empty(ct, tmp_path):
    array = np.zeros(SHAPE, np.uint8)
    array[[0, 4], 4:10, 3:9] = 1
    for hint in (True, False):

        def change(seg, hint=hint):
            if not hint:
                del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices

        path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), array, labels=["liver"], change=change)
        mask = read_seg(path, ct)["liver"]
        np.testing.assert_array_equal(mask.numpy()[0], on_image(array))
        assert mask.meta["segment"]["resampled"] == 0


def test_frames_further_apart_than_thick_say_that_some_may_be_left_out(ct, tmp_path):
    array = two_segments()[..., :1]
    array[2] = 0  # frames on slices 1 and 3 only

    def forget(seg):
        del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices

    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), array, labels=("liver",), change=forget)
    mask = read_seg(path)["liver"]
    assert mask.pixdim.tolist() == [1.5, 2, 6]
    for image in (mask, read_label(path)):
        assert "slices of 3 mm lie 6 mm apart" in image.meta["problems"]
    assert read_seg(path, ct)["liver"].meta["problems"] == ""
    path = write_seg(tmp_path / "whole.dcm", sorted(ct.iterdir()), array, labels=("liver",))
    assert read_seg(path)["liver"].meta["problems"] == ""


def test_a_reoriented_and_a_cropped_reference_keep_every_voxel(ct, tmp_path):
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments())
    image = read_image(ct)
    turned = read_seg(path, Orientation(axcodes="SRA")(image))["tumor"]
    np.testing.assert_array_equal(Orientation(axcodes="LPS")(turned).numpy()[0], on_image(two_segments()[..., 1]))
    affine = image.affine.clone()
    affine[:3, 3] += affine[:3, 2] * 4
    cropped = image[..., 4:]
    cropped.affine = affine
    mask = read_seg(path, cropped, "tumor")["tumor"]
    np.testing.assert_array_equal(mask.numpy()[0], on_image(two_segments()[4:, ..., 1]))
    assert mask.meta["segment"]["outside"] == 42
    with pytest.raises(GeometryError, match="segment 1 'liver' has 108 voxels and none of them on the grid"):
        read_seg(path, cropped)


def test_another_grid_takes_the_nearest_voxel(ct, tmp_path, make_series):
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments())
    # Twice as fine in each direction, voxels parted in two.
    make_series(
        tmp_path / "fine",
        np.zeros([2 * n for n in SHAPE], np.int16),
        spacing=(1.0, 0.75),
        step=1.5,
        origin=(-10.375, -20.5, 29.25),
        series="1.2.3",
    )
    mask = read_seg(path, tmp_path / "fine")["liver"]
    truth = on_image(two_segments()[..., 0]).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(mask.numpy()[0], truth)
    assert mask.meta["segment"]["resampled"] == 1
    assert mask.meta["matched_by"] == "frame of reference"


@pytest.mark.parametrize(("count", "thickness", "start"), [(3, 6.0, 31.5), (2, 9.0, 33.0)])
def test_thick_frames_fill_the_thin_slices_that_they_cover(tmp_path, make_series, count, thickness, start):
    array = np.zeros((count, 20, 24), np.uint8)
    array[1, 4:10, 3:9] = 1
    thick = make_series(tmp_path / "thick", array.astype(np.int16), step=thickness, origin=(-10, -20, start))
    path = write_seg(tmp_path / "seg.dcm", thick, array, labels=["liver"])
    make_series(tmp_path / "ct", np.zeros(SHAPE, np.int16), series="1.2.3")
    mask = read_seg(path, tmp_path / "ct")["liver"]
    np.testing.assert_array_equal(mask.numpy()[0], on_image(array.repeat(6 // count, 0)))


def test_fractions_have_a_threshold_or_come_as_they_are(ct, tmp_path):
    array = np.zeros(SHAPE, np.float32)
    array[2, 4:10, 3:9] = np.linspace(0.1, 0.9, 36).reshape(6, 6)
    path = write_seg(
        tmp_path / "seg.dcm",
        sorted(ct.iterdir()),
        array,
        labels=["liver"],
        kind="FRACTIONAL",
        max_fractional_value=200,
    )
    mask = read_seg(path, ct)["liver"]
    np.testing.assert_array_equal(mask.numpy()[0], on_image(np.rint(array * 200) >= 100))
    fractions = read_seg(path, ct, probabilities=True)["liver"].numpy()[0]
    assert fractions.dtype == np.float32
    np.testing.assert_allclose(fractions, on_image(array), atol=0.5 / 200 + 1e-6)


def test_a_label_map_gives_a_mask_per_segment_and_none_of_the_background(ct, tmp_path):
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 4:10, 3:9] = 1
    array[3:5, 12:14, 5:12] = 2
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), array, kind="LABELMAP")
    masks = read_seg(path, ct)
    assert list(masks) == ["liver", "tumor"]
    for number, mask in enumerate(masks.values(), start=1):
        np.testing.assert_array_equal(mask.numpy()[0], on_image(array == number))


def test_segments_by_number_label_and_pattern(ct, tmp_path):
    array = np.repeat(two_segments(), 2, axis=3)
    files = sorted(ct.iterdir())
    path = write_seg(tmp_path / "seg.dcm", files, array, labels=["GTV 1", "GTV[2]", "cord", "cord"])
    assert list(read_seg(path)) == ["GTV 1", "GTV[2]", "cord", "cord (4)"]
    assert list(read_seg(path, segments="GTV[2]")) == ["GTV[2]"]
    assert list(read_seg(path, segments=["GTV*", 3])) == ["GTV 1", "GTV[2]", "cord"]
    assert read_seg(path, segments=4)["cord"].meta["segment"]["number"] == 4
    with pytest.raises(ReadError, match="2 segments are named 'cord': choose by number, one of 3, 4"):
        read_seg(path, segments="cord")
    with pytest.raises(ReadError, match=r"no segment is 'gtv 1': it has 1 'GTV 1', .*3 'cord'"):
        read_seg(path, segments="gtv 1")
    with pytest.raises(ReadError, match="no segment is 7"):
        read_seg(path, segments=7)


def _drop_ties(seg):
    del seg.ReferencedSeriesSequence
    seg.FrameOfReferenceUID = ""


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda seg: setattr(seg, "PatientID", "someone else"), "belongs to another patient than"),
        (lambda seg: setattr(seg, "FrameOfReferenceUID", "1.2.3"), "in another frame of reference"),
        (lambda seg: (_drop_ties(seg), setattr(seg, "StudyInstanceUID", "1.2.4")), "belongs to another study"),
    ],
)
def test_a_segmentation_of_something_else_is_refused(ct, tmp_path, change, match):
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments(), change=change)
    assert len(read_seg(path)) == 2
    with pytest.raises(GeometryError, match=match) as error:
        read_seg(path, ct)
    assert "someone else" not in str(error.value)
    assert "\n" not in str(error.value)


def test_geometry_alone_must_fit(ct, tmp_path, make_series):
    def change(seg):
        _drop_ties(seg)
        seg.StudyInstanceUID = ""

    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments(), change=change)
    assert read_seg(path, ct)["liver"].meta["matched_by"] == "geometry"
    make_series(tmp_path / "moved", np.zeros(SHAPE, np.int16), origin=(-10, -20, 31))
    with pytest.raises(GeometryError, match="nothing but geometry ties"):
        read_seg(path, tmp_path / "moved")


def test_what_is_no_segmentation_of_a_volume(ct, tmp_path):
    with pytest.raises(ReadError, match="modality CT: expected SEG"):
        read_seg(sorted(ct.iterdir())[0])
    with pytest.raises(ReadError, match="no such file"):
        read_seg(tmp_path / "absent.dcm")
    (tmp_path / "text.dcm").write_text("text")
    with pytest.raises(ReadError, match="not DICOM"):
        read_seg(tmp_path / "text.dcm")
    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments())
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData[:-100]
    ds.save_as(tmp_path / "short.dcm")
    with pytest.raises(ReadError, match="cut short: "):
        read_seg(tmp_path / "short.dcm")
    del ds.PixelData
    ds.save_as(tmp_path / "none.dcm")
    with pytest.raises(ReadError, match="no pixels"):
        read_seg(tmp_path / "none.dcm")
    ds = pydicom.dcmread(path)
    del ds.PerFrameFunctionalGroupsSequence[0]
    ds.save_as(tmp_path / "fewer.dcm")
    with pytest.raises(ReadError, match="5 frames by NumberOfFrames"):
        read_seg(tmp_path / "fewer.dcm")
    ds = pydicom.dcmread(path)
    del ds.SegmentSequence
    ds.save_as(tmp_path / "bare.dcm")
    with pytest.raises(ReadError, match="it cannot be parsed"):
        read_seg(tmp_path / "bare.dcm")
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    pydicom.dcmwrite(tmp_path / "big.dcm", ds, implicit_vr=False, little_endian=False)
    with pytest.raises(ReadError, match="Explicit VR Big Endian"):
        read_seg(tmp_path / "big.dcm")


def test_a_few_frames_cannot_claim_a_huge_grid(ct, tmp_path):
    def change(seg):
        seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = "0.0001"

    path = write_seg(tmp_path / "seg.dcm", sorted(ct.iterdir()), two_segments(), change=change)
    with pytest.raises(GeometryError, match=r"span .* slices: expected at most 4,000"):
        read_seg(path)

    def far(seg):
        seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [-10, -20, 1e7]

    path = write_seg(tmp_path / "far.dcm", sorted(ct.iterdir()), two_segments(), change=far)
    with pytest.raises(GeometryError, match=r"span .* slices|no regular volume"):
        read_seg(path)


@pytest.mark.realdata
def test_segmentations_of_other_tools(data):
    folder = data / "odd" / "highdicom" / "test_files"
    counted = {"seg_image_ct_binary.dcm": 638, "seg_image_ct_binary_fractional.dcm": 638,
               "seg_image_ct_binary_single_frame.dcm": 1832, "seg_image_ct_true_fractional.dcm": 638}  # fmt: skip
    for path in sorted(folder.glob("seg_*.dcm")):
        if path.name in counted:
            # The sum of the stored frames, which pydicom decodes.
            stored = pydicom.dcmread(path).pixel_array
            assert int((stored > 0.5 * stored.max()).sum()) <= counted[path.name] <= int((stored > 0).sum())
            assert int(read_seg(path)["first segment"].sum()) == counted[path.name]
        elif "_sm_" in path.name:
            with pytest.raises(ReadError, match="microscope's slide"):
                read_seg(path)
        elif "_cr_" in path.name:
            with pytest.raises(GeometryError, match="lie nowhere in the patient"):
                read_seg(path)
    overlap = read_seg(folder / "seg_image_ct_binary_overlap.dcm")
    assert {name: int(mask.sum()) for name, mask in overlap.items()} == {"first segment": 64, "second segment": 16}
    single = read_seg(folder / "seg_image_ct_binary_single_frame.dcm", folder / "ct_image.dcm")["first segment"]
    stored = pydicom.dcmread(folder / "seg_image_ct_binary_single_frame.dcm").pixel_array
    np.testing.assert_array_equal(single.numpy()[0, :, :, 0], stored.reshape(128, 128).T)
    # Two of its three frames were cut away, and its functional groups still tell of them.
    with pytest.raises(ReadError, match=r"1 frame by NumberOfFrames .* and 3 by PerFrameFunctionalGroupsSequence"):
        read_seg(data / "odd" / "pydicom" / "test_files" / "liver_1frame.dcm")


@pytest.mark.realdata
def test_the_thorax_plan_as_a_segmentation_and_back(data, tmp_path):
    folder = data / "dicom" / "ct_rtstruct_lung"
    names = ["GTV-1", "Spinal cord"]
    masks = read_rtstruct(folder / "RTSTRUCT.dcm", folder / "CT", rois=names)
    (series,) = find_series(folder / "CT")
    array = np.stack([masks[name].numpy()[0].transpose(2, 1, 0) for name in names], axis=-1)
    path = write_seg(tmp_path / "seg.dcm", series.files, array, labels=names)
    for name, mask in read_seg(path, series).items():
        np.testing.assert_array_equal(mask.numpy(), masks[name].numpy())
        np.testing.assert_allclose(mask.affine.numpy(), masks[name].affine.numpy(), atol=1e-6)
