"""Emulator parts that devices train: what the policies make of them, against plain loops."""

import pytest
import torch
from safetensors.torch import load_file

from fedpeat.core import ConfigError
from tests.oracles import whole_run as oracle

ADAPTER, KEPT = (0, 5), (1, 4)
ATTENTION = "client.unfreeze=[attention]"
CHOSEN = ("rounds=1", "client.local_steps=4", "client.learning_rate=0.01")


def of_blocks(names, *indices):
    return {name for name in names if name.startswith(tuple(f"model.layers.{index}." for index in indices))}


def plain_loop(folder, rows, start, *, part):
    """Adapter LoRA and one part of the kept blocks, trained by a plain loop; by canonical name."""
    model, parameters = oracle.set_up(folder, adapter=ADAPTER, kept=KEPT, rank=8)
    sources = sorted([*ADAPTER, *KEPT])
    for position, source in enumerate(sources):
        if source in KEPT:
            for name, parameter in model.model.layers[position].named_parameters():
                if part in name:
                    parameters[f"model.layers.{source}.{name}"] = parameter.requires_grad_(True)
    oracle.write(parameters, start)
    optimizer = torch.optim.AdamW([parameters[name] for name in sorted(parameters)], lr=0.01, eps=1e-4)
    oracle.train(model, parameters, rows, optimizer, first=0, steps=4, batch_size=2, client="ann")
    return oracle.read(parameters)


@pytest.mark.parametrize(("part", "inside"), [("attention", "self_attn"), ("mlp", "mlp"), ("norm", "layernorm")])
def test_one_client_is_a_plain_loop(part, inside, run, model_folder, only, held_out):
    path = only("ann")
    chosen = [*CHOSEN, f"data.path={path}", f"client.unfreeze=[{part}]", "client.optimizer_options={eps: 1e-4}"]
    start = run(*chosen, "rounds=0").tensors
    ran = run(*chosen)
    expected = plain_loop(model_folder(), oracle.read_rows(path, 16, "ann"), start, part=inside)
    assert oracle.largest_difference(ran.tensors, expected) <= 1e-6
    moved = of_blocks(ran.tensors, *KEPT)
    assert moved
    assert all(inside in name for name in moved)
    assert any(not torch.equal(ran.tensors[name], start[name]) for name in moved)


@pytest.mark.parametrize("policy", ["map_back", "discard", "local"])
def test_what_becomes_of_it_at_plug_in(policy, run, model_folder):
    ran = run(*CHOSEN, ATTENTION, f"client.unfreeze_policy={policy}", "export=true", "server.train=off")
    before = load_file(model_folder() / "model.safetensors")
    after = load_file(ran.folder / "export" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not of_blocks(changed, 2, 3), "dropped blocks have nothing to learn"
    learnt = {name for name in of_blocks(before, *KEPT) if "self_attn" in name}
    assert of_blocks(changed, *KEPT) == (learnt if policy == "map_back" else set())
    assert of_blocks(changed, *ADAPTER)
    if policy == "map_back":
        assert all(torch.equal(after[name], ran.tensors[name]) for name in learnt)


def test_only_map_back_changes_the_plug_in(run):
    without = run(*CHOSEN).summary["bytes"]
    found = {policy: run(*CHOSEN, ATTENTION, f"client.unfreeze_policy={policy}") for policy in ("local", "discard")}
    kept = {name: tensor for name, tensor in found["local"].tensors.items() if of_blocks([name], *KEPT)}
    shared = {name: tensor for name, tensor in found["discard"].tensors.items() if of_blocks([name], *KEPT)}
    start = run(*CHOSEN, ATTENTION, "rounds=0").tensors
    assert all(torch.equal(tensor, start[name]) for name, tensor in kept.items()), "what is local never arrives"
    assert any(not torch.equal(tensor, start[name]) for name, tensor in shared.items())
    assert found["local"].summary["bytes"]["up"] == without["up"]
    size = sum(tensor.numel() * 4 for tensor in shared.values())
    assert found["discard"].summary["bytes"]["up"] == without["up"] + 3 * size
    stored = [load_file(path) for path in (found["local"].folder / "clients").rglob("personal.*.safetensors")]
    assert len(stored) == 3
    assert all(set(tensors) == set(kept) for tensors in stored)
    # Devices trained the same steps, so the adapter they send is the same; what counts at plug-in is the adapter alone.
    assert found["local"].losses["plug_in"] == pytest.approx(found["discard"].losses["plug_in"], abs=1e-6)
    assert found["local"].losses["emulator_tuned"] != found["discard"].losses["emulator_tuned"]


def test_single_blocks_can_be_chosen(run):
    ran = run(*CHOSEN, "client.unfreeze=[norm]", "client.unfreeze_blocks=[4]")
    assert of_blocks(ran.tensors, 4)
    assert not of_blocks(ran.tensors, 1)


def test_a_recipe_that_trains_some_parts_trains_these_too(run):
    for policy in ("map_back", "local"):
        ran = run(*CHOSEN, ATTENTION, f"client.unfreeze_policy={policy}", "strategy=ffa_lora")
        assert ran.summary["status"] == "finished"
        assert bool(list((ran.folder / "clients").rglob("personal.*.safetensors"))) == (policy == "local")


SHARED = ["emulator=cka", "emulator.kept_blocks=2", "emulator.share=true", "data.server_share=0.2"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["client.unfreeze=[atention]"], "did you mean 'attention'"),
        ([ATTENTION, "client.unfreeze_policy=maybe"], "no such policy"),
        ([ATTENTION, "client.unfreeze_blocks=[2]"], "the emulator holds blocks 1, 4"),
        ([ATTENTION, "emulator.kept_blocks=4"], "needs an emulator"),
        ([ATTENTION, "control.kept_blocks={ann: 1}"], "needs one emulator"),
        ([ATTENTION, "client.unfreeze_policy=discard", "server.train=full", "data.server_share=0.2"], "server.train"),
        ([ATTENTION, *SHARED], "stands at 3 places"),
        ([ATTENTION, "emulator=int8"], "is stored as int8"),
        ([ATTENTION, "emulator=low_rank"], "the full model has no such tensor"),
        (["client.unfreeze=[mlp]", "emulator=ffn_channels"], "the full model's is"),
    ],
)
def test_what_cannot_be_had_is_refused(overrides, told, run):
    without = ("emulator.kept_blocks",) if overrides[-1].startswith("emulator=") else ()
    with pytest.raises(ConfigError, match=told):
        run(*CHOSEN, *overrides, without=without)


@pytest.mark.parametrize("emulator", [SHARED, ["emulator=low_rank"], ["emulator=ffn_channels"]])
def test_shared_and_compressed_blocks_can_train_on_devices(emulator, run):
    without = () if emulator is SHARED else ("emulator.kept_blocks",)
    ran = run(*CHOSEN, ATTENTION, *emulator, "client.unfreeze_policy=discard", without=without)
    assert of_blocks(ran.tensors, 1, 2, 3, 4)


def test_attention_maps_back_where_only_channels_were_left_out(run):
    ran = run(*CHOSEN, ATTENTION, "emulator=ffn_channels", without=("emulator.kept_blocks",))
    assert of_blocks(ran.tensors, 1, 2, 3, 4)
