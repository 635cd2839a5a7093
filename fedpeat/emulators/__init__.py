"""What stands in for the middle?

A builder turns the middle's blocks into the emulator's (`uniform`, chained with `chain`); `write_bundle` puts emulator,
adapter, embeddings, head, config and tokenizer into one content-addressed folder; `open_bundle` checks such a folder;
`build_emulated` makes a device's model from it alone. `full_view` shows a full model in the same way.

To add one more: a function of flat keywords that returns a `Builder` (`Blocks -> Blocks`, a name, its settings), beside
`uniform` in `select.py` or in a file of its own, and a line in `__all__`; its laws are in `tests/laws/test_surgery.py`.
"""

from fedpeat.emulators.blocks import Block, Blocks, Builder, chain
from fedpeat.emulators.bundle import Bundle, open_bundle, write_bundle
from fedpeat.emulators.select import uniform
from fedpeat.emulators.view import EmulatedModel, build_emulated, bundle_tokenizer, full_view

__all__ = [
    "Block",
    "Blocks",
    "Builder",
    "Bundle",
    "EmulatedModel",
    "build_emulated",
    "bundle_tokenizer",
    "chain",
    "full_view",
    "open_bundle",
    "uniform",
    "write_bundle",
]
