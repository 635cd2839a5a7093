from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.bundles import build_emulated
from fedpeat.core import ConfigError, DataError
from fedpeat.emulators import Blocks, chain, cka, first, listed, make_emulator, shared, stand_in, uniform
from fedpeat.emulators.selection.clusters import linear_cka, merge, neighbour_similarities
from fedpeat.models import make_split, model_tensors
from tests.bundles import bundled

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gemma2")


def hsic(one, other):
    """The empirical Hilbert-Schmidt independence criterion with linear kernels, by its definition."""
    rows = len(one)
    centring = torch.eye(rows, dtype=torch.float64) - torch.ones(rows, rows, dtype=torch.float64) / rows
    return torch.trace((one @ one.T) @ centring @ (other @ other.T) @ centring) / (rows - 1) ** 2


def by_definition(one, other):
    return float(hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt())


@pytest.mark.parametrize("rows", [2, 5, 30])
@pytest.mark.parametrize("seed", range(3))
def test_cka_against_its_definition(rows, seed):
    random = torch.Generator().manual_seed(seed)
    one = torch.randn(rows, 7, generator=random, dtype=torch.float64)
    other = one[:, :4] @ torch.randn(4, 9, generator=random, dtype=torch.float64) + 3.0
    other += 0.5 * torch.randn(rows, 9, generator=random, dtype=torch.float64)
    assert linear_cka(one, other) == pytest.approx(by_definition(one, other), rel=1e-9)
    assert linear_cka(one, one) == pytest.approx(1.0)
    # It knows neither scale, nor place, nor rotation.
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=random, dtype=torch.float64))
    assert linear_cka(5 * one @ turn - 8, other) == pytest.approx(linear_cka(one, other), rel=1e-9)


def test_cka_of_rows_that_are_alike():
    same = torch.tensor([[0.1, 0.7, 0.3]]).repeat(5, 1)
    assert linear_cka(same, torch.randn(5, 2, generator=torch.Generator().manual_seed(0))) == 0.0
    assert linear_cka(same, same) == 0.0


def greedily(runs, similarities, count):
    """Merging step by step, as the method is told."""
    clusters = [[[place] for place in run] for run in runs]
    steps = []
    while sum(len(run) for run in clusters) > count:
        pairs = [(similarities[run[i][-1]], r, i) for r, run in enumerate(clusters) for i in range(len(run) - 1)]
        _, r, i = max(pairs, key=lambda pair: (pair[0], -pair[1], -pair[2]))
        steps.append((clusters[r][i][-1], clusters[r][i + 1][0]))
        clusters[r][i : i + 2] = [clusters[r][i] + clusters[r][i + 1]]
    return [cluster for run in clusters for cluster in run], steps


@given(st.data())
def test_merging_is_greedy(data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    runs, start = [], 1
    for length in lengths:
        runs.append(list(range(start, start + length)))
        start += length + 1
    # Few values, so that there are ties.
    similarities = {place: data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])) for run in runs for place in run}
    count = data.draw(st.integers(len(runs), sum(lengths)))
    clusters, merges = merge(runs, similarities, count)
    assert (clusters, merges) == greedily(runs, similarities, count)
    assert len(clusters) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_similarities_of_pooled_states(name, miniature, make_context):
    loaded = miniature(name, blocks=6)
    context = make_context(loaded, padded=True)
    pooled = []
    for ids, mask in zip(context.rows["input_ids"], context.rows["attention_mask"], strict=True):
        with torch.no_grad():
            told = loaded.model(input_ids=ids[mask.bool()][None], output_hidden_states=True, use_cache=False)
        pooled.append(torch.stack(told.hidden_states)[:, 0].double().mean(1))
    rows = torch.stack(pooled, dim=1)  # (states, rows, width)
    found = neighbour_similarities(context, context.rows, [1, 2, 4], "")
    assert found == pytest.approx({1: by_definition(rows[2], rows[3]), 2: by_definition(rows[3], rows[5])}, abs=1e-5)


def test_a_row_of_padding_is_not_compared(miniature, make_context):
    loaded = miniature("llama", blocks=6)
    context = make_context(loaded, padded=True, batch_size=7)
    more = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in context.rows.items()}
    more["attention_mask"][-1] = 0
    expected = neighbour_similarities(context, context.rows, [1, 2, 3], "")
    assert neighbour_similarities(context, more, [1, 2, 3], "") == pytest.approx(expected, abs=1e-6)


