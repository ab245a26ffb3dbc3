"""Who is who: the key of a dataset, pseudonyms, and messages without identifiers."""

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import ConfigError, DatasetError
from medseg.io import atomic_path

if TYPE_CHECKING:
    from pydicom import Dataset

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
        return hmac.new(self.key, identifier.encode(), hashlib.sha256).hexdigest()[:DIGITS]

    def write(self, **names: Mapping[str, Any]) -> None:
        """Keep the key, and names by number or pseudonym; mode 600 from the first byte on."""
        content = {"about": "Secret: tells who the patients of the dataset are.", "key": self.key.hex(), **names}
        _sweep(self.path.parent)
        with atomic_path(self.path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
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
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(identifier.encode()).hexdigest()[:8]}"


def mask(message: str, files: Mapping[Path, str], identifiers: Iterable[str] = (), *, root: Path | None = None) -> str:
    """A message on one line, with source files by their shown names and identifiers blotted out.

    Args:
        message: as an error said it.
        files: what to call each file.
        identifiers: words that tell who a patient is; single letters are left.
        root: a folder to call SOURCE.

    Example:
        >>> mask("/data/Doe/1.dcm: no weight for DOE", {Path("/data/Doe/1.dcm"): "source 7"}, ["Doe"])
        'source 7: no weight for [masked]'
    """
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())
    names: dict[str, str] = {str(root): "SOURCE"} if root is not None else {}
    for path, shown in files.items():
        names[str(path)] = shown
        names.setdefault(str(path.parent), f"the folder of {shown}")
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, names[name])
    for path, shown in files.items():
        if len(path.name) > 3 and path.name in text and path.name not in shown:
            text = text.replace(path.name, shown)
    words = {identifier.strip() for identifier in identifiers}
    for word in sorted((word for word in words if len(word) > 1), key=len, reverse=True):
        # A number is an identifier wherever it stands; a name only as a word ("Ed" is not in "edge").
        anywhere = len(word) > 3 and any(map(str.isdigit, word))
        pattern = re.escape(word) if anywhere else rf"(?<![^\W_]){re.escape(word)}(?![^\W_])"
        text = re.sub(pattern, "[masked]", text, flags=re.IGNORECASE)
    return text


#: DICOM attributes that tell who a patient is, or where they were seen.
_IDENTIFIERS = (
    *("PatientID", "OtherPatientIDs", "IssuerOfPatientID", "AccessionNumber", "InstitutionName"),
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
)
#: Numbers of a patient, which are written with and without what stands around their digits.
_NUMBERS = ("PatientID", "OtherPatientIDs", "AccessionNumber")
#: Dates, which are written in many ways.
_DATES = ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
_DATE_FORMS = tuple(
    form.replace("?", sign) for form in ("{y}?{m}?{d}", "{d}?{m}?{y}", "{m}?{d}?{y}") for sign in ("", *".-/_")
)
#: Names of people, each of whose words is an identifier too.
_NAMES = ("PatientName", "OtherPatientNames", "PatientBirthName", "ReferringPhysicianName", "OperatorsName")


def identifying_words(header: "Dataset") -> set[str]:
    """What a DICOM header says of who the patient is and when they were seen, for :func:`mask`.

    Four digits or more of a PatientID count by themselves, and so do the usual ways to write a date.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> header.PatientName, header.PatientID = "Doe^Jane", "A-17"
        >>> sorted(identifying_words(header))
        ['A-17', 'Doe', 'Doe^Jane', 'Jane']
    """
    found = {str(header.get(keyword) or "").strip() for keyword in _IDENTIFIERS}
    for keyword in _NAMES:
        name = str(header.get(keyword) or "").strip()
        found |= {name, *re.split(r"[\s^=,]+", name)}
    for keyword in _NUMBERS:
        found |= set(re.findall(r"\d{4,}", str(header.get(keyword) or "")))
    for keyword in _DATES:
        date = re.fullmatch(r"(\d{4})(\d\d)(\d\d)", str(header.get(keyword) or "").strip())
        if date:
            year, month, day = date.groups()
            found |= {form.format(y=year, m=month, d=day) for form in _DATE_FORMS}
    return found - {""}


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
