"""One process at a time works in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from medseg.errors import DatasetError


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder; the system releases the lock of a process that was killed.

    Args:
        folder: which exists.
        what: what is at work, for the message (``build``).

    Raises:
        DatasetError: another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetError(f"{folder}: another {what} is at work on it; wait for it to end") from None
        except OSError:  # a network file system without locks on folders
            pass
        yield
    finally:
        os.close(descriptor)
