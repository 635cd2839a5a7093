import csv
import gzip
import logging

import datasets
import pytest

from fedpeat.core import DataError, StorageError
from fedpeat.data import DataSpec, docstrings
from fedpeat.data.sources import fingerprint, load
from tests.fedpeat.data.corpus import documents, write_jsonl

ROWS = documents(12)


def spec_of(kind, path, **settings):
    return DataSpec.of({"kind": kind, "path": None if path is None else str(path), "block_size": 6, **settings})


@pytest.fixture
def read(tmp_path):
    def call(kind, path, *, server=False, **settings):
        spec = spec_of(kind, path, **settings)
        return load(spec, server=server, scratch=tmp_path / "scratch", cache=tmp_path / "cache")

    return call


def write_hub_folder(folder):
    """The layout of a hub dataset: Parquet shards named by split."""
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS[:8]), ("test", ROWS[8:])):
        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_keeps_all_fields(read, tmp_path, name):
    table = read("jsonl", write_jsonl(tmp_path / name, ROWS))
    assert table.column_names == ["text", "who", "kind", "age"]
    assert table[3] == ROWS[3]


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_csv_with_a_delimiter(read, tmp_path, delimiter):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert read("csv", tmp_path / "rows.csv", delimiter=delimiter)["text"][:] == [row["text"] for row in ROWS]


