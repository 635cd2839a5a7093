"""What does a device receive of the model, and how does it know that it is whole?

`write_bundle` puts adapter, emulator, embeddings, head, config and tokenizer into one content-addressed folder;
`open_bundle` checks such a folder; `build_emulated` makes a device's model from it alone.

To add one more file to it: `bundle.py` writes it, `manifest.py` allows its name.
"""

from fedpeat.bundles.build import build_emulated, bundle_tokenizer
from fedpeat.bundles.bundle import Bundle, open_bundle, write_bundle

__all__ = ["Bundle", "build_emulated", "bundle_tokenizer", "open_bundle", "write_bundle"]
