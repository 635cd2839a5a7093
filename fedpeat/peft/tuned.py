"""A model with the tensors that train and travel picked out."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from fedpeat.core import Layout, Tensors, check_like
from fedpeat.peft.names import View
from fedpeat.peft.pairs import change_of, set_folds


@dataclass(frozen=True, eq=False)
class Tuned:
    """A model in which the trainable tensors, and only these, require gradients.

    They are fp32 whatever the model's dtype, and known by canonical name: `model.layers.11.mlp.up_proj.lora_A.weight`
    is in the full model's block 11, at whatever position that block stands here. `names` is the one answer to what
    travels.

    `model.train()` and `model.eval()` mean what they mean in HF: in training, dropout is on in the whole model, frozen
    blocks included, at the rates of the model's config.

    Attributes:
        model: The module to call: `model(input_ids=..., labels=...)`. With input prompts its logits are
            `(batch, prompt_tokens + tokens, vocabulary)`.
        names: Canonical names of the trainable tensors, sorted.
        parameters: The trainable tensors themselves, in that order.
        frozen_digest: Hash of the method's own frozen tensors (random projections, index tensors), which every
            participant must have alike; "" if there are none.
        identity_at_start: Whether attaching the method left the model's output unchanged.
        initial: What the trainable tensors were when the method was attached: alike for all participants of a run.
        layout: The trainable tensors by role.
        layers: The plain LoRA layers by canonical name: those that take folds.
        prompt_tokens: Length of the input prompt before the tokens, 0 without one.
        view: Where the blocks of `model` are and come from.
        wrapper: HF peft's own view of `model`, None for `full`.
        compiled: Compiled functions of this model, by key, kept as long as the model is.
    """

    model: nn.Module
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    frozen_digest: str
    identity_at_start: bool
    view: View
    initial: Tensors = field(default_factory=dict, repr=False)
    layout: Layout = field(default_factory=Layout, repr=False)
    layers: Mapping[str, LoraLayer] = field(default_factory=dict, repr=False)
    prompt_tokens: int = 0
    wrapper: PeftModel | None = field(default=None, repr=False)
    compiled: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _originals: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _folds: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the trainable tensors are."""
        return self.parameters[0].device

    def read(self) -> dict[str, torch.Tensor]:
        """Return fresh copies of the trainable tensors on the CPU, fp32, by canonical name."""
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in zip(self.names, self.parameters, strict=True)
        }

    def change_since(self, start: Tensors) -> dict[str, torch.Tensor]:
        """Return how far the trainable tensors are from `start`, on the CPU, by canonical name."""
        return {
            name: parameter.detach().cpu() - start[name]
            for name, parameter in zip(self.names, self.parameters, strict=True)
        }

    def write(self, tensors: Tensors) -> None:
        """Copy `tensors` into the trainable tensors.

        Raises:
            UpdateRefused: If names, shapes or dtypes differ; nothing is written then.
        """
        check_like(tensors, dict(zip(self.names, self.parameters, strict=True)), what="the travelling tensors")
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(tensors[name])

    def fold(self, folds: Tensors) -> None:
        """Make the base weight of each LoRA layer its original plus its fold `(out, in)`; without one, the original.

        Raises:
            PeftError: If a fold is for no LoRA layer of the adapter blocks, or of another shape.
        """
        set_folds(self.layers, self._originals, folds)
        self._folds.clear()
        self._folds.update(folds)

    @property
    def folded(self) -> bool:
        """Whether anything is folded into base weights now."""
        return bool(self._originals)

    def change_of(self, layer: str) -> torch.Tensor:
        """Return how far the weight of a plain LoRA layer is from its original, `(out, in)`, fp32: fold and factors."""
        return change_of(self.layers[layer], self._folds.get(layer))

    def only(self, names: Collection[str]) -> "Tuned":
        """Return the same model with only these of its tensors as the trainable ones; it shares everything else."""
        chosen = [(name, one) for name, one in zip(self.names, self.parameters, strict=True) if name in names]
        return replace(self, names=tuple(name for name, _ in chosen), parameters=tuple(one for _, one in chosen))
