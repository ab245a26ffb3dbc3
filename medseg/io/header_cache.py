"""What the headers of files said when they were last read, kept in an SQLite file.

A row is known by the path, the size and the time of change (ns) of a file. It is taken only where it was written by the
same reading code: the same modules of `medseg.io`, the same versions of the libraries behind them. The file holds
PatientIDs, so only its owner may read it (mode 600).

A cache is a help, never a condition: whatever is wrong with it costs one line in the log, and the files are read.
"""

import functools
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..version import __version__
from .dicom_header import Instance, Plane
from .text import one_line

logger = logging.getLogger(__name__)

# The mark that tells our file from any other SQLite database ("mseg").
_APPLICATION_ID = 0x6D736567
_TABLE = """CREATE TABLE IF NOT EXISTS headers (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL,
    reader TEXT NOT NULL, common TEXT NOT NULL, own TEXT NOT NULL
) WITHOUT ROWID"""
# Rows are written this many at a time: a killed process loses these at most.
_BATCH = 2000
# How long to wait for another process that writes.
_WAIT_S = 5.0
# A file changed so short a time ago may change again within the same tick of the clock, unseen.
_SETTLED_NS = 2_000_000_000
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

# The fields of an instance that its neighbors in the series do not share. The others are parsed once per series.
_OWN = ("sop_uid", "planes")
_LEFT_OUT = ("path", "dataset")
_as_text = json.JSONEncoder(separators=(",", ":")).encode


class Header(NamedTuple):
    """The header of a file as two JSON texts: what a series has in common, and what is the file's own.

    Both are empty for a file that is no image. It is `kept` for the next time where it depends on this file alone.
    """

    common: str
    own: str
    kept: bool = True


class FileState(NamedTuple):
    """A file as the cache knows it: absolute path, size in bytes, time of change in ns."""

    path: bytes
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Look at a file.

        Raises:
            OSError: it is not there, or may not be looked at.
        """
        status = path.stat()
        return cls(os.fsencode(path.absolute()), status.st_size, status.st_mtime_ns)


def default_cache() -> Path:
    """Return where the cache of a user lies: ``$XDG_CACHE_HOME/medseg/headers.sqlite``, or below ``~/.cache``.

    Raises:
        RuntimeError: the user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "medseg" / "headers.sqlite"


def pack(instance: Instance) -> Header:
    """Write the header of a DICOM file as text.

    Example:
        >>> instance = Instance(path=Path("a"), **{f.name: "" for f in fields(Instance) if f.name != "path"})
        >>> instance.planes = (Plane((0.0, 0.0, 3.5), None, None, None),) * 2
        >>> unpack(pack(instance), Path("a")).planes == instance.planes
        True
    """
    values = {f.name: getattr(instance, f.name) for f in fields(instance) if f.name not in _LEFT_OUT}
    own = {name: values.pop(name) for name in _OWN}
    runs: list[list[Any]] = []
    before = None
    for plane in own["planes"]:
        if plane is before:  # a thousand frames without geometry share one
            runs[-1][0] += 1
        else:
            runs.append([1, *(getattr(plane, f.name) for f in fields(Plane))])
        before = plane
    own["planes"] = runs
    # What is said of a file names it, perhaps by another way to it than the next time.
    return Header(_as_text(values), _as_text(own), kept=not instance.problem)


def unpack(header: Header, path: Path) -> Instance:
    """Read back what `pack` wrote. Values that many files share are one object in memory.

    Raises:
        ValueError, TypeError, KeyError: damaged text.
    """
    own = json.loads(header.own)
    planes: list[Plane] = []
    for count, *values in own.pop("planes"):
        planes.extend([Plane(*map(_as_tuples, values))] * count)
    return Instance(
        path=path, planes=tuple(planes), **{n: _as_tuples(v) for n, v in own.items()}, **_common(header.common)
    )


@functools.lru_cache(maxsize=512)
def _common(text: str) -> dict[str, Any]:
    return {name: _as_tuples(value) for name, value in json.loads(text).items()}


def _as_tuples(value: Any) -> Any:
    """Turn JSON's lists back into tuples; the same ones are one object."""
    if not isinstance(value, list):
        return value
    made = tuple(map(_as_tuples, value))
    return _one_of(repr(made), made)


