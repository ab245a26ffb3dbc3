"""The header of a plain DICOM file, found faster than pydicom finds it.

A series is hundreds of small files whose headers take longer to parse than their pixels. Most of them are written in
explicit little endian without surprises; of those `scan` finds the elements (DICOM PS3.5 chapter 7, PS3.10 chapter 7)
and hands them to pydicom as they are, to be converted when they are asked for. All else is pydicom's to parse.
"""

from functools import lru_cache
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import IO, Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import UID

# Value representations by the length of their length field (PS3.5 7.1.2).
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_NAMES = {name: name.decode() for name in _SHORT | _LONG}
# Of these a value is the same wherever the same bytes stand.
_SIMPLE = frozenset(name.decode() for name in _SHORT)

_ELEMENT, _LENGTH = Struct("<HH2sH").unpack_from, Struct("<L").unpack_from
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DELIMITER = 8  # bytes
_CHARACTER_SET = 0x00080005
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_PIXEL_DATA = BaseTag(0x7FE00010)
# Bytes that are read of a file: as most headers have, and as the others may have.
_HEAD, _MORE = 1 << 15, 1 << 20

_Elements = dict[BaseTag, DataElement | RawDataElement]


class _Unusual(Exception):
    """Something that is left to pydicom."""


class Header(FileDataset):
    """A dataset that converts values once for all slices of a series that have the same."""

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of an element by its keyword; see `pydicom.dataset.Dataset.get`."""
        if isinstance(key, str) and (tag := _tag(key)) is not None:
            element = self._dict.get(tag)
            if element is None:
                return default
            if element.is_raw and element.value is not None and element.VR in _SIMPLE:
                found = self.original_character_set
                encoding = found if isinstance(found, str) else tuple(found)
                return _value(element.tag, element.VR, element.value, encoding)
        return super().get(key, default)


def pixels_in_file(ds: Dataset) -> bool:
    """Whether `scan` left the pixels in the file, which it does with those that are not compressed."""
    return isinstance(ds, Header) and _left(ds) is not None


def pixel_data(ds: Dataset) -> bytes:
    """Return PixelData, from the file where `scan` left it there."""
    left = _left(ds) if isinstance(ds, Header) else None
    if left is None:
        return bytes(ds.PixelData)
    with Path(ds.filename).open("rb") as file:
        file.seek(left.value_tell)
        return file.read(left.length)


def _left(header: Header) -> RawDataElement | None:
    element = header._dict.get(_PIXEL_DATA)
    return element if isinstance(element, RawDataElement) and element.value is None else None


@lru_cache(maxsize=1024)
def _tag(keyword: str) -> BaseTag | None:
    tag = tag_for_keyword(keyword)
    return None if tag is None else BaseTag(tag)


@lru_cache(maxsize=4096)
def _value(tag: BaseTag, vr: str, value: bytes, encoding: str | tuple[str, ...]) -> Any:
    raw = RawDataElement(tag, vr, len(value), value, 0, False, True)
    return convert_raw_data_element(raw, encoding=encoding if isinstance(encoding, str) else list(encoding)).value


def scan(path: Path, file: IO[bytes], *, pixels: bool, defer: int) -> FileDataset | None:
    """Read the header of a file.

    Args:
        path: the name of the file, under which values left there are found again.
        file: the same file, open at its start; it is left somewhere else.
        pixels: give the pixels too, left in the file.
        defer: values of more bytes than this stay in the file as well.

    Returns:
        What `pydicom.dcmread` gives, or None where that is to read the file.
    """
    head = file.read(_HEAD)
    if head[128:132] != b"DICM":
        return None
    try:
        meta, at = _elements(head, 132, defer, group=2)
        named = meta[BaseTag(0x00020010)].value or b""
        syntax = UID(named.rstrip(b"\0 ").decode("ascii"))
        if syntax.is_private or syntax.is_implicit_VR or not syntax.is_little_endian or syntax.is_deflated:
            return None
        try:
            elements, at = _elements(head, at, defer)
        except (StructError, IndexError):  # it goes on behind what was read
            head += file.read(_MORE)
            elements, at = _elements(head, at, defer)
        if not elements or (at >= len(head) and file.read(1)):
            return None
        if pixels:
            group, number, vr, _ = _ELEMENT(head, at)
            (length,) = _LENGTH(head, at + 8)
            plain = (group, number) == (0x7FE0, 0x0010) and vr in (b"OW", b"OB") and not syntax.is_encapsulated
            if not plain or not length or file.seek(0, 2) != at + 12 + length:
                return None  # compressed, of another kind, or there are elements behind the pixels
            elements[_PIXEL_DATA] = RawDataElement(_PIXEL_DATA, _NAMES[vr], length, None, at + 12, False, True)
    except (_Unusual, StructError, LookupError, ValueError, AttributeError, RecursionError):
        return None
    file_meta = FileMetaDataset(meta)
    file_meta.set_original_encoding(False, True, "iso8859")
    header = Header(str(path), elements, head[:128], file_meta, False, True)
    header.set_original_encoding(False, True, header._character_set)
    return header


def _elements(head: bytes, at: int, defer: int, group: int = 0) -> tuple[_Elements, int]:
    """Find the elements from a place on, up to the pixels, or those of one group; return them and where they end."""
    found: _Elements = {}
    value: Any
    while at < len(head):
        tag, vr, length, place = _element(head, at)
        if (group and tag >> 16 != group) or tag in _PIXELS:
            break
        if tag >> 16 < 2:
            raise _Unusual
        if length == _UNDEFINED:
            at = _end_of_sequence(head, vr, place)
            length = at - place - _DELIMITER
            value = head[place : place + length]
        else:
            at = place + length
            if at > len(head):
                raise IndexError
            if not length:
                value = empty_value_for_VR(_NAMES[vr], raw=True)
            else:
                value = head[place:at] if length <= defer or tag == _CHARACTER_SET else None
        key = BaseTag(tag)
        found[key] = RawDataElement(key, _NAMES[vr], length, value, place, False, True)
    return found, at


def _element(head: bytes, at: int) -> tuple[int, bytes, int, int]:
    """Return tag, value representation and length of the element at a place, and where its value begins."""
    group, number, vr, length = _ELEMENT(head, at)
    tag = group << 16 | number
    if group == 0xFFFE:  # an item or a delimiter has no value representation
        return tag, b"", _LENGTH(head, at + 4)[0], at + 8
    if vr in _SHORT:
        return tag, vr, length, at + 8
    if vr in _LONG:
        return tag, vr, _LENGTH(head, at + 8)[0], at + 12
    raise _Unusual


def _end_of_sequence(head: bytes, vr: bytes, at: int) -> int:
    """Return where a sequence of undefined length ends, behind its delimiter."""
    if vr != b"SQ":
        raise _Unusual
    while True:
        tag, _, length, at = _element(head, at)
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _Unusual
        if length != _UNDEFINED:
            at += length
            continue
        while tag != _ITEM_END:
            tag, vr, length, at = _element(head, at)
            if length == _UNDEFINED:
                at = _end_of_sequence(head, vr, at)
            else:
                at += length
