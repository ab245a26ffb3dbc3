"""What a value, a file or a transform is, as plain values that change whenever its result could.

What cannot be described is refused: a description that leaves something out would call two different things the same.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import TraceableTransform

from medseg.errors import ConfigError, ReadError

#: Libraries behind the transforms and readers: another version may give other voxels.
LIBRARIES = (
    *("medseg", "monai", "torch", "numpy", "scipy", "scikit-image", "SimpleITK", "nibabel", "pydicom", "pillow"),
    *("highdicom", "imagecodecs", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls"),
)
# A file changed so short a time ago may change again within the same tick of the clock, unseen.
_SETTLED_NS = 2_000_000_000
_hashes: dict[tuple[int, ...], str] = {}


def describe(value: Any, folders: bool = True) -> Any:
    """Describe a value as what JSON can hold, the same for the same content in every process.

    A text or path that names a file or folder is described by its content too; the keys of a dictionary name none.
    Arrays and tensors are their bytes; functions and classes are their name and the code or version of their package;
    other objects are their class and their attributes.

    Args:
        value: what to describe.
        folders: whether a mere name may name a folder. Else a folder is one with a separator (``./atlas``) or a `Path`,
            so that the key ``"label"`` of a transform is no folder that happens to lie in the working directory.

    Raises:
        ConfigError: something without a name or with hidden state: a lambda, a function within a function, a generator.
        ReadError: a header that names voxels outside of its folder.

    Example:
        >>> describe({"factor": 0.5, "keys": ("image",)})
        ['dict', [['factor', 0.5], ['keys', ['tuple', ['image']]]]]
        >>> describe(lambda x: x)
        Traceback (most recent call last):
        medseg.errors.ConfigError: <lambda> of ... cannot be told from another: expected a function ... with a name ...
    """
    try:
        return _describe(value, folders)
    except RecursionError:
        raise ConfigError(f"{type(value).__name__}: refers to itself, so its content cannot be described") from None


def _describe(value: Any, folders: bool) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float):
        return value
    if kind is str or isinstance(value, os.PathLike):
        content = _content(os.fspath(value), folders or kind is not str)
        name = value if kind is str else [kind.__name__, os.fspath(value)]
        return name if content is None else ["file", name, content]
    if isinstance(value, enum.Enum):
        return ["enum", _named(kind), value.name]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _describe_array(value, folders)
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        return _describe_container(value, folders)
    if kind in (bytes, complex, range, slice, torch.dtype, torch.device) or isinstance(value, np.dtype):
        return [kind.__name__, repr(value)]
    if kind is re.Pattern:
        return ["pattern", repr(value.pattern), value.flags]
    if isinstance(value, MethodType):
        return ["method", _describe(value.__self__, folders), value.__name__]
    if kind is functools.partial:
        return ["partial", *(_describe(part, folders) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return ["name", *_named(value)]
    return ["object", _named(kind), _describe(_state(value), folders)]


def _describe_array(value: Any, folders: bool) -> Any:
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        plain = value.as_subclass(torch.Tensor).detach().cpu().contiguous()
        digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        described = [kind, str(value.dtype), str(value.device), list(value.shape), digest]
        if isinstance(value, MetaTensor):
            described += [_describe(part, folders) for part in (dict(value.meta), list(value.applied_operations))]
        return described
    array = np.ascontiguousarray(value)
    if array.dtype.hasobject:
        raise ConfigError(f"an array of Python objects ({value!r:.60}) cannot be described: expected numbers")
    return [kind, repr(array.dtype), list(np.shape(value)), hashlib.sha256(array.tobytes()).hexdigest()]


def _describe_container(value: Any, folders: bool) -> Any:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else _named(kind)
    if isinstance(value, Mapping):
        keys = [key if type(key) is str else _describe(key, folders) for key in value]
        items = [_describe(item, folders) for item in value.values()]
        return [name, sorted(map(list, zip(keys, items, strict=True)), key=repr)]
    items = [_describe(item, folders) for item in value]
    return [name, sorted(items, key=repr) if isinstance(value, set | frozenset) else items]


def _state(value: Any) -> dict[str, Any]:
    """Return the attributes of an object."""
    slots: set[str] = set()
    for cls in type(value).__mro__:
        own = cls.__dict__.get("__slots__", ())
        slots.update([own] if isinstance(own, str) else own)
    slots -= {"__dict__", "__weakref__"}
    if not hasattr(value, "__dict__") and not slots:
        raise ConfigError(f"{value!r:.60} cannot be described: {type(value).__name__} does not show its content")
    state = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
    if isinstance(value, TraceableTransform):
        state["_tracing"] = value.tracing  # which MONAI makes on first use, for every thread
    return state


def _named(thing: Any) -> list[str]:
    """Return module, name and code of a function or class that can be found by its name."""
    module, name = getattr(thing, "__module__", None) or "builtins", thing.__qualname__
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not thing:
        raise ConfigError(
            f"{name} of {module} cannot be told from another: expected a function or class with a name of its own in a "
            "module; write it there, with what it needs as parameters"
        )
    # A worker that was spawned knows the script under another name.
    return ["__main__" if module == "__mp_main__" else module, name, _code(module)]


@functools.cache
def _code(module: str) -> str:
    """Return what tells the code of a module from another state of it: versions, or a hash of the source."""
    root = module.partition(".")[0]
    # A namespace package has no file of its own.
    file = getattr(sys.modules[root], "__file__", None) or getattr(sys.modules[module], "__file__", None)
    if root in sys.builtin_module_names or (file and _below(file, "stdlib") and not _below(file, "purelib", "platlib")):
        return f"python {platform.python_version()}"
    if not file:
        raise ConfigError(f"{module} has no file: expected functions and classes of a module or script")
    if root != "medseg" and _below(file, "purelib", "platlib"):
        packages = importlib.metadata.packages_distributions().get(root, ())
        if packages:
            return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(packages)))
    return _source(file)


def _source(file: str) -> str:
    """Hash the Python files of a package, or those beside a single module."""
    path = Path(file)
    files = path.parent.rglob("*.py") if path.name == "__init__.py" else path.parent.glob("*.py")
    found = hashlib.sha256()
    for source in sorted(files):
        found.update(f"{source.relative_to(path.parent)}\0".encode() + hashlib.sha256(source.read_bytes()).digest())
    return found.hexdigest()


def _below(file: str, *folders: str) -> bool:
    return any(Path(file).is_relative_to(sysconfig.get_path(folder)) for folder in folders)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that matter, where they are installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = ""
    return found


def _content(name: str, folders: bool) -> Any:
    """Return the hashes of the files that a text names, None where it names none."""
    try:
        path = Path(name).expanduser()  # as MONAI's LoadImage does
        if not name or not path.exists():
            return None
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, or with the home of nobody
        return None
    if path.is_dir():
        if not (folders or os.sep in name):
            return None
        return [[str(file.relative_to(path)), file_hash(file)] for file in _files_below(path)]
    return [file_hash(path), *([file.name, file_hash(file)] for file in _companions(path))]


def _files_below(folder: Path) -> list[Path]:
    found = (Path(root) / file for root, _, files in os.walk(folder, followlinks=True) for file in files)
    return sorted(file for file in found if file.is_file())


def _companions(path: Path) -> Iterator[Path]:
    """Yield the other files that are read with one: the voxels of a header, what a DICOMDIR lists."""
    from medseg.io.metaimage import inside, read_meta_header

    name = path.name.lower()
    if name == "dicomdir":
        yield from _files_below(path.parent)
    elif name.endswith(".mhd"):
        yield from read_meta_header(path).files
    elif name.endswith((".nhdr", ".nrrd")):
        with path.open("rb") as file:
            voxels = re.search(rb"(?im)^data ?file:[ \t]*(.+?)\r?$", file.read(1 << 20).split(b"\n\n")[0])
        if voxels:
            data = inside(path, voxels[1].decode("latin-1"))
            if not data.is_file():
                raise ReadError(f"{path}: `data file` is {data.name[:60]!r}: expected one file beside the header")
            yield data
    elif name.endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        stem = re.sub(r"\.(hdr|img)(\.gz)?$", "", path.name, flags=re.I)
        pair = re.compile(re.escape(stem) + r"\.(hdr|img|mat)(\.gz)?", re.I)
        yield from sorted(file for file in path.parent.iterdir() if pair.fullmatch(file.name) and file != path)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file. Within a process, a file is read again only when it may have changed.

    A file counts as unchanged where device, inode, size and both times (of content and of inode, in ns) are the same,
    and the times were two seconds in the past when it was read. The time of the inode cannot be set back by a program.
    """
    path = Path(path)
    before = path.stat()
    state = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    if state in _hashes:
        return _hashes[state]
    settled = max(before.st_mtime_ns, before.st_ctime_ns) < time.time_ns() - _SETTLED_NS
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = path.stat()
    if settled and state == (after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns):
        _hashes[state] = digest
    return digest
