"""Standardized uptake values (SUVbw) from PET headers.

The formulas are those of the QIBA FDG-PET/CT profile (vendor-neutral pseudo-code, version of 2013) and of
DICOM PS3.3 C.8.9.1: SUVbw = activity concentration [Bq/ml] × weight [g] / dose, the dose being the injected activity
decayed to the time that the images are corrected to.
"""

import datetime as dt
import math
import re
from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset

from ..errors import MissingTagError, ReadError
from .dicom_pixels import functional_group
from .text import one_line

_PHILIPS = "Philips PET Private Group"
_GE = "GEMS_PETD_01"


# What all slices of a series share where SUVbw depends on it, and whether it stands with the radiopharmaceutical.
_SHARED = (
    (False, "Units", "(0054,1001)"),
    (False, "DecayCorrection", "(0054,1102)"),
    (False, "PatientWeight", "(0010,1030)"),
    (False, "SeriesDate", "(0008,0021)"),
    (False, "SeriesTime", "(0008,0031)"),
    (True, "RadionuclideTotalDose", "(0018,1074)"),
    (True, "RadionuclideHalfLife", "(0018,1075)"),
    (True, "RadiopharmaceuticalStartTime", "(0018,1072)"),
    (True, "RadiopharmaceuticalStartDateTime", "(0018,1078)"),
)
_UNIT_CODES = {"Bq/ml": "BQML", "{SUVbw}g/ml": "GML", "g/ml{SUVbw}": "GML"}


def suv_factors(headers: Sequence[Dataset], *, names: Sequence[str]) -> list[float]:
    """Return the factor to SUVbw of every slice of one series; see `suv_factor`.

    The slices of several bed positions were acquired one after the other, yet all are corrected to one start of the
    scan: that of the earliest. Slices that disagree about the injection, the weight or the units are no one series.

    Raises:
        MissingTagError, ReadError: as `suv_factor`, or slices that disagree; ``names`` has the name of each.
    """
    moments = [_acquisition(ds) for ds in headers]
    first = min(range(len(headers)), key=lambda i: moments[i] or dt.datetime.max)
    shared = _SHARED if headers[0].get("Units") != "GML" else _SHARED[:1]
    for ds, name in zip(headers, names, strict=True):
        for of_radiopharmaceutical, keyword, tag in shared:
            mine, other = (_radiopharmaceutical(h) if of_radiopharmaceutical else h for h in (ds, headers[0]))
            if mine.get(keyword) != other.get(keyword):
                raise ReadError(
                    f"{name}: its {keyword} {tag} differs from that of {names[0]}: these are slices of different "
                    "PET series (pet_units='stored' reads them as they are)"
                )
    return [_factor(ds, headers[first], name) for ds, name in zip(headers, names, strict=True)]


def _radiopharmaceutical(ds: Dataset) -> Dataset:
    items = ds.get("RadiopharmaceuticalInformationSequence")
    return items[0] if items else Dataset()


def suv_factor(ds: Dataset, *, name: str = "PET image") -> float:
    """Return the factor from rescaled stored values (slope and intercept applied) to SUVbw in g/ml.

    - Units BQML: weight · 1000 / dose. With DecayCorrection START the dose is decayed from the injection to the start
      of the scan; with ADMIN the images are corrected to the injection and the dose is taken as it is.
      An enhanced object tells by DecayCorrectionDateTime (0018,9701) what its frames are corrected to (C.8.22.6), and
      may tell its units by a RealWorldValueMappingSequence that equals the rescale.
    - Units CNTS: Philips' SUV factor (7053,1000), or its activity factor (7053,1009) and then as BQML.
    - Units GML: 1 where SUVType is BW or absent, which the standard defines as BW.

    The injection is RadiopharmaceuticalStartDateTime, or RadiopharmaceuticalStartTime on the day of the scan; a time of
    day later than the scan's is of the day before. A time of day alone is not enough where the half-life is so long
    (Cu-64, Zr-89, I-124) that the injection may have been a day earlier. The start of the scan is SeriesDate and
    SeriesTime unless these are later than the acquisition (a reprocessed series): then GE's private scan time, or the
    acquisition time less FrameReferenceTime as QIBA has it for Siemens.

    Args:
        ds: the header of one PET slice.
        name: stands in front of messages, such as the path of the file.

    Raises:
        MissingTagError: an attribute that the result depends on is absent or unusable; it is named, never guessed.
        ReadError: units, SUV type or corrections that cannot be turned into SUVbw, or implausible values.

    Example:
        >>> ds = Dataset()
        >>> ds.Units, ds.DecayCorrection, ds.PatientWeight = "BQML", "ADMIN", 70
        >>> radio = Dataset()
        >>> radio.RadionuclideTotalDose = 350e6
        >>> ds.RadiopharmaceuticalInformationSequence = [radio]
        >>> suv_factor(ds) * 5000  # 5 kBq/ml, 70 kg, 350 MBq
        1.0
    """
    return _factor(ds, ds, name)


