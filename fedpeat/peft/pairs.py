"""LoRA layers by role: which travelling tensors are factors of which layer, and what is folded into its base weight."""

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedpeat.core import Layout, LoraPair, PeftError, Tensors, shorten
from fedpeat.peft.names import View
from fedpeat.peft.square import CORE, CoredFactor

ADAPTER_NAME = "default"
"""HF peft's name for its one set of tensors; no part of a canonical name."""


def plain_layers(model: nn.Module, view: View) -> dict[str, LoraLayer]:
    """Return the linear layers whose change is `scaling * B @ A` and nothing else, by canonical name.

    DoRA, biases of LoRA's own and other variants add more, and embeddings and convolutions have other shapes: their
    tensors travel like any others.
    """
    return {
        view.canonical(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and _is_plain(module)
    }


def _is_plain(module: LoraLayer) -> bool:
    return (
        ADAPTER_NAME in module.lora_A
        and isinstance(module.lora_A[ADAPTER_NAME], nn.Linear | CoredFactor)
        and not module.lora_variant
        and not module.lora_bias.get(ADAPTER_NAME, False)
        and module.base_layer.weight.dim() == 2  # type: ignore[union-attr]
    )


def layout_of(layers: Mapping[str, LoraLayer], names: tuple[str, ...]) -> Layout:
    """Return the travelling tensors `names` by role, given the plain LoRA layers by canonical name."""
    pairs = tuple(_pair(name, layer) for name, layer in sorted(layers.items()))
    inside = {name for pair in pairs for name in ((pair.r,) if pair.r else (pair.a, pair.b))}
    ranks = [layer.r[ADAPTER_NAME] for layer in layers.values()]
    return Layout(pairs, tuple(name for name in names if name not in inside), max(ranks, default=0))


def _pair(name: str, layer: LoraLayer) -> LoraPair:
    factor = layer.lora_A[ADAPTER_NAME]
    weight = layer.lora_B[ADAPTER_NAME].weight
    shape = (int(weight.shape[0]), int(factor.weight.shape[1]))  # type: ignore[index]
    cored = isinstance(factor, CoredFactor)
    return LoraPair(
        module=name,
        a=f"{name}.lora_A.{'basis' if cored else 'weight'}",
        b=f"{name}.lora_B.weight",
        scaling=float(layer.scaling[ADAPTER_NAME]),
        shape=shape,
        r=f"{name}.lora_A.{CORE}" if cored else None,
    )


def set_folds(layers: Mapping[str, LoraLayer], originals: dict[str, torch.Tensor], folds: Tensors) -> None:
    """Make each layer's base weight its original one plus its fold; layers without one get their original back.

    Args:
        layers: The plain LoRA layers by canonical name.
        originals: The base weights as they were, of layers with a fold; kept up to date.
        folds: What to add, fp32, `(out, in)`, by layer.

    Raises:
        PeftError: If a fold is for no such layer or of another shape; nothing is changed then.
    """
    unknown = sorted(set(folds) - set(layers))
    if unknown:
        raise PeftError(
            f"cannot fold into {shorten(unknown, 3)}", "no LoRA layer of that name is here", "use the run's own peft"
        )
    for name, change in folds.items():
        if tuple(change.shape) != _pair(name, layers[name]).shape:
            raise PeftError(
                f"cannot fold {tuple(change.shape)} into {name}",
                f"the layer's weight is {_pair(name, layers[name]).shape} (out, in)",
                "use the run's own peft",
            )
    for name, layer in layers.items():
        weight: nn.Parameter = layer.get_base_layer().weight  # type: ignore[assignment]
        if name in folds:
            original = originals.setdefault(name, weight.data)
            stored_across = bool(getattr(layer, "fan_in_fan_out", False))  # GPT-2's Conv1D holds (in, out)
            change = (folds[name].T if stored_across else folds[name]).to(original.device)
            weight.data = (original.float() + change).to(original.dtype)
        elif name in originals:
            weight.data = originals.pop(name)


@torch.no_grad()
def change_of(layer: LoraLayer, fold: torch.Tensor | None) -> torch.Tensor:
    """Return the whole change of a layer's weight, `(out, in)`, fp32, on the CPU: its factors and what is folded.

    Not the difference of base weights, whose rounding would make it one of full rank.
    """
    a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    change = (layer.scaling[ADAPTER_NAME] * (b.float() @ a.float())).cpu()  # type: ignore[union-attr, operator]
    return change if fold is None else change + fold.cpu()
