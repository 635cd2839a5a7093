"""Settings to emulators: what stands in for the middle on each device, and which of its tensors train."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedpeat.bundles import Bundle, open_bundle, write_bundle
from fedpeat.core import ConfigError, write_json
from fedpeat.data import FederatedData, Rows, open_rows
from fedpeat.emulators import Blocks, BuildContext, Builder, EmulatedModel, make_emulator, unfrozen_names
from fedpeat.models import LoadedModel, Split
from simulations.building import built
from simulations.ladder import rungs

Settings = Mapping[str, Any]
NOTES = "emulator.json"
"""The file in a run's folder with what builders found out."""


def public_rows(data: FederatedData) -> Rows | None:
    """Return the text that emulators are built on: public rows, or else the server's own; None if it has neither."""
    for part in ("public", "train"):
        rows = open_rows(data.folder, "server", part)
        if len(rows):
            return rows
    return None


def context_of(
    settings: Settings,
    data: FederatedData,
    loaded: LoadedModel,
    split: Split,
    *,
    cache: Path,
    tell: Callable[[str, float | None], None],
) -> BuildContext:
    """Return what builders may use: the full model, public text, the caches."""
    rows = public_rows(data)
    return BuildContext(
        model=loaded.model,
        split=split,
        rows=None if rows is None else rows.batch(torch.arange(len(rows))),
        seed=settings["seed"],
        cache=cache,
        batch_size=settings["evaluation"]["batch_size"],
        tell=tell,
    )


def builders_of(settings: Settings) -> dict[str, Builder]:
    """Return the builder of each emulator: the run's own under `default`, those of single devices by their keys."""
    return {key: built(node) for key, node in rungs(settings).items()}


def emulators_of(settings: Settings, loaded: LoadedModel, split: Split, context: BuildContext) -> dict[str, Blocks]:
    """Return the blocks of each emulator, by key; on the evaluation's threads, whose number changes float sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings["evaluation"]["threads"])
    try:
        return {
            key: make_emulator(loaded, split=split, builder=builder, context=context)
            for key, builder in builders_of(settings).items()
        }
    finally:
        torch.set_num_threads(before)


def bundles_of(loaded: LoadedModel, split: Split, emulators: Mapping[str, Blocks], folder: Path) -> dict[str, Bundle]:
    """Write (or find) the bundle of each emulator."""
    written = {
        key: write_bundle(loaded, split=split, emulator=emulator, folder=folder) for key, emulator in emulators.items()
    }
    return {key: open_bundle(bundle.folder) for key, bundle in written.items()}


def write_notes(emulators: Mapping[str, Blocks], split: Split, folder: Path) -> None:
    """Keep what builders made and found out, in the run's folder: it never goes to a device."""
    plain = {
        key: {
            "builder": dict(emulator.description),
            "count": split.count,
            "adapter": list(split.adapter),
            "blocks": [
                {
                    "source": block.source,
                    "place": block.place,
                    "changes": [change["kind"] for change in block.changes],
                }
                for block in emulator.blocks
            ],
            "notes": [dict(note) for note in emulator.notes],
        }
        for key, emulator in emulators.items()
    }
    write_json(folder / NOTES, plain)


def unfrozen_of(settings: Settings, views: Mapping[str, EmulatedModel]) -> Sequence[str]:
    """Return which of the emulator's parameters train, by their names in it.

    Raises:
        ConfigError: If there is no emulator, or nothing in it that can train as asked.
    """
    client = settings["client"]
    if not client["unfreeze"]:
        return []
    if "default" not in views:
        raise ConfigError(
            f"client.unfreeze={client['unfreeze']} needs an emulator",
            "nothing of the middle was left out or changed, so that the adapter and it are the full model",
            "keep fewer blocks, or put the blocks that are to train into the adapter (model.split)",
        )
    return unfrozen_names(views["default"], client["unfreeze"], blocks=client["unfreeze_blocks"])
