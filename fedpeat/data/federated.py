"""From a source to each participant's rows on disk: once, under a hash of everything they depend on."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpeat.core import DataError, StorageError, content_hash, write_json, write_tensors
from fedpeat.data import rows as on_disk
from fedpeat.data.choices import CHOICES_FILE, MadeChoices, held_out_documents, make_choices
from fedpeat.data.histogram import count_labels
from fedpeat.data.packing import Packed, join
from fedpeat.data.partition import label_field, partition
from fedpeat.data.rows import PARTS, FederatedData, is_whole, open_federated
from fedpeat.data.shards import Shard, keep_fit, make_server, make_shard
from fedpeat.data.sources import HELD_OUT_FIELD, fingerprint, has_clients, load
from fedpeat.data.spec import DataSpec
from fedpeat.data.split import ServerDocuments, take_server_documents
from fedpeat.data.text import Documents, TokenisedDocuments, first_occurrences, read_documents, tokenise

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
"""Raised whenever the same settings would give other rows, so that no old folder is taken for a new one."""


def prepare(
    source: Mapping[str, Any],
    *,
    tokenizer: Any,
    tokenizer_id: str,
    clients_count: int | None,
    seed: int,
    cache_folder: str | Path,
    batch_size: int = 1,
    owner: str | None = None,
) -> FederatedData:
    """Read, clean, partition, split, tokenise and pack the data, unless that has been done before.

    Args:
        source: The flat settings of a `conf/data` option (see `DataSpec`).
        tokenizer: Of the model; its content, not its name, decides whether rows can be used again.
        tokenizer_id: Its name, for the record.
        clients_count: How many clients; None for all that the data names itself.
        seed: The run's seed.
        cache_folder: Where prepared data is kept, each in a folder of its own.
        batch_size: Rows a client needs for one training step.
        owner: Whose all the documents are, in a real federation, where `source` holds those of one client: the same
            documents in the same order give the same rows as in a simulation with a client of this name.

    Raises:
        ConfigError: If a setting is unknown, missing, out of range, or does not go with another one.
        DataError: If data is missing, empty, lacks a field or cannot be partitioned as asked.
        StorageError: If the folder cannot be written.
    """
    spec = DataSpec.of(source) if owner is None else _owned(DataSpec.of(source))
    cache = Path(cache_folder)
    identity: dict[str, Any] = {
        "format": FORMAT,
        "spec": _identity(spec),
        "source": fingerprint(spec, cache=cache),
        "tokenizer": _tokenizer_hash(tokenizer, tokenizer_id),
        "clients_count": clients_count,
        "seed": seed,
        "batch_size": batch_size,
        **({} if owner is None else {"owner": owner}),
    }
    folder = cache / content_hash(identity)
    if not is_whole(folder):
        with _scratch_folder(cache) as scratch:
            corpus = _read(spec, scratch=scratch, cache=cache)
            wanted = {"clients_count": clients_count, "seed": seed, "batch_size": batch_size}
            if owner is None:
                built = _build(spec, corpus, tokenizer, **wanted)
            else:
                built = _build_own(spec, corpus, tokenizer, owner=owner, seed=seed, batch_size=batch_size)
        _write(folder, built, spec, tokenizer=tokenizer, tokenizer_id=tokenizer_id, identity=identity)
    return open_federated(folder)


def _identity(spec: DataSpec) -> dict[str, Any]:
    """Return the settings that rows depend on: where files lie is none; nor are choices, where there are none."""
    left_out = ("path", "server_path") if spec.choices is not None else ("path", "server_path", "choices")
    return {key: value for key, value in spec.to_json().items() if key not in left_out}


@contextlib.contextmanager
def _scratch_folder(cache: Path) -> Iterator[Path]:
    """Make a folder in `cache` for what only reading needs, and remove it in the end."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".reading-", dir=cache, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {cache}", str(error), "free some space, or choose another cache") from error
    with folder as name:
        yield Path(name)


def _tokenizer_hash(tokenizer: Any, tokenizer_id: str) -> str:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return content_hash([type(tokenizer).__name__, tokenizer_id, special, tokenizer.get_vocab()])
    # Padding and truncation are how the tokenizer was last called, not what it is.
    content = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    return content_hash([special, content])


@dataclass(frozen=True)
class _Corpus:
    """All documents, those of the server's own source first, then the clients' in the order of `table`."""

    documents: Documents
    own: int
    table: Dataset | None
    held_out: np.ndarray
    report: dict[str, int]


