"""A cache on disk of what comes before the first random transform, which knows when its content is stale."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms import Transform
from monai.transforms.traits import RandomizableTrait
from monai.utils import TraceKeys
from torch.utils.data import Dataset

from medseg.data.content_hash import describe, versions
from medseg.data.loading import SeededDataset
from medseg.errors import ConfigError, MedsegError
from medseg.io import atomic_write_bytes

logger = logging.getLogger(__name__)

# Changes whenever files are written in another way, so that old ones are not taken for new ones.
_FORMAT = b"medseg cache 1\n"
_SUFFIX = ".cache"
_HOUR_S = 3600


class ContentCacheDataset(SeededDataset):
    """A :class:`SeededDataset` that keeps on disk what comes before the first random transform.

    MONAI's `PersistentDataset` gives back what it once stored, whatever happened to the files since, and by default to
    the transforms too. Here the name of a stored result is the SHA-256 of all that it depends on:

    - the item: its values, and the content of every file that it names (a path, a list of paths, a folder; with an MHD
      or NRRD header or a pair of HDR and IMG also the file of the voxels);
    - the transforms up to the first random one, in their order: class and attributes, to any depth, and the content of
      the files and folders that they name (a folder by a `Path` or a text with a separator);
    - the code: versions of the libraries, and the source of medseg and of modules that are not installed packages;
    - whether MONAI tracks metadata.

    The name is worked out anew each time, so a file that changes in the middle of a training is seen too. Not seen are
    files that a transform finds without their being named by the item or by an attribute, and variables of modules that
    are changed while the program runs.

    As with MONAI, a `Compose` within the sequence counts as random: what comes before it is kept. Stored are tensors,
    arrays, MetaTensors with affine, meta and applied operations (so results can be inverted; the id of the transform
    is left out, as in `PersistentDataset`), numbers, text, and lists, tuples and dictionaries of these; enumerations
    become their plain values. What is computed passes through the same form, so the first epoch equals the later ones.

    Several processes may use one folder. Files appear whole or not at all and carry a checksum: one that is damaged is
    computed again, with a line in the log. Where nothing can be written, items are computed each time. No pickled
    object is read. The folder holds images of patients as they are.

    Args:
        data: see :class:`SeededDataset`.
        transform: see there.
        cache_dir: the folder; it is made where it is absent. Any number of datasets may share it.
        seed: see there.
        cache_rate: share of the items whose deterministic part is kept in memory as well, 0 to 1; what is in memory is
            not checked again.
        num_workers: threads that fill the memory.

    Raises:
        ConfigError: a deterministic transform or an item whose content cannot be described, such as a lambda; a result
            that cannot be stored. The message names it.

    Example:
        >>> import tempfile
        >>> from monai.transforms import RandGaussianNoise, ScaleIntensityRange
        >>> folder = Path(tempfile.mkdtemp())
        >>> def dataset(top):
        ...     transform = [ScaleIntensityRange(0, top, 0, 1), RandGaussianNoise(prob=1)]
        ...     return ContentCacheDataset([torch.ones(1, 2, 2)], transform, folder)
        >>> same = bool((dataset(2)[0] == dataset(2)[0]).all())
        >>> same, len(list(folder.iterdir()))
        (True, 1)
        >>> _ = dataset(3)[0]
        >>> len(list(folder.iterdir()))
        2
    """

    def __init__(
        self,
        data: Sequence[Any] | Dataset,
        transform: Sequence[Callable] | Callable | None,
        cache_dir: str | os.PathLike[str],
        seed: int = 0,
        cache_rate: float = 0.0,
        num_workers: int = 1,
    ) -> None:
        self.cache_dir = Path(cache_dir)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cache_dir {self.cache_dir}: expected a folder; {error.strerror}") from error
        super().__init__(data, transform, seed=seed, cache_rate=cache_rate, num_workers=num_workers)
        self._transforms_key(self._first_random())  # what cannot be described is better said now

    def key(self, index: int) -> str:
        """Return the name under which the deterministic part of an item is stored.

        Raises:
            ConfigError: see the class.
        """
        return self._key(index, self.data[index], self._first_random())

    def prune(self, max_bytes: int = 0) -> int:
        """Delete what was used longest ago until the folder holds at most `max_bytes`; return the bytes deleted.

        Another process that wants a deleted result computes it again. Left-overs of killed processes go too.
        """
        found = []
        for path in self.cache_dir.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == _SUFFIX and not path.name.startswith(".tmp-"):
                found.append((status.st_mtime_ns, status.st_size, path))
            elif path.name.startswith(".tmp-") and status.st_mtime < time.time() - _HOUR_S:
                path.unlink(missing_ok=True)
        total, deleted = sum(size for _, size, _ in found), 0
        for _, size, path in sorted(found):
            if total - deleted <= max_bytes:
                break
            path.unlink(missing_ok=True)
            deleted += size
        return deleted

    def _transform(self, index: int) -> Any:
        if index % len(self) < self.cache_num:  # in memory
            return super()._transform(index)
        prepared, first = self._load_cache_item(index), self._first_random()
        return prepared if first is None else self.transform(prepared, start=first)

    def _load_cache_item(self, idx: int) -> Any:
        item, first = self.data[idx], self._first_random()
        if first == 0:
            return item
        path = self.cache_dir / (self._key(idx, item, first) + _SUFFIX)
        try:
            prepared = _unpack(_read(path))
            os.utime(path)  # `prune` goes by the last use
            return prepared
        except FileNotFoundError:
            pass
        except Exception as error:
            logger.warning("%s: damaged (%s); computed again", path, str(error).splitlines()[0] if str(error) else "")
        prepared = self.transform(item, end=first, threading=True)
        try:
            packed = _pack(prepared)
        except MedsegError as error:
            raise ConfigError(f"item {idx}: {error}") from error
        content = io.BytesIO()
        torch.save(packed, content)
        payload = content.getvalue()
        try:
            atomic_write_bytes(path, _FORMAT + hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); items are computed each time", self.cache_dir, error.strerror)
        return _unpack(torch.load(io.BytesIO(payload), weights_only=True))

    def _first_random(self) -> int | None:
        first = self.transform.get_index_of_first(
            lambda t: isinstance(t, RandomizableTrait) or not isinstance(t, Transform)
        )
        return None if first is None else int(first)

    def _key(self, index: int, item: Any, first: int | None) -> str:
        try:
            described = describe(item)
        except MedsegError as error:
            raise type(error)(f"item {index}: {error}") from error
        return _hash([self._transforms_key(first), described])

    def _transforms_key(self, first: int | None) -> str:
        described = []
        for number, transform in enumerate(self.transform.transforms[:first]):
            try:
                described.append(describe(transform, folders=False))
            except MedsegError as error:
                raise ConfigError(
                    f"transform {number} ({type(transform).__name__}) comes before the first random one and cannot be "
                    f"cached: {error}"
                ) from error
        compose = self.transform
        settings = [compose.map_items, compose.unpack_items, compose.lazy, describe(compose.overrides, folders=False)]
        return _hash([_FORMAT.decode(), versions(), get_track_meta(), settings, described])


def _hash(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Any:
    """Read a stored result.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what was written.
    """
    content = path.read_bytes()
    begin = len(_FORMAT) + hashlib.sha256().digest_size
    payload = memoryview(content)[begin:]
    # torch.load does not notice a wrong byte.
    if not content.startswith(_FORMAT) or content[len(_FORMAT) : begin] != hashlib.sha256(payload).digest():
        raise ValueError("its checksum is wrong")
    return torch.load(io.BytesIO(payload), weights_only=True)


def _pack(value: Any) -> Any:
    """Turn a prepared item into what `torch.load(weights_only=True)` reads."""
    kind = type(value)
    if isinstance(value, Enum):
        return _pack(value.value)
    if value is None or kind in (bool, int, float, complex, str):
        return value
    if isinstance(value, MetaTensor):
        if value.pending_operations:
            raise ConfigError("an image with pending operations cannot be cached: expected them to be applied")
        parts = [_own(value.as_tensor()), _pack(dict(value.meta)), _pack(_without_ids(list(value.applied_operations)))]
        return {"kind": "MetaTensor", "parts": parts}
    if isinstance(value, torch.Tensor):
        return _own(value)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.hasobject or array.dtype.names:
            raise ConfigError(f"an array of {array.dtype} cannot be cached: expected numbers or text")
        # As bytes, since torch lacks some of numpy's types. An empty buffer is none to torch.
        data = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else None
        return {"kind": "array", "parts": [data, array.dtype.str, list(array.shape), isinstance(value, np.generic)]}
    if isinstance(value, Mapping):
        return {"kind": "dict", "parts": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if kind in (list, tuple, torch.Size):
        return {"kind": kind.__name__, "parts": [_pack(item) for item in value]}
    if isinstance(value, torch.dtype | torch.device):
        return {"kind": kind.__name__, "parts": [str(value)]}
    if isinstance(value, os.PathLike):
        return {"kind": "Path", "parts": [os.fspath(value)]}
    raise ConfigError(
        f"a result of type {kind.__name__} ({value!r:.60}) cannot be cached: expected tensors, arrays, numbers, text, "
        "and lists, tuples and dictionaries of these; put the transform that makes it after the first random one"
    )


def _without_ids(operations: Any) -> Any:
    """Return operations as they are, but for the ids of the transforms, which are other ones in the next process."""
    if isinstance(operations, Mapping):
        return {k: TraceKeys.NONE if k == TraceKeys.ID else _without_ids(v) for k, v in operations.items()}
    if type(operations) in (list, tuple):
        return type(operations)(map(_without_ids, operations))
    return operations


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the rest of the storage that it is a view of, which would be written too."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _unpack(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind, parts = value["kind"], value["parts"]
    if kind == "MetaTensor":
        data, meta, applied = parts
        return MetaTensor(data, meta=_unpack(meta), applied_operations=_unpack(applied))
    if kind == "array":
        data, dtype, shape, scalar = parts
        array = np.frombuffer(b"" if data is None else data.numpy().tobytes(), np.dtype(dtype)).reshape(shape).copy()
        return array[()] if scalar else array
    if kind == "dict":
        return {_unpack(key): _unpack(item) for key, item in parts}
    if kind in ("list", "tuple", "Size"):
        return {"list": list, "tuple": tuple, "Size": torch.Size}[kind](map(_unpack, parts))
    if kind == "dtype":
        return getattr(torch, parts[0].removeprefix("torch."))
    if kind == "device":
        return torch.device(parts[0])
    return Path(parts[0])
