"""Layers that take a linear layer's place, and how they are put there: with real tensors or on the meta device."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core import ModelError
from fedpeat.emulators.changes import Change, Rebuild, replace_module
from fedpeat.emulators.compression.formats import INT4, INT8, SPARSE, whole
from fedpeat.emulators.compression.stored import Format, Shape, StoredLinear

Linear: TypeAlias = nn.Linear | Conv1D


class LowRank(nn.Module):
    """A linear layer as the product of two narrow ones, `up(down(x))`; the bias is `up`'s."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    @property
    def weight(self) -> torch.Tensor:
        """The product `(out, in)`, made anew: for model code that looks at a layer's weight."""
        return self.up.weight @ self.down.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `(..., out)` for inputs `(..., in)`."""
        return self.up(self.down(inputs))


def shape_of(layer: Linear) -> Shape:
    """Return `(out, in)`, whichever way round the weight lies."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def matrix_of(layer: nn.Module) -> torch.Tensor:
    """Return the weight `(out, in)` of a linear layer, or in fp32 that of what took its place."""
    if isinstance(layer, LowRank):
        return matrix_of(layer.up).float() @ matrix_of(layer.down).float()
    if isinstance(layer, StoredLinear):
        return layer.dense(torch.float32)
    if not isinstance(layer, Linear):
        raise ModelError(f"cannot use the weight of a {type(layer).__name__}", "it is no linear layer")
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def as_weight(layer: Linear, matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix `(out, in)` as `layer` would hold it."""
    return (matrix.T if isinstance(layer, Conv1D) else matrix).contiguous()


def _new_linear(inputs: int, outputs: int, like: torch.Tensor, *, bias: nn.Parameter | None) -> nn.Linear:
    empty = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=like.dtype)
    layer = empty.to_empty(device=like.device)
    layer.register_parameter("bias", bias)
    return layer


def _low_rank(layer: Linear, settings: Mapping[str, Any]) -> LowRank:
    outputs, inputs = shape_of(layer)
    rank = whole(settings, "rank", min(outputs, inputs))
    down = _new_linear(inputs, rank, layer.weight, bias=None)
    return LowRank(down, _new_linear(rank, outputs, layer.weight, bias=layer.bias))


def _narrow(layer: Linear, settings: Mapping[str, Any]) -> Linear:
    outputs, inputs = shape_of(layer)
    size = {"inputs": inputs, "outputs": outputs, **settings}
    new_inputs, new_outputs = whole(size, "inputs", inputs), whole(size, "outputs", outputs)
    bias = layer.bias
    if bias is not None and new_outputs != outputs:
        bias = nn.Parameter(bias.new_empty(new_outputs), requires_grad=False)
    if not isinstance(layer, Conv1D):
        return _new_linear(new_inputs, new_outputs, layer.weight, bias=bias)
    with torch.device("meta"):
        narrow = Conv1D(new_outputs, new_inputs)
    narrow.to(layer.weight.dtype)
    narrow.to_empty(device=layer.weight.device)
    narrow.register_parameter("bias", bias)
    return narrow


def _stored(layer_format: Format) -> Callable[[Linear, Mapping[str, Any]], nn.Module]:
    def make(layer: Linear, settings: Mapping[str, Any]) -> nn.Module:
        return StoredLinear(layer_format, shape_of(layer), settings, bias=layer.bias, like=layer.weight)

    return make


def _in_each(make: Callable[[Linear, Mapping[str, Any]], nn.Module]) -> Rebuild:
    """Return the function that puts a new layer in the place of each linear layer that a change names."""

    def rebuild(block: nn.Module, change: Change) -> None:
        for path, settings in change["modules"].items():
            layer = block.get_submodule(path)
            if not isinstance(layer, Linear):
                raise TypeError(f"{path!r} is a {type(layer).__name__}, no linear layer")
            replace_module(block, path, make(layer, settings))

    return rebuild


STRUCTURES: Mapping[str, Rebuild] = {
    "low_rank": _in_each(_low_rank),
    "ffn_channels": _in_each(_narrow),
    "int8": _in_each(_stored(INT8)),
    "int4": _in_each(_stored(INT4)),
    "sparse": _in_each(_stored(SPARSE)),
}
"""How a block gets its structure, for each kind of change that alters it."""
