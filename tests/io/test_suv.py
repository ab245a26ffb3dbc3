"""Factors worked out by hand: weight 70 kg, 370 MBq of F-18 (half-life 6586.2 s) at 10:00, scan at 11:00."""

import math

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medseg.errors import MissingTagError, ReadError
from medseg.io import read_image, suv_factor

HALF_LIFE = 6586.2
AFTER_AN_HOUR = 70_000 / (370e6 * 0.5 ** (3600 / HALF_LIFE))


def header(**changes) -> Dataset:
    ds = Dataset()
    radio = Dataset()
    ds.Units, ds.DecayCorrection, ds.PatientWeight = "BQML", "START", 70
    ds.SeriesDate, ds.SeriesTime = "20240131", "110000"
    ds.AcquisitionDate, ds.AcquisitionTime = "20240131", "110230.5"
    radio.RadionuclideTotalDose, radio.RadionuclideHalfLife = 370e6, HALF_LIFE
    radio.RadiopharmaceuticalStartTime = "100000.000000"
    for keyword, value in changes.items():
        target = radio if keyword.startswith("Radio") else ds
        if value is None:
            delattr(target, keyword)
        else:
            setattr(target, keyword, value)
    ds.RadiopharmaceuticalInformationSequence = [radio]
    return ds


def test_decay_to_the_start_of_the_scan():
    # 0.5 ** (3600 / 6586.2) = 0.684620..., dose then 253.3 MBq: 70000 / 253.3e6 = 2.7634e-4
    assert pytest.approx(2.7634e-4, rel=1e-4) == AFTER_AN_HOUR
    assert suv_factor(header()) == pytest.approx(AFTER_AN_HOUR, rel=1e-9)


def test_images_corrected_to_the_injection_need_no_times():
    changes = dict.fromkeys(("SeriesTime", "SeriesDate", "RadiopharmaceuticalStartTime", "RadionuclideHalfLife"))
    assert suv_factor(header(DecayCorrection="ADMIN", **changes)) == pytest.approx(70_000 / 370e6)


def test_an_injection_before_midnight():
    ds = header(RadiopharmaceuticalStartTime="233000", SeriesTime="003000", AcquisitionTime="003100")
    assert suv_factor(ds) == pytest.approx(AFTER_AN_HOUR, rel=1e-9)


@pytest.mark.parametrize(
    ("start", "zone"),
    [("20240131100000", None), ("20240131100000.000+0100", "+0100"), ("20240131090000+0000", "+0100")],
)
def test_the_full_moment_of_injection_goes_before_the_time_of_day(start, zone):
    ds = header(RadiopharmaceuticalStartDateTime=start, RadiopharmaceuticalStartTime="030000")
    if zone:
        ds.TimezoneOffsetFromUTC = zone
    assert suv_factor(ds) == pytest.approx(AFTER_AN_HOUR, rel=1e-9)


def test_a_reprocessed_series_takes_the_scan_time_from_the_frame():
    # SeriesTime is hours later. QIBA: acquisition − frame reference time + mean time of the count rate in the frame.
    ds = header(SeriesTime="170000", AcquisitionTime="110500", FrameReferenceTime=360_000, ActualFrameDuration=120_000)
    rate = math.log(2) / HALF_LIFE
    mean = math.log(rate * 120 / (1 - math.exp(-rate * 120))) / rate
    elapsed = 3600 + 300 - 360 + mean
    assert suv_factor(ds) == pytest.approx(70_000 / (370e6 * 0.5 ** (elapsed / HALF_LIFE)), rel=1e-9)
    del ds.FrameReferenceTime
    with pytest.raises(MissingTagError, match=r"FrameReferenceTime \(0054,1300\)"):
        suv_factor(ds)


def test_a_time_of_day_alone_leaves_the_day_of_a_long_lived_nuclide_open():
    # Zr-89 is imaged days after the injection: four of them are a factor of 2.3.
    zirconium = {"RadionuclideHalfLife": 282_276}
    with pytest.raises(MissingTagError, match=r"RadiopharmaceuticalStartDateTime \(0018,1078\)"):
        suv_factor(header(**zirconium))
    ds = header(**zirconium, RadiopharmaceuticalStartDateTime="20240127110000")
    assert suv_factor(ds) == pytest.approx(70_000 / (370e6 * 0.5 ** (4 * 86400 / 282_276)), rel=1e-9)


def test_ge_keeps_the_scan_time_of_a_reprocessed_series():
    ds = header(SeriesTime="170000")
    ds.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20240131110000.00")
    assert suv_factor(ds) == pytest.approx(AFTER_AN_HOUR, rel=1e-9)


