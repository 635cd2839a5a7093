import numpy as np
import pytest

from fedpeat.core import DataError
from fedpeat.data import DataSpec
from fedpeat.data.packing import Packed
from fedpeat.data.shards import Shard, keep_fit, make_server, make_shard
from fedpeat.data.split import ServerDocuments
from fedpeat.data.text import TokenisedDocuments, Tokens

BLOCK = 4
NOBODY = np.zeros(0, dtype=np.int64)
NONE_HELD_OUT = np.zeros(100, dtype=bool)


def spec_of(**settings):
    return DataSpec.of({"kind": "jsonl", "path": "x", "block_size": BLOCK, **settings})


def tokens_of(count, length=3):
    """Document i is `length` times the token i."""
    return TokenisedDocuments(
        Tokens(np.repeat(np.arange(count, dtype=np.int32), length), np.arange(count + 1) * length), None, 0, False
    )


def shard_of(name, rows, blocks=None):
    packed = Packed(np.zeros((rows, BLOCK), dtype=np.int32), np.zeros(rows, dtype=int), np.full(rows, BLOCK))
    empty = packed.rows(slice(0))
    parts = ("train", "validation", "test", "public")
    documents = {part: np.arange(rows) if part == "train" else NOBODY for part in parts}
    return Shard(
        name, documents, {p: packed if p == "train" else empty for p in parts}, rows if blocks is None else blocks
    )


def fit(shards, *, count=None, natural=True, batch_size=1, **settings):
    kept, selection = keep_fit(shards, spec_of(**settings), batch_size=batch_size, clients_count=count, natural=natural)
    return [shard.name for shard in kept], selection


def test_the_last_blocks_are_for_test():
    shard = make_shard("c", np.arange(12), tokens_of(12), spec_of(test_blocks=2), held_out=NONE_HELD_OUT, seed=0)
    stream = np.repeat(np.arange(12), 3).reshape(-1, BLOCK)
    assert shard.packed["train"].ids.tolist() == stream[:-2].tolist()
    assert shard.packed["test"].ids.tolist() == stream[-2:].tolist()
    assert shard.blocks == 9


def test_a_short_client_can_be_kept_as_a_padded_row():
    documents = np.arange(1)
    dropped = make_shard("c", documents, tokens_of(1), spec_of(), held_out=NONE_HELD_OUT, seed=0)
    kept = make_shard("c", documents, tokens_of(1), spec_of(too_small="keep"), held_out=NONE_HELD_OUT, seed=0)
    assert len(dropped.packed["train"]) == 0
    assert kept.packed["train"].lengths.tolist() == [3]


def test_pooled_test_documents_count_though_each_client_has_less_than_a_row():
    spec = spec_of(test_share=0.4)
    tokens = tokens_of(20, length=2)
    shards = [
        make_shard(f"c{i}", np.arange(4 * i, 4 * i + 4), tokens, spec, held_out=NONE_HELD_OUT, seed=0) for i in range(5)
    ]
    server = make_server(ServerDocuments(NOBODY, NOBODY, NOBODY, NOBODY), shards, tokens, spec)
    wanted = np.concatenate([shard.documents["test"] for shard in shards])
    assert (
        server.packed["test"].ids.ravel().tolist() == np.repeat(wanted, 2)[: len(wanted) * 2 // BLOCK * BLOCK].tolist()
    )
    assert sum(len(shard.packed["test"]) for shard in shards) < len(server.packed["test"])


@pytest.mark.parametrize(
    ("part", "message"), [("train", "data.server_share"), ("public", "public_share"), ("test", "data.test_share")]
)
def test_server_rows_that_were_asked_for_and_are_none_are_told(part, message):
    documents = {name: np.arange(1) if name == part else NOBODY for name in ("train", "public", "test")}
    with pytest.raises(DataError, match=f"its 1 documents hold 3 tokens, less than a row of 4; raise .*{message}"):
        make_server(ServerDocuments(**documents, rest=NOBODY), [], tokens_of(2), spec_of())


def test_small_clients_are_dropped_and_named():
    names, selection = fit([shard_of("a", 3), shard_of("b", 1), shard_of("c", 0)], batch_size=2)
    assert names == ["a"]
    assert (selection.report["too_small"], selection.report["too_small_names"]) == (2, ["b", "c"])
    assert selection.documents == {"in_clients_too_small": 1, "in_clients_left_out": 0}


def test_min_blocks_counts_all_parts():
    assert fit([shard_of("a", 10, blocks=12), shard_of("b", 11, blocks=11)], min_blocks=12)[0] == ["a"]


def test_keep_keeps_all_that_can_train():
    names, selection = fit([shard_of("a", 3), shard_of("b", 1), shard_of("c", 0)], batch_size=2, too_small="keep")
    assert names == ["a", "b"]
    assert selection.report["too_small_names"] == ["c"]


def test_the_largest_natural_clients_are_taken():
    shards = [shard_of("a", 2), shard_of("b", 5), shard_of("c", 3), shard_of("d", 3)]
    names, selection = fit(shards, count=2)
    assert names == ["b", "c"]
    assert selection.report["left_out_names"] == ["a", "d"]
    assert selection.documents["in_clients_left_out"] == 5


def test_too_few_clients_are_told():
    shards = [shard_of("a", 2), shard_of("b", 0)]
    with pytest.raises(DataError, match=r"clients\.count=3; the data gives 2 clients; set it to at most 2"):
        fit([shard_of("a", 2), shard_of("b", 2)], count=3)
    with pytest.raises(
        DataError, match=r"gives 1 client, and 1 client with too little: b \(0 rows to train on, 0 in all"
    ):
        fit(shards, count=2)
    with pytest.raises(DataError, match="too_small=error; 1 client with too little"):
        fit(shards, too_small="error")
    with pytest.raises(DataError, match="no client has enough data"):
        fit([shard_of("b", 0)])
    assert fit(shards, count=2, natural=False)[0] == ["a"]
