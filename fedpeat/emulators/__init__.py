"""What stands in for the middle?

A builder turns the middle's blocks into the emulator's (`uniform`, chained with `chain`); `make_emulator` applies one
to a full model, `stand_in` shows the result as the model that a device would have, and `full_view` a full model in the
same way.

To add one more: a function of flat keywords that returns a `Builder` (`Blocks -> Blocks`, a name, its settings), and a
line in `__all__`. One that changes a block's structure notes how in the block's `changes` and adds a kind to
`REBUILDS`. The laws of all builders are in `tests/laws/test_emulators.py`.
"""

from fedpeat.emulators.assemble import (
    EmulatedModel,
    Position,
    emulated_tensors,
    full_view,
    positions_of,
    put_together,
    stand_in,
)
from fedpeat.emulators.blocks import Block, Blocks, BuildContext, Builder, chain, make_emulator
from fedpeat.emulators.compression import ffn_channels, int4, int8, low_rank, magnitude_pruning
from fedpeat.emulators.selection import (
    ablation,
    angular_distance,
    block_influence,
    cka,
    first,
    gradient,
    last,
    listed,
    middle_out,
    random_blocks,
    shared,
    uniform,
)
from fedpeat.emulators.training import (
    EmulatorLora,
    Pace,
    Realigner,
    Realignment,
    Weights,
    distilled,
    harmonizers,
)
from fedpeat.emulators.unfreeze import check_map_back, check_sublayers, unfrozen_names

__all__ = [
    "Block",
    "Blocks",
    "BuildContext",
    "Builder",
    "EmulatedModel",
    "EmulatorLora",
    "Pace",
    "Position",
    "Realigner",
    "Realignment",
    "Weights",
    "ablation",
    "angular_distance",
    "block_influence",
    "chain",
    "check_map_back",
    "check_sublayers",
    "cka",
    "distilled",
    "emulated_tensors",
    "ffn_channels",
    "first",
    "full_view",
    "gradient",
    "harmonizers",
    "int4",
    "int8",
    "last",
    "listed",
    "low_rank",
    "magnitude_pruning",
    "make_emulator",
    "middle_out",
    "positions_of",
    "put_together",
    "random_blocks",
    "shared",
    "stand_in",
    "unfrozen_names",
    "uniform",
]
