from dataclasses import replace

import pytest
import torch

from fedpeat.bundles import build_emulated, write_bundle
from fedpeat.core import ConfigError, ModelError, digest
from fedpeat.emulators import Block, BuildContext, Builder, distilled, harmonizers, stand_in
from fedpeat.emulators.training import distillation, loop
from fedpeat.emulators.training.harmonizers import copy_sharing
from fedpeat.models import model_tensors
from tests.fedpeat.emulators.training.conftest import state

QUICK = {"steps": 8, "learning_rate": 0.01, "batch_size": 4, "warmup": 2}


class StopHereError(Exception):
    pass


def counting(context, *, stop_after=None):
    """The same context, and how often training was told of."""
    told = []

    def tell(text, share):
        if text == "distilling the emulator":
            told.append(share)
            if len(told) == stop_after:
                raise StopHereError

    return replace(context, tell=tell), told


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_lowers_the_gap_on_rows_it_did_not_see(kind, workshop):
    shop = workshop(kind, rows=40)
    before = shop.fingerprint
    emulator = shop.make([2], distilled(**{**QUICK, "steps": 60}))
    (note,) = emulator.notes
    assert note["held_out_after"] < 0.8 * note["held_out_before"]
    assert {"builder": "distilled", "what": "distillation", "steps": 60}.items() <= note.items()
    assert [step for step, _ in note["loss"]] == list(range(2, 61, 2))
    assert note["loss"][-1][1] < note["loss"][0][1]
    assert shop.fingerprint == before
    assert emulator.blocks[0].changes == ({"kind": "distilled"},)
    assert not any(parameter.requires_grad for parameter in emulator.blocks[0].module.parameters())


def test_it_is_deterministic_and_follows_the_seed(workshop):
    shop = workshop()
    random = torch.get_rng_state()
    first, again = (shop.make([2], distilled(**QUICK)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert digest(state(first)) == digest(state(again))
    assert first.notes == again.notes
    other = shop.make([2], distilled(**QUICK), context=replace(shop.context, seed=1))
    assert digest(state(other)) != digest(state(first))


def test_held_out_rows_do_not_matter(workshop):
    shop = workshop(rows=20)
    other = {name: tensor.clone() for name, tensor in shop.context.rows.items()}
    other["input_ids"][18:] = 50
    changed = shop.make([2], distilled(**QUICK), context=replace(shop.context, rows=other))
    emulator = shop.make([2], distilled(**QUICK))
    assert digest(state(changed)) == digest(state(emulator))
    assert changed.notes[0]["held_out_after"] != emulator.notes[0]["held_out_after"]


def test_everything_else_of_the_emulated_model_stays(workshop):
    shop = workshop("opt")
    emulator = shop.make([2], distilled(**QUICK))
    plain, trained = (
        {name: tensor for name, tensor, _ in model_tensors(stand_in(shop.loaded.model, shop.split, one).model)}
        for one in (shop.make([2]), emulator)
    )
    changed = {name for name in plain if not torch.equal(plain[name], trained[name])}
    assert changed
    assert all(name.startswith("model.decoder.layers.1.") for name in changed)


@pytest.mark.parametrize("part", ["attention", "mlp", "norm"])
def test_only_some_parts_train(part, workshop):
    shop = workshop("llama")
    own = shop.make([2], distilled(**QUICK, train=[part])).blocks[0].module
    source = shop.loaded.model.model.layers[2]
    before = dict(source.named_parameters())
    changed = {name for name, parameter in own.named_parameters() if not torch.equal(parameter, before[name])}
    words = {"attention": "self_attn", "mlp": "mlp", "norm": "layernorm"}
    assert changed
    assert changed == {name for name in before if words[part] in name}
    assert all(dict(own.named_parameters())[name] is before[name] for name in set(before) - changed)


def test_harmonizers_train_on(workshop):
    shop = workshop(rows=40)
    poor = harmonizers(rank=4, damping=100.0)
    plain = shop.make([2], poor)
    emulator = shop.make([2], poor, distilled(**{**QUICK, "steps": 40}, train=["harmonizers"]))
    assert [change["kind"] for change in emulator.blocks[0].changes] == ["harmonizers", "distilled"]
    assert [note["builder"] for note in emulator.notes] == ["harmonizers", "distilled"]
    assert emulator.notes[1]["held_out_after"] < emulator.notes[1]["held_out_before"]
    before, after = state(plain), state(emulator)
    assert {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])} == {"before", "after"}


