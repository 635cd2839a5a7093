"""The socket in a client's own folder over which Flower's processes reach the client's resident worker.

It is for the same user alone: a socket of mode 0600 in a folder of mode 0700. Nothing is imported here beyond the
standard library, since Flower starts a process that imports this for each message.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

PLACE, NAME, LOCK = "worker", "socket", "lock"
"""The folder in a client's own, and what is in it."""

LONGEST = 107
"""Bytes of a path that a socket's address has room for."""

BACKLOG = 64
_PAUSE = 0.05
_NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)


class NoWorker(Exception):
    """No worker listens."""


class Taken(Exception):
    """Another worker serves the folder."""


@contextlib.contextmanager
def _address(place: Path) -> Iterator[str]:
    """Yield an address of the socket in `place` that is short enough, however long the folder's name is."""
    path = str(place / NAME)
    if len(os.fsencode(path)) <= LONGEST:
        yield path
        return
    if not Path("/proc/self/fd").is_dir():
        raise OSError(errno.ENAMETOOLONG, "the folder's name is too long for a socket in it, here", path)
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{NAME}"
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Yield the private folder of a client's socket, held for this process until it ends, however it does.

    Raises:
        Taken: If another process holds it.
    """
    place = folder / PLACE
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.chmod(0o700)
    handle = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Taken(f"another worker serves {folder}") from error
        yield place
    finally:
        os.close(handle)


@contextlib.contextmanager
def listening(place: Path) -> Iterator[socket.socket]:
    """Yield a socket that listens in `place`, which is held `alone`; what a worker left there that died goes."""
    (place / NAME).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with _address(place) as address:
            listener.bind(address)
        (place / NAME).chmod(0o600)  # until here, the folder's own mode kept others out
        listener.listen(BACKLOG)
        try:
            yield listener
        finally:
            (place / NAME).unlink(missing_ok=True)


def connect(folder: Path, seconds: float) -> socket.socket:
    """Return a connection to the worker of a client's folder.

    Args:
        folder: The client's.
        seconds: How long to wait for a worker that is just being started.

    Raises:
        NoWorker: If none listens after that time.
        OSError: If the socket cannot be had for another reason.
    """
    deadline = time.monotonic() + seconds
    while True:
        there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(folder / PLACE) as address:
                there.connect(address)
            return there
        except OSError as error:
            there.close()
            if error.errno not in _NOT_YET:
                raise
            if time.monotonic() > deadline:
                raise NoWorker from error
        time.sleep(_PAUSE)


def listens(folder: Path) -> bool:
    """Return whether a worker listens in a client's folder."""
    try:
        connect(folder, 0.0).close()
    except (NoWorker, OSError):
        return False
    return True
