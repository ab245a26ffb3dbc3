"""What the result of a case depends on, as a hash: another hash means that the case has to be made again."""

import dataclasses
import enum
import errno
import functools
import hashlib
import hmac
import json
import os
import stat
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.recipes.base import Case
from medseg.errors import DatasetError
from medseg.version import __version__

#: Libraries whose version may change the voxels or the bytes of a dataset.
LIBRARIES = (
    *("numpy", "scipy", "scikit-image", "nibabel", "pydicom", "highdicom", "imagecodecs", "pylibjpeg-rle", "pillow"),
    *("SimpleITK", "torch", "monai"),
)
_WINDOW = 1000


@functools.cache
def versions() -> dict[str, str]:
    """Versions that the result of every case depends on."""
    found = {library: version(library) for library in LIBRARIES}
    return {"medseg": __version__, **found, "zlib": zlib.ZLIB_RUNTIME_VERSION}


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: Iterable[Path], threads: int) -> "Iterator[tuple[Path, str | OSError]]":
    """SHA-256 of every file, or why it cannot be read, in the order given; however many files, memory is the same."""
    waiting: deque[tuple[Path, Future[str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            waiting.append((file, pool.submit(sha256, file)))
            if len(waiting) > _WINDOW:
                yield _hash_of(*waiting.popleft())
        while waiting:
            yield _hash_of(*waiting.popleft())


def _hash_of(file: Path, future: "Future[str]") -> "tuple[Path, str | OSError]":
    error = future.exception()
    return file, error if isinstance(error, OSError) else future.result()


def fingerprint(key: bytes, *content: Any) -> str:
    """HMAC-SHA256 of what JSON can hold.

    It is keyed because the content may hold names of patients, which could be guessed and tried otherwise.

    Example:
        >>> fingerprint(b"", {"b": 1, "a": [2]}) == fingerprint(b"", {"a": [2], "b": 1}) != fingerprint(b"k", {})
        True
    """
    return hmac.new(key, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def describe_case(case: Case, source: Path, hashes: dict[Path, str]) -> Any:
    """What tells a case from another that would be made otherwise, as JSON: contents, names below ``source``, detail.

    Raises:
        DatasetError: the detail holds an object whose content cannot be told.
    """
    parts = [
        [part, [[below(file, source), hashes.get(file, "")] for file in files]] for part, files in case.sources.items()
    ]
    try:
        return [case.name, case.patient, parts, _plain(case.detail, source)]
    except TypeError as error:
        raise DatasetError(
            f"the recipe's Case.detail cannot be compared with that of the last build: {error}"
        ) from None


def below(file: Path, source: Path) -> str:
    """The path of a file from ``source`` on."""
    text, start = str(file), f"{source}{os.sep}"
    if text.startswith(start):  # much the fastest, and what there are a hundred thousand of
        text = text[len(start) :]
    elif file.is_absolute():
        text = os.path.relpath(file, source)
    return text.replace(os.sep, "/")


def _plain(value: Any, source: Path) -> Any:
    """A value as JSON, the same for the same content wherever the source lies."""
    if value is None or isinstance(value, str | bool | int | float):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, Path):
        return below(value, source)
    if isinstance(value, list | tuple):
        return [_plain(item, source) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, source) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name), source) for item in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "items"):
        return [[_plain(key, source), _plain(item, source)] for key, item in value.items()]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist(), source)
    raise TypeError(f"{type(value).__name__} found; text, numbers, paths, lists, mappings and dataclasses can be")
