"""Every tensor of a model by name, and which names share one."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from fedpeat.core import Tensors

Kind = Literal["parameter", "buffer", "attribute"]


def model_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Kind]]:
    """Yield every tensor that `model` computes with: name, tensor, and what it is.

    More than a state dict: buffers that are not saved (rotary frequencies) and tensors held as plain attributes belong
    to it too. A tied tensor comes once for each of its names.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, "parameter"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, "buffer"
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value, "attribute"


def tied_names(tensors: Tensors) -> dict[str, str]:
    """Map each further name of a tensor to its first name: the same memory seen under several names.

    >>> weight = torch.ones(2, 2)
    >>> tied_names({"embed.weight": weight, "bias": torch.ones(2), "head.weight": weight})
    {'head.weight': 'embed.weight'}
    """
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied
