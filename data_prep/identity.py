"""Who is who: the key of a dataset, pseudonyms, and messages without identifiers."""

import hashlib
import hmac
import json
import os
import re
import secrets
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import ConfigError, DatasetError
from medseg.io import atomic_path
from medseg.io.text import one_line

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

#: Hexadecimal digits of a pseudonym: 64 bits, so that two patients of a million share one by chance of 1 in 10 million.
DIGITS = 16
_LONGEST_NAME = 64


class KeyFile:
    """The file beside a dataset that can tell its patients: a secret key, and the names of numbered things.

    It is readable by its owner only. The same key gives the same pseudonyms.

    Args:
        path: where it lies.
        key: the secret.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self.key = key

    @classmethod
    def open(cls, path: Path, given: Path | None = None) -> "KeyFile":
        """Read the key beside a dataset; without one, take the key of ``given`` or make one up.

        Raises:
            ConfigError: ``given`` is no key file.
            DatasetError: the dataset was built with another key than ``given``.
        """
        own = _read_key(path) if path.exists() else None
        if given is not None:
            key = _read_key(given)
            if own is not None and own != key:
                raise DatasetError(
                    f"{given}: another key than that of {path}, with which the dataset was begun; "
                    "leave --key out, or build into another folder"
                )
            return cls(path, key)
        return cls(path, own or secrets.token_bytes(32))

    def pseudonym(self, identifier: str) -> str:
        """HMAC-SHA256 of an identifier, cut to 16 hexadecimal digits.

        Example:
            >>> KeyFile(Path("x.key"), b"secret").pseudonym("A-17")
            '5e218d3123af0a4d'
        """
        return hmac.new(self.key, _bytes(identifier), hashlib.sha256).hexdigest()[:DIGITS]

    def write(self, **names: Mapping[str, Any]) -> None:
        """Keep the key, and names by number or pseudonym; mode 600 from the first byte on."""
        content = {"about": "Secret: tells who the patients of the dataset are.", "key": self.key.hex(), **names}
        _sweep(self.path.parent)
        with atomic_path(self.path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            # A name that is no UTF-8 has surrogates in it, which JSON can hold as \udcXX.
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
                file.write("\n")


def safe_name(identifier: str) -> str:
    """A public identifier as a file name that cannot leave its folder.

    Letters, digits, ``.``, ``-`` and ``_`` stay; when anything had to change, a piece of the identifier's hash keeps
    two of them apart.

    Example:
        >>> safe_name("LUNG1-001")
        'LUNG1-001'
        >>> safe_name("../../etc/passwd")
        '_.._etc_passwd-3754d6cb'
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", identifier).lstrip(".-")
    if name == identifier and 0 < len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME] or '_'}-{hashlib.sha256(_bytes(identifier)).hexdigest()[:8]}"


def _bytes(identifier: str) -> bytes:
    return identifier.encode("utf-8", "surrogatepass")  # a file name may be no UTF-8


def mask(message: str, files: Mapping[Path, str], identifiers: Iterable[str] = (), *, root: Path | None = None) -> str:
    """A message on one line, with source files by their shown names and identifiers blotted out.

    Args:
        message: as an error said it.
        files: what to call each file.
        identifiers: words that tell who a patient is; single letters are left.
        root: the source, called SOURCE; nothing below it is called by its name.

    Example:
        >>> mask("/data/Doe/1.dcm: no weight for DOE", {Path("/data/Doe/1.dcm"): "source 7"}, ["Doe"])
        'source 7: no weight for [masked]'
        >>> mask("/data/Doe/2.dcm: cut short", {}, root=Path("/data"))
        'a file of SOURCE: cut short'
    """
    text = one_line(message)
    names: dict[str, str] = {}
    for path, shown in files.items():
        names[one_line(path)] = shown
        for folder in path.parents:
            if folder != path.parent and (root is None or root not in folder.parents):
                break
            names.setdefault(one_line(folder), f"the folder of {shown}")
    if root is not None:
        names[one_line(root)] = "SOURCE"
    for name in sorted(names, key=len, reverse=True):
        if names[name] == "SOURCE":
            text = re.sub(rf"{re.escape(name)}/.+?(?=: |; |, |['\")]|$)", "a file of SOURCE", text)
        text = text.replace(name, names[name])
    for path, shown in files.items():
        name = one_line(path.name)
        if len(name) > 3 and name in text and name not in shown:
            text = text.replace(name, shown)
    folded = text.casefold()
    words = {one_line(identifier) for identifier in identifiers}
    for word in sorted((word for word in words if len(word) > 1), key=len, reverse=True):
        if word.casefold() not in folded:  # of hundreds of words hardly one is
            continue
        # A number is an identifier wherever it stands; a name only as a word ("Ed" is not in "edge").
        anywhere = len(word) > 3 and any(map(str.isdigit, word))
        pattern = re.escape(word) if anywhere else rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"
        text = re.sub(pattern, "[masked]", text, flags=re.IGNORECASE)
    return text