def _read(spec: DataSpec, *, scratch: Path, cache: Path) -> _Corpus:
    seen: set[str] = set()
    report = {"found": 0, "empty": 0, "duplicates": 0, "server_found": 0, "server_empty": 0, "server_duplicates": 0}
    own = Documents([], [] if spec.is_paired else None)
    if spec.has_server_source:
        table = load(spec, server=True, scratch=scratch / "server", cache=cache)
        own, _ = _cleaned(table, spec, seen, report, "server_")
    if not has_clients(spec):
        return _Corpus(own, len(own), None, np.zeros(len(own), dtype=bool), report)
    table = load(spec, server=False, scratch=scratch / "clients", cache=cache)
    documents, kept = _cleaned(table, spec, seen, report, "")
    table = table.select(kept)
    held_out = np.zeros(len(own) + len(documents), dtype=bool)
    if HELD_OUT_FIELD in table.column_names and spec.kind == "docstrings":
        held_out[len(own) :] = table[HELD_OUT_FIELD][:]
    prompts = None if own.prompts is None or documents.prompts is None else own.prompts + documents.prompts
    return _Corpus(Documents(own.texts + documents.texts, prompts), len(own), table, held_out, report)


def _cleaned(
    table: Dataset, spec: DataSpec, seen: set[str], report: dict[str, int], prefix: str
) -> tuple[Documents, list[int]]:
    documents = read_documents(table, spec)
    kept, report[prefix + "empty"], report[prefix + "duplicates"] = first_occurrences(documents, seen=seen)
    report[prefix + "found"] = len(documents)
    if not kept:
        found = (
            f"of {len(documents)}, {report[prefix + 'empty']} are empty and {report[prefix + 'duplicates']} repeated"
        )
        remedy = "check data.path, data.server_path and data.text_field"
        raise DataError("no documents to learn from", found, remedy)
    return documents.select(kept), kept


@dataclass(frozen=True)
class _Built:
    """All that is written: clients in order of name, the server, counts by label for each client, and the report."""

    shards: list[Shard]
    server: Shard
    field: str | None
    histograms: list[dict[str, int]]
    report: dict[str, Any]
    choices: MadeChoices | None


def _build(
    spec: DataSpec, corpus: _Corpus, tokenizer: Any, *, clients_count: int | None, seed: int, batch_size: int
) -> _Built:
    tokens = tokenise(corpus.documents, tokenizer=tokenizer, separator=spec.separator)
    numbers = np.arange(len(corpus.documents))
    server = take_server_documents(
        spec, own=numbers[: corpus.own], clients=numbers[corpus.own :], held_out=corpus.held_out, seed=seed
    )
    documents = dict(corpus.report)
    documents |= {"server": len(server.train), "public": len(server.public), "server_test": len(server.test)}
    if corpus.table is None:
        pooled = make_server(server, [], tokens, spec)
        choices = _choices(spec, corpus, tokens, pooled, [], tokenizer)
        report = {"documents": documents, "clients": {}, "tokens": _token_report([], pooled)}
        return _Built([], pooled, None, [], _with_choices(report, choices), choices)
    table = corpus.table.select(server.rest - corpus.own)
    given = partition(table, spec, clients_count=clients_count, seed=seed)
    shards = [
        make_shard(name, server.rest[chosen], tokens, spec, held_out=corpus.held_out, seed=seed)
        for name, chosen in given.clients.items()
    ]
    kept, clients = keep_fit(shards, spec, batch_size=batch_size, clients_count=clients_count, natural=given.is_natural)
    pooled = make_server(server, kept, tokens, spec)
    documents |= {"without_client": given.without_client, "left_out_by_partitioner": given.left_out}
    documents |= clients.documents
    documents |= {part: sum(len(shard.documents[part]) for shard in kept) for part in PARTS[:3]}
    field = label_field(spec)
    histograms = count_labels(corpus.table, field, [shard.all_documents - corpus.own for shard in kept])
    choices = _choices(spec, corpus, tokens, pooled, kept, tokenizer)
    report = {"documents": documents, "clients": clients.report, "tokens": _token_report(kept, pooled)}
    return _Built(kept, pooled, field, histograms, _with_choices(report, choices), choices)


def _owned(spec: DataSpec) -> DataSpec:
    """Return the settings for the documents of one client: it shares none, with the server or with other clients."""
    return replace(
        spec,
        client_field=None,
        label_field=None,
        partitioner="natural",
        partitioner_options={},
        server_share=0.0,
        public_share=0.0,
        server_path=None,
        server_split=None,
    )


