"""How are kept blocks made smaller?

By fewer numbers (`low_rank`, `ffn_channels`, `magnitude_pruning`) or by fewer bits a number (`int8`, `int4`); `chain`
puts several after one another. Each gives copies of the blocks another structure, which a device makes again from the
manifest's `changes` before it fills in the tensors.

To add one more: a layer in `layers.py` with its kind in `STRUCTURES` (or a `Format` in `formats.py` for one that only
stores weights otherwise), and a function of flat keywords that calls `compress`.
"""

from fedpeat.emulators.changes import REBUILDS
from fedpeat.emulators.compression.channels import ffn_channels
from fedpeat.emulators.compression.layers import STRUCTURES, LowRank
from fedpeat.emulators.compression.low_rank import low_rank
from fedpeat.emulators.compression.pruning import magnitude_pruning
from fedpeat.emulators.compression.storage import int4, int8
from fedpeat.emulators.compression.stored import StoredLinear

REBUILDS.update(STRUCTURES)

__all__ = ["LowRank", "StoredLinear", "ffn_channels", "int4", "int8", "low_rank", "magnitude_pruning"]
