"""A model's tensors, taken apart into adapter, middle and the rest, and put together again by canonical name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedpeat.core import ModelError, Tensors, shorten
from fedpeat.models.blocks import BlockStack, find_blocks
from fedpeat.models.build import build_skeleton, fill
from fedpeat.models.names import block_index
from fedpeat.models.split import Split
from fedpeat.models.tensors import model_tensors, tied_names


@dataclass(frozen=True)
class Parts:
    """A full model's tensors by canonical name; views of the model's own, not copies.

    Attributes:
        adapter: Of the adapter's blocks.
        middle: Of the other blocks.
        rest: Of everything outside the blocks: embeddings, final norm, head.
    """

    adapter: Tensors
    middle: Tensors
    rest: Tensors

    @property
    def all(self) -> dict[str, torch.Tensor]:
        """All tensors together."""
        return {**self.adapter, **self.middle, **self.rest}


def take_apart(model: nn.Module, split: Split, *, stack: BlockStack | None = None) -> Parts:
    """Divide a full model's tensors by `split`.

    Raises:
        ModelError: If the model has no blocks, or another number of them.
    """
    stack = stack or find_blocks(model)
    if stack.count != split.count:
        found = f"{stack.path} has {stack.count}"
        raise ModelError(f"cannot take a model apart with a {split}", found, "make the split for this model")
    parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "middle": {}, "rest": {}}
    for name, tensor, _ in model_tensors(model):
        source = source_of(name, stack)
        role = "rest" if source is None else "adapter" if source in split.adapter else "middle"
        parts[role][name] = tensor.detach()
    return Parts(**parts)


def source_of(name: str, stack: BlockStack) -> int | None:
    """Return the block that a tensor of the full model belongs to, or None."""
    indices = (block_index(name, path=path) for path in stack.paths if name.startswith(f"{path}."))
    return next((index for index in indices if index is not None), None)


def assemble(description: Mapping[str, Any], parts: Parts) -> PreTrainedModel:
    """Build a full model from its description and its parts, without any file.

    Args:
        description: From `describe`.
        parts: Tensors of all blocks and the rest; what is tied among them stays tied.

    Raises:
        ModelError: If tensors are missing or mis-shaped, or the class is not known.
    """
    tensors = parts.all
    model = build_skeleton(description)
    fill(model, tensors, tied=tied_names(tensors))
    return model


def plug_in(model: nn.Module, tensors: Tensors) -> None:
    """Copy tensors (a tuned adapter's, say) into a full model, in place, by canonical name.

    Raises:
        ModelError: If the model has no tensor of that name and shape; nothing is changed then.
    """
    own = {name: tensor for name, tensor, _ in model_tensors(model)}
    remedy = "plug in tensors of the same model, by their canonical names"
    strangers = sorted(set(tensors) - set(own))
    if strangers:
        raise ModelError("cannot plug in", f"the model has no {shorten(strangers, 3)}", remedy)
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            found = f"{name!r} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            raise ModelError("cannot plug in", found, remedy)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
