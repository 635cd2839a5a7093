"""One process at a time in a folder."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fedpeat.core.errors import EngineError, StorageError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold a folder's lock and yield its handle, made if need be; the system lets go of it however the process ends.

    Raises:
        StorageError: If the folder cannot be written.
        EngineError: If another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(f"cannot write {folder}", str(error), "choose another folder") from error
    try:
        for _ in range(20):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)  # workers of a command that was killed end within a moment
        else:
            raise EngineError(f"cannot use {folder}", "another command is running there", "wait for it to end")
        yield handle
    finally:
        os.close(handle)
