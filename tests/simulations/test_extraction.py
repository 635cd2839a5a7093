from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedpeat.bundles import build_emulated
from fedpeat.control import FixedControl
from fedpeat.core import ConfigError, digest
from fedpeat.data import POOLED, Rows
from fedpeat.emulators import chain, int4, int8, listed, low_rank, magnitude_pruning, shared, uniform
from fedpeat.models import make_split, model_tensors
from simulations import extraction
from simulations.costs import is_stored
from simulations.evaluation import Evaluator
from simulations.extraction import check_extraction, curious_client, everything, make_dense, run_extraction
from tests.bundles import bundled

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = make_split(4, first=1, last=1)
CLIENTS = [SimpleNamespace(name=name, rows=rows) for name, rows in (("ann", 3), ("eve", 7), ("bob", 7))]
BUILDERS = {
    "uniform": uniform(kept_blocks=1),
    "shared": chain(stages={"one": listed(blocks=[2]), "everywhere": shared()}),
    "int8": int8(),
    "int4": int4(),
    "sparse": magnitude_pruning(share=0.5),
    "small": chain(stages={"narrow": low_rank(share=0.3), "few_bits": int8()}),
    "shared_int4": chain(stages={"one": listed(blocks=[2]), "everywhere": shared(), "few_bits": int4()}),
}


@pytest.fixture
def make_bundle(miniature, tmp_path):
    def make(builder, family="gpt2"):
        return bundled(miniature(family), split=SPLIT, builder=BUILDERS[builder], folder=tmp_path)

    return make


@pytest.mark.parametrize("builder", BUILDERS)
def test_all_that_is_held_trains_and_nothing_changes_at_first(builder, make_bundle, make_ids):
    bundle, ids = make_bundle(builder), make_ids()
    expected = build_emulated(bundle).model(input_ids=ids, use_cache=False).logits
    tuned = everything(bundle, seed=1)
    assert not any(is_stored(module) for module in tuned.model.modules())
    torch.testing.assert_close(tuned.model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    every = {id(parameter) for parameter in tuned.model.parameters()}
    assert {id(parameter) for parameter in tuned.parameters} == every
    assert all(parameter.requires_grad for parameter in tuned.parameters)
    tuned.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters)


def test_in_every_family(family, make_bundle):
    tuned = everything(make_bundle("uniform", family), seed=1)
    assert len(tuned.parameters) == len({id(parameter) for parameter in tuned.model.parameters()})


def test_the_bundle_on_disk_is_left_alone(make_bundle):
    bundle = make_bundle("uniform")
    before = digest({name: tensor for name, tensor, _ in model_tensors(build_emulated(bundle).model)})
    tuned = everything(bundle, seed=1)
    with torch.no_grad():
        for parameter in tuned.parameters:
            parameter.fill_(1.0)
    assert digest({name: tensor for name, tensor, _ in model_tensors(build_emulated(bundle).model)}) == before


class Halves(nn.Module):
    """A linear layer that keeps half of each weight."""

    def __init__(self, bias=True):
        super().__init__()
        self.dtype = torch.bfloat16
        self.halves = nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(2)) if bias else None

    def dense(self, dtype):
        return 2 * self.halves.to(dtype)


def test_layers_in_another_form_become_linear_ones_of_their_own_dtype():
    twice = Halves(bias=False)
    model = nn.ModuleDict({"block": nn.ModuleList([Halves(), twice]), "again": twice, "plain": nn.Linear(3, 2)})
    plain = model["plain"]
    make_dense(model)
    first, second = model["block"]
    assert [type(module) for module in (first, second, model["again"])] == [nn.Linear] * 3
    assert first.weight.tolist() == second.weight.tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    assert first.weight.dtype is torch.bfloat16
    assert (first.in_features, first.out_features) == (3, 2)
    assert first.bias.tolist() == [1.0, 1.0]
    assert second.bias is None
    assert second.weight is model["again"].weight
    assert model["plain"] is plain


def probe(extraction_on=True, pool=False, **keys):
    return {
        "baselines": {"extraction": extraction_on},
        "clients": {"pool": pool},
        "extraction": {"steps": None, "learning_rate": 0.01, "client": None, **keys},
    }


def test_the_client_with_most_rows_tries_unless_one_is_named():
    data = SimpleNamespace(clients=CLIENTS)
    assert curious_client(probe(), data) == "bob"
    assert curious_client(probe(client="ann"), data) == "ann"
    assert curious_client(probe(pool=True), data) == POOLED


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"client": "anna"}, "did you mean 'ann'"),
        ({"steps": 0}, "extraction.steps=0"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_what_cannot_be_tried_is_told_before_the_run(keys, told):
    data = SimpleNamespace(clients=CLIENTS)
    with pytest.raises(ConfigError) as caught:
        check_extraction(probe(**keys), data)
    assert told in str(caught.value)
    check_extraction(probe(extraction_on=False, **keys), data)
    check_extraction(probe(client="eve", steps=3), data)


@pytest.fixture
def tried(make_bundle, make_ids, monkeypatch):
    """The probe on rows of its own: what it found, and what it told."""
    ids = make_ids(6, 12)
    monkeypatch.setattr(extraction, "open_rows", lambda *_: Rows(ids, ids))
    told, bundles = [], {"default": make_bundle("uniform").folder, "small": make_bundle("int8").folder}

    def run(rounds=2, **keys):
        federation = SimpleNamespace(
            control=FixedControl(
                ("ann", "bob", "eve"),
                per_round=2,
                local_steps=3,
                rounds=2,
                seed=1,
                local_steps_of={"eve": 1},
                emulator_of={"eve": "small"},
            ),
            bundles=bundles,
            evaluator=Evaluator(Rows(ids, ids), batch_size=2, threads=1, device="cpu"),
            seed=1,
            rounds=rounds,
            job={"spec": {"learning_rate": 9e9, "batch_size": 2, "optimizer_state": "keep"}},
        )
        observer = SimpleNamespace(message=told.append)
        return run_extraction(probe(**keys), federation, SimpleNamespace(clients=CLIENTS, folder=""), observer=observer)

    run.told = told
    return run


def test_it_trains_as_long_as_asked_or_as_the_client_does(tried):
    found = {steps: tried(steps=steps)["loss"] for steps in (1, 6)}
    own = tried()
    assert (own["client"], own["steps"], own["loss"]) == ("bob", 6, found[6])
    assert found[6] < found[1]
    assert own["tokens"] == 6 * 11
    other = tried(client="eve")
    assert other["steps"] == 2
    assert other["loss"] != tried(steps=2)["loss"]  # its emulator is another one
    untrained = tried(rounds=0)
    assert untrained["steps"] == 0
    assert untrained["loss"] > found[1]


def test_training_out_of_bounds_is_told_and_ends_nothing(tried):
    found = tried(learning_rate=1e30)
    assert found == {"loss": None, "perplexity": None, "accuracy": None, "tokens": None, "client": "bob", "steps": 6}
    assert "went out of bounds" in tried.told[0]
