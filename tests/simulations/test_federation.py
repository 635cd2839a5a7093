import threading
from types import SimpleNamespace

import pytest
import torch

from fedpeat.client import Store
from fedpeat.control import FixedControl
from fedpeat.core import ClientUpdate, DevicePlan, Evaluation, GlobalState, RoundPlan, digest
from fedpeat.data import Rows
from fedpeat.emulators import full_view
from fedpeat.models import make_split
from fedpeat.peft import attach
from fedpeat.server import evaluate
from simulations import baselines
from simulations.evaluation import Evaluator, Personal
from simulations.federation import Federation, put_into, strategy_for
from simulations.round_report import Clock, report_of
from strategies.general import fed_avg


@pytest.fixture
def tuned(miniature):
    view = full_view(miniature("llama", blocks=2), make_split(2, first=1, last=1))
    places = {"path": view.path, "sources": view.sources, "adapter_positions": view.adapter_positions}
    return attach(view.model, method={"kind": "lora", "rank": 2}, seed=7, **places)


@pytest.fixture
def rows(make_ids):
    ids = make_ids(4, 12)
    return Rows(ids, ids)


@pytest.fixture
def federation(tuned, rows):
    """A federation of ann and bob on two adapter blocks; what it does not need here is left out."""

    def make(**more):
        plain = {
            "recipe": fed_avg(),
            "control": FixedControl(("ann", "bob"), per_round=2, local_steps=3, rounds=2, seed=1),
            "job": {"seed": 1},
            "bundles": {"default": "bundle", "kept_1": "small"},
            "full": tuned,
            "emulated": {},
            "zero_shot": {},
            "evaluator": Evaluator(rows, batch_size=2, threads=1, device="cpu"),
            "participant": None,
            "rounds": 2,
            "evaluate_every": 1,
            "min_replies": 1,
            "timeout_seconds": None,
            "workers": 2,
            "seed": 1,
            "method": {"kind": "lora", "rank": 8, "alpha": 20, "dropout": 0.1, "targets": None},
        }
        return Federation(**{**plain, **more})

    return make


def random_state(tuned, seed=1, folded=True):
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in sorted(tuned.initial.items())}
    folds = {pair.module: torch.full(pair.shape, 0.03) for pair in tuned.layout.pairs if folded}
    return GlobalState(tensors, folds)


def loss_of(tuned, rows):
    return evaluate(tuned.model, rows, batch_size=2, threads=1)


class Silent:
    """An observer who sees nothing but messages."""

    def __init__(self):
        self.messages = []

    def resumed(self, done): ...

    def bundle_delivered(self, version, clients, sent): ...

    def round_started(self, plan): ...

    def client_done(self, name, metrics): ...

    def client_failed(self, failure): ...

    def round_finished(self, report): ...

    def working(self, text, share): ...

    def message(self, text):
        self.messages.append(text)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_rank_of_its_own_has_the_runs_scaling(rank, federation):
    method = federation().method_at(rank)
    assert method["rank"] == rank
    assert method["alpha"] / method["rank"] == pytest.approx(20 / 8)
    assert {key: method[key] for key in ("kind", "dropout", "targets")} == {
        "kind": "lora",
        "dropout": 0.1,
        "targets": None,
    }


def test_without_one_the_method_is_the_runs(federation):
    made = federation()
    assert made.method_at(None) == made.method
    assert made.method_at(None) is not made.method
    assert federation(method={"kind": "full"}).method_at(None) == {"kind": "full"}


def test_a_job_has_the_devices_bundle_method_and_attack(federation):
    made = federation(attacks={"bob": {"kind": "scale", "factor": 2.0}})
    strategy = strategy_for(made, [5, 6], Silent())
    ann, bob = (strategy.job_of(d) for d in (DevicePlan("ann", 3), DevicePlan("bob", 3, emulator="kept_1", rank=2)))
    assert ann == {"bundle": "bundle", "method": made.method, "attack": None}
    assert (bob["bundle"], bob["method"]["alpha"]) == ("small", 5.0)
    assert bob["attack"] == {"kind": "scale", "factor": 2.0}
    assert strategy.situation.layout is made.full.layout
    assert strategy.situation.population == 2
    assert [strategy.node_of("x") for _ in range(3)] == [5, 6, 5]


