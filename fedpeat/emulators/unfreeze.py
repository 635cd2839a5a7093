"""Which of an emulator's own tensors train on devices, and whether the full model has them too."""

from collections.abc import Sequence

import torch

from fedpeat.core import ConfigError, nearest, shorten
from fedpeat.emulators.assemble import EmulatedModel
from fedpeat.models import SUBLAYERS, sublayers


def check_sublayers(wanted: Sequence[str]) -> None:
    """Check names of sublayers.

    Raises:
        ConfigError: If one is unknown.
    """
    for name in wanted:
        if name not in SUBLAYERS:
            raise ConfigError(f"client.unfreeze={list(wanted)}", f"{name!r} is no sublayer", nearest(name, SUBLAYERS))


def unfrozen_names(view: EmulatedModel, wanted: Sequence[str], *, blocks: Sequence[int] | None = None) -> list[str]:
    """Return the names, in `view.model`, of the emulator's parameters that are to train.

    Args:
        view: An emulated model, or a full one.
        wanted: Sublayers: `attention`, `mlp`, `norm`.
        blocks: Of these blocks only, by the full model's index; None for all of the emulator's.

    Raises:
        ConfigError: If a sublayer is unknown, a block is not in the emulator, or nothing there can train.
    """
    check_sublayers(wanted)
    if not wanted:
        return []
    held = {position: source for position, source in enumerate(view.sources) if position not in view.adapter_positions}
    strangers = sorted(set(blocks or ()) - set(held.values()))
    if strangers:
        raise ConfigError(
            f"client.unfreeze_blocks names block {strangers[0]}",
            f"the emulator holds blocks {shorten(sorted(set(held.values())))}",
            "name some of these",
        )
    chosen = []
    stack, seen = view.model.get_submodule(view.path), set()
    for position, source in held.items():
        if source in seen or (blocks is not None and source not in blocks):
            continue  # a shared block's tensors are the same at all its places
        seen.add(source)
        block = stack.get_submodule(str(position))
        parameters = dict(block.named_parameters())
        kinds = sublayers(block)
        names = [name for name in parameters if kinds[name] in wanted]
        stored = [name for name in names if not parameters[name].is_floating_point()]
        if stored:
            raise ConfigError(
                f"client.unfreeze={list(wanted)} cannot train {stored[0]!r} of block {source}",
                f"it is stored as {str(parameters[stored[0]].dtype).removeprefix('torch.')}",
                "unfreeze what is not stored so (norm), or leave the storing stage of the emulator out",
            )
        chosen += [f"{view.path}.{position}.{name}" for name in names]
    if not chosen:
        raise ConfigError(
            f"client.unfreeze={list(wanted)} finds nothing to train",
            "the emulator has no such tensor",
            "set it to null",
        )
    return chosen


def check_map_back(emulated: EmulatedModel, full: EmulatedModel, names: Sequence[str]) -> list[str]:
    """Return the full model's names of unfrozen tensors, if what was learnt on them has one place there.

    Args:
        emulated: The emulated model.
        full: The full model, in the same form.
        names: The unfrozen tensors' names in the emulated model.

    Raises:
        ConfigError: If a block stands at several places, or a tensor is not in the full model or has another shape.
    """
    own, there = dict(emulated.model.named_parameters()), dict(full.model.named_parameters())
    mapped = []
    for name in names:
        position, _, rest = name.removeprefix(f"{emulated.path}.").partition(".")
        source = emulated.sources[int(position)]
        original = f"{full.path}.{source}.{rest}"
        found = _difference(own[name], there.get(original))
        if emulated.sources.count(source) > 1:
            found = f"block {source} stands at {emulated.sources.count(source)} places"
        if found:
            raise ConfigError(
                f"client.unfreeze_policy=map_back has no place for {original!r}",
                found,
                "choose client.unfreeze_policy=discard or local, or an emulator of unchanged blocks",
            )
        mapped.append(original)
    return mapped


def _difference(own: torch.Tensor, original: torch.Tensor | None) -> str:
    if original is None:
        return "the full model has no such tensor"
    if own.shape != original.shape:
        return f"it is {tuple(own.shape)}, the full model's is {tuple(original.shape)}"
    return ""
