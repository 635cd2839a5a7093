import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedpeat.core import PeftError, digest, product


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def moved(tuned, size=0.05):
    generator = torch.Generator().manual_seed(1)
    tuned.write(
        {name: tensor + size * torch.randn(tensor.shape, generator=generator) for name, tensor in tuned.read().items()}
    )
    return tuned


def folds_for(tuned, layers=None, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        pair.module: 0.05 * torch.randn(pair.shape, generator=generator)
        for pair in tuned.layout.pairs
        if layers is None or pair.module in layers
    }


def at_home(view, name):
    """The module of a view that the full model calls `name`."""
    block, rest = name.removeprefix(f"{view.path}.").split(".", 1)
    return view.model.get_submodule(f"{view.path}.{view.sources.index(int(block))}.{rest}")


def frozen(tuned):
    return digest(
        {name: tensor.detach() for name, tensor in tuned.model.named_parameters() if not tensor.requires_grad}
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_lora_layer_is_a_pair_of_the_full_models_name_and_shape(kind, view, full, attached):
    tuned, whole = attached(view(kind), kind="lora", rank=3, alpha=6), full(kind)
    layout, tensors = tuned.layout, tuned.read()
    assert {name for pair in layout.pairs for name in (pair.a, pair.b)} == set(tuned.names)
    assert layout.others == ()
    assert layout.rank == 3
    assert len(layout.pairs) == len(tuned.layers) == 3 * (7 if kind == "llama" else 4)
    for pair in layout.pairs:
        module = whole.model.get_submodule(pair.module)
        stored = tuple(module.weight.shape)
        assert pair.shape == (stored[::-1] if isinstance(module, Conv1D) else stored)
        assert tensors[pair.a].shape == (3, pair.shape[1])
        assert tensors[pair.b].shape == (pair.shape[0], 3)
        assert (pair.scaling, pair.r) == (2.0, None)
    assert any(pair.shape[0] != pair.shape[1] for pair in layout.pairs)
    assert isinstance(module, Conv1D) == (kind == "gpt2")


def test_scalings_and_ranks_are_the_layers_own(view, attached):
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 9}, "target_modules": ["q_proj"]}
    layout = attached(view(), kind="hf", type="LORA", options=options).layout
    assert [pair.scaling for pair in layout.pairs] == [6 / 3] * 3
    assert layout.rank == 9


def test_a_head_that_trains_is_no_factor(view, attached):
    layout = attached(view(), kind="lora", rank=2, train_head=True).layout
    assert layout.others == ("lm_head.weight",)
    assert layout.names(["other"]) == {"lm_head.weight"}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # HF peft takes LoRA's own biases for broken factors
@pytest.mark.parametrize(
    "method",
    [
        {"type": "LORA", "options": {"use_dora": True}},
        {"type": "LORA", "options": {"lora_bias": True}},
        {"type": "IA3"},
        {"kind": "full"},
    ],
    ids=["DoRA", "bias", "IA3", "full"],
)
def test_what_adds_more_than_a_product_is_no_pair_but_travels(method, view, attached):
    tuned = attached(view(), **{"kind": "hf", **method})
    assert tuned.layout.pairs == ()
    assert tuned.layout.others == tuned.names
    assert tuned.layout.rank == 0
    assert dict(tuned.layers) == {}
    with pytest.raises(PeftError, match="no LoRA layer of that name"):
        tuned.fold({"model.layers.0.self_attn.q_proj": torch.zeros(32, 32)})


