"""Every experiment in `conf/experiment` does what it says, on the same held-out text as the rest."""

import pytest
import torch

from tests.oracles import whole_run as oracle

ALL = tuple(range(6))
AUTHORS = ("ann", "bob", "eve")
# See test_twins.py: without it AdamW makes whole steps out of rounding noise.
EPS = 1e-4
STEADY = f"client.optimizer_options={{eps: {EPS}}}"
EMULATOR = ("model.split.first", "model.split.last", "emulator.kept_blocks")


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.003, eps=EPS)


def blocks_of(ran):
    return {int(name.split(".")[2]) for name in ran.tensors if name.startswith("model.layers.")}


@pytest.fixture
def experiment(run):
    """An experiment as it is: of what makes a run tiny, nothing that the experiment decides is given."""
    return lambda name, *overrides: run(f"experiment={name}", *overrides, without=EMULATOR)


@pytest.fixture
def pooled(notes):
    return {"all clients": torch.cat([oracle.read_rows(notes, 16, author) for author in AUTHORS])}


def test_fed_ft_tunes_the_weights_themselves(experiment, model_folder):
    ran = experiment("fed_ft")
    before = dict(oracle.load(model_folder()).named_parameters())
    assert blocks_of(ran) == set(ALL)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(ran.tensors) <= set(before)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in ran.tensors.items())
    whole = sum(4 * tensor.numel() for tensor in ran.tensors.values())
    assert ran.summary["bytes"]["up"] == ran.summary["bytes"]["down"] == 2 * 3 * whole
    for line in ran.rounds:
        assert line["evaluations"]["emulator_tuned"] == line["evaluations"]["plug_in"]


def test_fed_ft_tunes_all_but_what_is_in_neither_block_nor_end(experiment, model_folder):
    every = {name for name, _ in oracle.load(model_folder()).named_parameters()}
    assert every - set(experiment("fed_ft").tensors) == {"model.norm.weight"}


def test_fed_peft_tunes_lora_in_every_block(experiment):
    ran = experiment("fed_peft")
    assert blocks_of(ran) == set(ALL)
    assert all("lora_" in name for name in ran.tensors)
    assert ran.losses["emulator_zero_shot"] == ran.losses["full_zero_shot"]
    assert ran.losses["emulator_tuned"] == ran.losses["plug_in"] < ran.losses["full_zero_shot"]


def test_local_only_tunes_each_client_alone(run, only):
    """As in a federation of that client alone, with the steps of all rounds in one."""
    ran = run("experiment=local_only", "rounds=3", STEADY)
    alone = ran.summary["baselines"]["local_only"]
    assert set(alone["clients"]) == set(AUTHORS)
    assert alone["mean"]["loss"] == pytest.approx(sum(one["loss"] for one in alone["clients"].values()) / 3)
    assert [line["round"] for line in ran.rounds] == [0]
    assert ran.summary["bytes"]["down"] == ran.summary["bytes"]["up"] == 0
    assert ran.losses["plug_in"] == ran.losses["full_zero_shot"]
    for author in ("ann", "eve"):
        single = run(f"data.path={only(author)}", "rounds=1", "client.local_steps=6", STEADY)
        assert alone["clients"][author]["loss"] == pytest.approx(single.losses["plug_in"], rel=1e-6)


def test_local_only_beside_a_federation_leaves_it_alone(run):
    plain, both = run(), run("baselines.local_only=true")
    assert both.digest == plain.digest
    assert both.losses == plain.losses
    assert both.summary["bytes"] == plain.summary["bytes"]
    alone = run("experiment=local_only")
    assert both.summary["baselines"] == alone.summary["baselines"]


@pytest.mark.parametrize(
    ("name", "adapter", "kept", "tiny_too"),
    [("centralised", ALL, (), False), ("offsite_tuning", (0, 5), (1, 4), True)],
)
def test_pooled_text_is_tuned_by_one_plain_loop(name, adapter, kept, tiny_too, run, pooled, model_folder, held_out):
    """With the budget of the federation: two steps for each of three clients in each of two rounds."""
    without = () if tiny_too else EMULATOR
    chosen = (f"experiment={name}", STEADY)
    ran = run(*chosen, without=without)
    model, parameters = oracle.set_up(model_folder(), adapter=adapter, kept=kept, rank=8)
    start = run(*chosen, "rounds=0", without=without).tensors
    budget = {"rounds": 2, "steps": {"all clients": 6}, "pace": 6, "batch_size": 2}
    tuned = oracle.federate(model, parameters, start, pooled, make_optimizer=adam, **budget)
    assert oracle.largest_difference(ran.tensors, tuned) <= 1e-6
    assert blocks_of(ran) == set(adapter)
    oracle.write(parameters, tuned)
    loss = oracle.loss_of(model, oracle.read_rows(held_out, 16))
    assert ran.losses["emulator_tuned"] == pytest.approx(loss, rel=1e-6)
    assert {tuple(line["clients"]) for line in ran.rounds[1:]} == {("all clients",)}


def test_the_transfer_gap_is_the_distance_to_tuning_the_whole_model(run, experiment):
    ran = run("baselines.whole_model=true")
    whole = ran.summary["baselines"]["whole_model"]
    direct = experiment("fed_peft")
    assert whole["loss"] == direct.losses["plug_in"]
    assert ran.summary["transfer_gap"] == pytest.approx(ran.losses["plug_in"] - whole["loss"])
    plain = run()
    assert ran.digest == plain.digest
    assert ran.summary["bytes"] == plain.summary["bytes"]
    assert "transfer_gap" not in plain.summary
