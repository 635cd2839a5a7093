import sys

import pytest
from matplotlib.image import imread

from fedpeat.data import plot_clients, prepare
from tests.fedpeat.data.corpus import documents, write_jsonl


@pytest.mark.parametrize("clients", [3, 60])
@pytest.mark.parametrize("label", [None, "kind"])
def test_few_and_many_clients_are_drawn(prepared, tmp_path, clients, label):
    rows = documents(240, clients=clients)
    data = prepared(rows, client_field="who", label_field=label, test_share=0.2, validation_share=0.2)
    path = plot_clients(data, tmp_path / "figures" / "clients.png")
    picture = imread(path)
    assert picture.shape[0] > 300
    assert picture.shape[1] > 600
    assert picture[..., :3].std() > 0.05


def test_no_figure_is_left_open(prepared, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_clients(prepared(documents(20), count=2), tmp_path / "clients.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_real_federations_server_has_no_clients_to_draw(tmp_path, tokenizer):
    own = write_jsonl(tmp_path / "own.jsonl", documents(30))
    source = {"kind": "jsonl", "server_path": str(own), "block_size": 6}
    data = prepare(source, tokenizer=tokenizer, tokenizer_id="words", clients_count=None, seed=0, cache_folder=tmp_path)
    assert plot_clients(data, tmp_path / "clients.png").stat().st_size > 0
