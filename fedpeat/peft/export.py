"""Write what was trained in HF peft's layout, for `PeftModel.from_pretrained`."""

from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from peft import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from fedpeat.core import product, write_tensors
from fedpeat.peft.names import View
from fedpeat.peft.pairs import ADAPTER_NAME
from fedpeat.peft.tuned import Tuned

_PREFIX = "base_model.model."
_ROUNDING = 1e-6
"""A direction of a change this much smaller than its largest is rounding of fp32, not tuning."""


def export_adapter(tuned: Tuned, folder: str | Path, base_name: str) -> bool:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the full model.

    Args:
        tuned: A tuned model, the full one or an emulated one: blocks are named as in the full model either way.
        folder: Where to write.
        base_name: What the config names as its base: a hub id or a folder.

    Returns:
        Whether there was anything to write: a model that trains its own weights has no PEFT tensors.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    wrapper, view = tuned.wrapper, tuned.view
    if wrapper is None:
        return False
    tensors = get_peft_model_state_dict(wrapper, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    named = {_rename(name, view): tensor.detach().clone() for name, tensor in tensors.items()}
    config = deepcopy(wrapper.peft_config[ADAPTER_NAME])
    if tuned.folded or any(pair.r for pair in tuned.layout.pairs):
        named |= _whole_changes(tuned)
        named = {name: tensor for name, tensor in named.items() if not name.endswith((".basis", ".core"))}
        rank = max(len(tensor) for name, tensor in named.items() if ".lora_A." in name)
        plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        for field, value in {**plain, "init_lora_weights": True}.items():
            setattr(config, field, value)
    config.base_model_name_or_path = base_name
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(getattr(config, field, None), set | list):
            setattr(config, field, _targets(tuned, getattr(config, field)))
    head = _trained_head(tuned)
    if head:
        setattr(config, "modules_to_save", [head])  # noqa: B010 (not a field of every config class)
        named |= {_PREFIX + name: tensor for name, tensor in tuned.read().items() if name.startswith(f"{head}.")}
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    write_tensors(Path(folder) / "adapter_model.safetensors", named, {"format": "pt"})
    return True


def _whole_changes(tuned: Tuned) -> dict[str, torch.Tensor]:
    """Return factors, of one rank and scaling 1, of all that was changed in each LoRA layer, what is folded included.

    An adapter that left out what a strategy folded into base weights would not be what was trained.
    """
    changes = {name: tuned.change_of(name) for name in tuned.layers}
    for pair in tuned.layout.pairs:
        if pair.r is None:  # some starts (PiSSA) take their product out of the base weight; it belongs to the base here
            changes[pair.module] = changes[pair.module] - product(pair, tuned.initial)
    triples = {name: torch.linalg.svd(change.double(), full_matrices=False) for name, change in changes.items()}
    ranks = [int((sizes > sizes[:1] * _ROUNDING).sum()) for _, sizes, _ in triples.values()]
    rank = max(1, *ranks)
    named: dict[str, torch.Tensor] = {}
    for name, (left, sizes, right) in triples.items():
        root = sizes[:rank].sqrt()
        pad = rank - len(root)
        named[f"{_PREFIX}{name}.lora_A.weight"] = nn.functional.pad(right[:rank] * root[:, None], (0, 0, 0, pad))
        named[f"{_PREFIX}{name}.lora_B.weight"] = nn.functional.pad(left[:, :rank] * root, (0, pad))
    return {name: tensor.float().contiguous() for name, tensor in named.items()}


def _rename(name: str, view: View) -> str:
    inner = name.removeprefix(_PREFIX)
    return _PREFIX + view.canonical(inner) if inner != name else name


def _targets(tuned: Tuned, wanted: set[str] | list[str]) -> list[str]:
    """Return the full names, in the full model, of the modules that HF peft's own shortened list means."""
    assigned = getattr(tuned.wrapper.base_model, "targeted_module_names", []) if tuned.wrapper else []
    return [
        tuned.view.canonical(name)
        for name in assigned
        if any(name == target or name.endswith(f".{target}") for target in wanted)
    ]


def _trained_head(tuned: Tuned) -> str | None:
    """Return the name of the head if it trains."""
    if tuned.wrapper is None:
        return None
    model = cast(PreTrainedModel, tuned.wrapper.get_base_model())
    head = model.get_output_embeddings()
    if head is None or not any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return next(name for name, module in model.named_modules() if module is head)
