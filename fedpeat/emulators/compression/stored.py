"""A linear layer whose weight is kept in a smaller form and made anew whenever it is needed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fedpeat.core import Tensors

Shape = tuple[int, int]
Layout = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


class Format(NamedTuple):
    """A form in which a weight matrix `(out, in)` is kept: tensors by name, and the way there and back.

    Attributes:
        layout: Shape and settings to each tensor's dtype (None: the weight's own) and shape. It raises `ValueError` or
            `TypeError` on settings that make no sense, whoever they come from.
        encode: Matrix and settings to the tensors.
        decode: Tensors, shape, settings and a dtype to the matrix in that dtype.
        weights: Shape and settings to the number of weights that are kept.
    """

    layout: Callable[[Shape, Mapping[str, Any]], Layout]
    encode: Callable[[torch.Tensor, Mapping[str, Any]], dict[str, torch.Tensor]]
    decode: Callable[[Tensors, Shape, Mapping[str, Any], torch.dtype], torch.Tensor]
    weights: Callable[[Shape, Mapping[str, Any]], int]


class StoredLinear(nn.Module):
    """A frozen linear layer that keeps its weight in a `Format`.

    It computes in the dtype of its input, or in autocast's where that is on. Between the forward and the backward pass
    only the stored tensors lie in memory: the matrix is made for a product and dropped, once in each direction.

    Args:
        layer_format: The form.
        shape: `(out, in)`.
        settings: The form's own, JSON-like.
        bias: `(out,)`, which stays as it is, or None.
        like: A tensor whose dtype and device new ones take.
    """

    def __init__(
        self,
        layer_format: Format,
        shape: Shape,
        settings: Mapping[str, Any],
        *,
        bias: nn.Parameter | None,
        like: torch.Tensor,
    ) -> None:
        super().__init__()
        self.format = layer_format
        self.out_features, self.in_features = shape
        self.settings = dict(settings)
        self.dtype = like.dtype
        for name, (dtype, size) in layer_format.layout(shape, self.settings).items():
            empty = torch.empty(size, dtype=dtype or like.dtype, device=like.device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def shape(self) -> Shape:
        """Return `(out, in)`."""
        return self.out_features, self.in_features

    @property
    def kept_weights(self) -> int:
        """How many weights are kept, however many bits each takes."""
        return self.format.weights(self.shape, self.settings)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix `(out, in)`, made anew: for model code that looks at a layer's weight."""
        return self.dense(self.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix `(out, in)` in `dtype`."""
        stored = {name: tensor for name, tensor in self._parameters.items() if name != "bias" and tensor is not None}
        return self.format.decode(stored, self.shape, self.settings, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `(..., out)` for inputs `(..., in)`."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return _Product.apply(inputs, bias, self)

    def extra_repr(self) -> str:
        """Return what `print` says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.settings}"


class _Product(torch.autograd.Function):
    """`x @ dense.T + bias`, which keeps nothing for the backward pass but the layer, and makes the matrix again."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, bias: torch.Tensor | None, layer: StoredLinear) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, layer.dense(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # the base class's takes anything
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        to_inputs = gradient @ ctx.layer.dense(gradient.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0) if ctx.needs_input_grad[1] else None
        return to_inputs, to_bias, None
