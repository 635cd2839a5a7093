import itertools
import subprocess
import sys

import pytest

from fedpeat.core import ConfigError, DataError, StorageError
from fedpeat.data import docstrings, open_rows, prepare
from fedpeat.data import federated as room
from tests.fedpeat.data.corpus import documents, held_by, make_tokenizer, sources_of, write_jsonl
from tests.fedpeat.data.test_partition import FLOWER

SHARES = {"test_share": 0.2, "validation_share": 0.2, "server_share": 0.1, "public_share": 0.1}


def all_parts(data):
    """Documents by owner and part; the server's test and validation rows are the clients' again."""
    parts = {
        (c.name, part): held_by(data, c.name, part) for c in data.clients for part in ("train", "validation", "test")
    }
    return parts | {("server", part): held_by(data, "server", part) for part in ("train", "public")}


def accounted(report):
    counts = report["documents"]
    return counts["found"], sum(n for key, n in counts.items() if key != "found" and not key.startswith("server_"))


@pytest.mark.parametrize("settings", [{"client_field": "who"}, {"client_field": ["who", "kind"]}, {"count": 7}])
def test_no_two_parts_share_a_document(prepared, settings):
    rows = documents(200)
    rows += [{**row, "text": row["text"].replace(" ", "\n  ")} for row in rows[::3]]
    data = prepared(rows, **SHARES, **settings)
    parts = all_parts(data)
    for one, other in itertools.combinations(parts, 2):
        assert not parts[one] & parts[other], (one, other)
    assert set().union(*parts.values()) == set(range(200))
    for part in ("test", "validation"):
        assert held_by(data, "server", part) == set().union(*(parts[c.name, part] for c in data.clients))
    assert data.report["documents"]["duplicates"] == len(rows) - 200
    assert accounted(data.report) == (len(rows), len(rows))


@pytest.mark.parametrize("name", FLOWER)
def test_every_partitioner_prepares_and_accounts_for_every_document(prepared, name):
    options = dict(FLOWER[name])
    if name == "Size":
        options["partition_sizes"] = [30, 30]
    if name == "InnerDirichlet":
        options["partition_sizes"] = [40, 40]
    count = 2 if name in ("Size", "InnerDirichlet", "GroupedNaturalId") else 3
    data = prepared(documents(120), count=count, partitioner=name, partitioner_options=options, **SHARES)
    parts = all_parts(data)
    assert sum(map(len, parts.values())) == len(set().union(*parts.values()))
    assert accounted(data.report) == (120, 120)
    leaves_out = ("Size", "InnerDirichlet", "Shard", "Pathological")
    assert (data.report["documents"]["left_out_by_partitioner"] > 0) == (name in leaves_out)


def test_same_seed_same_bytes_and_another_seed_others(prepared):
    def contents(data):
        return [path.read_bytes() for path in sorted(data.folder.iterdir())]

    rows = documents(60)
    one, again, other = (
        prepared(rows, cache=cache, seed=seed, count=3, **SHARES) for cache, seed in zip("aab", (0, 0, 1), strict=True)
    )
    twin = prepared(rows, cache="c", seed=0, count=3, **SHARES)
    assert one.folder == again.folder
    assert one.folder.name == twin.folder.name != other.folder.name
    assert contents(one) == contents(twin)
    assert all_parts(one) != all_parts(other)


def test_prepared_data_is_used_again_until_something_changes(prepared, monkeypatch):
    rows = documents(60)
    first = prepared(rows, count=3)
    with monkeypatch.context() as patch:
        patch.setattr(room, "load", lambda *_, **__: pytest.fail("read again"))
        assert prepared(rows, count=3) == first
    for change in ({"count": 4}, {"seed": 1}, {"block_size": 5}, {"test_share": 0.1}, {"batch_size": 2}):
        assert prepared(rows, **{"count": 3, **change}).folder != first.folder
    assert prepared(rows[:-1], count=3).folder != first.folder


def test_a_broken_folder_is_made_anew(prepared):
    rows = documents(60)
    data = prepared(rows, count=3)
    whole = (data.folder / "rows.safetensors").read_bytes()
    (data.folder / "rows.safetensors").write_bytes(whole[:-8])
    assert prepared(rows, count=3) == data
    assert (data.folder / "rows.safetensors").read_bytes() == whole