def test_parquet(read, tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read("parquet", tmp_path / "rows.parquet")["who"][:] == [row["who"] for row in ROWS]


@pytest.mark.parametrize(("sample_by", "count"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_text_by_line_paragraph_or_file(read, tmp_path, sample_by, count):
    (tmp_path / "play.txt").write_text("HAMLET:\nTo be\n\nOPHELIA:\nMy lord")
    found = read("text", tmp_path / "play.txt", sample_by=sample_by)["text"][:]
    assert len([text for text in found if text]) == count


def test_compressed_text(read, tmp_path):
    (tmp_path / "play.txt.gz").write_bytes(gzip.compress(b"To be\nor not\n"))
    assert read("text", tmp_path / "play.txt.gz", sample_by="line")["text"][:] == ["To be", "or not"]


def test_folders_globs_lists_and_the_file_as_a_field(read, tmp_path):
    (tmp_path / "plays").mkdir()
    for name in ("lear", "hamlet"):
        (tmp_path / "plays" / f"{name}.txt").write_text(f"{name} speaks")
    (tmp_path / "plays" / "notes.pdf").write_bytes(b"\0")
    (tmp_path / "plays" / "blank.txt").write_text("")
    folder = tmp_path / "plays"
    for path in (str(folder), f"{folder}/*.txt"):
        table = read("text", path, client_field="file")
        assert dict(zip(table["file"][:], table["text"][:], strict=True)) == {
            "hamlet": "hamlet speaks",
            "lear": "lear speaks",
        }
    task = {"answer_field": "file", "prompt_template": "{text}", "choices": "auto"}
    assert sorted(read("text", str(folder), **task)["file"][:]) == ["hamlet", "lear"]
    spec = DataSpec.of(
        {"kind": "text", "path": [f"{folder}/lear.txt"], "server_path": f"{folder}/hamlet.txt", "block_size": 6}
    )
    places = {"scratch": tmp_path / "scratch", "cache": tmp_path}
    assert load(spec, server=False, **places)["text"][:] == ["lear speaks"]
    assert load(spec, server=True, **places)["text"][:] == ["hamlet speaks"]


def test_hub_layout_in_a_local_folder(read, tmp_path):
    folder = write_hub_folder(tmp_path / "hub")
    assert read("hub", folder)["text"][:] == [row["text"] for row in ROWS[:8]]
    assert read("hub", folder, split="test")["text"][:] == [row["text"] for row in ROWS[8:]]
    assert read("hub", folder, server_split="test", server=True).num_rows == 4
    with pytest.raises(DataError, match="validation"):
        read("hub", folder, split="validation")


def test_docstrings_hold_out_modules(read, tmp_path, monkeypatch):
    rows = [
        {"library": "a", "module": f"a.b{i}.c", "name": f"a.b{i}.c.f", "text": f"words\n{i}\n\nx\n\ny"}
        for i in range(5)
    ]
    asked = []
    monkeypatch.setattr(docstrings, "read_docstrings", lambda libraries, **_: asked.append(libraries) or rows)
    monkeypatch.setattr(docstrings, "held_out", lambda row: row["module"] == "a.b3.c")
    table = read("docstrings", None, libraries=["a"])
    assert asked == [("a",)]
    assert table["package"][:] == [f"a.b{i}" for i in range(5)]
    assert table["summary"][:] == [f"words\n{i}" for i in range(5)]
    assert table["held_out"][:] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("jsonl", "rows.jsonl", "", "it is empty"),
        ("jsonl", "rows.jsonl.gz", gzip.compress(b"", mtime=0), "it is empty"),
        ("jsonl", "rows.jsonl", "{oops", "cannot read"),
        ("text", "rows.txt", "", "it is empty"),
        ("text", "rows.txt", b"\xff\xfe\x00\x81", "decode"),
        ("csv", "rows.csv", "", "it is empty"),
        ("parquet", "rows.parquet", "", "it is empty"),
        ("parquet", "rows.parquet", "no parquet", "cannot read"),
        ("jsonl", "rows.jsonl.gz", b"no gzip", "cannot read"),
    ],
)
def test_files_that_cannot_be_read_are_told(read, tmp_path, kind, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read(kind, tmp_path / name)


# pandas leaves the file open when it meets no row.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_csv_of_a_header_alone_is_empty(read, tmp_path):
    (tmp_path / "rows.csv").write_text("text,who\n")
    with pytest.raises(DataError, match="it is empty"):
        read("csv", tmp_path / "rows.csv")


def test_missing_files_are_told_with_the_nearest(read, tmp_path):
    write_jsonl(tmp_path / "speeches.jsonl", ROWS)
    (tmp_path / "none").mkdir()
    for path, message in {
        "speaches.jsonl": "did you mean 'speeches.jsonl'",
        "nowhere/speeches.jsonl": "nor its folder",
        "*.parquet": "no file matches",
        "none": "no file ending in .jsonl",
    }.items():
        with pytest.raises(DataError, match=message):
            read("jsonl", tmp_path / path)
    with pytest.raises(DataError, match="no such folder"):
        read("hub", tmp_path / "nothing")
    with pytest.raises(DataError, match="did you mean 'jsonl'"):
        read("jsnl", tmp_path / "x")


def test_fingerprint_follows_content_not_place(tmp_path):
    first = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "copy").mkdir()
    copy = write_jsonl(tmp_path / "copy" / "rows.jsonl", ROWS)
    known = fingerprint(spec_of("jsonl", first), cache=tmp_path)
    assert fingerprint(spec_of("jsonl", copy), cache=tmp_path) == known
    write_jsonl(copy, ROWS[1:])
    assert fingerprint(spec_of("jsonl", copy), cache=tmp_path) != known
    assert fingerprint(spec_of("jsonl", first, server_path=str(copy)), cache=tmp_path) != known
    folder = write_hub_folder(tmp_path / "hub")
    splits = {fingerprint(spec_of("hub", folder, split=split), cache=tmp_path) for split in ("train", "test")}
    assert len(splits) == 2
    with pytest.raises(DataError, match="no such file"):
        fingerprint(spec_of("jsonl", tmp_path / "gone.jsonl"), cache=tmp_path)


def test_reading_shows_nothing_and_leaves_settings_alone(read, tmp_path, capfd):
    before = (datasets.are_progress_bars_disabled(), logging.getLogger("datasets").level)
    read("jsonl", write_jsonl(tmp_path / "rows.jsonl", ROWS))
    (tmp_path / "bad.jsonl").write_text("{oops")
    with pytest.raises(DataError):
        read("jsonl", tmp_path / "bad.jsonl")
    assert capfd.readouterr() == ("", "")
    assert (datasets.are_progress_bars_disabled(), logging.getLogger("datasets").level) == before


def test_a_full_disk_is_told(read, tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(StorageError, match="free some space"):
        read("jsonl", path)
