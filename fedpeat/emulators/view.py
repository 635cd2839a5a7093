"""A model as a device sees it: adapter and emulator, or for comparison the full model in the same form."""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpeat.core import ModelError, StorageError
from fedpeat.emulators.bundle import Bundle
from fedpeat.emulators.manifest import TOKENIZER_FOLDER
from fedpeat.models import (
    LoadedModel,
    Split,
    build_skeleton,
    canonical_name,
    fill,
    find_blocks,
    keep_blocks,
    load_tokenizer,
    model_tensors,
)


@dataclass(frozen=True)
class EmulatedModel:
    """A model whose block positions are known by the full model's indices.

    Attributes:
        model: In eval mode; all parameters frozen.
        path: Where its blocks are (`"model.layers"`).
        sources: For each position, its block's index in the full model.
        adapter_positions: Positions of the adapter's blocks.
    """

    model: PreTrainedModel
    path: str
    sources: tuple[int, ...]
    adapter_positions: tuple[int, ...]


def build_emulated(bundle: Bundle, *, device: str | torch.device = "cpu") -> EmulatedModel:
    """Build a device's model from a bundle and nothing else.

    On a CPU, parameters are views of the bundle's mapped files: processes that build from one bundle share its memory
    as long as they only read.

    Args:
        bundle: From `open_bundle`.
        device: Where the model goes.

    Raises:
        ModelError: If its model class is neither transformers' own nor registered, or the tensors do not fit it.
        StorageError: If its files cannot be read.
    """
    stack, sources = bundle.stack, bundle.sources
    if any(position["changes"] for position in bundle.manifest["positions"]):
        found = "it holds changed blocks that this version cannot rebuild"
        raise ModelError(f"cannot build from bundle {bundle.folder}", found, "use the fedpeat version that wrote it")
    model = build_skeleton(bundle.manifest["model"])
    found = find_blocks(model)
    if found != stack:
        raise ModelError(f"cannot build from bundle {bundle.folder}", f"its blocks are at {found}, it says {stack}")
    keep_blocks(model, stack, sources)
    stored, aliases = _read(bundle, device), bundle.manifest["aliases"]
    tensors, holders = {}, {}
    for name, _, kind in model_tensors(model):
        canonical = name
        for path in stack.paths:
            canonical = canonical_name(canonical, path=path, sources=sources)
        holder = aliases.get(canonical, canonical)
        if holder not in stored:
            raise ModelError(f"cannot build from bundle {bundle.folder}", f"it holds no tensor {holder!r}")
        tensors[name] = stored[holder]
        if kind == "parameter":
            holders[name] = holder
    fill(model, tensors, tied=_ties(holders))
    return EmulatedModel(model, stack.path, sources, bundle.adapter_positions)


def _read(bundle: Bundle, device: str | torch.device) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name in bundle.manifest["files"]:
        if name.endswith(".safetensors") and "/" not in name:
            try:
                tensors |= load_file(bundle.folder / name, device=str(device))
            except (OSError, SafetensorError) as error:
                remedy = "fetch the bundle again, or write it anew"
                raise StorageError(f"cannot read {bundle.folder / name}", str(error), remedy) from error
    return tensors


def _ties(holders: dict[str, str]) -> dict[str, str]:
    first: dict[str, str] = {}
    return {name: first.setdefault(holder, name) for name, holder in holders.items()}


def bundle_tokenizer(bundle: Bundle) -> PreTrainedTokenizerBase:
    """Load the tokenizer that came with a bundle.

    Raises:
        ModelError: If the bundle has none.
    """
    return load_tokenizer(bundle.folder / TOKENIZER_FOLDER)


def full_view(loaded: LoadedModel, split: Split) -> EmulatedModel:
    """Show a full model in the same form: nothing dropped, every block at its own index; shares the model.

    Raises:
        ModelError: If the model has no blocks, or another number of them than the split.
    """
    stack = find_blocks(loaded.model)
    if stack.count != split.count:
        found = f"the model has {stack.count} blocks"
        raise ModelError(f"cannot view the model with a {split}", found, "make the split for this model")
    return EmulatedModel(loaded.model, stack.path, tuple(range(stack.count)), split.adapter)
