"""Fp32 tensors that train inside a bf16 or fp16 model."""

from typing import Any

import torch
from torch import nn


def run_in_own_precision(model: nn.Module) -> None:
    """Make every call of a bf16 or fp16 `model` run under autocast of its dtype, so that fp32 tensors fit into it.

    Trainable tensors are fp32 (a step of 1e-4 vanishes in bf16), their neighbours are not: without autocast the two do
    not multiply. An fp32 model is left alone. Hooks, not a replaced `forward`: they survive a deep copy.
    """
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    if dtype is torch.float32:
        return
    autocast = _Autocast(next(model.parameters()).device.type, dtype)
    model.register_forward_pre_hook(autocast.enter)
    model.register_forward_hook(autocast.leave, always_call=True)


def make_uniform(model: nn.Module) -> None:
    """Undo `run_in_own_precision`: every parameter is of the model's own dtype again, and no autocast is needed."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            autocast = getattr(hook, "__self__", None)
            if isinstance(autocast, _Autocast):
                del hooks[key]
                for parameter in model.parameters():
                    if parameter.is_floating_point():  # weights stored in few bits stay as they are
                        parameter.data = parameter.detach().to(autocast.dtype)


class _Autocast:
    """A pair of hooks that puts a module's forward pass under autocast, an exception included."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.device_type = device_type
        self.dtype = dtype
        self.entered: list[torch.autocast] = []

    def enter(self, _module: nn.Module, _inputs: Any) -> None:
        context = torch.autocast(self.device_type, dtype=self.dtype)
        context.__enter__()
        self.entered.append(context)

    def leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.entered.pop().__exit__(None, None, None)
