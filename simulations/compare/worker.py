"""A worker process: runs one cell after the other, so that imports are paid once.

It reads a line of JSON for each cell from standard input (`{"settings": ..., "folder": ...}`; `null` to end) and
answers with a line on standard output. What a cell prints goes to `log.txt` in its folder.
"""

import contextlib
import gc
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

LOG = "log.txt"


def main() -> None:
    """Serve until told to end; end at once when the parent is gone, so that no orphan writes on."""
    # Of a command in the background of a script, a worker would inherit that interruptions are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(os.fdopen(os.dup(0), encoding="utf-8"), tasks), daemon=True).start()
    with _standard_streams(Path(os.devnull)):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            run = _find(sys.argv[1])
            _tell(channel, {"ready": True})
            while (task := tasks.get()) is not None:
                _tell(channel, work(run, task))
        except KeyboardInterrupt:
            pass


def _listen(source: TextIO, tasks: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    for line in source:
        task = json.loads(line)
        tasks.put(task)
        if task is None:
            return
    os._exit(1)  # the parent is gone without a word


def _find(reference: str) -> Callable[[Any, Path], Any]:
    """Return the function named `module:function`."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _tell(channel: TextIO, answer: dict[str, Any]) -> None:
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


def work(run: Callable[[Any, Path], Any], task: dict[str, Any]) -> dict[str, Any]:
    """Return how the run of `task` ended: `status`, and for failures `kind` and `reason`."""
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    forget()
    with _standard_streams(folder / LOG):
        try:
            summary = run(task["settings"], folder)
            return {"status": summary["status"], "kind": "", "reason": ""}
        except KeyboardInterrupt:
            return {"status": "interrupted", "kind": "", "reason": ""}
        except BaseException as error:
            traceback.print_exc()
            return {"status": "failed", "kind": type(error).__name__, "reason": _told(error)}


def _told(error: BaseException) -> str:
    """Return an error in one line; ours say what they are by themselves."""
    core = sys.modules.get("fedpeat.core")  # not imported here: that takes seconds, and the run has done it
    ours = core is not None and isinstance(error, core.FedPeatError)
    return str(error) if ours else f"{type(error).__name__}: {error}".rstrip(": ")


def forget() -> None:
    """Drop what an earlier cell left in this process: models, and the peaks of memory that a cell reports."""
    app = sys.modules.get("fedpeat.client.app")
    if app is not None:
        app.forget_models()
    gc.collect()
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def _standard_streams(path: Path) -> Iterator[None]:
    """Let everything that is printed, by native code too, go to the end of a file."""
    kept = [os.dup(1), os.dup(2)]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        for place in (1, 2):
            os.dup2(handle, place)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for place, old in zip((1, 2), kept, strict=True):
            os.dup2(old, place)
            os.close(old)
        os.close(handle)
