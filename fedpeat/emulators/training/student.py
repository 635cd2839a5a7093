"""The emulated model in which an emulator's blocks train: fp32, with parameters of its own for what trains."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fedpeat.core import ConfigError, ModelError, shorten
from fedpeat.emulators.assemble import EmulatedModel
from fedpeat.emulators.blocks import Blocks
from fedpeat.emulators.harmonizer import DOORS
from fedpeat.models import SUBLAYERS, canonical_name, model_tensors, sublayers

PARTS = (*SUBLAYERS, "harmonizers")
"""What of a kept block can be trained."""


def trainable(blocks: Blocks, parts: Sequence[str]) -> dict[tuple[int, str], nn.Parameter]:
    """Return the parameters of the emulator's blocks that are to train, by source and name in the block.

    Args:
        blocks: The emulator; one module at several places is listed once.
        parts: Some of `PARTS`.

    Raises:
        ConfigError: If there are none, or one of the blocks is stored in a type that cannot be trained.
    """
    chosen: dict[tuple[int, str], nn.Parameter] = {}
    for source, module in {block.source: block.module for block in blocks.blocks}.items():
        for name, tensor, _ in model_tensors(module):
            if not tensor.is_floating_point() and tensor.dtype != torch.bool:
                raise ConfigError(
                    f"emulator stage distilled cannot train block {source}",
                    f"{name!r} is stored as {str(tensor.dtype).removeprefix('torch.')}",
                    "put the storing stage last in emulator.stages",
                )
        kinds = sublayers(module)
        for name, parameter in module.named_parameters():
            kind = "harmonizers" if name.split(".")[0] in DOORS else kinds[name]
            if kind in parts:
                chosen[source, name] = parameter
    if not chosen:
        raise ConfigError(
            "emulator stage distilled has nothing to train",
            f"of {shorten(parts)}, the emulator's {len(blocks)} blocks have nothing",
            "keep a block, or set train=null",
        )
    return chosen


def name_of(key: tuple[int, str]) -> str:
    """Return one name for source and name in the block."""
    return f"{key[0]}.{key[1]}"


def make_trainable(
    student: EmulatedModel, blocks: Blocks, wanted: Mapping[tuple[int, str], nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Turn an emulated model to fp32 and let `wanted` train in it, in memory of its own; all else stays frozen.

    Args:
        student: From `stand_in` of the blocks; changed in place, the blocks are not.
        blocks: The emulator. What is zero in the matrices of a pruned block stays zero.
        wanted: From `trainable`.

    Returns:
        What trains, by `name_of` its source and name in the block.

    Raises:
        ModelError: If something that is to train is also a part of another block.
    """
    student.model.float()
    pruned = {block.source for block in blocks.blocks if any(change["kind"] == "pruned" for change in block.changes)}
    owners: dict[int, set[int | None]] = {}
    for name, parameter in student.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(_within(name, student)[0])
    parameters = {}
    for name, parameter in student.model.named_parameters():
        source, rest = _within(name, student)
        if source is None or (source, rest) not in wanted:
            continue
        if owners[id(parameter)] != {source}:
            found = "it is the same tensor as one outside this block"
            raise ModelError(f"cannot train {rest!r} of block {source}", found, "use an emulator that is not trained")
        # A copy: in an fp32 model this is still the full model's own memory.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
        parameters[name_of((source, rest))] = parameter
        if source in pruned and parameter.ndim == 2:
            parameter.register_hook(_masked(parameter.detach() != 0))
    return parameters


def _within(name: str, view: EmulatedModel) -> tuple[int | None, str]:
    canonical = canonical_name(name, path=view.path, sources=view.sources)
    if not canonical.startswith(f"{view.path}."):
        return None, ""
    source, _, rest = canonical.removeprefix(f"{view.path}.").partition(".")
    return int(source), rest


def _masked(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient * mask
