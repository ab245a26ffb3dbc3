"""One process at a time changes what is in a folder; the system releases the lock of a process that was killed."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import DatasetError


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same folder: to read, change and write a file again.

    A network file system without locks gives no turns.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with in_turn(folder):
        ...     _ = (folder / "scores.csv").write_text("case,dice")
    """
    with _locked(folder, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Refuse to work in a folder in which another process is at work.

    Args:
        folder: which exists.
        what: what is at work, for the message (``build``).

    Raises:
        DatasetError: another process holds the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            raise DatasetError(f"{folder}: another {what} is at work on it; wait for it to end") from None
        yield


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            raise
        except OSError:  # a network file system without locks on folders
            pass
        yield
    finally:
        os.close(descriptor)
