"""What kinds of documents does each client hold?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeat.data.text import check_field

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LABELS = 24
"""Rarer labels than these are counted as `OTHER`."""
OTHER = "(other)"
_BINS = 10


def count_labels(table: Dataset, field: str | None, owners: Sequence[np.ndarray]) -> list[dict[str, int]]:
    """Count each owner's documents by the value of `field`.

    Numbers of many values are counted in ten bins of equal width; of many other labels, the most frequent are named.

    Args:
        table: The documents.
        field: The label or source to count; None for no histogram.
        owners: Rows of `table` by owner.

    Returns:
        For each owner its counts by label, each label in the same order; empty without a field.

    Raises:
        DataError: If the field is not in the data.
    """
    if field is None:
        return []
    check_field(table, field, "data.label_field")
    labels = _as_labels(table[field][:])
    names, codes = np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)
    frequent = np.argsort(-np.bincount(codes), kind="stable")[:MOST_LABELS]
    order = _in_order(names, frequent)
    counted = []
    for rows in owners:
        counts = np.bincount(codes[rows], minlength=len(names))
        row = {str(names[code]): int(counts[code]) for code in order}
        if len(names) > MOST_LABELS:
            row[OTHER] = int(counts.sum()) - sum(row.values())
        counted.append(row)
    return counted


def _in_order(names: np.ndarray, codes: np.ndarray) -> list[int]:
    """Order labels by value: 2 before 10, bins by their lower edge, words by the alphabet."""

    def key(code: int) -> tuple[float, str]:
        try:
            return float(str(names[code]).split(" to ")[0]), ""
        except ValueError:
            return np.inf, str(names[code])

    return sorted((int(code) for code in codes), key=key)


def _as_labels(values: list[Any]) -> list[str]:
    """Turn values into words; floats of many values into bins.

    >>> _as_labels([1, None, "a"])
    ['1', '(none)', 'a']
    """
    numbers = [value for value in values if isinstance(value, float) and np.isfinite(value)]
    if len(set(numbers)) <= MOST_LABELS:
        return ["(none)" if value is None else str(value) for value in values]
    edges = np.linspace(min(numbers), max(numbers), _BINS + 1)
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]
    return [
        names[min(int(np.searchsorted(edges, value, side="right")) - 1, _BINS - 1)]
        if isinstance(value, float) and np.isfinite(value)
        else "(none)"
        for value in values
    ]
