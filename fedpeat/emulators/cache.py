"""What is worked out once for a model and a public text, and found again by content."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedpeat.core import StorageError, Tensors, content_hash, digest, read_json, write_json
from fedpeat.emulators.blocks import BuildContext


def cache_key(context: BuildContext, what: str, rows: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a result depends on, JSON-like.

    Args:
        context: Whose model, split and seed.
        what: The kind of result ("block_influence").
        rows: The public text that it is worked out on.
        settings: The builder's keywords that matter.
    """
    return {
        "what": what,
        "model": context.fingerprint,
        "dtype": str(context.model.dtype),
        "attention": str(context.model.config._attn_implementation),
        "adapter": list(context.split.adapter),
        "rows": digest(rows),
        "batch_size": context.batch_size,
        "seed": context.seed,
        "settings": dict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": context.model.device.type,
    }


def cache_folder(context: BuildContext, key: Mapping[str, Any]) -> Path | None:
    """Return the folder for what has this key; None if nothing is kept."""
    return None if context.cache is None else context.cache / content_hash(key)


def cached_json(context: BuildContext, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Return the JSON-like value kept under `key`, or make, keep and return it; a damaged file is made anew.

    Raises:
        StorageError: If the folder cannot be written.
    """
    folder = cache_folder(context, key)
    if folder is None:
        return make()
    path = folder / "value.json"
    if path.is_file():
        try:
            return read_json(path)["value"]
        except (StorageError, KeyError, TypeError):
            pass
    value = make()
    write_json(path, {"key": dict(key), "value": value})
    return value