def _factor(ds: Dataset, first: Dataset, name: str) -> float:
    """Return the factor of one slice, given the header of the slice of its series that was acquired first."""
    units = _units(ds, name)
    if units == "GML":
        kind = one_line(ds.get("SUVType") or "BW")
        if kind != "BW":
            raise ReadError(f"{name}: SUVType (0054,1006) is {kind}: only BW can be read as SUVbw")
        return 1.0
    if units not in ("BQML", "CNTS"):
        raise ReadError(f"{name}: Units (0054,1001) is {units}: expected BQML, CNTS or GML")
    _check_corrections(ds, name)
    if units == "BQML":
        return _suv_per_bqml(ds, first, name)
    factor = _private_number(ds, 0x7053, _PHILIPS, 0x00)
    if factor:
        return factor
    activity = _private_number(ds, 0x7053, _PHILIPS, 0x09)
    if not activity:
        raise MissingTagError(
            f"{name}: Units (0054,1001) is CNTS, and neither Philips' SUV factor (7053,1000) nor its activity "
            f"factor (7053,1009) is present: SUVbw cannot be worked out (pet_units='stored' reads the counts)"
        )
    return activity * _suv_per_bqml(ds, first, name)


def _units(ds: Dataset, name: str) -> str:
    """Return the units of the rescaled values as (0054,1001) has them; enhanced objects may say so by code."""
    if ds.get("Units") or not ds.get("PerFrameFunctionalGroupsSequence"):
        return one_line(_required(ds, "Units", "(0054,1001)", name))
    found = set()
    for frame in range(len(ds.PerFrameFunctionalGroupsSequence)):
        mapping = functional_group(ds, frame, "RealWorldValueMappingSequence")
        rescale = functional_group(ds, frame, "PixelValueTransformationSequence") or ds
        code = (mapping.get("MeasurementUnitsCodeSequence") or [Dataset()])[0].get("CodeValue")
        same = all(
            (ours := _number(mapping.get(f"RealWorldValue{part}"))) is not None
            and (theirs := _number(rescale.get(f"Rescale{part}"))) is not None
            and math.isclose(ours, theirs, rel_tol=1e-6)
            for part in ("Slope", "Intercept")
        )
        found.add(_UNIT_CODES.get(str(code)) if same else None)
    if len(found) != 1 or None in found:
        raise MissingTagError(
            f"{name}: an enhanced PET without Units (0054,1001), whose RealWorldValueMappingSequence (0040,9096) does "
            "not say that the rescaled values are in Bq/ml or SUVbw (pet_units='stored' reads them as they are)"
        )
    return str(found.pop())


def _check_corrections(ds: Dataset, name: str) -> None:
    """Refuse what is no activity concentration: SUV needs attenuation and decay corrected."""
    done = ds.get("CorrectedImage")
    listed = [one_line(word) for word in ([done] if isinstance(done, str) else done or [])]
    for keyword, word, tag in (
        ("AttenuationCorrected", "ATTN", "(0018,9759)"),
        ("DecayCorrected", "DECY", "(0018,9758)"),
    ):
        if any(listed) and word not in listed:
            raise ReadError(
                f"{name}: CorrectedImage (0028,0051) lacks {word}: SUVbw needs attenuation and decay corrected "
                "(pet_units='stored' reads the values as they are)"
            )
        if one_line(ds.get(keyword) or "YES") != "YES":
            raise ReadError(f"{name}: {keyword} {tag} is not YES: SUVbw cannot be worked out")


