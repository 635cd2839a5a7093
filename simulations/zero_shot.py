"""Evaluations before tuning, kept between runs: those of one model on one held-out text never change."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeat.core import Evaluation, StorageError, content_hash, read_json, write_json


def cached_evaluation(
    cache: Path, key: Mapping[str, Any] | Sequence[Any], evaluate: Callable[[], Evaluation]
) -> Evaluation:
    """Return the evaluation kept under `key`, or make, keep and return it.

    A kept file that is damaged is made anew; a result that is not finite is not kept.

    Args:
        cache: The folder of kept evaluations; made where missing.
        key: All that the result depends on, JSON-like: model, dtype, rows, batch size, threads, device.
        evaluate: Makes the evaluation.

    Raises:
        StorageError: If the folder cannot be written.
    """
    path = Path(cache) / f"{content_hash(key)}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    made = evaluate()
    if math.isfinite(made.loss) and math.isfinite(made.accuracy):
        write_json(path, {"key": key, "evaluation": made.to_json()})
    return made


def _read(path: Path) -> Evaluation | None:
    """Return a kept evaluation; None where there is none that can be used."""
    if not path.is_file():
        return None
    try:
        plain = read_json(path)["evaluation"]
        choices = plain.get("choice_accuracy")
        return Evaluation(
            loss=float(plain["loss"]),
            accuracy=float(plain["accuracy"]),
            tokens=int(plain["tokens"]),
            choice_accuracy=None if choices is None else float(choices),
        )
    except (StorageError, KeyError, TypeError, ValueError, AttributeError):
        return None