def test_nothing_is_left_beside_the_prepared_folder(prepared, tmp_path):
    prepared(documents(60), count=3)
    with pytest.raises(DataError):
        prepared(documents(60), count=100)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_tokenizer_counts_by_content(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", documents(40))

    def folder(tokenizer, name="one"):
        source = {"kind": "jsonl", "path": str(path), "block_size": 6}
        return prepare(
            source, tokenizer=tokenizer, tokenizer_id=name, clients_count=2, seed=0, cache_folder=tmp_path / "cache"
        ).folder

    used = make_tokenizer()
    used(["d0 d1 d2", "d0"], padding=True, truncation=True, max_length=2)
    assert folder(make_tokenizer()) == folder(make_tokenizer(), "another name") == folder(used)
    assert folder(make_tokenizer(begins=True)) != folder(make_tokenizer())


def test_pairs_are_scored_on_the_answer_only(prepared):
    rows = [{"ask": f"d{i} d{i}", "say": f"d{i + 100}", "who": "ab"[i % 2]} for i in range(20)]
    rows.append({"ask": " ".join(["d300"] * 9), "say": "d301", "who": "a"})
    settings = {"prompt_field": "ask", "answer_field": "say", "prompt_template": "{prompt} ", "client_field": "who"}
    data = prepared(rows, **settings, test_share=0.2)
    assert [client.name for client in data.clients] == ["a", "b"]
    kept = [open_rows(data.folder, client.name, part) for client in data.clients for part in ("train", "test")]
    assert sum(len(part) for part in kept) == 21
    for part in kept:
        for ids, labels in zip(part.input_ids.tolist(), part.labels.tolist(), strict=True):
            if ids[0] != 304:
                word = ids[0]
                assert ids == [word, word, word + 100, 2, 3, 3]
                assert labels == [-100, -100, word + 100, 2, -100, -100]
    assert data.report["tokens"]["truncated_pairs"] == 1
    mask = open_rows(data.folder, "b", "train").attention_mask
    assert mask is not None
    assert mask[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_the_servers_own_file_is_for_test_and_never_a_clients(prepared, tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", documents(130)[100:])
    data = prepared(documents(110), count=3, server_path=str(own), server_share=0.2, public_share=0.1)
    assert data.server_rows == {"train": 6, "validation": 0, "test": 21, "public": 3}
    parts = [held_by(data, "server", part) for part in ("train", "public", "test")]
    assert set().union(*parts) == set(range(100, 130))
    clients = set().union(*(held_by(data, client.name, "train") for client in data.clients))
    assert clients == set(range(100))
    assert data.report["documents"]["duplicates"] == 10


def test_a_real_federations_server_needs_no_clients_data(tmp_path, tokenizer):
    own = write_jsonl(tmp_path / "own.jsonl", documents(30))
    data = prepare(
        {"kind": "jsonl", "server_path": str(own), "block_size": 6, "server_share": 0.5},
        tokenizer=tokenizer,
        tokenizer_id="words",
        clients_count=None,
        seed=0,
        cache_folder=tmp_path / "cache",
    )
    assert data.clients == ()
    assert (data.server_rows["train"], data.server_rows["test"]) == (15, 15)


def test_held_out_docstrings_are_the_test_rows(tmp_path, tokenizer, monkeypatch):
    rows = [
        {"library": row["who"], "module": f"m{i % 10}", "name": "f", "text": row["text"]}
        for i, row in enumerate(documents(100))
    ]
    monkeypatch.setattr(docstrings, "read_docstrings", lambda *_, **__: rows)
    monkeypatch.setattr(docstrings, "held_out", lambda row: row["module"] in ("m3", "m4"))
    source = {"kind": "docstrings", "client_field": "library", "block_size": 6, "server_share": 0.25}
    data = prepare(source, tokenizer=tokenizer, tokenizer_id="words", clients_count=None, seed=0, cache_folder=tmp_path)
    assert held_by(data, "server", "test") == {i for i in range(100) if i % 10 in (3, 4)}
    assert data.server_rows["train"] == 20
    assert sum(client.rows for client in data.clients) == 60


@pytest.mark.parametrize(
    ("rows", "settings", "error", "message"),
    [
        ([{"text": " "}, {"text": ""}], {}, DataError, "of 2, 2 are empty"),
        (documents(5), {"count": 6}, DataError, "there are 5 documents"),
        (documents(5), {}, ConfigError, "set clients.count"),
        (documents(5), {"count": 2, "text_field": "txt"}, DataError, "did you mean 'text'"),
        (documents(5), {"count": 2, "label_field": "knd"}, DataError, "did you mean 'kind'"),
        (documents(5), {"client_field": "whom"}, DataError, "did you mean 'who'"),
        (documents(40), {"client_field": "who", "count": 5}, DataError, "set it to at most 4"),
        (
            documents(5),
            {"count": 5, "block_size": 7},
            DataError,
            "no client has enough data; 5 clients with too little",
        ),
        (
            documents(5),
            {"count": 5, "batch_size": 2, "too_small": "error"},
            DataError,
            "5 clients with too little",
        ),
        (documents(5), {"count": 2, "tst_share": 0.1}, ConfigError, "did you mean 'test_share'"),
    ],
)
def test_bad_input_is_told(prepared, rows, settings, error, message):
    with pytest.raises(error, match=message):
        prepared(rows, **settings)


def test_a_folder_that_cannot_be_made_is_told(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", documents(5))
    with pytest.raises(StorageError, match="choose another cache"):
        prepare(
            {"kind": "jsonl", "path": str(path), "block_size": 6},
            tokenizer=tokenizer,
            tokenizer_id="words",
            clients_count=2,
            seed=0,
            cache_folder=path / "cache",
        )


def test_opening_rows_needs_none_of_the_libraries_that_prepared_them(prepared):
    data = prepared(documents(40), count=2)
    code = (
        "import sys, fedpeat.data as d; r = d.open_rows(sys.argv[1], 'client-0');"
        "heavy = {'datasets', 'flwr_datasets', 'matplotlib', 'pandas', 'pyarrow', 'transformers'} & set(sys.modules);"
        "print(len(r), r.input_ids.sum().item(), sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(data.folder)], capture_output=True, text=True, check=True)
    rows = open_rows(data.folder, "client-0")
    assert done.stdout.split(maxsplit=2) == [str(len(rows)), str(rows.input_ids.sum().item()), "[]\n"]
    assert sources_of(rows.input_ids)


OWNED = {
    "texts": {"test_share": 0.2, "validation_share": 0.2},
    "padded": {"test_share": 0.3, "tail": "pad"},
    "last rows": {"test_blocks": 2},
    "pairs": {"test_share": 0.2, "prompt_field": "who", "answer_field": "text"},
    "choices": {"test_share": 0.2, "prompt_field": "text", "answer_field": "kind", "choices": "auto", "block_size": 12},
    "few": {"too_small": "keep", "block_size": 40, "test_share": 0.5, "tail": "drop"},
}


@pytest.mark.parametrize("kind", OWNED)
def test_the_rows_of_one_owners_documents_are_those_of_its_client(prepared, tokenizer, tmp_path, kind):
    rows = documents(48)
    settings = {"kind": "jsonl", "block_size": 6, **OWNED[kind]}
    whole = prepared([*rows, *rows[:3]], **{"client_field": "who", "seed": 5, "server_path": None, **OWNED[kind]})
    for client in whole.clients:
        path = write_jsonl(tmp_path / f"{client.name}.jsonl", [row for row in rows if row["who"] == client.name])
        # What is about other clients and the server has no meaning for one owner, and may name fields it lacks.
        others = {"client_field": "no such field", "server_share": 0.9, "label_field": "nor this"}
        own = prepare(
            {**settings, "path": str(path), **others},
            tokenizer=tokenizer,
            tokenizer_id="words",
            clients_count=None,
            seed=5,
            cache_folder=tmp_path / "own",
            owner=client.name,
        )
        (found,) = own.clients
        assert found == client
        for part in ("train", "validation", "test"):
            here, there = open_rows(own.folder, client.name, part), open_rows(whole.folder, client.name, part)
            assert here.input_ids.tolist() == there.input_ids.tolist()
            assert here.labels.tolist() == there.labels.tolist()
        assert own.server_rows == {"train": 0, "validation": 0, "test": 0, "public": 0}


def test_an_owner_with_too_little_is_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", documents(1))
    settings = {"kind": "jsonl", "block_size": 6, "path": str(path)}
    common = {"tokenizer": tokenizer, "tokenizer_id": "words", "clients_count": None, "seed": 0}
    with pytest.raises(DataError, match=r"ann .* rows to train on"):
        prepare(settings, **common, cache_folder=tmp_path / "cache", batch_size=2, owner="ann")