def test_blocks_that_do_nothing_join_what_they_repeat(miniature, make_context, kept_by, silence):
    loaded = miniature("llama", blocks=8)
    silence(loaded, [2, 3, 5])
    kept, note = kept_by(cka(kept_blocks=3, share=False), make_context(loaded))
    assert note["clusters"] == [[1, 2, 3], [4, 5], [6]]
    assert kept == note["kept"] == [2, 5, 6]  # the middle one of three; of two, the later
    assert note["dropped"] == [1, 3, 4]
    assert sorted(note["merges"]) == [[1, 2], [2, 3], [4, 5]]
    assert note["similarity"] == pytest.approx([1.0, 1.0, 1.0])
    assert (note["builder"], note["what"], note["unit"]) == ("cka", "clusters", "linear CKA")


def test_clusters_stay_between_blocks_of_the_adapter(miniature, make_context, kept_by, silence):
    loaded = miniature("gpt2", blocks=8)
    split = make_split(8, blocks=[0, 3, 6])
    silence(loaded, [2, 3, 4, 5])  # all of 1 to 5 leave the same
    context = make_context(loaded, split=split)
    _, note = kept_by(cka(kept_blocks=3, share=False), context)
    assert note["clusters"] == [[1, 2], [4, 5], [7]]
    with pytest.raises(ConfigError, match=r"divide the middle into 3 runs, .*; set emulator\.kept_blocks >= 3"):
        kept_by(cka(kept_blocks=2), context)
    # A block that another builder dropped divides nothing.
    split = make_split(8, first=1, last=1)
    both = chain(stages={"thin": listed(blocks=[1, 4, 6]), "cluster": cka(kept_blocks=1, share=False)})
    assert kept_by(both, make_context(loaded, split=split))[0] == [4]


@pytest.mark.parametrize("name", FAMILIES)
def test_sharing_gives_full_depth_without_further_tensors(name, miniature, make_context, tmp_path):
    loaded = miniature(name, blocks=7)
    context = make_context(loaded)

    def made(share):
        builder = cka(kept_blocks=2, share=share)
        return make_emulator(loaded, split=context.split, builder=builder, context=context)

    emulator, thin = made(share=True), made(share=False)
    assert [block.place for block in emulator.blocks] == [1, 2, 3, 4, 5]
    assert {id(block.module) for block in emulator.blocks} == {id(block.module) for block in thin.blocks}
    kept = [block.source for block in thin.blocks]
    nearest = [min(kept, key=lambda source: (abs(source - place), source)) for place in range(1, 6)]
    assert [block.source for block in emulator.blocks] == nearest
    assert emulator.notes[-1] == {
        "builder": "shared",
        "what": "source",
        "sources": {str(place): source for place, source in zip(range(1, 6), nearest, strict=True)},
    }
    deep, shallow = (stand_in(loaded.model, context.split, one) for one in (emulator, thin))
    assert deep.sources == (0, *nearest, 6)

    def memory(model):
        return {tensor.data_ptr() for _, tensor, kind in model_tensors(model) if kind == "parameter"}

    assert memory(deep.model) == memory(shallow.model)
    ids = context.rows["input_ids"]
    with torch.no_grad():
        assert not torch.allclose(deep.model(ids).logits, shallow.model(ids).logits)
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        grown = deep.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(
            grown, deep.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
        )
    assert grown.shape == (6, 14)


@torch.no_grad()
def test_a_shared_block_computes_as_the_kept_one(miniature, make_context, make_ids):
    loaded = miniature("llama", blocks=5)
    context = make_context(loaded)
    both = chain(stages={"keep": listed(blocks=[2]), "share": shared()})
    emulator = make_emulator(loaded, split=context.split, builder=both, context=context)
    found = stand_in(loaded.model, context.split, emulator).model(make_ids()).logits
    layers = loaded.model.model.layers
    for index in (1, 3):
        layers[index].load_state_dict(layers[2].state_dict())
    torch.testing.assert_close(found, loaded.model(make_ids()).logits)