#: DICOM attributes, other than names of people and dates, that tell who a patient is or where they were seen.
_IDENTIFIERS = {
    *("PatientID", "OtherPatientIDs", "IssuerOfPatientID", "AccessionNumber", "AdmissionID"),
    *("InstitutionName", "InstitutionAddress", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
}
#: Numbers of a patient, which are written with and without what stands around their digits.
_NUMBERS = {"PatientID", "OtherPatientIDs", "AccessionNumber", "AdmissionID", "StudyID"}
#: Groups of DICOM attributes whose sequences may name a patient; those of others hold geometry.
_GROUPS = {0x0008, 0x0010, 0x0032, 0x0038, 0x0040}
_GERMAN = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})


def identifying_words(header: "Dataset") -> set[str]:
    """What a DICOM header says of who the patient is and when they were seen, for :func:`mask`.

    All names of people in it count, word by word and in the usual spellings without accents; all dates, in the usual
    ways to write one; and numbers of the patient, of which four digits or more count by themselves. Values that cannot
    be read are passed over.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> header.PatientName, header.PatientID = "Doe^Jane", "A-17"
        >>> sorted(identifying_words(header))
        ['A-17', 'Doe', 'Doe^Jane', 'Jane']
    """
    from medseg.io.dicom_header import quiet

    found: set[str] = set()
    with quiet():
        for element in _elements(header):
            values = [str(value).strip() for value in (element.value if element.VM > 1 else [element.value])]
            for value in values:
                if element.VR == "PN":
                    found |= set().union(*map(_spellings, (value, *re.split(r"[\s^=,]+", value))))
                if element.VR in ("DA", "DT"):
                    found |= _date_forms(value)
                if element.keyword in _IDENTIFIERS:
                    found.add(value)
                if element.keyword in _NUMBERS:
                    found |= set(re.findall(r"\d{4,}", value))
    return found - {""}


def words_of(file: Path) -> set[str]:
    """What the header of a DICOM file says of who the patient is, also of one without preamble; else nothing.

    Args:
        file: of any kind.
    """
    import pydicom

    from medseg.io.dicom_header import quiet

    try:
        with quiet():
            return identifying_words(pydicom.dcmread(file, stop_before_pixels=True, force=True))
    except Exception:  # pydicom raises many kinds on damaged files
        return set()


def _elements(header: "Dataset") -> "Iterator[DataElement]":
    """The elements of a header that can be read, and those of the sequences in it that may name a patient."""
    for tag in tuple(header.keys()):  # the header itself would read them all
        try:
            element = header[tag]
            inner = list(element.value) if element.VR == "SQ" and tag.group in _GROUPS else []
        except Exception:  # pydicom raises many kinds on odd values
            continue
        if element.VR != "SQ":
            yield element
        for item in inner:
            yield from _elements(item)


def _spellings(name: str) -> set[str]:
    """A name as it is, with its accents as characters of their own, and without them."""
    composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    bare = "".join(letter for letter in apart if not unicodedata.combining(letter))
    return {name, composed, apart, bare, composed.translate(_GERMAN)}


def _date_forms(text: str) -> set[str]:
    """A date of a DICOM header as it is written there and elsewhere."""
    match = re.match(r"(\d{4})[.-]?(\d\d)[.-]?(\d\d)", text)
    if match is None:
        return {text}
    year, month, day = match.groups()
    found = {text, f"{year}{month}{day}", f"{day}{month}{year}", f"{month}{day}{year}"}
    for y, m, d in product((year, year[2:]), {month, month.lstrip("0")}, {day, day.lstrip("0")}):
        for sign in "-./_ ":
            found |= {sign.join((y, m, d)), sign.join((d, m, y)), sign.join((m, d, y))}
    return found


def _read_key(path: Path) -> bytes:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such key file; give the .key of another dataset, or leave --key out") from None
    except ValueError:
        text = ""
    try:
        written = json.loads(text)["key"] if text.startswith("{") else text
        key = bytes.fromhex(written)
    except (ValueError, KeyError, TypeError):
        key = b""
    if len(key) < 16:
        raise ConfigError(f"{path}: not a key file; expected the .key of a dataset, or at least 32 hexadecimal digits")
    return key


def _sweep(folder: Path) -> None:
    """Remove what a killed build left half-written beside the dataset; a minute's grace for one at work."""
    for path in folder.glob(".tmp-*.key"):
        try:
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()
        except OSError:
            continue
