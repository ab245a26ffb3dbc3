"""What the stored values stand for: rescale, LUTs, colors, palettes, MONOCHROME1, and the windows of the header."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydicom.dataset import Dataset

from medseg.errors import MissingTagError, ReadError
from medseg.io import read_image
from medseg.io.dicom_header import Instance, quiet, read_instance
from medseg.io.dicom_pixels import decode, rescale, window_of

from .test_transfer_syntaxes import NATIVE, header, read, write


def instance(ds: Dataset) -> Instance:
    fields = dict.fromkeys(Instance.__dataclass_fields__, "")
    return Instance(**{**fields, "path": Path("x.dcm"), "modality": ds.Modality, "dataset": ds, "planes": ()})


def gray(values, dtype="u2", modality="CR", **attributes) -> Dataset:
    values = np.asarray(values, dtype)
    ds = header(values.shape, dtype)
    ds.Modality = modality
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def values_of(tmp_path, values, dtype="u2", **attributes) -> list:
    ds = gray(values, dtype, **attributes)
    return read(write(tmp_path / "x.dcm", ds, np.asarray(values, dtype).tobytes())).tolist()


def lut(entries, first=0, bits=16, kind="US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", np.asarray(entries, "<u2").tobytes())
    item.ModalityLUTType = kind
    return item


# ------------------------------------------------------------------------------------------------ kinds of values


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_floating_point_pixels(tmp_path, keyword, dtype):
    values = np.array([[0.1, -2e30, np.nan], [np.inf, 5e-30, 7]], dtype)
    ds = header(values.shape, dtype)
    for absent in ("BitsStored", "HighBit", "PixelRepresentation"):
        delattr(ds, absent)
    setattr(ds, keyword, values.tobytes())
    pydicom.dcmwrite(tmp_path / "x.dcm", ds, enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path / "x.dcm"), values.astype(np.float32))


@pytest.mark.parametrize("frame", [0, 1, 2])
def test_one_bit_per_pixel_whose_frames_start_amid_a_byte(frame):
    frames = np.random.default_rng(1).integers(0, 2, (3, 3, 5), dtype=np.uint8)
    ds = header((3, 5), "u1")
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit, ds.NumberOfFrames = 0, 3
    ds.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
    ds["PixelData"].VR = "OB"
    item = instance(ds)
    np.testing.assert_array_equal(next(decode(item, [frame])), frames[frame])


@given(
    stored=hnp.arrays(np.uint16, (2, 3)),
    slope=st.floats(-1e4, 1e4).filter(lambda x: abs(x) > 1e-6),
    intercept=st.floats(-1e7, 1e7),
)
def test_a_rescaled_value_is_rounded_once(stored, slope, intercept):
    # DS holds 16 characters: what the file can say, not what the test draws.
    ds = gray(stored, RescaleSlope=f"{slope:.9g}", RescaleIntercept=f"{intercept:.9g}")
    with tempfile.TemporaryDirectory() as folder:
        got = read(write(Path(folder) / "x.dcm", ds, stored.tobytes()))
    exact = stored.astype(np.float64) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    np.testing.assert_array_equal(got, exact.astype(np.float32))


def test_a_large_intercept_leaves_the_small_values_whole(tmp_path):
    # In float32, 16,777,216 + 1 is 16,777,216.
    attributes = {"RescaleSlope": "16777217", "RescaleIntercept": "-16777216"}
    assert values_of(tmp_path, [[1, 0]], **attributes) == [[1, -16777216]]


def test_a_slope_of_zero_has_lost_the_values(tmp_path):
    assert values_of(tmp_path, [[0, 0]], RescaleSlope=0, RescaleIntercept=7) == [[7, 7]]
    with pytest.raises(ReadError, match=r"RescaleSlope \(0028,1053\) is 0"):
        values_of(tmp_path, [[0, 1]], RescaleSlope=0, RescaleIntercept=7)
    with pytest.raises(MissingTagError, match=r"RescaleSlope \(0028,1053\)"):
        values_of(tmp_path, [[0, 1]], RescaleIntercept=7)


def test_a_modality_lut_goes_before_the_rescale(tmp_path):
    entries = [5, 17, 4000, 90]
    assert values_of(tmp_path, [[9, 10, 11, 13, 200]], ModalityLUTSequence=[lut(entries, 10)]) == [[5, 5, 17, 90, 90]]
    signed = {"dtype": "i2", "ModalityLUTSequence": [lut(entries, -2, 12)]}
    assert values_of(tmp_path, [[-300, -2, -1, 0, 1, 2]], **signed) == [[5, 5, 17, 4000, 90, 90]]
    long = {"dtype": "u1", "ModalityLUTSequence": [lut(np.arange(600) * 3, 0, 12)]}
    assert values_of(tmp_path, [[0, 255]], **long) == [[0, 765]]


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda s: s.keyword)
def test_a_modality_lut_in_every_byte_order_and_its_unit(tmp_path, syntax):
    ds = gray([[0, 1]])
    ds.file_meta.TransferSyntaxUID = syntax
    ds.ModalityLUTSequence = [lut([258, 772], kind="OD")]
    order = "<" if syntax.is_little_endian else ">"
    ds.ModalityLUTSequence[0].LUTData = np.array([258, 772], f"{order}u2").tobytes()
    path = write(tmp_path / "x.dcm", ds, np.array([[0, 1]], f"{order}u2").tobytes())
    assert read(path).tolist() == [[258, 772]]
    assert read_image(path).meta["units"] == "OD"


def test_a_modality_lut_shorter_than_it_says(tmp_path):
    short = lut([1, 2])
    short.LUTDescriptor = [3, 0, 16]
    with pytest.raises(ReadError, match="a modality LUT of 2 entries, its descriptor says 3"):
        values_of(tmp_path, [[0, 1]], ModalityLUTSequence=[short])


# ---------------------------------------------------------------------------------------------------- MONOCHROME1


@pytest.mark.parametrize(
    ("values", "attributes", "turned"),
    [
        # By hand: (lowest possible + highest possible) − value.
        ([[0, 4095, 95]], {"BitsStored": 12, "HighBit": 11}, [[4095, 0, 4000]]),
        ([[0, 10]], {"BitsStored": 8, "HighBit": 7, "RescaleSlope": 2, "RescaleIntercept": 5}, [[515, 495]]),
        ([[-128, 127, 0]], {"dtype": "i2", "BitsStored": 8, "HighBit": 7}, [[127, -128, -1]]),
        ([[0, 1]], {"ModalityLUTSequence": [lut([0, 200], bits=8)]}, [[255, 55]]),
    ],
)
def test_monochrome1_pictures_have_white_high(tmp_path, values, attributes, turned):
    attributes = {"PhotometricInterpretation": "MONOCHROME1", **attributes}
    assert values_of(tmp_path, values, **attributes) == turned
    plain = {**attributes, "PhotometricInterpretation": "MONOCHROME2"}
    assert values_of(tmp_path, values, modality="MR", **attributes) == values_of(tmp_path, values, **plain)


@pytest.mark.parametrize(("photometric", "units"), [("MONOCHROME2", "OD"), ("MONOCHROME1", "stored")])
def test_a_picture_turned_white_high_is_no_optical_density_any_more(tmp_path, photometric, units):
    attributes = {"RescaleSlope": "0.5", "RescaleIntercept": "200", "RescaleType": "OD"}
    values_of(tmp_path, [[0, 9]], PhotometricInterpretation=photometric, **attributes)
    assert read_image(tmp_path / "x.dcm").meta["units"] == units


# --------------------------------------------------------------------------------------------------------- colors

RED_GREEN = np.array([[[255, 0, 0], [0, 255, 0]], [[10, 20, 30], [200, 100, 50]]], np.uint8)


@pytest.mark.parametrize("planes", [0, 1])
@pytest.mark.parametrize("syntax", NATIVE, ids=lambda s: s.keyword)
def test_color_by_pixel_and_by_plane(tmp_path, syntax, planes):
    ds = header(RED_GREEN.shape, "u1", syntax, color="RGB")
    ds.PlanarConfiguration = planes
    raw = RED_GREEN.transpose(2, 0, 1) if planes else RED_GREEN
    np.testing.assert_array_equal(read(write(tmp_path / "x.dcm", ds, raw.tobytes())), RED_GREEN)


def test_color_of_16_bits_keeps_them(tmp_path):
    deep = RED_GREEN.astype("<u2") * 257
    ds = header(deep.shape, "u2", color="RGB")
    np.testing.assert_array_equal(read(write(tmp_path / "x.dcm", ds, deep.tobytes())), deep)


def test_ybr_full_and_its_half_resolution(tmp_path):
    # PS3.3 C.7.6.3.1.2, b = Cb − 128, r = Cr − 128: R = Y + 1.402 r, G = Y − 0.3441 b − 0.7141 r, B = Y + 1.772 b.
    ybr = np.array([[[76, 85, 255], [100, 128, 128]]], np.uint8)
    ds = header(ybr.shape, "u1", color="YBR_FULL")
    assert read(write(tmp_path / "x.dcm", ds, ybr.tobytes())).tolist() == [[[254, 0, 0], [100, 100, 100]]]
    ds = header(ybr.shape, "u1", color="YBR_FULL_422")  # Y1 Y2 Cb Cr: two pixels share a color
    assert read(write(tmp_path / "y.dcm", ds, bytes([100, 50, 128, 128]))).tolist() == [[[100] * 3, [50] * 3]]


def palette(ds: Dataset, bits: int, first: int = 0) -> Dataset:
    """Red ascends, green descends, blue is constant."""
    ds.PhotometricInterpretation = "PALETTE COLOR"
    tables = {"Red": [0, 64, 128, 255], "Green": [255, 128, 64, 0], "Blue": [9, 9, 9, 9]}
    for color, entries in tables.items():
        values = np.array(entries, "u1") if bits == 8 else np.array(entries, "<u2") * 257
        ds.add_new(f"{color}PaletteColorLookupTableDescriptor", "US", [4, first, bits])
        ds.add_new(f"{color}PaletteColorLookupTableData", "OW", values.tobytes())
    return ds


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_of_8_and_of_16_bits_gives_8(tmp_path, bits):
    stored = np.array([[10, 11, 13], [12, 0, 99]], np.uint8)  # below the first entry, and behind the last
    ds = palette(header(stored.shape, "u1"), bits, first=10)
    image = read(write(tmp_path / "x.dcm", ds, stored.tobytes()))
    rows = [[0, 255, 9], [64, 128, 9], [255, 0, 9]], [[128, 64, 9], [0, 255, 9], [255, 0, 9]]
    assert image.tolist() == [list(row) for row in rows]


def test_a_segmented_palette(tmp_path):
    # PS3.3 C.7.9.2: two entries as they are (0, 100), then four that lead in equal steps to 200.
    stored = np.arange(6, dtype=np.uint8).reshape(1, 6)
    ds = header(stored.shape, "u1", color="PALETTE COLOR")
    for color in ("Red", "Green", "Blue"):
        ds.add_new(f"{color}PaletteColorLookupTableDescriptor", "US", [6, 0, 8])
        ds.add_new(f"Segmented{color}PaletteColorLookupTableData", "OW", bytes([0, 2, 0, 100, 1, 4, 200, 0]))
    image = read(write(tmp_path / "x.dcm", ds, stored.tobytes()))
    assert image[0, :, 0].tolist() == [0, 100, 125, 150, 175, 200]
    assert (image[..., 0] == image[..., 2]).all()


def test_a_supplemental_palette_is_for_the_display_alone(tmp_path):
    stored = np.array([[1, 2]], np.uint8)
    ds = palette(header(stored.shape, "u1"), 8)
    ds.PhotometricInterpretation, ds.PixelPresentation = "MONOCHROME2", "COLOR"
    assert read(write(tmp_path / "x.dcm", ds, stored.tobytes())).tolist() == [[1, 2]]


# -------------------------------------------------------------------------------------------------------- windows


def windowed(**attributes) -> tuple[float, float, str]:
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return window_of(ds)


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"WindowCenter": 40, "WindowWidth": 400}, (40, 400, "LINEAR")),
        ({"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}, (40, 400, "LINEAR")),
        ({"WindowCenter": "0.5", "WindowWidth": "1"}, (0.5, 1, "LINEAR")),
        ({"WindowCenter": 1, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}, (1, 0.5, "LINEAR_EXACT")),
        ({"WindowCenter": 1, "WindowWidth": 3, "VOILUTFunction": "SIGMOID"}, (1, 3, "SIGMOID")),
        ({"WindowCenter": 1, "WindowWidth": 0.5}, None),
        ({"WindowCenter": 1, "WindowWidth": 0}, None),
        ({"WindowCenter": 1, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"}, None),
        ({"WindowCenter": 1, "WindowWidth": 3, "VOILUTFunction": "CURVED"}, None),
        ({"WindowCenter": 1}, None),
        ({"WindowCenter": [], "WindowWidth": 3}, None),
        ({"WindowCenter": "", "WindowWidth": ""}, None),
        ({}, None),
    ],
)
def test_the_window_of_a_header(attributes, window):
    found = windowed(**attributes)
    if window is None:
        assert all(map(math.isnan, found[:2]))
        assert found[2] == "LINEAR"
    else:
        assert found == window


def test_the_window_of_each_frame():
    def group(center):
        voi, item = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 10
        item.FrameVOILUTSequence = [voi]
        return item

    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth = 1, 2
    ds.PerFrameFunctionalGroupsSequence = [group(5), group(6), Dataset()]
    ds.SharedFunctionalGroupsSequence = [group(7)]
    assert [window_of(ds, frame)[0] for frame in range(4)] == [5, 6, 7, 7]
    ds.SharedFunctionalGroupsSequence = [Dataset()]
    assert window_of(ds, 2) == (1, 2, "LINEAR")


def shown(values, center, width, function):
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3: from 0 to 1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / width + 0.5, 0, 1)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_window_turns_with_a_monochrome1_picture_and_scales_with_its_units(function):
    stored = np.arange(0, 4096, 13, dtype=np.uint16)[None]
    ds = gray(stored, BitsStored=12, RescaleSlope=2, RescaleIntercept=-100, VOILUTFunction=function)
    ds.WindowCenter, ds.WindowWidth = 900, 1500
    out = np.empty((*stored.shape, 1), np.float32)
    rescale(instance(ds), 0, stored, out)
    before = shown(out, *window_of(ds))
    ds.PhotometricInterpretation = "MONOCHROME1"
    turned = np.empty_like(out)
    rescale(instance(ds), 0, stored, turned)
    np.testing.assert_allclose(shown(turned, *window_of(ds)), 1 - before, atol=1e-5)
    np.testing.assert_allclose(shown(out * 0.01, *window_of(gray_of(ds), factor=0.01)), before, atol=1e-5)


def gray_of(ds: Dataset) -> Dataset:
    ds.PhotometricInterpretation = "MONOCHROME2"
    return ds


def test_the_window_comes_with_the_image(tmp_path):
    ds = gray([[0, 1]], modality="CT", WindowCenter=40, WindowWidth=400)
    meta = read_image(write(tmp_path / "x.dcm", ds, np.zeros((1, 2), "u2").tobytes())).meta
    assert meta["window"] == (40, 400)
    assert meta["window_function"] == "LINEAR"


# ---------------------------------------------------------------------------------------------------- real files


@pytest.mark.realdata
def test_a_real_deflated_file(data):
    image = read(data / "odd/pydicom/test_files/image_dfl.dcm")
    assert image[300, 255:263].tolist() == [138, 65, 65, 65, 65, 35, 35, 35]


@pytest.mark.realdata
def test_real_bits_and_doses(data):
    folder = data / "odd/pydicom/test_files"

    def first(name):
        with quiet():
            return next(decode(read_instance(folder / name, pixels=True), [0]))

    assert first("liver_1frame.dcm")[254, 304:310].tolist() == [1, 0, 0, 1, 1, 0]
    assert first("liver_expb_1frame.dcm")[145, 250:260].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    for name in ("rtdose_1frame.dcm", "rtdose_expb_1frame.dcm", "rtdose_rle_1frame.dcm"):
        assert first(name)[4, 3:6].tolist() == [1031000, 1029000, 1027000]


@pytest.mark.realdata
def test_a_real_palette_and_real_ybr(data):
    folder = data / "odd/pydicom/test_files"
    ds = pydicom.dcmread(folder / "examples_palette.dcm")
    table = [np.frombuffer(ds[f"{c}PaletteColorLookupTableData"].value, "<u2") for c in ("Red", "Green", "Blue")]
    expected = np.stack([entries[ds.pixel_array] >> 8 for entries in table], axis=-1)
    np.testing.assert_array_equal(read(folder / "examples_palette.dcm"), expected)
    # The colors of a test card, in rows of ten: red, green, blue.
    image = read(folder / "SC_ybr_full_422_uncompressed.dcm")
    for row, color in ((5, (254, 0, 0)), (25, (0, 255, 5)), (45, (0, 0, 254)), (95, (255, 255, 255))):
        assert image[row, 50].tolist() == list(color)