def _suv_per_bqml(ds: Dataset, first: Dataset, name: str) -> float:
    weight = _positive(ds, "PatientWeight", "(0010,1030)", name)
    if weight > 700:
        raise ReadError(f"{name}: PatientWeight (0010,1030) is {weight:g}: expected kilograms")
    sequence = _required(ds, "RadiopharmaceuticalInformationSequence", "(0054,0016)", name)
    if len(sequence) != 1:
        raise ReadError(
            f"{name}: RadiopharmaceuticalInformationSequence (0054,0016) has {len(sequence)} items: expected 1"
        )
    radio = sequence[0]
    dose = _positive(radio, "RadionuclideTotalDose", "(0018,1074)", name)
    if dose < 1e4:
        raise ReadError(f"{name}: RadionuclideTotalDose (0018,1074) is {dose:g}: expected becquerel")
    enhanced = "DecayCorrection" not in ds and "DecayCorrected" in ds
    correction = "" if enhanced else one_line(_required(ds, "DecayCorrection", "(0054,1102)", name))
    if correction == "ADMIN":
        return weight * 1000 / dose
    if correction != "START" and not enhanced:
        raise ReadError(
            f"{name}: DecayCorrection (0054,1102) is {correction}: expected START or ADMIN; SUVbw needs "
            "decay-corrected images (pet_units='stored' reads them as they are)"
        )
    half_life = _positive(radio, "RadionuclideHalfLife", "(0018,1075)", name)
    clock = str(ds.get("TimezoneOffsetFromUTC") or "")
    if enhanced:
        clock = clock or _offset(ds.get("DecayCorrectionDateTime")) or ""
        scan = _corrected_to(ds, clock, name)
    else:
        scan = _scan_start(first, half_life, name)
    longest = 10 * half_life  # a thousandth is left after ten: nobody scans then
    elapsed = (scan - _injection(radio, scan, clock, longest, name)).total_seconds()
    if elapsed < 0 or elapsed > longest:
        raise ReadError(
            f"{name}: the injection is {elapsed:.0f} s before the scan (half-life {half_life:g} s): the times "
            "(0018,1078) or (0018,1072) and (0008,0031) contradict each other"
        )
    return weight * 1000 / (dose * math.pow(2, -elapsed / half_life))


def _injection(radio: Dataset, scan: dt.datetime, clock: str, longest: float, name: str) -> dt.datetime:
    if moment := _moment_at(radio.get("RadiopharmaceuticalStartDateTime"), clock):
        return moment
    time = _time(radio.get("RadiopharmaceuticalStartTime"))
    if time is None:
        raise MissingTagError(
            f"{name}: RadiopharmaceuticalStartDateTime (0018,1078) and RadiopharmaceuticalStartTime (0018,1072) are "
            "missing or unusable: the decay since the injection cannot be worked out"
        )
    moment = dt.datetime.combine(scan.date(), time)
    # Only a time of day is given: one after the scan belongs to the day before.
    if moment > scan:
        moment -= dt.timedelta(days=1)
    if (scan - moment).total_seconds() + 86400 <= longest:
        raise MissingTagError(
            f"{name}: RadiopharmaceuticalStartDateTime (0018,1078) is missing or unusable: with a half-life of "
            f"{longest / 36000:.1f} h, RadiopharmaceuticalStartTime (0018,1072) leaves the day of the injection open"
        )
    return moment


def _corrected_to(ds: Dataset, clock: str, name: str) -> dt.datetime:
    """Return the moment that the frames of an enhanced object are corrected to (PS3.3 C.8.22.6)."""
    moment = _moment_at(ds.get("DecayCorrectionDateTime"), clock)
    if moment is None:
        raise MissingTagError(
            f"{name}: DecayCorrectionDateTime (0018,9701) is missing or unusable: what the frames are decay-corrected "
            "to is unknown (pet_units='stored' reads them as they are)"
        )
    return moment


def _acquisition(ds: Dataset) -> dt.datetime | None:
    return _date_and_time(ds, "Acquisition") or _moment(ds.get("AcquisitionDateTime"))


