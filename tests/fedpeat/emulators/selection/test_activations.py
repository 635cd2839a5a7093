from dataclasses import replace

import pytest
import torch

from fedpeat.core import ConfigError, DataError, ModelError
from fedpeat.emulators import Blocks
from fedpeat.emulators.selection.activations import (
    batches,
    evaluating,
    loss_sum,
    progress,
    public_rows,
    scored_tokens,
    see_states,
    skipping,
)
from fedpeat.models import find_blocks
from tests.oracles.skipped_blocks import skipping as skipping_in_tests

FAMILIES = ("gpt2", "opt", "bloom", "llama", "qwen3", "gemma2", "mixtral", "odd")


def inputs(context):
    return {name: tensor for name, tensor in context.rows.items() if name != "labels"}


def seen(context, indices):
    """All that a watcher sees, joined over batches: `{index: (entering, leaving, real)}`."""
    parts = {index: [] for index in indices}
    see_states(context, context.rows, indices, lambda index, *found: parts[index].append(found), telling="")
    return {index: [torch.cat(one) for one in zip(*found, strict=True)] for index, found in parts.items()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "odd"])
def test_states_are_those_that_the_model_tells(name, padded, miniature, make_context):
    loaded = miniature(name, blocks=5)
    context = make_context(loaded, padded=padded)
    with torch.no_grad():
        told = loaded.model(**inputs(context), output_hidden_states=True, use_cache=False).hidden_states
    found = seen(context, [1, 3])
    assert list(found) == [1, 3]
    for index, (entering, leaving, real) in found.items():
        expected = context.rows["attention_mask"].bool() if padded else torch.ones(6, 10, dtype=torch.bool)
        assert torch.equal(real, expected)
        # Batches of another size change float sums, and what padding sees is no one's concern.
        torch.testing.assert_close(entering[real], told[index][real], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(leaving[real], told[index + 1][real], atol=1e-5, rtol=1e-4)


def test_states_of_a_class_that_nobody_knows(miniature, make_context):
    loaded = miniature("odd", blocks=4)
    context = make_context(loaded)
    found = seen(context, [1, 2])
    # Its blocks are followed by gains that stand beside them.
    torch.testing.assert_close(found[1][1] * loaded.model.tower.gains[1], found[2][0])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_skipping(name, miniature, make_context):
    loaded = miniature(name, blocks=5)
    context = make_context(loaded)
    whole = loaded.model(**inputs(context)).logits
    with skipping(context, [1, 3]):
        found = loaded.model(**inputs(context)).logits
    with skipping_in_tests(find_blocks(loaded.model).of(loaded.model), [1, 3]):
        assert torch.equal(found, loaded.model(**inputs(context)).logits)
    assert torch.equal(loaded.model(**inputs(context)).logits, whole)
    assert not torch.allclose(found, whole)


def test_all_is_put_back_when_something_fails(miniature, make_context):
    loaded = miniature("llama", blocks=4)
    loaded.model.train()
    loaded.model.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in loaded.model.named_modules()}

    def fail(*_):
        assert not any(module.training for module in loaded.model.modules())
        raise RuntimeError("seen enough")

    context = make_context(loaded)
    with pytest.raises(RuntimeError, match="seen enough"):
        see_states(context, context.rows, [1, 2], fail, telling="")
    with pytest.raises(RuntimeError, match="again"), skipping(context, [1]), evaluating(loaded.model):
        raise RuntimeError("again")
    assert {name: module.training for name, module in loaded.model.named_modules()} == before
    assert not any(module._forward_hooks for module in loaded.model.modules())


@torch.no_grad()
def test_the_loss_is_the_models_own(miniature, make_context):
    loaded = miniature("gemma2", blocks=4)
    context = make_context(loaded, rows=3)
    tokens = scored_tokens(context.rows)
    assert tokens == 3 * 9
    own = loaded.model(**context.rows).loss
    torch.testing.assert_close(loss_sum(context, context.rows) / tokens, own.double())


@torch.no_grad()
def test_padding_is_not_scored(miniature, make_context):
    loaded = miniature("llama", blocks=4)
    context = make_context(loaded, padded=True)
    careless = {**context.rows, "labels": context.rows["input_ids"]}  # labels on padding, too
    alone, tokens = 0.0, 0
    for ids, mask in zip(careless["input_ids"], careless["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        alone += float(loaded.model(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
        tokens += row.shape[1] - 1
    assert scored_tokens(careless) == scored_tokens(context.rows) == tokens
    assert float(loss_sum(context, careless)) == pytest.approx(alone, rel=1e-5)
    # Padding on the left: nothing is predicted from it.
    left = {name: tensor.flip(1) for name, tensor in careless.items()}
    assert scored_tokens(left) == tokens


def test_text_without_a_label_is_refused(make_ids):
    ids = make_ids(2, 6)
    unlabelled = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(DataError, match="none of 2 public rows has a label"):
        scored_tokens(unlabelled)
    unlabelled["labels"][:, 0] = 5  # the first token follows nothing
    with pytest.raises(DataError):
        scored_tokens(unlabelled)


def test_rows_are_taken_at_even_distances(miniature, make_context):
    loaded = miniature("gpt2", blocks=4)
    context = make_context(loaded, rows=9, padded=True)
    blocks = Blocks((), context=context)
    chosen = public_rows(blocks, "ablation", 5)
    assert set(chosen) == {"input_ids", "labels", "attention_mask"}
    for name, tensor in chosen.items():
        assert torch.equal(tensor, context.rows[name][::2])
    everything = public_rows(blocks, "ablation", 64)
    assert torch.equal(everything["input_ids"], context.rows["input_ids"])
    assert [len(batch["labels"]) for batch in batches(context, everything)] == [4, 4, 1]


@pytest.mark.parametrize("rows", [None, {"input_ids": torch.zeros(0, 4)}])
def test_no_public_text_is_told(rows, miniature, make_context):
    context = make_context(miniature("gpt2"), rows=1)
    blocks = Blocks((), context=replace(context, rows=rows))
    with pytest.raises(ConfigError, match="emulator=ablation needs public text"):
        public_rows(blocks, "ablation", 4)


def test_progress_is_told(miniature, make_context):
    told = []
    context = make_context(miniature("gpt2"), tell=lambda text, share: told.append((text, share)))
    see_states(context, context.rows, [1], lambda *_: None, telling="looking")
    assert told == [("looking", 0.0), ("looking", 0.5), ("looking", 1.0)]
    progress(context, "more", 4)()
    assert told[-1] == ("more", 0.25)


def test_blocks_that_are_called_otherwise_are_refused(miniature, make_context):
    loaded = miniature("odd", blocks=3)
    tower = loaded.model.tower

    def by_name(stream, cache):
        for rung in tower.rungs:
            stream = rung(stream=stream, cache=cache)
        return stream

    tower.forward = by_name
    context = make_context(loaded)
    with pytest.raises(ModelError, match="it is called with stream, cache"):
        seen(context, [1])
    with pytest.raises(ModelError, match="it is called with stream, cache"), skipping(context, [1]):
        loaded.model(**inputs(context))


def test_states_of_another_shape_are_refused(miniature, make_context):
    loaded = miniature("odd", blocks=3)
    loaded.model.tower.rungs[1].forward = lambda stream, cache: stream.flatten(0, 1)
    with pytest.raises(ModelError, match=r"they are \(40, 32\) for \(4, 10\) tokens"):
        seen(make_context(loaded), [1])