def test_a_second_distillation_is_no_second_change(workshop):
    emulator = workshop().make([2], distilled(**QUICK), distilled(**QUICK))
    assert emulator.blocks[0].changes == ({"kind": "distilled"},)
    assert emulator.notes[1]["held_out_before"] == emulator.notes[0]["held_out_after"]


def test_zeros_of_a_pruned_block_stay(workshop):
    def prune(blocks):
        def change(block):
            values = {
                name: torch.where(parameter.abs() < 0.05, 0.0, parameter)
                for name, parameter in block.module.named_parameters()
            }
            return replace(block, module=copy_sharing(block.module, values), changes=({"kind": "pruned"},))

        return blocks.changed(change)

    shop = workshop("gpt2")
    before = dict(shop.make([2], Builder("prune", {}, prune)).blocks[0].module.named_parameters())
    after = dict(shop.make([2], Builder("prune", {}, prune), distilled(**QUICK)).blocks[0].module.named_parameters())
    for name, parameter in after.items():
        if parameter.ndim == 2:
            assert (parameter[before[name] == 0] == 0).all()
            assert not torch.equal(parameter, before[name])
    assert (before["attn.c_attn.weight"] == 0).any()


def test_a_shared_block_is_trained_once(workshop, make_ids):
    def share(blocks):
        only = blocks.blocks[0]
        return blocks.having((only, Block(only.source, only.module, place=only.source + 1)))

    shop = workshop(rows=40)
    emulator = shop.make([2], Builder("share", {}, share), distilled(**{**QUICK, "steps": 40}))
    one, other = emulator.blocks
    assert one.module is other.module
    assert (one.place, other.place) == (2, 3)
    assert emulator.notes[0]["held_out_after"] < emulator.notes[0]["held_out_before"]


def test_a_bundle_gives_the_same_bits(workshop, make_ids, tmp_path):
    shop = workshop("llama", dtype="bfloat16")
    emulator = shop.make([2], harmonizers(rank=4), distilled(**QUICK))
    assert {tensor.dtype for tensor in state(emulator).values()} == {torch.bfloat16}
    bundle = write_bundle(shop.loaded, split=shop.split, emulator=emulator, folder=tmp_path)
    own = stand_in(shop.loaded.model, shop.split, emulator).model
    with torch.no_grad():
        assert torch.equal(build_emulated(bundle).model(make_ids()).logits, own(make_ids()).logits)


@pytest.mark.parametrize("weights", [{"lm_weight": 1.0, "hidden_weight": 0.0}, {"logit_weight": 1.0}])
def test_other_terms_train_too(weights, workshop):
    shop = workshop(rows=40)
    counted = (torch.arange(40)[:, None] + torch.arange(12)) % 90 + 3  # each token says which one comes next
    context = replace(shop.context, rows={"input_ids": counted, "labels": counted})
    (note,) = shop.make([2], distilled(**{**QUICK, "steps": 30}, **weights), context=context).notes
    assert note["loss"][-1][1] < note["loss"][0][1]
    if "lm_weight" in weights:
        assert note["lm_after"] < note["lm_before"]


def test_the_teacher_runs_once_on_each_row(workshop, monkeypatch):
    shop = workshop(rows=20)
    calls, heads = [], []
    shop.loaded.model.model.layers[1].register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    shop.loaded.model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    remembered = shop.make([2], distilled(**QUICK))
    assert (sum(calls), len(heads)) == (18 + 2 * 2, 0)
    monkeypatch.setattr(distillation, "REMEMBERED_BYTES", 0)
    calls.clear()
    again = shop.make([2], distilled(**QUICK))
    assert sum(calls) == 8 * 4 + 2 * 2
    assert again.notes[0]["held_out_after"] == pytest.approx(remembered.notes[0]["held_out_after"], rel=1e-3)


