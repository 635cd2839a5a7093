"""The parts of a block: its linear layers, and what belongs to attention, MLP and norms."""

import re
from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

SUBLAYERS = ("attention", "mlp", "norm")

_ATTENTION = re.compile(r"attn|attention")
_NORM = re.compile(r"norm")


def linear_layers(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers of a block by name: `nn.Linear`, and `Conv1D` as in GPT-2.

    >>> list(linear_layers(nn.Sequential(nn.Linear(2, 2), nn.GELU())))
    ['0']
    """
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def sublayers(block: nn.Module) -> Mapping[str, str]:
    """Return what each parameter of a block belongs to, by name: one of `SUBLAYERS`.

    A norm is a module whose class is called so, wherever it stands (Qwen3 normalises inside its attention). Attention
    is what stands under a name or class that says so; all the rest is the MLP, experts included.

    >>> block = nn.ModuleDict({"self_attn": nn.Linear(2, 2, bias=False), "fc": nn.Linear(2, 2, bias=False)})
    >>> dict(sublayers(block))
    {'self_attn.weight': 'attention', 'fc.weight': 'mlp'}
    """
    kinds: dict[str, str] = {}
    found: dict[str, str] = {}
    for path, module in block.named_modules():
        parent = kinds.get(path.rpartition(".")[0], "mlp")
        kinds[path] = _kind_of(path.rpartition(".")[2], module, parent) if path else "mlp"
        for name, _ in module.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = kinds[path]
    return found


def _kind_of(name: str, module: nn.Module, parent: str) -> str:
    own = type(module).__name__
    if _NORM.search(own.lower()):
        return "norm"
    # A norm beside attention is often named after it ("post_attention_layernorm"): the class spoke first.
    says_so = any(_ATTENTION.search(word.lower()) for word in (name, own))
    return "attention" if parent == "attention" or says_so else parent
