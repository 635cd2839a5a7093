"""From a model and a builder to a bundle, in one step."""

from pathlib import Path

from fedpeat.bundles import Bundle, write_bundle
from fedpeat.emulators import BuildContext, Builder, make_emulator
from fedpeat.models import LoadedModel, Split


def bundled(
    loaded: LoadedModel, *, split: Split, builder: Builder, folder: Path, context: BuildContext | None = None
) -> Bundle:
    """Write the bundle of the emulator that `builder` makes."""
    emulator = make_emulator(loaded, split=split, builder=builder, context=context)
    return write_bundle(loaded, split=split, emulator=emulator, folder=folder)
