"""Files that appear whole or not at all."""

import contextlib
import contextvars
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_FLUSH = contextvars.ContextVar("flush", default=True)


@contextlib.contextmanager
def flushed_later() -> Iterator[None]:
    """Leave it to the caller to flush what is written in the block, by ``os.sync()`` once all of it is.

    For many small files whose loss in a power cut would be noticed and mended, as a build does by their hashes: a disk
    flushes all of them at once in the time of a few. A killed process loses nothing either way.
    """
    token = _FLUSH.set(False)
    try:
        yield
    finally:
        _FLUSH.reset(token)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends well, the file there becomes ``path``.

    The temporary name starts with ``.tmp-`` and keeps the suffixes of ``path``, for writers that choose the format by
    suffix. The file is flushed to disk before it is renamed, so a killed process or a power cut leaves the old file or
    the new one (but see ``flushed_later``). When the block raises, the temporary file is removed and ``path`` stays as
    it was.

    Args:
        path: where the file shall be; its folder must exist.

    Raises:
        FileNotFoundError: the block wrote no file at the temporary path.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_path(folder / "scores.csv") as temporary:
        ...     _ = temporary.write_text("case,dice")
        >>> [file.name for file in folder.iterdir()]
        ['scores.csv']
    """
    path = Path(path)
    suffixes = "".join(path.suffixes[-2:])
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}{suffixes if len(suffixes) < 100 else path.suffix}"
    try:
        yield temporary
        if _FLUSH.get():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)  # which says that the file is absent, where it is
        if _FLUSH.get():
            _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8 with Unix line ends, whole or not at all (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are left to their own promises."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
