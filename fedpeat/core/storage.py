"""Files that are either whole or absent: atomic writes, content hashes, no pickle."""

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fedpeat.core.errors import StorageError

if TYPE_CHECKING:  # JSON and text are written by programs, too, that do without torch
    import torch

    from fedpeat.core.tree import Tensors


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, flush it to disk, then rename it into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _told(path, error) from error
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; an ordinary new file follows the umask.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise _told(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _told(path: Path, error: Exception) -> StorageError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    remedy = "free some space or choose another folder" if full else "check the folder and its permissions"
    found = "the disk is full" if full else str(error)
    return StorageError(f"cannot write {path}", found, remedy)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    _atomically(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data`, atomically.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    _atomically(Path(path), lambda partial: partial.write_bytes(data))


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity become null, as JSON has neither.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    write_text(path, json.dumps(_without_nan(value), indent=2, ensure_ascii=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: If it is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}", str(error), "restore it, or start afresh") from error


def write_tensors(path: str | Path, tensors: "Tensors", metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _atomically(Path(path), lambda partial: save_file(plain, partial, metadata=dict(metadata) if metadata else None))


def read_tensors(path: str | Path) -> "dict[str, torch.Tensor]":
    """Read named tensors from safetensors; on a CPU they are mapped, not copied.

    Raises:
        StorageError: If the file is missing, truncated or not safetensors.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot read {path}", str(error), "the file is missing or truncated: make it anew"
        ) from error


def content_hash(value: object) -> str:
    """Return a short hash of a JSON-like value: the name under which results of it are cached.

    >>> content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
