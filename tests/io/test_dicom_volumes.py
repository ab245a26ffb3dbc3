"""Several volumes or stacks in one series: told apart by their headers, and called by what they are."""

import random
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medseg.errors import GeometryError, ReadError
from medseg.io import find_series, match_series, read_image, read_series, read_volumes
from medseg.io.dicom_volumes import Frame, part

from .test_realdata import agree

ONE = np.arange(4 * 3 * 5, dtype=np.int16).reshape(4, 3, 5)  # slices, rows, columns
Z = [(-10, -20, 30 + 3 * k) for k in range(4)]


def stored(image):
    """The voxels of an image as they were stored: [channels, slices, rows, columns]."""
    return image.numpy().transpose(0, 3, 2, 1)


def several(make_series, folder, attributes, *, modality="MR", values=None, positions=None, **more):
    """Write one volume for each entry of ``attributes``, which are set on its slices; volume v holds ONE + 100 v."""
    positions = positions or [Z] * len(attributes)

    def change(i, ds):
        volume = next(v for v in range(len(positions)) if i < sum(map(len, positions[: v + 1])))
        for keyword, value in attributes[volume].items():
            setattr(ds, keyword, value[i % 4] if isinstance(value, tuple) else value)

    pixels = np.concatenate([ONE[: len(here)] + 100 * v for v, here in enumerate(positions)])
    return make_series(
        folder, pixels, modality=modality, positions=[p for here in positions for p in here], change=change, **more
    )


