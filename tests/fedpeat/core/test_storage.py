import json
import math
import os

import pytest
import torch

from fedpeat.core import StorageError, content_hash, read_json, read_tensors, write_json, write_tensors, write_text


def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path):
    tensors = {"w": torch.randn(3, 2).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "deep" / "t.safetensors", tensors, {"round": "3"})
    again = read_tensors(tmp_path / "deep" / "t.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    write_json(tmp_path / "a.json", {"x": math.nan, "y": [math.inf, 1.5], "é": "ü"})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5], "é": "ü"}
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["é"] == "ü"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.json", "t.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_broken_files_are_told(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"w": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StorageError, match="truncated"):
        read_tensors(path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StorageError):
        read_json(tmp_path / "a.json")
    with pytest.raises(StorageError):
        read_json(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_text(tmp_path / "file" / "below", "x")


def test_content_hash_tells_values_apart():
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash([1, 2]) != content_hash([2, 1])