@functools.lru_cache(maxsize=4096)
def _one_of(written: str, value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the first value that is written the same: 0.0 and -0.0 are equal, and are not the same."""
    return value


@functools.cache
def reader_version() -> str:
    """Return what tells the reading code of this installation from any other."""
    code = hashlib.sha256(__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        code.update(source.read_bytes())
    for package in ("pydicom", "nibabel", "numpy", "pillow"):
        code.update(f"{package} {metadata.version(package)}".encode())
    return code.hexdigest()[:32]


class HeaderCache:
    """An SQLite file of headers. Several processes may use one file at once.

    Args:
        path: the file; it is made where it is absent, with its folder.

    Raises:
        ConfigError: the file is a database of something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._waiting: list[tuple[Any, ...]] = []
        self._database: sqlite3.Connection | None = None
        self._guard(self._open)

    def __enter__(self) -> "HeaderCache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, files: Sequence[FileState]) -> dict[bytes, Header]:
        """Return the headers that are known, by path; 500 files at most."""
        return self._guard(self._get, files) or {}

    def put(self, found: Mapping[FileState, Header]) -> None:
        """Keep headers; those of files that were changed within the last two seconds are not kept."""
        settled = time.time_ns() - _SETTLED_NS
        reader = reader_version()
        self._waiting.extend(
            (*state, reader, header.common, header.own)
            for state, header in found.items()
            if header.kept and state.changed < settled
        )
        if len(self._waiting) >= _BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is waiting, and let go of the file."""
        self._flush()
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite would make the file, and its journal after it, for everyone to read.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        self.path.chmod(0o600)
        database = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        try:
            if _mark(database) != _APPLICATION_ID:
                database.execute("BEGIN IMMEDIATE")  # another process may begin the same file
                mark = _mark(database)
                if mark != _APPLICATION_ID:
                    if mark or database.execute("SELECT 1 FROM sqlite_master").fetchone():
                        raise ConfigError(
                            f"{self.path}: a database of something else, not a cache of headers: give another file"
                        )
                    database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                database.execute(_TABLE)
                database.execute("COMMIT")
            database.execute(_TABLE)
        except BaseException:
            database.close()
            raise
        self._database = database

    def _get(self, files: Sequence[FileState]) -> dict[bytes, Header]:
        if self._database is None:
            return {}
        marks = ",".join("?" * len(files))
        rows = self._database.execute(
            f"SELECT path, size, changed, common, own FROM headers WHERE reader = ? AND path IN ({marks})",
            (reader_version(), *(state.path for state in files)),
        )
        wanted = set(files)
        return {row[0]: Header(row[3], row[4]) for row in rows if FileState(*row[:3]) in wanted}

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            self._guard(self._put, rows)

    def _put(self, rows: list[tuple[Any, ...]]) -> None:
        if self._database is None:
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany("INSERT OR REPLACE INTO headers VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise

    def _guard(self, do: Any, *arguments: Any) -> Any:
        """Do something with the file; where that fails, go on without it or with a new one."""
        try:
            return do(*arguments)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _BUSY:  # another process is writing: these headers are read, or kept, another time
                if do == self._open:
                    self._leave(error)
                return None
            if code not in _CORRUPT:
                self._leave(error)
                return None
            self._set_aside(error)
        except OSError as error:
            self._leave(error)
        return None

    def _leave(self, error: Exception) -> None:
        """Go on without a cache."""
        logger.warning(one_line(f"{self.path}: the cache of headers cannot be used ({error}); every file is read"))
        self._database = None

    def _set_aside(self, error: Exception) -> None:
        """Begin a new file where the old one is damaged."""
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None
        aside = self.path.with_name(self.path.name + ".damaged")
        try:
            self.path.replace(aside)
            for journal in ("-journal", "-wal", "-shm"):
                self.path.with_name(self.path.name + journal).unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as again:
            self._leave(again)
            return
        logger.warning(
            one_line(
                f"{self.path}: the cache of headers is damaged ({error}): set aside as {aside.name}, a new one begun"
            )
        )


def _mark(database: sqlite3.Connection) -> int:
    ((mark,),) = database.execute("PRAGMA application_id")
    return int(mark)