def test_philips_counts():
    ds = header(Units="CNTS")
    with pytest.raises(MissingTagError, match=r"\(7053,1000\).*\(7053,1009\)"):
        suv_factor(ds)
    block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x09, "DS", "2.5")
    assert suv_factor(ds) == pytest.approx(2.5 * AFTER_AN_HOUR, rel=1e-9)
    block.add_new(0x00, "DS", "0.000511")
    assert suv_factor(ds) == pytest.approx(0.000511)
    block[0x00].value = "0"
    assert suv_factor(ds) == pytest.approx(2.5 * AFTER_AN_HOUR, rel=1e-9)


def test_grams_per_millilitre_are_suv_already():
    assert suv_factor(header(Units="GML")) == 1
    assert suv_factor(header(Units="GML", SUVType="BW")) == 1
    with pytest.raises(ReadError, match="LBM"):
        suv_factor(header(Units="GML", SUVType="LBM"))


@pytest.mark.parametrize(
    ("keyword", "tag"),
    [
        ("Units", "(0054,1001)"),
        ("PatientWeight", "(0010,1030)"),
        ("DecayCorrection", "(0054,1102)"),
        ("RadionuclideTotalDose", "(0018,1074)"),
        ("RadionuclideHalfLife", "(0018,1075)"),
        ("RadiopharmaceuticalStartTime", "(0018,1072)"),
    ],
)
def test_what_is_missing_is_named(keyword, tag):
    with pytest.raises(MissingTagError) as error:
        suv_factor(header(**{keyword: None}))
    assert keyword in str(error.value)
    assert tag in str(error.value)


def test_a_series_without_times_or_radiopharmaceutical():
    with pytest.raises(MissingTagError, match="SeriesTime"):
        suv_factor(header(SeriesTime=None, AcquisitionTime=None))
    ds = header()
    del ds.RadiopharmaceuticalInformationSequence
    with pytest.raises(MissingTagError, match=r"RadiopharmaceuticalInformationSequence \(0054,0016\)"):
        suv_factor(ds)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"PatientWeight": 0}, "PatientWeight"),
        ({"PatientWeight": 70000}, "kilograms"),
        ({"RadionuclideTotalDose": 370}, "becquerel"),
        ({"DecayCorrection": "NONE"}, "NONE"),
        ({"Units": "CM2ML"}, "CM2ML"),
        ({"RadiopharmaceuticalStartDateTime": "20240201100000"}, "contradict"),
        ({"RadiopharmaceuticalStartDateTime": "20230131100000"}, "contradict"),
    ],
)
def test_what_cannot_be_is_refused(changes, match):
    with pytest.raises(ReadError, match=match):
        suv_factor(header(**changes))


def test_a_pet_series_comes_in_suvbw(tmp_path, make_series):
    def change(i, ds):
        ds.update(header())

    stored = np.arange(12, dtype=np.int16).reshape(2, 2, 3)
    make_series(tmp_path, stored, modality="PT", slopes=[1000, 500], change=change)
    bqml = (stored * np.reshape([1000, 500], (2, 1, 1))).transpose(2, 1, 0)
    suv, as_stored = read_image(tmp_path), read_image(tmp_path, pet_units="stored")
    np.testing.assert_allclose(suv.numpy()[0], bqml * AFTER_AN_HOUR, rtol=1e-6)
    np.testing.assert_array_equal(as_stored.numpy()[0], bqml)
    assert (suv.meta["units"], as_stored.meta["units"]) == ("SUVbw", "stored")


@pytest.mark.parametrize("keyword", ["PatientWeight", "RadionuclideTotalDose"])
def test_a_pet_series_without_weight_or_dose_is_refused(tmp_path, make_series, keyword):
    make_series(
        tmp_path, np.ones((2, 2, 3), np.int16), modality="PT", change=lambda i, ds: ds.update(header(**{keyword: None}))
    )
    with pytest.raises(MissingTagError, match=keyword) as error:
        read_image(tmp_path)
    assert str(tmp_path) in str(error.value)


# A whole PET series, by hand: 75 kg, 300 MBq at 09:00:00, half-life 6600 s, scan at 10:50:00, which is 6600 s later:
# half of the dose is left, 150 MBq, and 1 Bq/ml is 75,000 g / 150,000,000 Bq = 0.0005 g/ml.
BY_HAND = 0.0005
STORED = np.array([[[0, 1000], [200, 32767]], [[1, 2], [4, 8]], [[5, 0], [0, 5]]], dtype=np.int16)
SLOPES = [2.5, 0.5, 4.0]


