import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpeat.core import ConfigError
from fedpeat.emulators import Block, Blocks, BuildContext, chain, ffn_channels, low_rank
from fedpeat.emulators.compression.channels import channel_sizes, find_mlps, largest
from fedpeat.emulators.compression.layers import matrix_of
from fedpeat.models import find_blocks, linear_layers, make_split
from tests.conftest import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

WITHOUT = {"mixtral", "odd"}
"""Families whose blocks have no such MLP: those are refused, see below."""
WITH = [kind for kind in FAMILIES if kind not in WITHOUT]


def slow_choice(producers, consumers, channels, count):
    """Indices of the largest channels, by a loop over channels and entries."""
    sizes = []
    for channel in range(channels):
        total = 0.0
        for matrix in producers:
            for part in range(0, len(matrix), channels):
                total += sum(float(value) ** 2 for value in matrix[part + channel])
        for matrix in consumers:
            total += sum(float(value) ** 2 for value in matrix[:, channel])
        sizes.append(total)
    order = sorted(range(channels), key=lambda channel: (-sizes[channel], channel))
    return sorted(order[:count])


def phi3():
    settings = {"num_hidden_layers": 4, "pad_token_id": 0, "vocab_size": 40, "max_position_embeddings": 64}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.Phi3ForCausalLM(hf.Phi3Config(**shape, **settings)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", WITH)
def test_the_choice_is_that_of_a_loop_over_channels(kind, miniature):
    model = miniature(kind).model
    block = find_blocks(model).of(model)[1]
    (mlp,) = find_mlps(block, 32)
    matrices = [[matrix_of(layer) for layer in layers.values()] for layers in (mlp.producers, mlp.consumers)]
    assert len(matrices[0]) == (2 if kind in {"llama", "mistral", "qwen3", "gemma2", "qwen2", "gemma3"} else 1)
    for count in (1, 10, mlp.channels):
        assert largest(channel_sizes(mlp), count).tolist() == slow_choice(*matrices, mlp.channels, count)


@torch.no_grad()
def zero_channels(block, kept):
    (mlp,) = find_mlps(block, 32)
    gone = torch.ones(mlp.channels, dtype=torch.bool)
    gone[kept] = False
    for layer in mlp.consumers.values():
        layer.weight[gone if isinstance(layer, hf.pytorch_utils.Conv1D) else (slice(None), gone)] = 0
    return mlp.channels


@pytest.mark.parametrize("kind", WITH)
@torch.no_grad()
def test_it_computes_what_the_whole_mlp_does_with_the_other_channels_at_zero(kind, emulate, make_ids):
    made = emulate(kind, ffn_channels(share=0.3))
    blocks = find_blocks(made.loaded.model).of(made.loaded.model)
    for block in made.blocks.blocks:
        (mlp,) = find_mlps(blocks[block.source], 32)
        kept = largest(channel_sizes(mlp), int(0.3 * mlp.channels))
        (small,) = find_mlps(block.module, 32)
        assert small.channels == len(kept)
        zero_channels(blocks[block.source], kept)
    expected = made.loaded.model(make_ids()).logits
    torch.testing.assert_close(made.view.model(make_ids()).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gates_and_values_in_one_layer(make_ids):
    model = phi3()
    block = model.model.layers[1]
    (mlp,) = find_mlps(block, 16)
    assert (list(mlp.producers), list(mlp.consumers), mlp.channels) == (["mlp.gate_up_proj"], ["mlp.down_proj"], 24)
    kept = largest(channel_sizes(mlp), 12)
    assert kept.tolist() == slow_choice([block.mlp.gate_up_proj.weight], [block.mlp.down_proj.weight], 24, 12)
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    context = BuildContext(model, make_split(4, first=1, last=1))
    made = ffn_channels(share=0.5)(Blocks((Block(1, block),), context=context)).blocks[0]
    assert made.changes[0]["modules"] == {"mlp.down_proj": {"inputs": 12}, "mlp.gate_up_proj": {"outputs": 24}}
    block.mlp.down_proj.weight[:, [channel for channel in range(24) if channel not in kept.tolist()]] = 0
    torch.testing.assert_close(made.module.mlp(states), block.mlp(states), atol=1e-5, rtol=1e-5)


def test_attention_and_norms_stay(emulate):
    made = emulate("gpt2", ffn_channels(share=0.5))
    original, block = made.loaded.model.transformer.h[1], made.blocks.blocks[0].module
    for (name, old), (_, new) in zip(original.named_parameters(), block.named_parameters(), strict=True):
        if not name.startswith("mlp."):
            assert torch.equal(old, new)
    assert (block.mlp.c_fc.nf, block.mlp.c_proj.nx) == (64, 64)
    assert block.mlp.c_fc.bias.shape == (64,)
    assert torch.equal(block.mlp.c_proj.bias, original.mlp.c_proj.bias)


def test_the_error_is_that_of_the_channels_left_out(emulate):
    made = emulate("llama", ffn_channels(share=0.5))
    lost = whole = 0.0
    for block in made.blocks.blocks:
        (mlp,) = find_mlps(made.loaded.model.model.layers[block.source], 32)
        squares = channel_sizes(mlp).square()
        whole += float(squares.sum())
        lost += float(squares.sort().values[:24].sum())
    assert made.blocks.notes[0]["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


def test_all_channels_are_the_model_itself(emulate, make_ids):
    made = emulate("opt", ffn_channels(share=1.0))
    assert torch.equal(made.view.model(make_ids()).logits, made.loaded.model(make_ids()).logits)
    assert made.blocks.notes[0]["error"] == 0.0


def test_one_channel_at_least(emulate):
    (mlp,) = find_mlps(emulate("llama", ffn_channels(share=0.001)).blocks.blocks[0].module, 32)
    assert mlp.channels == 1


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "MixtralDecoderLayer"), ("odd", "OddRung")])
def test_blocks_without_such_an_mlp(kind, name, emulate):
    with pytest.raises(ConfigError, match=f"cannot find the MLP of a {name}; it has no linear layers"):
        emulate(kind, ffn_channels())