KINDS = [
    ([{"EchoTime": 9.84}, {"EchoTime": 4.92}], ["echo 1 (TE 4.92 ms)", "echo 2 (TE 9.84 ms)"], [1, 0]),
    ([{"EchoNumbers": 1}, {"EchoNumbers": 2}], ["echo 1", "echo 2"], [0, 1]),
    ([{"DiffusionBValue": 800.0}, {"DiffusionBValue": 0.0}], ["b=0", "b=800"], [1, 0]),
    ([{"InversionTime": 100}, {"InversionTime": 900}], ["TI 100 ms", "TI 900 ms"], [0, 1]),
    ([{"FlipAngle": 5}, {"FlipAngle": 26}], ["flip angle 5°", "flip angle 26°"], [0, 1]),
    ([{"TemporalPositionIdentifier": 2}, {"TemporalPositionIdentifier": 1}], ["time 1", "time 2"], [1, 0]),
    ([{"AcquisitionTime": "101500"}, {"AcquisitionTime": "101400"}], ["time 1", "time 2"], [1, 0]),
    ([{"AcquisitionNumber": 7}, {"AcquisitionNumber": 3}], ["acquisition 3", "acquisition 7"], [1, 0]),
    ([{"TriggerTime": 40}, {"TriggerTime": 0}], ["trigger 1 (0 ms)", "trigger 2 (40 ms)"], [1, 0]),
    (
        [{"ImageType": ["ORIGINAL", "PRIMARY", "P"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "M"]}],
        ["magnitude image", "phase image"],
        [1, 0],
    ),
    (
        [{"ImageType": ["DERIVED", "PRIMARY", "DIXON", kind]} for kind in ("WATER", "FAT")],
        ["fat image", "water image"],
        [1, 0],
    ),
    (
        [{"ImageType": ["DERIVED", "PRIMARY", "ADC"]}, {"ImageType": ["DERIVED", "PRIMARY", "T", "B"], "EchoTime": 3}],
        ["ADC", "T B"],
        [0, 1],
    ),
    # Nothing but InstanceNumber, which runs on from volume to volume.
    ([{}, {}], ["volume 1", "volume 2"], [0, 1]),
    # Each slice has a time of its own; the later one at each position is of the second volume.
    (
        [{"AcquisitionTime": ("1024", "1022", "1025", "1023")}, {"AcquisitionTime": ("1014", "1013", "1012", "1011")}],
        ["time 1", "time 2"],
        [1, 0],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("attributes", "names", "order"), KINDS, ids=[" ".join(names) for _, names, _ in KINDS])
def test_volumes_are_called_by_what_they_are(tmp_path, make_series, attributes, names, order):
    several(make_series, tmp_path, attributes)
    expected = np.stack([ONE + 100 * v for v in order])
    image = read_image(tmp_path)
    assert image.meta["volumes"] == "; ".join(names)
    np.testing.assert_array_equal(stored(image), expected)
    volumes = read_volumes(tmp_path)
    assert list(volumes) == names
    for k, volume in enumerate(volumes.values()):
        np.testing.assert_array_equal(stored(volume)[0], expected[k])
        np.testing.assert_array_equal(volume.affine, image.affine)
        assert volume.meta["volumes"] == ""
    (series,) = find_series(tmp_path)
    assert (list(series.volumes), series.channels, series.shape, series.problems) == (names, 2, (5, 3, 4), ())
    np.testing.assert_array_equal(read_series(series), image)


def test_what_only_instance_number_tells_apart_is_said(tmp_path, make_series):
    several(make_series, tmp_path, [{}, {}])
    assert "nothing but InstanceNumber" in read_image(tmp_path).meta["problems"]
    assert "nothing but InstanceNumber" in find_series(tmp_path)[0].notes[0]


def test_ranks_count_only_where_every_position_has_as_many_frames(tmp_path, make_series):
    # Without the third slice of the second volume, the rank of its other slices is still theirs; that of none is sure.
    times = [{"AcquisitionTime": ("1011", "1012", "1013", "1014")}, {"AcquisitionTime": ("1021", "1022", "1024")}]
    several(make_series, tmp_path, times, positions=[Z, [Z[0], Z[1], Z[3]]])
    match = r"same position \(000\.dcm and 004\.dcm\) that differ in time of acquisition, but not all positions have"
    with pytest.raises(GeometryError, match=match):
        read_image(tmp_path)
    (series,) = find_series(tmp_path)
    assert "differ in time of acquisition" in series.problems[0]


def test_a_slice_that_may_be_a_copy_is_noted(tmp_path, make_series):
    files = make_series(tmp_path, ONE)
    ds = pydicom.dcmread(files[2])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.save_as(tmp_path / "copy.dcm")
    (series,) = find_series(tmp_path)
    assert "1 slice at the same position as another (002.dcm and copy.dcm): left out if the pixels" in series.notes[0]


def test_a_plain_series_has_one_volume_without_a_name(tmp_path, make_series):
    # Acquisition numbers and times that differ from slice to slice tell no volumes apart.
    several(make_series, tmp_path, [{"AcquisitionNumber": (1, 2, 3, 4), "AcquisitionTime": ("1", "2", "3", "4")}])
    assert read_image(tmp_path).meta["volumes"] == ""
    assert list(read_volumes(tmp_path)) == [""]
    assert find_series(tmp_path)[0].volumes == ()


@pytest.mark.parametrize("before", [(), ("ANOTHER VENDOR", "A THIRD")])
def test_siemens_b_values_of_an_archive_that_lost_their_types(tmp_path, make_series, before):
    def change(i, ds):
        for creator in before:  # the vendor's block is not the first
            ds.private_block(0x0019, creator, create=True).add_new(0x0C, "OB", b"7")
        block = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0C, "OB", b"50" if i < 4 else b"400 ")

    make_series(tmp_path, np.concatenate([ONE, ONE]), modality="MR", positions=Z * 2, change=change)
    assert list(read_volumes(tmp_path)) == ["b=50", "b=400"]


def test_ge_and_philips_b_values(tmp_path, make_series):
    def ge(i, ds):
        block = ds.private_block(0x0043, "GEMS_PARM_01", create=True)
        block.add_new(0x39, "IS", [1000000000 + (50 if i < 4 else 800), 8, 0, 0])

    def philips(i, ds):
        ds.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", 0.0 if i < 4 else 1000.0)

    for name, change in (("ge", ge), ("philips", philips)):
        make_series(tmp_path / name, np.concatenate([ONE, ONE]), modality="MR", positions=Z * 2, change=change)
    assert list(read_volumes(tmp_path / "ge")) == ["b=50", "b=800"]
    assert list(read_volumes(tmp_path / "philips")) == ["b=0", "b=1000"]