def test_a_finished_emulator_is_found_again(workshop, tmp_path):
    shop = workshop(cache=tmp_path)
    context, told = counting(shop.context)
    first = shop.make([2], distilled(**QUICK), context=context)
    assert len(told) == 8
    again = shop.make([2], distilled(**QUICK), context=context)
    assert len(told) == 8
    assert digest(state(again)) == digest(state(first))
    assert (again.notes, again.blocks[0].changes) == (first.notes, first.blocks[0].changes)
    assert {path.name for path in tmp_path.glob("*/*")} == {"result.json", "result.safetensors"}
    for other in ({"steps": 9}, {"train": ["mlp"]}, {"lm_weight": 0.1}):
        shop.make([2], distilled(**{**QUICK, **other}), context=context)
    shop.make([3], distilled(**QUICK), context=context)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("name", ["result.json", "result.safetensors"])
def test_a_damaged_result_is_made_anew(name, workshop, tmp_path):
    shop = workshop(cache=tmp_path)
    first = shop.make([2], distilled(**QUICK))
    (path,) = tmp_path.glob(f"*/{name}")
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[: len(raw) // 2])
    context, told = counting(shop.context)
    again = shop.make([2], distilled(**QUICK), context=context)
    assert len(told) == 8
    assert digest(state(again)) == digest(state(first))


def test_interrupted_it_ends_in_the_same_bits(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    shop = workshop()
    expected = shop.make([2], harmonizers(rank=2), distilled(**QUICK))
    for stop_after in (3, 2):
        context, _ = counting(replace(shop.context, cache=tmp_path), stop_after=stop_after)
        with pytest.raises(StopHereError):
            shop.make([2], harmonizers(rank=2), distilled(**QUICK), context=context)
    context, told = counting(replace(shop.context, cache=tmp_path))
    emulator = shop.make([2], harmonizers(rank=2), distilled(**QUICK), context=context)
    assert len(told) == 8 - 3 - 2
    assert digest(state(emulator)) == digest(state(expected))
    assert emulator.notes == expected.notes


def test_a_loss_out_of_bounds_is_told(workshop):
    with pytest.raises(ModelError, match="lower its learning_rate"):
        workshop().make([2], distilled(**{**QUICK, "learning_rate": 1e30}))


def test_what_cannot_be_trained_is_refused(workshop):
    def store(blocks):
        def change(block):
            module = copy_sharing(block.module)
            module.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
            return replace(block, module=module)

        return blocks.changed(change)

    shop = workshop()
    with pytest.raises(ConfigError, match=r"block 2; 'codes' is stored as int8; put the storing stage last"):
        shop.make([2], Builder("store", {}, store), distilled(**QUICK))
    for kept, parts in (([], None), ([2], ["harmonizers"])):
        with pytest.raises(ConfigError, match="nothing to train"):
            shop.make(kept, distilled(**QUICK, train=parts))


def test_text_is_needed(workshop):
    shop = workshop()
    with pytest.raises(ConfigError, match="needs public text on the server"):
        shop.make([2], distilled(), context=BuildContext(shop.loaded.model, shop.split))
    one = {name: tensor[:1] for name, tensor in shop.context.rows.items()}
    with pytest.raises(ConfigError, match="there is one row of public text"):
        shop.make([2], distilled(), context=replace(shop.context, rows=one))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'atention' is no part of a block; did you mean 'attention'"):
        distilled(train=["atention"])
    for wrong in ({"steps": 0}, {"hidden_weight": 0.0}, {"lm_weight": -1.0}):
        with pytest.raises(ConfigError, match="cannot train an emulator"):
            distilled(**wrong)
