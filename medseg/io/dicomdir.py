"""DICOMDIR: the index of a medium, as a list of the files that it names (DICOM PS3.3 F, PS3.10 8)."""

from pathlib import Path

import pydicom

from ..errors import MedsegError, ReadError
from .dicom_header import DicomIndexError, quiet, read_instance
from .kinds import kind_by_content
from .text import one_line


def is_dicomdir(path: Path) -> bool:
    """Whether a file is a DICOMDIR, be it sound or not."""
    try:
        with quiet(), path.open("rb") as file:
            if kind_by_content(file.read(1024)) != "dicom":
                return False
            file.seek(0)
            read_instance(path, file, force=True)
    except DicomIndexError:
        return True
    except (MedsegError, OSError):
        return False
    return False


def dicomdir_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files that a DICOMDIR names, and what is wrong with it, one line each.

    Names are taken without regard to case where no file has the very name, and a version (``;1``) or a last dot of an
    ISO 9660 disk is left away. A file is taken inside the folder of the DICOMDIR only.
    """
    try:
        with quiet():
            index = pydicom.dcmread(path, force=True)
            named = [
                [str(part) for part in ([value] if isinstance(value, str) else value)]
                for record in index.get("DirectoryRecordSequence") or []
                if (value := record.get("ReferencedFileID"))
            ]
    except Exception as error:  # pydicom raises many kinds on damaged files, with values of the file in their text
        return [], [f"{path}: damaged DICOMDIR: it cannot be parsed ({type(error).__name__}): give the folder itself"]
    found: dict[Path, None] = {}
    absent, outside = [], []
    folder = _Folder(path.parent)
    for parts in named:
        try:
            file = folder.find(parts)
        except MedsegError:
            outside.append("/".join(parts))
            continue
        if file is None:
            absent.append("/".join(parts))
        else:
            found[file] = None
    problems = []
    if not named:
        problems.append(f"{path}: a DICOMDIR that names no file: give the folder itself")
    for names, what in (
        (absent, "absent: copy the medium again, or give the folder itself"),
        (outside, "not inside its folder, and were not looked at"),
    ):
        if names:
            which = f"{one_line(names[0])[:80]!r}" if len(names) == 1 else f"such as {one_line(names[0])[:80]!r}"
            problems.append(f"{path}: {len(names)} of the {len(named)} files that it names ({which}) are {what}")
    return list(found), problems


class _Folder:
    """A folder whose files are found whatever the case of their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.real = root.resolve()
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, parts: list[str]) -> Path | None:
        """Return a file below the root, None where it is absent.

        Raises:
            ReadError: it would lie outside.
        """
        place = self.root
        for part in parts:
            if part in ("", ".", "..") or set(part) & set("/\\\0:"):
                raise ReadError(f"{self.root}: a name that leads elsewhere")
            names = self._names(place)
            name = names.get(part) or names.get(_plain(part))
            if name is None:
                return None
            place = place / name
        if not place.resolve().is_relative_to(self.real):
            raise ReadError(f"{self.root}: a link that leads elsewhere")
        return place if place.is_file() else None

    def _names(self, folder: Path) -> dict[str, str]:
        if folder not in self._listed:
            try:
                names = sorted((entry.name for entry in folder.iterdir()), reverse=True)
            except OSError:
                names = []
            self._listed[folder] = {_plain(name): name for name in names} | {name: name for name in names}
        return self._listed[folder]


def _plain(name: str) -> str:
    return name.split(";")[0].rstrip(". ").casefold()
