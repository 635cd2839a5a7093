import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedpeat.bundles import build_emulated
from fedpeat.core import Evaluation, UpdateRefused
from fedpeat.data import Rows
from fedpeat.emulators import chain, full_view, int8, listed, make_emulator, shared, stand_in, uniform
from fedpeat.models import make_split
from fedpeat.peft import attach
from simulations import costs
from simulations.costs import (
    costs_of,
    count_parameters,
    emulator_blocks,
    full_bytes,
    is_stored,
    perplexity_ratio,
    sizes_of,
)
from tests.bundles import bundled

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = make_split(6, first=1, last=1)


class Stored(nn.Module):
    """Keeps a matrix of 6 x 4 in another form."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.zeros(6))

    def dense(self, dtype):
        return torch.zeros(6, 4, dtype=dtype)


def test_stored_layers_count_by_the_matrix_they_stand_for():
    shared_norm = nn.LayerNorm(4)
    block = nn.ModuleList([Stored(), Stored(), nn.Linear(4, 2), shared_norm, shared_norm])
    assert count_parameters(block) == 2 * (6 * 4 + 6) + (4 * 2 + 2) + 8


def test_a_layer_called_dense_is_no_stored_one(miniature):
    """GPT-NeoX's attention has a linear layer by that name."""
    block = miniature("gpt_neox").model.gpt_neox.layers[0]
    assert isinstance(block.attention.dense, nn.Linear)
    assert not any(is_stored(module) for module in block.modules())
    assert count_parameters(block) == sum(parameter.numel() for parameter in block.parameters())


def test_blocks_kept_in_few_bits_count_as_many_parameters(miniature):
    loaded = miniature("gpt2", blocks=6)
    plain, stored = (
        stand_in(loaded.model, SPLIT, make_emulator(loaded, split=SPLIT, builder=builder))
        for builder in (uniform(kept_blocks=2), chain(stages={"few": uniform(kept_blocks=2), "small": int8()}))
    )
    assert any(is_stored(module) for module in stored.model.modules())
    counts = [sum(map(count_parameters, emulator_blocks(view))) for view in (plain, stored)]
    assert counts[0] == counts[1] == 2 * sum(p.numel() for p in loaded.model.transformer.h[1].parameters())


def test_a_full_models_payload_is_that_of_a_bundle_that_leaves_nothing_out(family, miniature, tmp_path):
    loaded = miniature(family)
    before = full_bytes(loaded.model)
    bundle = bundled(
        loaded, split=make_split(4, first=1, last=1), builder=uniform(kept_blocks=2), folder=tmp_path / "whole"
    )
    assert bundle.whole
    assert before == bundle.payload_bytes


def test_sizes_are_of_what_stays_and_of_what_it_stands_for(miniature, tmp_path):
    loaded = miniature("llama", blocks=6)
    builders = {
        "default": uniform(kept_blocks=2),
        "all": uniform(kept_blocks=4),
        "again": chain(stages={"one": listed(blocks=[3]), "everywhere": shared()}),
        "none": uniform(kept_blocks=0),
    }
    bundles = {key: bundled(loaded, split=SPLIT, builder=builder, folder=tmp_path) for key, builder in builders.items()}
    views = {key: build_emulated(bundle) for key, bundle in bundles.items() if not bundle.whole}
    assert set(views) == {"default", "again", "none"}
    sizes = sizes_of(loaded, SPLIT, views, bundles)
    block = sum(parameter.numel() for parameter in loaded.model.model.layers[0].parameters())
    assert {key: size["emulator_parameters"] for key, size in sizes.items()} == {
        "default": 2 * block,
        "all": 4 * block,
        "again": block,  # it stands at four places
        "none": 0,
    }
    assert {size["middle_parameters"] for size in sizes.values()} == {4 * block}
    assert [size["kept_share"] for size in sizes.values()] == [0.5, 1.0, 0.25, 0.0]
    for key, size in sizes.items():
        assert size["bundle_bytes"] == bundles[key].payload_bytes
        assert size["full_bytes"] == bundles["all"].payload_bytes


def test_without_a_middle_there_is_no_share(miniature, tmp_path):
    loaded, split = miniature("llama"), make_split(4, blocks="all")
    bundles = {"default": bundled(loaded, split=split, builder=uniform(kept_blocks=0), folder=tmp_path)}
    size = sizes_of(loaded, split, {}, bundles)["default"]
    assert (size["emulator_parameters"], size["middle_parameters"], size["kept_share"]) == (0, 0, None)


