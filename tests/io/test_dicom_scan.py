"""The fast way to a DICOM header: it finds what pydicom finds, or leaves the file to pydicom."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from medseg.io.dicom_header import quiet
from medseg.io.dicom_scan import Header, pixel_data, pixels_in_file, scan

DEFER = 4096


def a_slice(syntax: str = ExplicitVRLittleEndian) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["slice"])
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = CTImageStorage
    ds.PatientName = "Grün^Ärmel"
    ds.PatientID = ""
    ds.ImagePositionPatient = [0, 1.5, -2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 4, 5, 16, 12, 11, 0
    ds.PixelData = np.arange(20, dtype="<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def written(ds: Dataset, folder: Path) -> Path:
    path = folder / "slice.dcm"
    ds.save_as(path, enforce_file_format=True)
    return path


def scanned(path: Path, pixels: bool = True) -> Any:
    with path.open("rb") as file:
        return scan(path, file, pixels=pixels, defer=DEFER)


def assert_same(found: Any, path: Path, pixels: bool = True) -> None:
    """Every element has the value that pydicom gives, asked for by tag and by keyword."""
    with quiet():
        wanted = pydicom.dcmread(path, stop_before_pixels=not pixels, defer_size=DEFER if pixels else None)
        assert found.file_meta == wanted.file_meta
        assert found.original_encoding == wanted.original_encoding
        assert found.original_character_set == wanted.original_character_set
        assert list(found.keys()) == list(wanted.keys())
        for tag in wanted.keys():  # noqa: SIM118 (a dataset iterates over elements)
            try:
                value = wanted[tag].value
            except Exception as error:
                with pytest.raises(type(error)):
                    found[tag]
                continue
            if keyword := pydicom.datadict.keyword_for_tag(tag):
                assert_equal(found.get(keyword), wanted.get(keyword))
            assert found[tag].VR == wanted[tag].VR
            assert_equal(found[tag].value, value)


def assert_equal(found: Any, wanted: Any) -> None:
    assert found == wanted or (found != found and wanted != wanted)


def test_a_plain_file_is_scanned_and_its_pixels_stay_in_the_file(tmp_path: Path) -> None:
    path = written(a_slice(), tmp_path)
    found = scanned(path)
    assert isinstance(found, Header)
    assert pixels_in_file(found)
    assert pixel_data(found) == np.arange(20, dtype="<u2").tobytes()
    assert_same(found, path)
    assert found.get("PatientName") == "Grün^Ärmel"
    assert found.get("SliceThickness", "absent") == "absent"
    assert found.get("Manufacturer") is None
    assert not pixels_in_file(found), "asked for by name, pixels are read into the dataset as ever"
    assert pixel_data(found) == np.arange(20, dtype="<u2").tobytes()


def test_without_pixels_the_scan_ends_before_them(tmp_path: Path) -> None:
    path = written(a_slice(), tmp_path)
    found = scanned(path, pixels=False)
    assert "PixelData" not in found
    assert_same(found, path, pixels=False)


@pytest.mark.parametrize("undefined", [False, True])
def test_nested_sequences(tmp_path: Path, undefined: bool) -> None:
    ds, inner, item = a_slice(), Dataset(), Dataset()
    inner.CodeValue, inner.CodeMeaning = "113", "Größe"
    item.ReferencedSOPInstanceUID = "1.2.3"
    item.PurposeOfReferenceCodeSequence = [inner, Dataset()]
    item["PurposeOfReferenceCodeSequence"].is_undefined_length = undefined
    inner.is_undefined_length_sequence_item = item.is_undefined_length_sequence_item = undefined
    ds.ReferencedImageSequence = [item, item]
    ds["ReferencedImageSequence"].is_undefined_length = undefined
    path = written(ds, tmp_path)
    found = scanned(path)
    assert_same(found, path)
    assert found.ReferencedImageSequence[1].PurposeOfReferenceCodeSequence[0].CodeMeaning == "Größe"


def test_an_item_whose_length_spells_a_value_representation(tmp_path: Path) -> None:
    """The length of an item stands where an element has its VR: 0x4441 bytes are not an element of VR DA."""
    ds, item = a_slice(), Dataset()
    item.TextValue = "x" * (0x4144 - 12)  # b"DA" in little endian, with the head of the element
    ds.ContentSequence = [item]
    ds["ContentSequence"].is_undefined_length = True
    path = written(ds, tmp_path)
    assert b"\xfe\xff\x00\xe0DA\0\0" in path.read_bytes()
    assert_same(scanned(path), path)


@pytest.mark.parametrize("size", [DEFER, DEFER + 2, 40_000, 70_000, 2_000_000])
def test_long_values_stay_in_the_file(tmp_path: Path, size: int) -> None:
    ds = a_slice()
    ds.add_new(0x00090010, "LO", "SOME MAKER")
    ds.add_new(0x00091001, "OB", b"\1" * size)
    ds.ImageComments = "behind it"
    path = written(ds, tmp_path)
    found = scanned(path)
    if size > 1 << 20:
        assert found is None
    else:
        assert_same(found, path)


@pytest.mark.parametrize("end", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, (1 << 15) + (1 << 20)])
def test_a_header_that_ends_where_reading_pauses(tmp_path: Path, end: int) -> None:
    """An element ends at the last byte that was read, or beside it, and another follows."""
    ds = a_slice()
    del ds.PixelData
    start = written(ds, tmp_path).stat().st_size
    pad = end - start - 12
    ds.EncapsulatedDocument = b"\2" * (pad + pad % 2)
    ds.StorageMediaFileSetID = "behind it"
    ds.PixelData = b"\0" * 40
    ds["PixelData"].VR = "OW"
    path = written(ds, tmp_path)
    for pixels in (False, True):
        found = scanned(path, pixels)
        assert found is None or assert_same(found, path, pixels) is None


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, "1.2.840.113619.5.2"]
)
def test_other_encodings_are_left_to_pydicom(tmp_path: Path, syntax: str) -> None:
    ds = a_slice(syntax)
    path = tmp_path / "slice.dcm"
    explicit, little = syntax != ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    if syntax == "1.2.840.113619.5.2":
        pydicom.dcmwrite(path, ds, implicit_vr=True, little_endian=True)
    else:
        pydicom.dcmwrite(path, ds, implicit_vr=not explicit, little_endian=little)
    assert scanned(path) is None
    assert scanned(path, pixels=False) is None


def test_compressed_pixels_are_left_to_pydicom_and_their_header_is_not(tmp_path: Path) -> None:
    ds = a_slice()
    ds.compress(RLELossless)
    path = written(ds, tmp_path)
    assert scanned(path) is None
    assert_same(scanned(path, pixels=False), path, pixels=False)


def test_elements_behind_the_pixels_are_left_to_pydicom(tmp_path: Path) -> None:
    ds = a_slice()
    ds.add_new(0xFFFCFFFC, "OB", b"\0" * 8)
    assert scanned(written(ds, tmp_path)) is None


def test_a_file_cut_short_is_left_to_pydicom_or_read_as_it_reads_it(tmp_path: Path) -> None:
    whole = written(a_slice(), tmp_path).read_bytes()
    path = tmp_path / "cut.dcm"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert scanned(path) is None
        found = scanned(path, pixels=False)
        assert found is None or assert_same(found, path, pixels=False) is None


@given(st.data())
def test_damage_raises_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ds, item = a_slice(), Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    ds.ReferencedImageSequence = [item]
    ds["ReferencedImageSequence"].is_undefined_length = item.is_undefined_length_sequence_item = True
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    for pixels in (False, True):
        found = scan(Path("damaged.dcm"), io.BytesIO(bytes(content)), pixels=pixels, defer=DEFER)
        assert found is None or isinstance(found, Header)


def test_values_are_those_of_their_own_slice(tmp_path: Path) -> None:
    """Values are converted once for equal bytes; bytes that differ, and the same bytes elsewhere, stay apart."""
    ds = a_slice()
    ds.ImagePositionPatient = [0, 1.5, -5]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PatientID = "5"
    ds.InstanceNumber = "5"
    first = scanned(written(a_slice(), tmp_path))
    second_path = tmp_path / "second"
    second_path.mkdir()
    second = scanned(written(ds, second_path))
    assert list(first.get("ImagePositionPatient")) == [0, 1.5, -2]
    assert list(second.get("ImagePositionPatient")) == [0, 1.5, -5]
    assert (first.get("PatientID"), second.get("PatientID"), second.get("InstanceNumber")) == ("", "5", 5)


def test_a_tag_that_has_a_rule_of_its_own(tmp_path: Path) -> None:
    """The number of entries of a palette is unsigned, whatever its VR (PS3.3 C.7.6.3.1.5)."""
    ds = a_slice()
    ds.add_new(0x00281101, "SS", [64000, 0, 16])
    ds.PixelRepresentation = 1
    ds.add_new(0x00280106, "SS", -1536)
    path = written(ds, tmp_path)
    assert_same(scanned(path), path)
    assert scanned(path).get("RedPaletteColorLookupTableDescriptor")[0] == 64000


@pytest.mark.realdata
def test_every_real_file_has_the_header_that_pydicom_finds(data: Path) -> None:
    counts = {True: 0, False: 0}
    for path in sorted((data / "dicom").rglob("*")):
        if not path.is_file() or path.read_bytes()[128:132] != b"DICM":
            continue
        for pixels in (False, True):
            found = scanned(path, pixels)
            counts[found is not None] += 1
            if found is not None:
                assert_same(found, path, pixels)
    assert counts[True] > counts[False]