def test_sharing_adds_nothing_to_a_bundle(miniature, make_context, tmp_path):
    loaded = miniature("qwen3", blocks=7)
    context = make_context(loaded)

    def bundle(share):
        builder = cka(kept_blocks=2, share=share)
        return bundled(loaded, split=context.split, builder=builder, folder=tmp_path / str(share), context=context)

    deep, thin = bundle(share=True), bundle(share=False)
    assert deep.payload_bytes == thin.payload_bytes
    model = build_emulated(deep)
    assert len(model.sources) == 7
    assert len(set(model.sources)) == 4
    emulator = make_emulator(loaded, split=context.split, builder=cka(kept_blocks=2), context=context)
    expected = stand_in(loaded.model, context.split, emulator)
    ids = context.rows["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.model(ids).logits, expected.model(ids).logits)


def places(blocks):
    return [(block.place, block.source) for block in blocks.blocks]


def test_sharing_after_any_choice(miniature, make_context, middle_of):
    context = make_context(miniature("gpt2", blocks=9))
    row = middle_of(context)
    both = chain(stages={"keep": uniform(kept_blocks=2), "share": shared()})
    assert places(both(row)) == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 7), (6, 7), (7, 7)]
    tie = chain(stages={"keep": listed(blocks=[2, 4]), "share": shared()})
    assert places(tie(row)) == [(1, 2), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4)]
    assert places(shared()(row)) == [(index, index) for index in range(1, 8)]
    # What was done to a block goes with it.
    thin = first(kept_blocks=1)(row)
    changed = thin.having((replace(thin.blocks[0], changes=({"kind": "pruned"},)),))
    assert [block.changes for block in shared()(changed).blocks] == [({"kind": "pruned"},)] * 7
    assert shared()(both(row)).blocks == both(row).blocks


def test_sharing_reaches_over_the_adapter(miniature, make_context, middle_of):
    context = make_context(miniature("gpt2", blocks=8), split=make_split(8, blocks=[0, 3, 7]))
    both = chain(stages={"keep": listed(blocks=[2, 6]), "share": shared()})
    assert places(both(middle_of(context))) == [(1, 2), (2, 2), (4, 2), (5, 6), (6, 6)]


def test_sharing_what_is_not_there(miniature, make_context, middle_of):
    row = middle_of(make_context(miniature("gpt2", blocks=5)))
    with pytest.raises(ConfigError, match="cannot share blocks in the emulator; it has none"):
        shared()(uniform(kept_blocks=0)(row))
    with pytest.raises(ConfigError, match="emulator=shared"):
        shared()(Blocks(row.blocks))
    whole = make_context(miniature("gpt2", blocks=4), split=make_split(4, blocks="all"))
    assert shared()(middle_of(whole)).blocks == ()


def test_similarities_are_worked_out_once(miniature, make_context, kept_by, count_passes, tmp_path):
    loaded = miniature("gpt2", blocks=6)
    passes = count_passes(loaded.model)
    context = make_context(loaded, cache=tmp_path)
    _, note = kept_by(cka(kept_blocks=2, share=False), context)
    assert len(passes) == 2
    assert kept_by(cka(kept_blocks=2, share=False), context)[1] == note
    kept_by(cka(kept_blocks=3), context)
    assert len(passes) == 2
    (path,) = tmp_path.glob("*/value.json")
    path.write_text("[", encoding="utf-8")
    assert kept_by(cka(kept_blocks=2, share=False), context)[1] == note
    assert len(passes) == 4


def test_too_little_to_compare(miniature, make_context, kept_by):
    with pytest.raises(ConfigError, match=r"on 1 public rows; .*; set emulator\.rows >= 2"):
        cka(kept_blocks=1, rows=1)
    with pytest.raises(ConfigError, match=r"emulator\.kept_blocks=0 for an empty middle"):
        cka(kept_blocks=0)
    context = make_context(miniature("gpt2", blocks=5))
    with pytest.raises(ConfigError, match="needs public text"):
        kept_by(cka(kept_blocks=2), replace(context, rows=None))
    with pytest.raises(ConfigError, match="cannot keep 4 middle blocks; there are 3"):
        kept_by(cka(kept_blocks=4), context)
    with pytest.raises(DataError, match="fewer than two public rows"):
        kept_by(cka(kept_blocks=2), replace(context, rows={name: one[:1] for name, one in context.rows.items()}))
    mask = torch.zeros(6, 10, dtype=torch.long)
    mask[0] = 1
    with pytest.raises(DataError, match="fewer than two public rows"):
        kept_by(cka(kept_blocks=2), replace(context, rows={**context.rows, "attention_mask": mask}))
