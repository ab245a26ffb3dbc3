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
