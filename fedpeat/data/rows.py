"""One participant's rows, opened from disk in any process: the same bytes in each, and nothing but its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedpeat.core import DataError, StorageError, nearest, read_json

POOLED = "all clients"
"""The name under which `open_rows` gives the rows of all clients together."""
PARTS = ("train", "validation", "test", "public")
"""What a participant's rows are for; only the server has public ones."""
SERVER = "server"
"""The participant whose `test` and `validation` rows are those of all clients, pooled."""
UNSCORED = -100
"""The label of a position that takes no part in the loss: prompts, padding."""
INDEX_FILE, ROWS_FILE, TABLE_FILE = "index.json", "rows.safetensors", "clients.json"


@dataclass(frozen=True)
class Rows:
    """Tokens to train or evaluate on.

    Attributes:
        input_ids: `(rows, tokens)` int64.
        labels: `(rows, tokens)` int64: the ids again, not shifted, and -100 where there is no loss.
        attention_mask: `(rows, tokens)` int64, 0 on padding; None where no row is padded.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: torch.Tensor | list[int]) -> dict[str, torch.Tensor]:
        """Return some rows as keywords for a model, each `(len(indices), tokens)`.

        >>> rows = Rows(torch.arange(6).reshape(3, 2), torch.arange(6).reshape(3, 2))
        >>> rows.batch([2, 0])["input_ids"].tolist()
        [[4, 5], [0, 1]]
        """
        batch = {"input_ids": self.input_ids[indices], "labels": self.labels[indices]}
        if self.attention_mask is not None:
            batch["attention_mask"] = self.attention_mask[indices]
        return batch


@dataclass(frozen=True)
class ClientShard:
    """What one client holds.

    Attributes:
        name: Unique; natural clients are named by their field's values.
        rows: Rows to train on.
        tokens: Tokens in them, padding not counted.
        documents: Documents in them.
        validation_rows: Its own validation rows.
        test_rows: Its own test rows (too few for a row of its own count in the server's pooled ones all the same).
    """

    name: str
    rows: int
    tokens: int
    documents: int
    validation_rows: int
    test_rows: int


@dataclass(frozen=True)
class FederatedData:
    """A population's data, on disk.

    Attributes:
        folder: Where; named by a hash of all that the data depends on.
        clients: Ordered by name.
        block_size: Tokens a row.
        server_rows: The server's rows by part; `test` and `validation` are pooled over clients.
        report: What became of each document, client and token: counts by name.
        remote: Whether clients hold their rows on machines of their own: the folder has the server's alone.
    """

    folder: Path
    clients: tuple[ClientShard, ...]
    block_size: int
    server_rows: Mapping[str, int]
    report: Mapping[str, Any] = field(default_factory=dict)
    remote: bool = False


@dataclass(frozen=True)
class _Index:
    plain: Mapping[str, Any]
    owners: Mapping[str, int]
    offsets: torch.Tensor


def open_federated(folder: str | Path) -> FederatedData:
    """Open what `prepare` wrote.

    Raises:
        StorageError: If it is missing or not whole.
    """
    folder = Path(folder)
    plain = _index(folder).plain
    shards = plain["shards"]
    clients = tuple(
        ClientShard(name, **{key: values[number] for key, values in shards.items()})
        for number, name in enumerate(plain["clients"])
    )
    return FederatedData(folder, clients, plain["block_size"], plain["server_rows"], plain["report"])


def open_rows(folder: str | Path, client: str, part: str = "train") -> Rows:
    """Read one participant's rows, and no others, from disk.

    Args:
        folder: `FederatedData.folder`.
        client: A client's name, `"server"`, or `POOLED` for all clients, one after the other.
        part: `train`, `validation`, `test`, or the server's `public`.

    Raises:
        DataError: If there is no such client or part.
        StorageError: If the file is missing or truncated.
    """
    folder = Path(folder)
    index = _index(folder)
    if part not in PARTS:
        raise DataError(f"no part {part!r} of the data", "", nearest(part, PARTS))
    if client != POOLED and client not in index.owners:
        found = f"it has {len(index.owners) - 1} clients and {SERVER!r}"
        raise DataError(f"no client {client!r} in the data", found, nearest(client, index.owners))
    # On disk: all train rows, client by client and then the server's; then all validation rows; and so on.
    start = PARTS.index(part) * len(index.owners)
    first, last = (0, len(index.owners) - 1) if client == POOLED else (index.owners[client], index.owners[client] + 1)
    rows = slice(int(index.offsets[start + first]), int(index.offsets[start + last]))
    with opened(folder / ROWS_FILE) as file:
        stored = {name: file.get_slice(name)[rows] for name in file.keys() if name != "offsets"}  # noqa: SIM118
    return _rows(stored)


def _rows(stored: Mapping[str, torch.Tensor]) -> Rows:
    ids = stored["input_ids"].long()  # (rows, tokens)
    if "lengths" not in stored:
        return Rows(ids, ids)
    position = torch.arange(ids.shape[1])
    lengths, scored_from = stored["lengths"][:, None], stored["scored_from"][:, None]  # (rows, 1)
    labels = ids.masked_fill((position >= lengths) | (position < scored_from), UNSCORED)
    padded = bool((lengths < ids.shape[1]).any())
    return Rows(ids, labels, (position < lengths).long() if padded else None)


def client_table(data: FederatedData) -> list[dict[str, Any]]:
    """Return one row a client: its counts, and `histogram`: documents by label or source, if any was asked for.

    Raises:
        StorageError: If the table is missing.
    """
    histograms = read_json(data.folder / TABLE_FILE)["histograms"]
    table = []
    for number, shard in enumerate(data.clients):
        counts = {key: value for key, value in vars(shard).items() if key != "name"}
        table.append({"client": shard.name, **counts, "histogram": histograms[number] if histograms else {}})
    return table


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds all that `prepare` writes, in full length."""
    try:
        expected = read_json(folder / INDEX_FILE)["bytes"]
        return all((folder / name).stat().st_size == size for name, size in expected.items())
    except (StorageError, OSError, KeyError, TypeError, AttributeError):
        return False


def _index(folder: Path) -> _Index:
    try:
        written = (folder / INDEX_FILE).stat().st_mtime_ns
    except OSError as error:
        raise StorageError(f"cannot read the data in {folder}", str(error), "prepare it again") from error
    return _read_index(folder, written)


@lru_cache(maxsize=4)
def _read_index(folder: Path, written: int) -> _Index:  # noqa: ARG001
    """Read once a process: with 10,000 clients the index takes longer to read than a client's rows."""
    plain = read_json(folder / INDEX_FILE)
    with opened(folder / ROWS_FILE) as file:
        offsets = file.get_tensor("offsets")
    owners = {name: number for number, name in enumerate([*plain["clients"], SERVER])}
    return _Index(plain, owners, offsets)


def opened(path: Path) -> Any:
    """Open a file of tensors in a folder of prepared data.

    Raises:
        StorageError: If it is missing or not whole.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read {path}", str(error), "remove the folder and prepare the data again") from error