def _build_own(spec: DataSpec, corpus: _Corpus, tokenizer: Any, *, owner: str, seed: int, batch_size: int) -> _Built:
    tokens = tokenise(corpus.documents, tokenizer=tokenizer, separator=spec.separator)
    numbers = np.arange(len(corpus.documents))
    shard = make_shard(owner, numbers, tokens, spec, held_out=corpus.held_out, seed=seed)
    (shard,), clients = keep_fit([shard], spec, batch_size=batch_size, clients_count=None, natural=True)
    nothing = ServerDocuments(*[numbers[:0]] * 4)
    server = make_server(nothing, [], tokens, replace(spec, test_share=0.0, test_blocks=0))
    documents = {**corpus.report, **{part: len(shard.documents[part]) for part in PARTS[:3]}}
    report = {"documents": documents, "clients": clients.report, "tokens": _token_report([shard], server)}
    return _Built([shard], server, None, [], report, None)


def _choices(
    spec: DataSpec, corpus: _Corpus, tokens: TokenisedDocuments, pooled: Shard, kept: Sequence[Shard], tokenizer: Any
) -> MadeChoices | None:
    if spec.choices is None:
        return None
    chosen = held_out_documents(pooled, kept, spec)
    return make_choices(corpus.documents, tokens, chosen, spec, tokenizer=tokenizer)


def _with_choices(report: dict[str, Any], choices: MadeChoices | None) -> dict[str, Any]:
    return report if choices is None else {**report, "choices": dict(choices.report)}


def _token_report(shards: Sequence[Shard], server: Shard) -> dict[str, int]:
    own = [server.packed["train"], server.packed["public"]]
    train = [shard.packed["train"] for shard in shards]
    return {
        "train": sum(part.tokens for part in train),
        "server": own[0].tokens,
        "public": own[1].tokens,
        "test": server.packed["test"].tokens,
        "dropped": sum(part.dropped_tokens for part in (*train, *own)),
        "truncated_pairs": sum(part.truncated for part in (*train, *own, server.packed["test"])),
    }


def _write(
    folder: Path, built: _Built, spec: DataSpec, *, tokenizer: Any, tokenizer_id: str, identity: Mapping[str, Any]
) -> None:
    """Write tensors and table first, the index last: a folder with an index is whole."""
    owners = [*built.shards, built.server]
    packed = [owner.packed[part] for part in PARTS for owner in owners]
    write_tensors(folder / on_disk.ROWS_FILE, _tensors(packed, spec.block_size, vocabulary=len(tokenizer)))
    write_json(folder / on_disk.TABLE_FILE, {"field": built.field, "histograms": built.histograms})
    files = [on_disk.ROWS_FILE, on_disk.TABLE_FILE]
    if built.choices is not None:
        tensors = {name: torch.from_numpy(array) for name, array in built.choices.tensors.items()}
        write_tensors(folder / CHOICES_FILE, tensors)
        files.append(CHOICES_FILE)
    index = {
        "identity": dict(identity),
        "tokenizer": tokenizer_id,
        "block_size": spec.block_size,
        "clients": [shard.name for shard in built.shards],
        "shards": {
            "rows": [len(shard.packed["train"]) for shard in built.shards],
            "tokens": [shard.packed["train"].tokens for shard in built.shards],
            "documents": [len(shard.documents["train"]) for shard in built.shards],
            "validation_rows": [len(shard.packed["validation"]) for shard in built.shards],
            "test_rows": [len(shard.packed["test"]) for shard in built.shards],
        },
        "server_rows": {part: len(built.server.packed[part]) for part in PARTS},
        "report": built.report,
        "bytes": {name: (folder / name).stat().st_size for name in files},
    }
    write_json(folder / on_disk.INDEX_FILE, index)


def _tensors(packed: Sequence[Packed], block_size: int, *, vocabulary: int) -> dict[str, torch.Tensor]:
    whole = join(packed, block_size=block_size)
    # Two bytes an id where the vocabulary allows; lengths only where a row is padded or in part unscored.
    ids = whole.ids.astype(np.uint16) if max(vocabulary, int(whole.ids.max(initial=0)) + 1) <= 1 << 16 else whole.ids
    offsets = np.cumsum([0, *(len(part) for part in packed)])
    tensors = {"input_ids": torch.from_numpy(ids), "offsets": torch.from_numpy(offsets)}
    if (whole.lengths < block_size).any() or whole.scored_from.any():
        tensors |= {"lengths": torch.from_numpy(whole.lengths), "scored_from": torch.from_numpy(whole.scored_from)}
    return tensors
