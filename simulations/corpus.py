"""Where prepared things are kept, and the data that settings describe."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.data import FederatedData, prepare
from fedpeat.models import load_tokenizer, locate_model


def cache_folder(settings: Mapping[str, Any]) -> Path:
    """Return the folder for prepared data and bundles: `cache`, `$FEDPEAT_CACHE` or `~/.cache/fedpeat`."""
    chosen = settings["cache"] or os.environ.get("FEDPEAT_CACHE") or Path.home() / ".cache" / "fedpeat"
    return Path(chosen).expanduser().absolute()


def prepare_data(settings: Mapping[str, Any]) -> FederatedData:
    """Return the partitioned data; prepared data is found again under a hash of all it depends on.

    Raises:
        DataError: If the data cannot be had as asked.
        ModelError: If the model has no tokenizer.
    """
    model = settings["model"]
    return prepare(
        settings["data"],
        tokenizer=load_tokenizer(locate_model(model["name"]), revision=model["revision"]),
        tokenizer_id=model["name"],
        clients_count=settings["clients"]["count"],
        seed=settings["seed"],
        cache_folder=cache_folder(settings) / "data",
        batch_size=settings["client"]["batch_size"],
    )
