import dataclasses

import pytest
import torch

from fedpeat.client import Store, Task, TrainingSpec, work
from fedpeat.core import GlobalState, RoundPlan, digest
from fedpeat.data import Rows
from fedpeat.emulators import full_view
from fedpeat.models import make_split
from fedpeat.peft import attach
from fedpeat.server import Participant, margins

PLAN = RoundPlan(round=2, start_step=3, total_steps=6, devices=())
SPEC = TrainingSpec(learning_rate=0.05, batch_size=4, optimizer="SGD", threads=1)


@pytest.fixture
def participant(miniature, make_ids):
    view = full_view(miniature("llama", blocks=2), make_split(2, first=1, last=1))
    places = {"path": view.path, "sources": view.sources, "adapter_positions": view.adapter_positions}
    tuned = attach(view.model, method={"kind": "lora", "rank": 2}, seed=7, **places)
    ids = make_ids(9, 12)
    return Participant(tuned, Rows(ids, ids), SPEC, steps=2, weight=0.5, weight_by="tokens", seed=11)


@pytest.fixture
def state(participant):
    tuned, generator = participant.tuned, torch.Generator().manual_seed(1)
    tensors = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tuned.read().items()}
    folds = {pair.module: torch.full(pair.shape, 0.02) for pair in tuned.layout.pairs}
    return GlobalState(tensors, folds, {"reducer|m": torch.ones(1)})


def test_the_server_works_as_a_client_of_its_name_on_what_is_folded_too(participant, state):
    update = participant.train(PLAN, state, {"proximal_mu": 0.5})
    tuned = participant.tuned
    tuned.fold(state.folds)
    task = Task("server", 2, 3, 6, 11, {"proximal_mu": 0.5})
    more = {"spec": SPEC, "tensors": state.tensors, "extras": {}, "store": Store(None, "server")}
    wanted = work(tuned, participant.rows, task=task, **more)
    assert digest(update.delta) == digest(wanted.delta)
    assert (update.client, update.round) == ("server", 2)
    assert update.weight == 0.5 * wanted.metrics["train_tokens"] == 0.5 * 2 * 4 * 12
    assert update.metrics["train_rows"] == 9
    assert update.payload_bytes is None
    tuned.fold({})
    unfolded = participant.train(PLAN, dataclasses.replace(state, folds={}), {"proximal_mu": 0.5})
    assert digest(unfolded.delta) != digest(update.delta)


@pytest.mark.parametrize(("by", "weight"), [("tokens", 48.0), ("rows", 4.5), ("equal", 0.5)])
def test_its_weight_is_relative_to_a_clients(by, weight, participant, state):
    assert dataclasses.replace(participant, weight_by=by).train(PLAN, state, {}).weight == weight


def test_it_sends_what_the_recipe_has_clients_send_and_keeps_nothing(participant, state):
    layout = participant.tuned.layout
    half = participant.train(PLAN, state, {"train_only": ["B"], "fixed": ["A"], "probe_rows": 3})
    assert set(half.delta) == layout.names(["B"])
    assert half.metrics["start_loss"] > 0
    own = [participant.train(PLAN, state, {"personal": ["B"]}) for _ in range(2)]
    assert set(own[0].delta) == layout.names(["A"])
    assert digest(own[0].delta) == digest(own[1].delta)
    controlled = participant.train(PLAN, state, {"control_variates": True})
    assert controlled.extras == {}
    assert digest(controlled.delta) == digest(participant.train(PLAN, state, {}).delta)


def test_margins_need_both_parts():
    assert margins({"emulator_tuned": 3.5, "plug_in": 3.25, "full_zero_shot": 4.0}) == {"privacy_margin": 0.25}
    assert margins({"plug_in": 3.25}) == {}
    assert margins({"emulator_tuned": 3.0, "plug_in": 3.25})["privacy_margin"] == pytest.approx(-0.25)
    assert margins({}, {"emulator_tuned": 0.5, "plug_in": 0.75}) == {"privacy_margin_accuracy": 0.25}
    assert margins({}, {"emulator_tuned": None, "plug_in": 0.75}) == {}
    assert margins({}, {"emulator_tuned": 0.5}) == {}
