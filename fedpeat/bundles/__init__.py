"""What does a device receive of the model, and how does it know that it is whole?

`write_bundle` puts adapter, emulator, embeddings, head, config and tokenizer into one content-addressed folder;
`open_bundle` checks such a folder; `build_emulated` makes a device's model from it alone.

`parts_of` cuts a bundle for a network, `BundleCache` is where a device puts it together.

To add one more file to it: `bundle.py` writes it, `manifest.py` allows its name.
"""

from fedpeat.bundles.build import build_emulated, bundle_tokenizer
from fedpeat.bundles.bundle import Bundle, open_bundle, write_bundle
from fedpeat.bundles.parts import PART_BYTES, BundleCache, Piece, is_version, parts_of, read_part

__all__ = [
    "PART_BYTES",
    "Bundle",
    "BundleCache",
    "Piece",
    "build_emulated",
    "bundle_tokenizer",
    "is_version",
    "open_bundle",
    "parts_of",
    "read_part",
    "write_bundle",
]
