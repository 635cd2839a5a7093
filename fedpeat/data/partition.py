"""Which client holds which document?"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeat.core import ConfigError, DataError, nearest, seed_for, shorten
from fedpeat.data.rows import POOLED, SERVER
from fedpeat.data.spec import DataSpec
from fedpeat.data.text import check_field

if TYPE_CHECKING:
    from datasets import Dataset

NATURAL = "natural"
_ROW = "__row__"
_RESERVED = (POOLED, SERVER)


@dataclass(frozen=True)
class Partition:
    """Documents by client.

    Attributes:
        clients: Indices of documents, `(documents,)`, in ascending order, by client name.
        without_client: Documents whose client field is empty.
        left_out: Documents that the partitioner gave to nobody.
        is_natural: Whether the data, not a number asked for, says how many clients there are.
    """

    clients: dict[str, np.ndarray]
    without_client: int = 0
    left_out: int = 0
    is_natural: bool = False


def partition(table: Dataset, spec: DataSpec, *, clients_count: int | None, seed: int) -> Partition:
    """Give each row of `table` to one client, or to none.

    `data.partitioner=natural` follows `data.client_field`; where that is not set, it shuffles and deals rows out evenly
    over `clients_count`. Any other name is that of a flwr-datasets partitioner.

    Raises:
        ConfigError: If the number of clients is needed and not given.
        DataError: If a field is missing, a partitioner or its options are wrong, or there are more clients than rows.
    """
    if spec.partitioner.lower() != NATURAL:
        return _by_flower(table, spec, clients_count, seed)
    if spec.partitioner_options:
        raise DataError("data.partitioner_options are set", "natural clients have none", "set data.partitioner")
    if spec.client_fields:
        return _by_fields(table, spec.client_fields)
    return _evenly(table.num_rows, _checked_count(clients_count, table.num_rows), seed)


def label_field(spec: DataSpec) -> str | None:
    """Return the field whose values are counted for each client."""
    return spec.label_field or spec.partitioner_options.get("partition_by")


def _by_fields(table: Dataset, names: tuple[str, ...]) -> Partition:
    for name in names:
        check_field(table, name, "data.client_field")
    owners: dict[tuple[Any, ...], list[int]] = {}
    without = 0
    for row, values in enumerate(zip(*(table[name][:] for name in names), strict=True)):
        if any(value is None or value == "" for value in values):
            without += 1
        else:
            owners.setdefault(tuple(str(value) for value in values), []).append(row)
    if not owners:
        found = "it is empty in each row"
        raise DataError(f"no clients by data.client_field={shorten(names)}", found, "set another field")
    clients: dict[str, np.ndarray] = {}
    for values in sorted(owners):
        clients[_free_name("/".join(values), clients)] = np.array(owners[values])
    return Partition(clients, without_client=without, is_natural=True)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """Keep names apart: from those with a meaning of their own, and where fields join to the same words."""
    number, free = 1, name
    while free in taken or free in _RESERVED:
        number += 1
        free = f"{name} ({number})"
    return free


def _checked_count(count: int | None, rows: int) -> int:
    if count is None:
        remedy = "set clients.count, or data.client_field for natural clients"
        raise ConfigError("cannot partition the data", "the number of clients is not set", remedy)
    if count < 1:
        raise ConfigError(f"clients.count={count}", "there must be a client", "set clients.count >= 1")
    if count > rows:
        remedy = f"set clients.count <= {rows}, or give more data"
        raise DataError(f"cannot give {count} clients a document each", f"there are {rows} documents", remedy)
    return count


def _numbered(number: int, count: int) -> str:
    return f"client-{number:0{len(str(count - 1))}d}"


def _evenly(rows: int, count: int, seed: int) -> Partition:
    order = np.random.default_rng(seed_for(seed, "partition")).permutation(rows)
    return Partition({_numbered(i, count): np.sort(part) for i, part in enumerate(np.array_split(order, count))})


def _by_flower(table: Dataset, spec: DataSpec, count: int | None, seed: int) -> Partition:
    kind = _flower_class(spec.partitioner)
    options = _completed(kind, spec, count, table.num_rows, seed)
    rows = _shuffled(table, options.get("partition_by"), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dirichlet tells of each retry.
        try:
            partitioner = kind(**options)
            partitioner.dataset = rows
            parts = [np.sort(partitioner.load_partition(i)[_ROW][:]) for i in range(partitioner.num_partitions)]
        except Exception as error:
            # Their checks raise ValueError, KeyError, TypeError and more; all of them are about the options.
            shown = ", ".join(f"{key}={value}" for key, value in options.items() if key != "seed")
            reason = str(error).strip() or type(error).__name__
            remedy = "change data.partitioner_options"
            raise DataError(f"cannot partition by {kind.__name__}({shown})", reason, remedy) from error
    ids = getattr(partitioner, "partition_id_to_natural_id", {})
    clients: dict[str, np.ndarray] = {}
    for number, part in enumerate(parts):
        clients[_free_name(str(ids.get(number, _numbered(number, len(parts)))), clients)] = part.astype(np.int64)
    given = np.concatenate([*parts, np.zeros(0)])
    if len(np.unique(given)) != len(given):
        raise DataError(f"{kind.__name__} gave a document to two clients", "clients must not share rows", "use another")
    natural = "num_partitions" not in inspect.signature(kind).parameters
    return Partition(clients, left_out=table.num_rows - len(given), is_natural=natural)


def _flower_class(name: str) -> Any:
    """Return the partitioner meant by `Dirichlet`, `dirichlet`, `inner_dirichlet` or `DirichletPartitioner`."""
    from flwr_datasets import partitioner as flower

    known = {_plain(each): each for each in flower.__all__ if each != "Partitioner"}
    if _plain(name) not in known:
        options = [NATURAL, *(each.removesuffix("Partitioner") for each in known.values())]
        raise DataError(f"no partitioner {name!r}", "", nearest(name, options))
    if _plain(name).startswith("vertical"):
        remedy = "use a partitioner of rows"
        raise DataError(f"cannot partition by {name}", "it splits columns, and a text is one column", remedy)
    return getattr(flower, known[_plain(name)])


def _plain(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower()).removesuffix("partitioner")


def _completed(kind: Any, spec: DataSpec, count: int | None, rows: int, seed: int) -> dict[str, Any]:
    """Check the options against the partitioner's signature, and fill in what the run already says."""
    accepted = {name: item for name, item in inspect.signature(kind).parameters.items() if name != "self"}
    options = dict(spec.partitioner_options)
    for name in options:
        if name not in accepted:
            raise DataError(f"{kind.__name__} takes no option {name!r}", "", nearest(name, accepted))
    if "num_partitions" in accepted:
        options["num_partitions"] = _checked_count(options.get("num_partitions", count), rows)
    if "seed" in accepted:
        options.setdefault("seed", seed_for(seed, "partition"))
    if "partition_by" in accepted and len(spec.client_fields) == 1:
        options.setdefault("partition_by", spec.client_fields[0])
    missing = [name for name, item in accepted.items() if item.default is item.empty and name not in options]
    if missing:
        remedy = " ".join(f"data.partitioner_options.{name}=..." for name in missing)
        raise DataError(f"{kind.__name__} needs {shorten(missing)}", "not set", f"set {remedy}")
    return {name: _converted(name, value) for name, value in options.items()}


def _converted(name: str, value: Any) -> Any:
    """Turn plain values into what a partitioner takes: arrays, and functions by their dotted name (`numpy.exp`)."""
    if name == "distribution_array":
        return np.asarray(value)
    if not (name.endswith("_fn") and isinstance(value, str)):
        return value
    module, _, function = value.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        asked = f"data.partitioner_options.{name}={value!r}"
        raise DataError(asked, str(error), "name a function of arrays, as numpy.exp") from error


def _shuffled(table: Dataset, field: str | None, seed: int) -> Dataset:
    """Return row numbers and the field to partition by, shuffled: some partitioners deal rows out in order."""
    from datasets import Dataset

    order = np.random.default_rng(seed_for(seed, "partition", "order")).permutation(table.num_rows)
    columns: dict[str, list[Any]] = {_ROW: order.tolist()}
    if field is not None:
        check_field(table, field, "data.partitioner_options.partition_by")
        values = table[field][:]
        columns[field] = [values[row] for row in order]
    return Dataset.from_dict(columns)