def _scan_start(ds: Dataset, half_life: float, name: str) -> dt.datetime:
    series = _date_and_time(ds, "Series")
    acquisition = _acquisition(ds)
    if series and (acquisition is None or series <= acquisition):
        return series
    if (moment := _moment(_private(ds, 0x0009, _GE, 0x0D))) is not None:
        return moment
    reference, duration = _number(ds.get("FrameReferenceTime")), _number(ds.get("ActualFrameDuration"))
    if acquisition and reference is not None and duration:
        rate = math.log(2) / half_life
        decay = rate * duration / 1000
        average = math.log(decay / -math.expm1(-decay)) / rate
        return acquisition - dt.timedelta(seconds=reference / 1000 - average)
    if series is None:
        raise MissingTagError(
            f"{name}: SeriesDate (0008,0021) and SeriesTime (0008,0031) are missing or unusable: "
            "the start of the scan is unknown"
        )
    raise MissingTagError(
        f"{name}: SeriesTime (0008,0031) is later than AcquisitionTime (0008,0032), and FrameReferenceTime (0054,1300) "
        "with ActualFrameDuration (0018,1242) is missing: the start of the scan is unknown"
    )


def _required(ds: Dataset, keyword: str, tag: str, name: str) -> Any:
    value = ds.get(keyword)
    if value is None or value == "" or (isinstance(value, Sequence) and not len(value)):
        raise MissingTagError(
            f"{name}: {keyword} {tag} is missing: SUVbw cannot be worked out (pet_units='stored' reads stored values)"
        )
    return value


def _positive(ds: Dataset, keyword: str, tag: str, name: str) -> float:
    number = _number(_required(ds, keyword, tag, name))
    if number is None or number <= 0:
        raise MissingTagError(f"{name}: {keyword} {tag} is not a positive number: SUVbw cannot be worked out")
    return number


def _number(value: object) -> float | None:
    if isinstance(value, bytes):
        value = value.decode("ascii", "ignore").strip(" \0")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _private(ds: Dataset, group: int, creator: str, element: int) -> object:
    try:
        return ds.private_block(group, creator)[element].value
    except KeyError:
        return None


def _private_number(ds: Dataset, group: int, creator: str, element: int) -> float | None:
    return _number(_private(ds, group, creator, element))


def _date_and_time(ds: Dataset, which: str) -> dt.datetime | None:
    date, time = str(ds.get(f"{which}Date") or ""), _time(ds.get(f"{which}Time"))
    try:
        day = dt.datetime.strptime(date.replace(".", ""), "%Y%m%d").date()
    except ValueError:
        return None
    return None if time is None else dt.datetime.combine(day, time)


def _time(value: object) -> dt.time | None:
    """Parse DICOM's TM, HHMMSS.FFFFFF; hours alone would be a guess."""
    digits, _, fraction = str(value or "").strip().replace(":", "").partition(".")
    if len(digits) not in (4, 6) or not digits.isdigit() or (fraction and not fraction.isdigit()):
        return None
    try:
        return dt.time(int(digits[:2]), int(digits[2:4]), int(digits[4:6] or 0), int((fraction + "000000")[:6]))
    except ValueError:
        return None


def _moment(value: object) -> dt.datetime | None:
    """Parse DICOM's DT, YYYYMMDDHHMMSS.FFFFFF&ZZXX, without its offset from UTC."""
    text = value.decode("ascii", "ignore") if isinstance(value, bytes) else str(value or "")
    text = text.strip(" \0").split("+")[0].split("-")[0]
    time = _time(text[8:])
    try:
        day = dt.datetime.strptime(text[:8], "%Y%m%d").date()
    except ValueError:
        return None
    return None if time is None else dt.datetime.combine(day, time)


def _moment_at(value: object, clock: str) -> dt.datetime | None:
    """Parse DICOM's DT into the time that a clock with this offset from UTC shows; None where that is unknown."""
    moment, offset = _moment(value), _offset(value)
    if moment is None or offset is None or offset == clock:
        return moment
    # With an offset of its own and none for the clock, the two cannot be compared.
    return moment - _as_delta(offset) + _as_delta(clock) if clock else None


def _offset(value: object) -> str | None:
    """Return the offset from UTC that a DT ends in, such as ``+0100``."""
    match = re.search(r"[+-]\d{4}$", str(value or "").strip(" \0"))
    return match.group() if match else None


def _as_delta(offset: str) -> dt.timedelta:
    minutes = int(offset[1:3]) * 60 + int(offset[3:5])
    return dt.timedelta(minutes=-minutes if offset[0] == "-" else minutes)
