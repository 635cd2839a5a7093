import time

import pytest
import torch

from fedpeat.core import DataError, StorageError
from fedpeat.data import POOLED, Rows, client_table, open_federated, open_rows
from fedpeat.data.rows import is_whole
from tests.fedpeat.data.corpus import documents


def test_rows_are_keywords_for_a_model():
    ids = torch.arange(12).reshape(3, 4)
    rows = Rows(ids, ids, torch.ones_like(ids))
    assert set(rows.batch([0])) == {"input_ids", "labels", "attention_mask"}
    assert rows.batch(torch.tensor([2, 2]))["labels"].tolist() == [[8, 9, 10, 11]] * 2
    assert len(rows) == 3


def test_what_is_opened_is_what_was_prepared(prepared):
    data = prepared(documents(40), client_field="who", test_share=0.2, server_share=0.1, label_field="kind")
    assert open_federated(data.folder) == data
    for client in data.clients:
        rows = open_rows(data.folder, client.name)
        assert (rows.input_ids.dtype, rows.labels.dtype, rows.attention_mask) == (torch.int64, torch.int64, None)
        assert rows.input_ids.shape == (client.rows, data.block_size)
        assert client.tokens == rows.input_ids.numel()
        assert len(open_rows(data.folder, client.name, "test")) == client.test_rows
    for part, count in data.server_rows.items():
        assert len(open_rows(data.folder, "server", part)) == count


def test_all_clients_together_are_each_after_the_other(prepared):
    rows = [{**row, "text": row["text"] + " d599" * (i % 3)} for i, row in enumerate(documents(40))]
    for tail in ("drop", "pad"):
        data = prepared(rows, client_field="who", test_share=0.2, tail=tail)
        for part in ("train", "test", "validation"):
            whole = open_rows(data.folder, POOLED, part)
            parts = [open_rows(data.folder, client.name, part) for client in data.clients]
            assert torch.equal(whole.input_ids, torch.cat([each.input_ids for each in parts]))
            assert torch.equal(whole.labels, torch.cat([each.labels for each in parts]))


def test_the_table_counts_documents_by_label(prepared):
    data = prepared(documents(40), client_field="who", label_field="kind", test_share=0.2)
    table = client_table(data)
    assert [row["client"] for row in table] == ["c0", "c1", "c2", "c3"]
    for number, row in enumerate(table):
        mine = [i % 3 for i in range(40) if i % 4 == number]
        assert row["histogram"] == {str(kind): mine.count(kind) for kind in range(3)}
        assert row["documents"] == row["rows"] == data.clients[number].rows
    assert client_table(prepared(documents(40), client_field="who"))[0]["histogram"] == {}


def test_unknown_clients_and_parts_are_told(prepared):
    data = prepared(documents(40), client_field="who")
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_rows(data.folder, "c0", "trian")
    with pytest.raises(DataError, match="it has 4 clients and 'server'"):
        open_rows(data.folder, "c9")


def test_missing_and_truncated_files_are_told(prepared, tmp_path):
    with pytest.raises(StorageError, match="prepare it again"):
        open_federated(tmp_path / "nothing")
    data = prepared(documents(40), client_field="who")
    assert is_whole(data.folder)
    content = (data.folder / "rows.safetensors").read_bytes()
    (data.folder / "rows.safetensors").write_bytes(content[:-4])
    assert not is_whole(data.folder)
    with pytest.raises(StorageError, match="prepare the data again"):
        open_rows(data.folder, "c0")


def test_a_population_of_thousands_opens_one_client_at_a_time(prepared):
    data = prepared([{"text": f"d{i % 600} d{i // 600} d7 d7 d7", "who": i} for i in range(3000)], client_field="who")
    assert len(data.clients) == 3000
    started = time.process_time()
    for client in data.clients[::30]:
        assert len(open_rows(data.folder, client.name)) == 1
    # 0.3 ms each was measured with 10,000 clients; the bound only shows that an open does not read everyone's rows.
    assert (time.process_time() - started) / 100 < 0.05