@pytest.fixture
def federation(miniature):
    """What costs are read off: a full model and two emulated ones, `same` being the full model itself."""

    def tuned(loaded, split):
        view = full_view(loaded, split)
        places = {"path": view.path, "sources": view.sources, "adapter_positions": view.adapter_positions}
        return attach(view.model, method={"kind": "lora", "rank": 2}, seed=7, **places)

    return SimpleNamespace(
        full=tuned(miniature("llama", blocks=4), make_split(4, first=1, last=1)),
        emulated={"default": tuned(miniature("llama", blocks=2), make_split(2, first=1, last=1))},
        zero_shot={
            "full_zero_shot": Evaluation(2.0, 0.3, 9),
            "emulator_zero_shot": Evaluation(2.0 + math.log(3), 0.2, 9),
            "emulator_zero_shot/odd": Evaluation(900.0, 0.2, 9),
        },
        job={"spec": {"learning_rate": 0.1, "batch_size": 2, "compile": True}},
        control=SimpleNamespace(clients=("ann", "bob")),
    )


@pytest.fixture
def data(make_ids, monkeypatch):
    """Bob holds most rows, of which the first few have no token to score."""
    clients = [SimpleNamespace(name="ann", rows=2), SimpleNamespace(name="bob", rows=9)]
    asked = []

    def open_rows(folder, client, part):
        asked.append(client)
        ids = make_ids(9, 12)
        return Rows(ids, ids.masked_fill(torch.arange(9)[:, None] < 7, -100))

    monkeypatch.setattr(costs, "open_rows", open_rows)
    return SimpleNamespace(clients=clients, folder="", asked=asked, remote=False)


SIZES = {"default": {"bundle_bytes": 5}, "same": {"bundle_bytes": 8}, "odd": {"bundle_bytes": 8}}
MEASURED = (
    "client_memory_bytes", "client_memory", "full_memory_bytes", "full_memory", "step_seconds", "full_step_seconds"
)  # fmt: skip


def test_costs_are_measured_on_the_device_and_on_the_full_model(federation, data):
    found = costs_of(SIZES, federation, data, measure=True)
    assert data.asked == ["bob"]
    own = found["default"]
    assert own["bundle_bytes"] == 5
    assert own["client_memory_bytes"] == sum(own["client_memory"].values()) < own["full_memory_bytes"]
    assert own["client_memory"]["weights"] < own["full_memory"]["weights"]
    assert own["client_memory"]["optimizer"] == own["full_memory"]["optimizer"] > 0
    assert own["step_seconds"] > 0 < own["full_step_seconds"]
    for key in ("same", "odd"):
        assert found[key]["client_memory"] == found[key]["full_memory"] == own["full_memory"]
        assert found[key]["step_seconds"] == found[key]["full_step_seconds"] == own["full_step_seconds"]
    assert own["zero_shot_ratio"] == pytest.approx(3.0)
    assert found["same"]["zero_shot_ratio"] == 1.0
    assert found["odd"]["zero_shot_ratio"] == math.inf
    assert perplexity_ratio(Evaluation(1.0, 0, 1), Evaluation(2.0, 0, 1)) == pytest.approx(1 / math.e)


def test_where_clients_rows_are_elsewhere_the_servers_own_are_measured_on(federation, data):
    data.remote = True
    assert costs_of(SIZES, federation, data, measure=True)["default"]["step_seconds"] > 0
    assert data.asked == ["server"]


def test_what_is_not_to_be_measured_or_cannot_be_is_none(federation, data, monkeypatch):
    off = costs_of(SIZES, federation, data, measure=False)["default"]
    assert data.asked == []

    def refuse(*_):
        raise next(errors)

    errors = iter([torch.OutOfMemoryError("gone"), MemoryError()] + 4 * [UpdateRefused("it diverged", "nan", "")])
    monkeypatch.setattr(costs, "footprint", refuse)
    monkeypatch.setattr(costs, "step_seconds", refuse)
    failed = costs_of(SIZES, federation, data, measure=True)["default"]
    for found in (off, failed):
        assert [found[name] for name in MEASURED] == [None] * len(MEASURED)
        assert found["bundle_bytes"] == 5
        assert found["zero_shot_ratio"] == pytest.approx(3.0)


def test_rows_without_a_token_to_score_cannot_be_trained_on(federation, data, monkeypatch, make_ids):
    ids = make_ids(9, 12)
    monkeypatch.setattr(costs, "open_rows", lambda *_: Rows(ids, torch.full_like(ids, -100)))
    assert costs_of(SIZES, federation, data, measure=True)["default"]["client_memory"] is None
