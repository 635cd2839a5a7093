"""Each participant's rows by part, and which clients have enough of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedpeat.core import DataError, shorten
from fedpeat.data.packing import Packed, join, pack
from fedpeat.data.rows import PARTS, SERVER
from fedpeat.data.spec import DataSpec
from fedpeat.data.split import ServerDocuments, hold_out
from fedpeat.data.text import TokenisedDocuments

_NAMES_SHOWN = 50
_REMEDY = "lower clients.count, data.block_size, data.min_blocks or client.batch_size, or set data.too_small=keep"


@dataclass(frozen=True)
class Shard:
    """What one participant holds.

    Attributes:
        name: A client's, or `"server"`.
        documents: Indices of documents by part. With `data.test_blocks` rather than `data.test_share`, test rows come
            out of the training documents.
        packed: Rows by part.
        blocks: Rows that all its documents together would make.
    """

    name: str
    documents: Mapping[str, np.ndarray]
    packed: Mapping[str, Packed]
    blocks: int

    @property
    def all_documents(self) -> np.ndarray:
        """Indices of its documents in every part."""
        return np.concatenate([self.documents[part] for part in PARTS])


def make_shard(
    name: str, documents: np.ndarray, tokens: TokenisedDocuments, spec: DataSpec, *, held_out: np.ndarray, seed: int
) -> Shard:
    """Split and pack one client's documents."""
    split = hold_out(documents, spec, held_out=held_out, client=name, seed=seed)
    parts = {part: split.get(part, documents[:0]) for part in PARTS}
    packed = {part: _pack(tokens, chosen, spec) for part, chosen in parts.items()}
    if spec.too_small == "keep" and not len(packed["train"]):
        packed["train"] = _pack(tokens, parts["train"], replace(spec, tail="pad"))
    if spec.test_blocks:
        packed["train"], packed["test"] = _last_rows(packed["train"], packed["test"], spec)
    return Shard(name, parts, packed, _count_blocks(tokens, documents, spec))


def _pack(tokens: TokenisedDocuments, chosen: np.ndarray, spec: DataSpec) -> Packed:
    return pack(tokens, chosen, block_size=spec.block_size, tail=spec.tail)


def _last_rows(train: Packed, test: Packed, spec: DataSpec) -> tuple[Packed, Packed]:
    first = max(len(train) - spec.test_blocks, 0)
    kept = replace(train.rows(slice(first)), dropped_tokens=train.dropped_tokens, truncated=train.truncated)
    return kept, join([test, train.rows(slice(first, None))], block_size=spec.block_size)


def _count_blocks(tokens: TokenisedDocuments, documents: np.ndarray, spec: DataSpec) -> int:
    if tokens.prompts is not None:
        return len(documents)
    total = int(tokens.texts.lengths(documents).sum())
    return -(-total // spec.block_size) if spec.tail == "pad" else total // spec.block_size


def make_server(taken: ServerDocuments, shards: Sequence[Shard], tokens: TokenisedDocuments, spec: DataSpec) -> Shard:
    """Pack the server's own documents, and pool the clients' validation and test documents.

    Pooled documents are packed anew, so that test documents of clients with less than a row of them count too.

    Raises:
        DataError: If a part that was asked for comes to less than a row.
    """
    nobody = taken.test[:0]
    documents = {
        "train": taken.train,
        "public": taken.public,
        "validation": np.concatenate([nobody, *(shard.documents["validation"] for shard in shards)]),
        "test": np.concatenate([taken.test, *(shard.documents["test"] for shard in shards)]),
    }
    packed = {part: _pack(tokens, chosen, spec) for part, chosen in documents.items()}
    if spec.test_blocks and not len(taken.test):
        packed["test"] = join([shard.packed["test"] for shard in shards], block_size=spec.block_size)
    for part, setting in (("train", "server_share"), ("public", "public_share"), ("test", "test_share")):
        wanted = len(documents[part]) or (part == "test" and (spec.test_share or spec.test_blocks))
        if wanted and not len(packed[part]):
            held = int(tokens.texts.lengths(documents[part]).sum())
            remedy = f"raise data.{setting}, lower data.block_size, or set data.tail=pad"
            found = f"its {len(documents[part])} documents hold {held} tokens, less than a row of {spec.block_size}"
            raise DataError(f"the server's {part} rows are none", found, remedy)
    return Shard(SERVER, documents, packed, sum(len(part) for part in packed.values()))


@dataclass(frozen=True)
class Selection:
    """Why clients were not kept: names and counts for the report, and their documents."""

    report: dict[str, Any]
    documents: dict[str, int]


def keep_fit(
    shards: Sequence[Shard], spec: DataSpec, *, batch_size: int, clients_count: int | None, natural: bool
) -> tuple[list[Shard], Selection]:
    """Keep the clients with enough data and, where the data names more than are asked for, the largest of them.

    Returns:
        The clients kept, ordered by name, and who was not.

    Raises:
        DataError: If too few are left, or `data.too_small=error` and one is too small.
    """
    least = 1 if spec.too_small == "keep" else max(batch_size, 1)
    small = [shard for shard in shards if not _is_fit(shard, spec, least)]
    told = _told(small, spec, least)
    if small and spec.too_small == "error":
        raise DataError("data.too_small=error", told, _REMEDY)
    names = {shard.name for shard in small}
    kept = [shard for shard in shards if shard.name not in names]
    if not kept:
        raise DataError("no client has enough data", told, _REMEDY)
    if natural and clients_count is not None and len(kept) < clients_count:
        found = f"the data gives {_clients(len(kept))}" + (f", and {told}" if small else "")
        raise DataError(f"clients.count={clients_count}", found, _REMEDY if small else f"set it to at most {len(kept)}")
    largest = sorted(kept, key=lambda shard: (-shard.packed["train"].tokens, shard.name))
    left_out = largest[clients_count:] if natural and clients_count is not None else []
    kept = sorted(set_aside(kept, left_out), key=lambda shard: shard.name)
    report = {
        "found": len(shards),
        "kept": len(kept),
        "too_small": len(small),
        "too_small_names": sorted(names)[:_NAMES_SHOWN],
        "left_out": len(left_out),
        "left_out_names": sorted(shard.name for shard in left_out)[:_NAMES_SHOWN],
    }
    documents = {"in_clients_too_small": _documents(small), "in_clients_left_out": _documents(left_out)}
    return kept, Selection(report, documents)


def set_aside(shards: Sequence[Shard], others: Sequence[Shard]) -> list[Shard]:
    """Return the shards that are not among `others`."""
    names = {shard.name for shard in others}
    return [shard for shard in shards if shard.name not in names]


def _is_fit(shard: Shard, spec: DataSpec, least: int) -> bool:
    enough = spec.too_small == "keep" or shard.blocks >= spec.min_blocks
    return enough and len(shard.packed["train"]) >= least


def _told(small: Sequence[Shard], spec: DataSpec, least: int) -> str:
    rows = (f"{shard.name} ({len(shard.packed['train'])} rows to train on, {shard.blocks} in all)" for shard in small)
    needed = f"{least} to train on" + (f", {spec.min_blocks} in all" if spec.min_blocks > 1 else "")
    shown = shorten(rows, 3)
    return f"{_clients(len(small))} with too little: {shown}; needed: {needed}, rows of {spec.block_size} tokens"


def _clients(count: int) -> str:
    return f"{count} client{'' if count == 1 else 's'}"


def _documents(shards: Sequence[Shard]) -> int:
    return sum(len(shard.all_documents) for shard in shards)