def test_a_model_is_put_into_a_state_folds_and_all(tuned, rows):
    state = random_state(tuned)
    unfolded = loss_of(put_into(tuned, random_state(tuned, folded=False)), rows)
    folded = loss_of(put_into(tuned, state), rows)
    assert folded != unfolded
    assert digest(tuned.read()) == digest(state.tensors)
    assert loss_of(put_into(tuned, random_state(tuned, folded=False)), rows) == unfolded


def test_every_model_is_scored_at_the_same_state(federation, tuned, rows, tmp_path):
    state = random_state(tuned)
    wanted = loss_of(put_into(tuned, state), rows)
    tuned.fold({})
    tuned.write(tuned.initial)
    assert federation().evaluate(state) == {"plug_in": wanted, "emulator_tuned": wanted}

    own = {n: t for n, t in random_state(tuned, seed=2).tensors.items() if n in tuned.layout.names(["B"])}
    Store(tmp_path, "ann").write("personal", own)
    found = federation(personal=Personal({"ann": rows}, str(tmp_path))).evaluate(state)
    tuned.write({**state.tensors, **own})
    assert found["personal"].loss == pytest.approx(loss_of(tuned, rows).loss)
    assert found["personal"] != found["plug_in"] == wanted


def test_clients_that_tune_alone_are_scored_without_what_the_federation_folded(federation, tuned, rows, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    delta = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tuned.initial.items()}
    tuned.write({name: tuned.initial[name] + delta[name] for name in delta})
    wanted = loss_of(tuned, rows)
    put_into(tuned, random_state(tuned))  # what a federation left in the model
    monkeypatch.setattr(baselines, "exchange", lambda *_, **__: [])
    updates = [ClientUpdate(name, 1, delta, 1.0) for name in ("ann", "bob")]
    monkeypatch.setattr("strategies.flower.RecipeStrategy.updates", lambda *_: iter(updates))
    watch = Silent()
    found = baselines.run_local_only(federation(), None, [1], observer=watch, stop=threading.Event())
    assert found["clients"] == {"ann": wanted.to_json(), "bob": wanted.to_json()}
    assert found["mean"]["loss"] == wanted.loss
    assert len(watch.messages) == 2


def test_a_report_counts_bytes_tokens_and_what_was_measured():
    clients = {
        "ann": {"weight": 1.0, "train_loss": 2.0, "train_tokens": 10.0, "bytes_up": 40.0, "peak_rss_mib": 1e9},
        "server": {"weight": 1.0, "train_loss": 4.0, "train_tokens": 6.0, "bytes_up": 40.0},
        "shy": {"weight": 1.0, "bytes_up": 8.0},  # an update may come without the usual metrics
    }
    done = SimpleNamespace(clients=clients, update_norm=0.5, error=0.25, metrics={"clip_norm": 0.5})
    down = {"ann": 100, "shy": 50, "late": 100}
    strategy = SimpleNamespace(aggregation=done, bytes_down=down, failures=[], cut=["shy"], surplus=["x", "y"])
    losses = {name: Evaluation(loss, 0.5, 9) for name, loss in (("emulator_tuned", 3.5), ("plug_in", 3.25))}
    report = report_of(RoundPlan(2, 6, 9, ()), strategy, losses, Clock(), also={"epsilon": 4.0})
    assert (report.bytes_down, report.bytes_up) == (250, 48)
    assert [report.clients[name]["bytes_down"] for name in clients] == [100.0, 0.0, 50.0]
    assert [report.clients[name]["bytes_up"] for name in clients] == [40.0, 0.0, 8.0]
    assert report.metrics["train_loss"] == 3.0
    assert report.metrics["aggregation_error"] == 0.25
    assert (report.metrics["clip_norm"], report.metrics["epsilon"]) == (0.5, 4.0)
    assert report.metrics["privacy_margin"] == 0.25
    assert report.metrics["peak_rss_mib"] == 1e9
    assert report.metrics["global_step"] == 6.0
    assert (report.metrics["weights_cut"], report.metrics["surplus"]) == (1.0, 2.0)
    done.error, done.clients = None, {}
    quiet = report_of(RoundPlan(2, 6, 9, ()), strategy, {}, Clock()).metrics
    assert not {"aggregation_error", "train_loss", "epsilon"} & set(quiet)
