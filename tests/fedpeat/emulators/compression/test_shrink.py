import pytest
import torch
from torch import nn

from fedpeat.core import ConfigError, ModelError
from fedpeat.emulators import (
    Block,
    Blocks,
    chain,
    ffn_channels,
    int4,
    int8,
    low_rank,
    magnitude_pruning,
    make_emulator,
    uniform,
)
from fedpeat.models import make_split

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDERS = [low_rank(), ffn_channels(), magnitude_pruning(), int8(), int4()]


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.name)
def test_an_empty_row(builder, miniature):
    stages = chain(stages={"select": uniform(kept_blocks=0), "shrink": builder})
    message = f"emulator={builder.name} has nothing to compress; the row of blocks is empty; keep some middle blocks"
    with pytest.raises(ConfigError, match=message):
        make_emulator(miniature("llama"), split=make_split(4), builder=stages)


def test_blocks_without_linear_layers():
    with pytest.raises(ConfigError, match="there are no such linear layers in a LayerNorm"):
        int8()(Blocks((Block(0, nn.LayerNorm(4)),)))


def test_what_was_stored_before_is_not_stored_again(miniature):
    stages = chain(stages={"one": int8(), "two": int4()})
    with pytest.raises(ConfigError, match="emulator=int4 has nothing to compress; there are no such linear layers"):
        make_emulator(miniature("llama"), split=make_split(4, first=1, last=1), builder=stages)


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(builder, value, miniature):
    loaded = miniature("llama")
    loaded.model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ModelError, match=r"cannot compress 'mlp\.up_proj' of block 2; its weights are not all finite"):
        make_emulator(loaded, split=make_split(4, first=1, last=1), builder=builder)


def test_a_note_says_what_came_of_it():
    blocks = Blocks((Block(0, nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8))),))
    nn.init.ones_(blocks.blocks[0].module[0].weight)
    (note,) = int8(block_size=64)(blocks).notes
    assert note == {
        "builder": "int8",
        "what": "compression",
        "parameters_before": 512 + 8 + 16,
        "parameters_after": 512 + 8 + 16,
        "bytes_before": 4 * (512 + 8 + 16),
        "bytes_after": 512 + 2 * 8 + 4 * (8 + 16),
        "error": pytest.approx(0.0, abs=4e-3),
    }


def test_zeros_are_stored_without_error():
    block = nn.Sequential(nn.Linear(6, 4))
    nn.init.zeros_(block[0].weight)
    made = int4()(Blocks((Block(0, block),)))
    assert made.notes[0]["error"] == 0.0
    assert torch.equal(made.blocks[0].module[0].weight, block[0].weight)