def pet(i, ds, **changes):
    radio = Dataset()
    radio.RadionuclideTotalDose, radio.RadionuclideHalfLife = 300e6, 6600
    radio.RadiopharmaceuticalStartTime = "090000.00"
    ds.RadiopharmaceuticalInformationSequence = [radio]
    ds.Units, ds.DecayCorrection, ds.PatientWeight = "BQML", "START", 75
    ds.CorrectedImage = ["NORM", "DTIM", "ATTN", "SCAT", "DECY"]
    ds.SeriesDate = ds.AcquisitionDate = "20240131"
    ds.SeriesTime = "105000"
    ds.AcquisitionTime = f"10{50 + 3 * i}00"  # three bed positions, one after the other
    for keyword, value in changes.items():
        setattr(radio if keyword.startswith("Radio") else ds, keyword, value)


def make(folder, make_series, change=pet, **more):
    make_series(folder, STORED, modality="PT", slopes=SLOPES, change=change, **more)
    return folder


def test_bed_positions_share_the_start_of_the_scan(tmp_path, make_series):
    image = read_image(make(tmp_path, make_series))
    # 1000 · 2.5 Bq/ml · 0.0005 = 1.25; 200 → 0.25; 32767 → 40.95875; 8 · 0.5 · 0.0005 = 0.002; 5 · 4 · 0.0005 = 0.01
    expected = [[[0, 1.25], [0.25, 40.95875]], [[0.00025, 0.0005], [0.001, 0.002]], [[0.01, 0], [0, 0.01]]]
    np.testing.assert_allclose(image.numpy()[0].transpose(2, 1, 0), expected, rtol=1e-6)
    assert image.meta["units"] == "SUVbw"


def test_a_whole_series_in_philips_counts(tmp_path, make_series):
    def counts(i, ds, element, value):
        pet(i, ds, Units="CNTS")
        ds.private_block(0x7053, "Philips PET Private Group", create=True).add_new(element, "DS", value)

    image = read_image(make(tmp_path / "suv", make_series, lambda i, ds: counts(i, ds, 0x00, "0.0004")))
    assert image[0, 1, 0, 0].item() == pytest.approx(1.0)  # 1000 counts · 2.5 · 0.0004
    image = read_image(make(tmp_path / "activity", make_series, lambda i, ds: counts(i, ds, 0x09, "3")))
    assert image[0, 1, 0, 0].item() == pytest.approx(3.75)  # 1000 counts · 2.5 · 3 Bq/ml · 0.0005


def test_a_whole_series_in_grams_per_millilitre(tmp_path, make_series):
    image = read_image(make(tmp_path, make_series, lambda i, ds: pet(i, ds, Units="GML")))
    assert image[0, 1, 0, 0].item() == 2500


def test_a_whole_series_corrected_to_the_injection(tmp_path, make_series):
    image = read_image(make(tmp_path, make_series, lambda i, ds: pet(i, ds, DecayCorrection="ADMIN")))
    assert image[0, 1, 0, 0].item() == pytest.approx(0.625)  # 2500 Bq/ml · 75,000 g / 300,000,000 Bq


def test_a_whole_series_after_midnight(tmp_path, make_series):
    def change(i, ds):
        pet(i, ds, SeriesTime="012000", AcquisitionTime=f"01{20 + 3 * i}00", RadiopharmaceuticalStartTime="233000")

    image = read_image(make(tmp_path, make_series, change))
    assert image[0, 1, 0, 0].item() == pytest.approx(1.25)  # 110 minutes from 23:30 to 01:20


def test_a_series_time_amid_the_bed_positions_is_no_start(tmp_path, make_series):
    def change(i, ds):
        # The mean time of 120 s with rate λ = ln 2 / 6600 s is 60 s − λ · 120² / 24 s = 59.937 s.
        pet(i, ds, SeriesTime="105400", FrameReferenceTime=59_937 + 180_000 * i, ActualFrameDuration=120_000)

    image = read_image(make(tmp_path / "a", make_series, change))
    # The first bed position was acquired at 10:50:00, 0.000 s after the start; the second, at 10:53, lies before the
    # time of the series too, the third after it: one start for all.
    np.testing.assert_allclose(image.numpy()[0, 0, 0], [0, 1 * 0.5 * BY_HAND, 5 * 4 * BY_HAND], rtol=1e-5)
    make(tmp_path / "b", make_series, lambda i, ds: pet(i, ds, SeriesTime="105400"))
    with pytest.raises(MissingTagError, match=r"FrameReferenceTime \(0054,1300\)"):
        read_image(tmp_path / "b")


@pytest.mark.parametrize(
    ("keyword", "value", "tag"),
    [
        ("PatientWeight", 80, r"\(0010,1030\)"),
        ("Units", "GML", r"\(0054,1001\)"),
        ("SeriesTime", "105001", r"\(0008,0031\)"),
        ("RadionuclideTotalDose", 301e6, r"\(0018,1074\)"),
        ("RadiopharmaceuticalStartTime", "090001", r"\(0018,1072\)"),
    ],
)
def test_slices_of_two_series_under_one_name_are_refused(tmp_path, make_series, keyword, value, tag):
    make(tmp_path, make_series, lambda i, ds: pet(i, ds, **({keyword: value} if i == 1 else {})))
    with pytest.raises(ReadError, match=rf"001\.dcm: its {keyword} {tag} differs from that of .*00\d\.dcm"):
        read_image(tmp_path)
    assert read_image(tmp_path, pet_units="stored")[0, 1, 0, 0] == 2500