def test_directions_of_one_b_value(tmp_path, make_series):
    directions = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    attributes = [{"DiffusionBValue": 0.0}] + [
        {"DiffusionBValue": 1000.0, "DiffusionGradientOrientation": one} for one in directions
    ]
    several(make_series, tmp_path, attributes)
    assert list(read_volumes(tmp_path)) == ["b=0"] + [f"b=1000, direction {k}" for k in (1, 2, 3)]


def test_an_adc_map_beside_b_values(tmp_path, make_series):
    kind = ["DERIVED", "PRIMARY", "DIFFUSION"]
    several(
        make_series,
        tmp_path,
        [{"DiffusionBValue": b, "ImageType": [*kind, "TRACEW"]} for b in (50.0, 800.0)]
        + [{"ImageType": [*kind, "ADC"]}],
    )
    assert list(read_volumes(tmp_path)) == ["ADC", "b=50", "b=800"]


def test_echoes_and_times_together(tmp_path, make_series):
    attributes = [{"EchoTime": te, "TemporalPositionIdentifier": t} for t in (1, 2) for te in (3, 6)]
    several(make_series, tmp_path, attributes)
    assert list(read_volumes(tmp_path)) == [
        f"echo {e} (TE {te} ms), time {t}" for e, te in ((1, 3), (2, 6)) for t in (1, 2)
    ]


def test_a_volume_that_lacks_slices_is_named(tmp_path, make_series):
    times = [{"TemporalPositionIdentifier": t} for t in (1, 2, 3)]
    several(make_series, tmp_path, times, positions=[Z, Z, Z[:3]])
    with pytest.raises(GeometryError, match=r"1 of 3 volumes lack some of the 4 positions \(time 3 has 3\)"):
        read_image(tmp_path)
    assert "time 3 has 3" in find_series(tmp_path)[0].problems[0]
    volumes = read_volumes(tmp_path)
    assert [image.shape[-1] for image in volumes.values()] == [4, 4, 3]
    assert "3 of the 4 positions" in volumes["time 3"].meta["problems"]
    assert volumes["time 1"].meta["problems"] == ""
    np.testing.assert_array_equal(stored(volumes["time 3"])[0], ONE[:3] + 200)


