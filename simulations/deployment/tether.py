"""A program that ends when whoever started it does, even by SIGKILL."""

import os
import signal
import threading


def end_with_parent() -> None:
    """Have this process end, as by SIGTERM, when its standard input closes: a pipe that its parent holds."""
    threading.Thread(target=_watch, args=(0,), name="tether", daemon=True).start()


def _watch(handle: int) -> None:
    try:
        while os.read(handle, 4096):
            pass
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