def test_biases_that_train_beside_lora_are_others(view, attached):
    layout = attached(view("gpt2"), kind="hf", type="LORA", options={"bias": "lora_only"}).layout
    assert len(layout.pairs) == 3
    assert layout.others == tuple(f"transformer.h.{block}.attn.c_attn.bias" for block in (0, 1, 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fold_is_a_change_of_the_base_weight(kind, dtype, view, attached, make_ids):
    seen = view(kind, dtype=dtype)
    tuned = moved(attached(seen, kind="lora", rank=2))
    weights = {name: layer.get_base_layer().weight for name, layer in tuned.layers.items()}
    places, before = {name: weight.data_ptr() for name, weight in weights.items()}, frozen(tuned)
    plain, folds = logits(tuned.model, make_ids()), folds_for(tuned)

    changed = view(kind, dtype=dtype)
    for name, fold in folds.items():
        module = at_home(changed, name)
        change = fold.T if isinstance(module, Conv1D) else fold
        module.weight.data = (module.weight.float() + change).to(module.weight.dtype)
    byhand = attached(changed, kind="lora", rank=2)
    byhand.write(tuned.read())

    assert not tuned.folded
    tuned.fold(folds)
    assert tuned.folded
    assert torch.equal(logits(tuned.model, make_ids()), logits(byhand.model, make_ids()))
    assert not torch.equal(logits(tuned.model, make_ids()), plain)
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}

    tuned.fold({})
    assert not tuned.folded
    assert frozen(tuned) == before
    # The very same storage: on a device it is the bundle's file, which workers share.
    assert {name: weight.data_ptr() for name, weight in weights.items()} == places
    assert torch.equal(logits(tuned.model, make_ids()), plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folds_replace_each_other(dtype, view, attached):
    tuned, fresh = (attached(view(dtype=dtype), kind="lora", rank=2) for _ in range(2))
    first, second = tuned.layout.pairs[0].module, tuned.layout.pairs[1].module
    tuned.fold(folds_for(tuned, seed=3))
    tuned.fold(folds_for(tuned, [first], seed=4))
    fresh.fold(folds_for(tuned, [first], seed=4))
    assert frozen(tuned) == frozen(fresh)
    tuned.fold(folds_for(tuned, [second], seed=5))
    fresh.fold({})
    fresh.fold(folds_for(tuned, [second], seed=5))
    assert frozen(tuned) == frozen(fresh)
    tuned.fold({})
    assert frozen(tuned) == frozen(attached(view(dtype=dtype), kind="lora", rank=2))


def test_both_ends_take_the_same_folds(view, full, attached):
    device, server = attached(view(), kind="lora", rank=2), attached(full(), kind="lora", rank=2)
    assert device.layout == server.layout
    folds = folds_for(server)
    for tuned in (device, server):
        tuned.fold(folds)
    for name in folds:
        ours, theirs = (tuned.layers[name].get_base_layer().weight for tuned in (device, server))
        assert torch.equal(ours, theirs)


def test_folds_that_do_not_fit_are_refused_and_nothing_changes(view, attached):
    tuned = attached(view("gpt2"), kind="lora", rank=2)
    folds = folds_for(tuned)
    name = next(pair.module for pair in tuned.layout.pairs if pair.shape[0] != pair.shape[1])
    before = frozen(tuned)
    with pytest.raises(PeftError, match=r"transformer\.h\.2\.attn\.c_attn; no LoRA layer of that name is here"):
        tuned.fold({**folds, "transformer.h.2.attn.c_attn": folds["transformer.h.1.attn.c_attn"]})
    with pytest.raises(PeftError, match=r"\(out, in\)"):
        tuned.fold({**folds, name: folds[name].T})
    assert frozen(tuned) == before
    assert not tuned.folded


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_on_a_fold_leaves_no_trace_in_frozen_tensors(kind, view, attached, make_ids):
    tuned, ids = attached(view(kind), kind="lora", rank=2), make_ids()
    before, start, folds = frozen(tuned), digest(tuned.read()), folds_for(tuned)
    tuned.fold(folds)
    folded, kept = frozen(tuned), digest(folds)
    optimizer = torch.optim.SGD(tuned.parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tuned.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    assert digest(tuned.read()) != start
    assert frozen(tuned) == folded != before
    tuned.fold({})
    assert frozen(tuned) == before
    assert digest(folds) == kept


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_change_of_a_layer_is_its_fold_and_its_product(kind, view, attached):
    tuned = moved(attached(view(kind), kind="lora", rank=2))
    factors, folds = tuned.read(), folds_for(tuned)
    for pair in tuned.layout.pairs:
        torch.testing.assert_close(tuned.change_of(pair.module), product(pair, factors))
    tuned.fold(folds)
    for pair in tuned.layout.pairs:
        wanted = product(pair, factors) + folds[pair.module]
        torch.testing.assert_close(tuned.change_of(pair.module), wanted, atol=1e-6, rtol=1e-5)