def test_layers_that_were_compressed_before(emulate):
    stages = {"shrink": low_rank(), "fewer": ffn_channels()}
    with pytest.raises(ConfigError, match=r"cannot find the MLP of a LlamaDecoderLayer.*put this stage before those"):
        emulate("llama", chain(stages=stages))
    made = emulate("llama", chain(stages={"fewer": ffn_channels(), "shrink": low_rank()}))
    assert [change["kind"] for change in made.blocks.blocks[0].changes] == ["ffn_channels", "low_rank"]


class Squeezed(nn.Module):
    """An MLP with a norm over its inner channels."""

    def __init__(self):
        super().__init__()
        self.inward, self.inner, self.outward = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)


def test_something_else_that_depends_on_the_channels():
    block = nn.ModuleDict({"mlp": Squeezed()})
    with pytest.raises(ConfigError, match=r"'mlp\.inner\.weight' depends on the inner channels too"):
        find_mlps(block, 8)
    block.mlp.inner = nn.LayerNorm(8)
    (mlp,) = find_mlps(block, 8)
    assert (list(mlp.producers), list(mlp.consumers)) == (["mlp.inward"], ["mlp.outward"])


def test_an_mlp_as_wide_as_the_model_is_not_told_apart(miniature):
    block = miniature("opt", ffn_dim=32).model.model.decoder.layers[0]
    assert find_mlps(block, 32) == []


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_the_largest_in_their_order(sizes, data):
    count = data.draw(st.integers(1, len(sizes)))
    expected = sorted(sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))[:count])
    assert largest(torch.tensor(sizes, dtype=torch.float64), count).tolist() == expected


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), True, None])
def test_shares_that_make_no_sense(share):
    with pytest.raises(ConfigError, match=r"emulator=ffn_channels with share=.*; set emulator\.share"):
        ffn_channels(share=share)


def test_it_needs_the_model():
    with pytest.raises(ConfigError, match="call make_emulator"):
        ffn_channels()(Blocks((Block(0, nn.Identity()),)))
    assert ffn_channels(share=0.25).describe() == {"name": "ffn_channels", "share": 0.25}


def test_linear_layers_of_the_result_are_still_plain(emulate):
    made = emulate("falcon", ffn_channels())
    assert all(type(layer) is not nn.Module for layer in linear_layers(made.blocks.blocks[0].module).values())
    assert len(linear_layers(made.blocks.blocks[0].module)) == 4