@pytest.mark.parametrize(("done", "lacking"), [(["DECY", "SCAT"], "ATTN"), (["ATTN"], "DECY"), ("DTIM", "ATTN")])
def test_what_is_not_corrected_for_attenuation_and_decay_has_no_suv(done, lacking):
    with pytest.raises(ReadError, match=rf"CorrectedImage \(0028,0051\) lacks {lacking}"):
        suv_factor(header(CorrectedImage=done))
    assert suv_factor(header(CorrectedImage=["ATTN", "DECY"])) == suv_factor(header(CorrectedImage=""))


def test_a_date_of_injection_that_is_a_day_off_is_refused():
    # 25 hours are 13.7 half-lives of F-18: a factor of 13,000 if it were believed.
    with pytest.raises(ReadError, match="contradict"):
        suv_factor(header(RadiopharmaceuticalStartDateTime="20240130100000"))


def enhanced_pet(i, ds, units="Bq/ml", mapped=(2.5, 0.0), corrected="YES", moment="20240131105000"):
    """One enhanced object of three frames, as PS3.3 A.56 has it."""
    pet(i, ds)
    for keyword in ("Units", "DecayCorrection", "CorrectedImage", "SeriesTime", "AcquisitionTime", "RescaleSlope"):
        delattr(ds, keyword)
    del ds.RescaleIntercept
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.130"
    ds.NumberOfFrames = 3
    ds.PixelData = STORED.tobytes()
    ds.DecayCorrected = ds.AttenuationCorrected = "YES"
    ds.DecayCorrected = corrected
    if moment:
        ds.DecayCorrectionDateTime = moment
    ds.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime = "20240131090000"
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, 3
    plane.ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    mapping, code, rescale = Dataset(), Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = units, "UCUM", units
    mapping.MeasurementUnitsCodeSequence = [code]
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = mapped
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 2.5, 0, "US"
    shared.RealWorldValueMappingSequence, shared.PixelValueTransformationSequence = [mapping], [rescale]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k in range(3):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [-10, -20, 30 + 3 * k]
        group.PlanePositionSequence = [position]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing


def test_an_enhanced_pet_tells_its_units_by_code_and_what_it_is_corrected_to(tmp_path, make_series):
    make_series(tmp_path, STORED[:1], modality="PT", change=enhanced_pet)
    image = read_image(tmp_path)
    np.testing.assert_allclose(image.numpy()[0].transpose(2, 1, 0), STORED * 2.5 * BY_HAND, rtol=1e-6)
    assert image.meta["units"] == "SUVbw"


@pytest.mark.parametrize(
    ("start", "moment"),
    [
        ("20240131090000+0100", "20240131105000+0100"),
        ("20240131080000+0000", "20240131105000+0100"),
        ("20240131080000.5-0000", "20240131105000.5+0100"),
    ],
)
def test_moments_with_offsets_from_utc(start, moment):
    ds = Dataset()
    ds.file_meta = Dataset()
    ds.PixelSpacing, ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 1], [1, 0, 0, 0, 1, 0], [0, 0, 0]
    ds.RescaleSlope = ds.RescaleIntercept = 0
    enhanced_pet(0, ds, moment=moment)
    ds.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime = start
    assert suv_factor(ds) == pytest.approx(BY_HAND, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"units": "{counts}"}, r"RealWorldValueMappingSequence \(0040,9096\)"),
        ({"mapped": (5.0, 0.0)}, r"RealWorldValueMappingSequence \(0040,9096\)"),
        ({"corrected": "NO"}, r"DecayCorrected \(0018,9758\) is not YES"),
        ({"moment": None}, r"DecayCorrectionDateTime \(0018,9701\)"),
    ],
)
def test_an_enhanced_pet_that_leaves_something_open_is_refused_by_name(tmp_path, make_series, changes, match):
    make_series(tmp_path, STORED[:1], modality="PT", change=lambda i, ds: enhanced_pet(i, ds, **changes))
    with pytest.raises(ReadError, match=match):
        read_image(tmp_path)


def test_the_window_of_a_pet_follows_into_suv(tmp_path, make_series):
    image = read_image(make(tmp_path, make_series, lambda i, ds: pet(i, ds, WindowCenter=5000.5, WindowWidth=10001)))
    # From 0 to 10,000 Bq/ml: 0 to 5 in SUV.
    assert image.meta["window"] == pytest.approx((2.5, 5.0))
    assert image.meta["window_function"] == "LINEAR_EXACT"