def test_two_acquisitions_that_overlap(tmp_path, make_series):
    far = [(x, y, z + 9) for x, y, z in Z]
    several(
        make_series, tmp_path, [{"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}], modality="CT", positions=[Z, far]
    )
    with pytest.raises(GeometryError, match="2 of 2 volumes lack some of the 7 positions"):
        read_image(tmp_path)
    volumes = read_volumes(tmp_path)
    assert [float(image.affine[2, 3]) for image in volumes.values()] == [30, 39]


@given(numbers=st.permutations(range(1, 9)), names=st.permutations(range(8)))
def test_neither_numbers_nor_names_of_files_change_a_volume(numbers, names):
    frames = [Frame(k % 4, {"echo_time": 5.0 * (1 + k // 4), "number": numbers[k]}, (names[k], 0)) for k in range(8)]
    back = {frame.slot: k for k, frame in enumerate(frames)}
    parted = part(sorted(frames, key=lambda frame: frame.slot))
    assert [[back[f.slot] for f in volume] for volume in parted.volumes.values()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not parted.extra
    assert not parted.by_number


@given(st.lists(st.integers(1, 3), min_size=8, max_size=8), st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_no_frame_is_lost_and_no_name_used_twice(echoes, positions):
    frames = [
        Frame(p, {"echo": e, "number": k}, (k, 0)) for k, (e, p) in enumerate(zip(echoes, positions, strict=True))
    ]
    parted = part(frames)
    found = [f.slot for volume in parted.volumes.values() for f in volume] + [f.slot for f, _ in parted.extra]
    assert sorted(found) == [(k, 0) for k in range(8)]
    for volume in parted.volumes.values():
        assert len({frame.position for frame in volume}) == len(volume)


def test_ct_with_several_volumes_is_not_taken_silently(tmp_path, make_series):
    several(make_series, tmp_path / "ct", [{"AcquisitionTime": t} for t in ("1014", "1015")], modality="CT")
    make_series(tmp_path / "pet", ONE, modality="PT", series=generate_uid())
    (study,) = match_series(find_series(tmp_path))
    assert "CT series 3 holds 2 volumes (time 1, time 2)" in study.problems[0]


# Stacks


def localizer(make_series, folder, *, kind="LOCALIZER", **more):
    """Write three planes of two slices each into one series."""
    planes = {"axial": (1, 0, 0, 0, 1, 0), "coronal": (1, 0, 0, 0, 0, -1), "sagittal": (0, 1, 0, 0, 0, -1)}
    for k, (name, orientation) in enumerate(planes.items()):

        def change(i, ds, k=k):
            ds.InstanceNumber = 1 + i + 2 * k
            if kind:
                ds.ImageType = ["ORIGINAL", "PRIMARY", kind]

        names = [f"{name}{i}" for i in (0, 1)]
        make_series(
            folder, ONE[:2] + 100 * k, modality="MR", orientation=orientation, names=names, change=change, **more
        )


@pytest.mark.parametrize(("kind", "prefix"), [("LOCALIZER", "localizer "), ("", "")])
def test_three_planes_in_one_series(tmp_path, make_series, kind, prefix):
    localizer(make_series, tmp_path, kind=kind)
    with pytest.raises(GeometryError, match=r"3 stacks .*axial \(2 of 5×3.*coronal \(2 .*sagittal \(2 ") as error:
        read_image(tmp_path)
    assert "read_volumes" in str(error.value)
    volumes = read_volumes(tmp_path)
    assert list(volumes) == [f"{prefix}{name}" for name in ("axial", "coronal", "sagittal")]
    for k, image in enumerate(volumes.values()):
        np.testing.assert_array_equal(np.sort(stored(image), axis=None), np.sort(ONE[:2] + 100 * k, axis=None))
    found = {series.stack: series for series in find_series(tmp_path)}
    assert list(found) == list(volumes)
    for name, series in found.items():
        assert (series.n_files, series.problems) == (2, ())
        np.testing.assert_array_equal(read_series(series), volumes[name])
        np.testing.assert_array_equal(series.affine, volumes[name].affine)


def test_scouts_in_a_ct_series_are_set_apart(tmp_path, make_series):
    make_series(tmp_path, ONE)
    scout = np.zeros((2, 8, 5), np.int16)
    make_series(
        tmp_path,
        scout,
        orientation=(0, 1, 0, 0, 0, -1),
        names=["s1", "s2"],
        change=lambda i, ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    )
    image = read_image(tmp_path)
    np.testing.assert_array_equal(stored(image)[0], ONE)
    assert image.meta["mended"] == "2 × localizer set apart"
    assert list(read_volumes(tmp_path)) == ["axial", "localizer sagittal"]
    found = {series.stack: series for series in find_series(tmp_path)}
    assert (found["axial"].n_files, found["axial"].notes) == (4, ("2 × localizer set apart",))
    assert found["localizer sagittal"].shape == (5, 8, 2)
    np.testing.assert_array_equal(read_series(found["axial"]), image)


def test_a_dose_report_in_a_ct_series_is_set_apart(tmp_path, make_series):
    def change(i, ds):
        del ds.ImagePositionPatient, ds.ImageOrientationPatient

    make_series(tmp_path / "ct", ONE)
    make_series(tmp_path / "ct", np.zeros((1, 20, 30), np.int16), names=["dose"], change=change)
    make_series(tmp_path / "pet", ONE, modality="PT", series=generate_uid())
    image = read_image(tmp_path / "ct")
    np.testing.assert_array_equal(stored(image)[0], ONE)
    assert image.meta["mended"] == "1 × picture without position set apart"
    (study,) = match_series(find_series(tmp_path))
    assert (study.series["CT"].stack, study.problems) == ("axial", ())


def test_two_stacks_of_one_orientation_are_numbered(tmp_path, make_series):
    make_series(tmp_path, ONE)
    make_series(
        tmp_path, ONE, spacing=(1.0, 1.0), names=list("abcd"), change=lambda i, ds: setattr(ds, "InstanceNumber", 9)
    )
    assert list(read_volumes(tmp_path)) == ["axial 1", "axial 2"]


def test_files_without_position_are_read_one_by_one(tmp_path, make_series):
    def change(i, ds):
        del ds.ImagePositionPatient, ds.ImageOrientationPatient

    make_series(tmp_path, ONE[:2], modality="CR", change=change)
    with pytest.raises(GeometryError, match=r"2 images without position: 000\.dcm has no usable ImagePositionPatient"):
        read_image(tmp_path)
    volumes = read_volumes(tmp_path)
    assert list(volumes) == ["image 1", "image 2"]
    assert not any(image.meta["has_geometry"] for image in volumes.values())


# Copies


def test_a_folder_with_two_copies_of_a_series_is_read(tmp_path, make_series):
    make_series(tmp_path / "a", ONE)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    image = read_image(tmp_path)
    np.testing.assert_array_equal(stored(image), ONE[None])
    assert image.meta["mended"] == "4 × copy of a slice left out"
    (series,) = find_series(tmp_path)
    assert (series.n_files, series.shape, series.notes) == (8, (5, 3, 4), ("4 copies of slices left out",))
    np.testing.assert_array_equal(read_series(series), image)


def test_a_copy_under_another_uid_is_left_out(tmp_path, make_series):
    files = make_series(tmp_path, ONE)
    ds = pydicom.dcmread(files[2])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.save_as(tmp_path / "copy.dcm")
    image = read_image(tmp_path)
    np.testing.assert_array_equal(stored(image), ONE[None])
    assert image.meta["mended"] == "1 × copy of a slice left out"


def test_a_whole_copy_under_other_uids_is_left_out(tmp_path, make_series):
    make_series(tmp_path, ONE)
    make_series(tmp_path, ONE, names=list("abcd"))
    image = read_image(tmp_path)
    np.testing.assert_array_equal(stored(image), ONE[None])
    assert (image.meta["mended"], image.meta["volumes"]) == ("1 × copy of the whole volume left out", "")
    assert list(read_volumes(tmp_path)) == [""]


def test_one_uid_with_two_contents_is_refused(tmp_path, make_series):
    files = make_series(tmp_path, ONE)
    ds = pydicom.dcmread(files[2])
    ds.PixelData = (ONE[2] + 1).astype("<i2").tobytes()
    ds.save_as(tmp_path / "changed.dcm")
    with pytest.raises(GeometryError, match=r"one SOPInstanceUID and different pixels .*(002|changed)"):
        read_image(tmp_path)
    ds.ImagePositionPatient = [-10, -20, 42]
    ds.save_as(tmp_path / "changed.dcm")
    with pytest.raises(GeometryError, match="one SOPInstanceUID and different positions"):
        read_image(tmp_path)


def test_one_series_uid_of_two_patients_is_two_series(tmp_path, make_series):
    make_series(tmp_path, ONE)
    make_series(tmp_path, ONE, names=list("abcd"), change=lambda i, ds: setattr(ds, "PatientID", "other"))
    assert len(find_series(tmp_path)) == 2
    with pytest.raises(ReadError, match="2 DICOM series"):
        read_image(tmp_path)


# Enhanced multi-frame


def enhanced(ds, frames, order, groups):
    """Make an enhanced object of a slice; ``order`` gives the slice of each frame, ``groups`` what is said of it."""
    ds.NumberOfFrames = len(order)
    ds.PixelData = np.asarray(frames, "<i2").tobytes()
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, 3
    plane.ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for z, more in zip(order, groups, strict=True):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [-10, -20, 30 + 3 * z]
        group.PlanePositionSequence = [position]
        for sequence, values in more.items():
            item = Dataset()
            for keyword, value in values.items():
                setattr(item, keyword, value)
            setattr(group, sequence, [item])
        ds.PerFrameFunctionalGroupsSequence.append(group)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(ds, keyword)


@pytest.mark.parametrize(
    ("modality", "groups", "names"),
    [
        (
            "MR",
            [{"MREchoSequence": {"EffectiveEchoTime": te}} for te in (2.5, 5.0)],
            ["echo 1 (TE 2.5 ms)", "echo 2 (TE 5 ms)"],
        ),
        ("MR", [{"MRDiffusionSequence": {"DiffusionBValue": b}} for b in (0.0, 500.0)], ["b=0", "b=500"]),
        ("PT", [{"FrameContentSequence": {"TemporalPositionIndex": t}} for t in (1, 2)], ["time 1", "time 2"]),
        (
            "CT",
            [{"ContrastBolusUsageSequence": {"ContrastBolusAgentPhase": p}} for p in ("ARTERIAL", "VENOUS")],
            ["arterial", "venous"],
        ),
        (
            "CT",
            [{"CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": p}} for p in (0.0, 80.0)],
            ["trigger 1 (0 ms)", "trigger 2 (80 ms)"],
        ),
        # Two dimensions, the first of which is the position in the stack.
        (
            "MR",
            [[{"FrameContentSequence": {"DimensionIndexValues": [z + 1, v]}} for z in range(4)] for v in (1, 2)],
            ["index 2: 1", "index 2: 2"],
        ),
    ],
    ids=["echo", "b", "time", "contrast", "trigger", "index"],
)  # fmt: skip
def test_an_enhanced_object_with_two_volumes(tmp_path, make_series, modality, groups, names):
    frames = [(v, z) for z in range(4) for v in (0, 1)]  # the volumes alternate
    random.Random(1).shuffle(frames)

    def change(i, ds):
        if modality == "PT":
            ds.Units = "BQML"
        own = [groups[v][z] if isinstance(groups[v], list) else groups[v] for v, z in frames]
        enhanced(ds, [ONE[z] + 100 * v for v, z in frames], [z for _, z in frames], own)

    make_series(tmp_path, ONE[:1], modality=modality, change=change)
    image = read_image(tmp_path, pet_units="stored")
    assert image.meta["volumes"] == "; ".join(names)
    np.testing.assert_array_equal(stored(image), [ONE, ONE + 100])


def test_frames_that_share_one_position_are_refused(tmp_path, make_series):
    def change(i, ds):
        ds.NumberOfFrames, ds.PixelData = 4, ONE.astype("<i2").tobytes()

    make_series(tmp_path, ONE[:1], modality="MR", change=change)
    with pytest.raises(GeometryError, match="4 frames share one ImagePositionPatient"):
        read_image(tmp_path)


@pytest.mark.parametrize("promised", [3, 5, 2_000_000_000])
def test_a_number_of_frames_that_is_not_theirs_is_refused(tmp_path, make_series, promised):
    def change(i, ds):
        enhanced(ds, ONE, range(4), [{}] * 4)
        ds.NumberOfFrames = promised

    make_series(tmp_path / "enhanced", ONE[:1], modality="MR", change=change)
    with pytest.raises(GeometryError, match=f"NumberOfFrames .* is {promised}, but the header describes 4 frames"):
        read_image(tmp_path / "enhanced")


def test_a_forged_number_of_frames_takes_no_memory(tmp_path, make_series):
    make_series(tmp_path, ONE[:1], change=lambda i, ds: setattr(ds, "NumberOfFrames", 2_000_000_000))
    with pytest.raises(GeometryError, match="is 2000000000, but the header describes 100000 frames"):
        read_image(tmp_path)
    assert "100000 frames" in find_series(tmp_path)[0].problems[0]


def test_a_film_without_position_is_read_frame_by_frame(tmp_path, make_series):
    def change(i, ds):
        ds.Modality, ds.NumberOfFrames, ds.PixelData = "US", 4, ONE.astype("<i2").tobytes()
        del ds.ImagePositionPatient, ds.ImageOrientationPatient

    make_series(tmp_path, ONE[:1], modality="CR", change=change)
    image = read_image(tmp_path)
    assert (tuple(image.shape), image.meta["has_geometry"]) == ((4, 5, 3, 1), False)
    assert image.meta["volumes"] == "frame 1; frame 2; frame 3; frame 4"
    np.testing.assert_array_equal(stored(image)[:, 0], ONE)


# Real data


@pytest.mark.realdata
def test_the_b_values_of_the_prostate(data):
    (folder,) = (data / "prostate" / "dicom" / "ProstateX-0000").glob("*/6.*")
    image = read_image(folder)
    assert image.meta["volumes"] == "b=50; b=400; b=800"
    volumes = read_volumes(folder)
    for k, volume in enumerate(volumes.values()):
        np.testing.assert_array_equal(volume[0], image[k])
    # Each against its own files: 19 of each b-value in the order of InstanceNumber, from the top down.
    for k, volume in enumerate(volumes.values()):
        for z in range(19):
            ds = pydicom.dcmread(folder / f"1-{1 + 19 * k + z:02d}.dcm")
            lps = np.array([*ds.ImagePositionPatient, 1.0]) * [-1, -1, 1, 1]
            voxel = np.linalg.inv(volume.affine.numpy()) @ lps
            np.testing.assert_allclose(voxel, [0, 0, round(voxel[2]), 1], atol=1e-3)
            np.testing.assert_array_equal(volume[0, :, :, round(float(voxel[2]))].numpy().T, ds.pixel_array)
    # The signal falls as b grows.
    means = [float(volume.mean()) for volume in volumes.values()]
    assert means == sorted(means, reverse=True)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["001", "001_implicit"])
def test_philips_enhanced_diffusion(data, name):
    folder = data / "dicom" / "mr_vendors" / "philips_enhanced" / "dti" / name
    volumes = read_volumes(folder)
    assert list(volumes) == ["b=0", "b=1300, direction 1", "b=1300, direction 2", "b=1300, direction 3"]
    # The reference beside it holds one volume, the third direction; its other three are all 0.
    reference = nib.load(f"{folder}_ground_truth.nii.gz")
    voxels = np.asanyarray(reference.dataobj)
    assert not voxels[..., 1:].any()
    agree(volumes["b=1300, direction 3"], voxels[..., 0], reference.affine)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("odd/dcm_qa_enh/In/Siemens/XA10", [f"time {k}" for k in range(1, 5)]),
        ("odd/dcm_qa_enh/In/Philips", ["magnitude image", "FIELD_MAP real image"]),
        ("dicom/mr_vendors/failing/notavolume/001", [f"acquisition {k}" for k in range(12, 16)]),
        ("dicom/mr_vendors/failing/sliceorientation/001", ["sagittal", "axial"]),
        (
            "dicom/ct_tilt_gap/S21610/S4010",
            ["localizer sagittal"] + [f"without position {name}" for name in ("1", "2, image 1", "2, image 2")],
        ),
    ],
)
def test_names_of_real_volumes(data, name, names):
    assert list(read_volumes(data / name)) == names


@pytest.mark.realdata
def test_the_same_slices_in_five_encodings_are_copies(data):
    generic = data / "dicom" / "mr_vendors" / "generic"
    plain = list((generic / "compressed" / "001").iterdir())
    image = read_image(plain)
    for name in ("compressed_rle", "compressed_j2k", "compressed_jpegls", "compressed_jpeg"):
        both = read_image([*plain, *(generic / name / "001").iterdir()])
        np.testing.assert_array_equal(both, image)
        assert both.meta["mended"] == "4 × copy of a slice left out"
