"""The PEFT methods of HF `peft`: which can be used here, how each is configured, and why some are refused."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import constants
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core import PeftError, nearest
from fedpeat.peft.targets import resolve

_DEPTH = "its tensors are keys and values for every block: their shape follows the depth, which devices do not share"
_TASKS = "it needs a task number with every row"

REFUSED: Mapping[str, str] = {
    "ADALORA": "it prunes ranks by a schedule of its own while training, so that ranks would differ between devices",
    "CARTRIDGE": _DEPTH,
    "MULTITASK_PROMPT_TUNING": _TASKS,
    "POLY": _TASKS,
    "PREFIX_TUNING": _DEPTH,
    "SHADOW": "it trains a side network along all blocks, the middle included",
    "TRAINABLE_TOKENS": "it trains rows of the embeddings, outside the adapter blocks",
    "XLORA": "it mixes LoRA weights trained before, which devices do not hold",
}
"""Why a type cannot be used; what is not listed here is also checked when it is attached."""

CHANGES_OUTPUT: Mapping[str, str] = {
    "C3A": "its kernels start at random",
    "CPT": "it puts a prompt before the input",
    "FOURIERFT": "its spectrum starts at random",
    "PROMPT_TUNING": "it puts a prompt before the input",
    "P_TUNING": "it puts a prompt before the input",
    "UNILORA": "its shared vector starts at random",
    "VBLORA": "its mixed vectors do not start at exactly zero",
}
"""Types whose output differs from the untouched model's at the start, and why."""

_SPLIT_DECIDES = {"layers_to_transform", "layers_pattern"}


@dataclass(frozen=True)
class MethodSupport:
    """One PEFT type of HF `peft`: may it be used (`allowed`), does it start as an identity, and why not."""

    name: str
    allowed: bool
    identity_at_start: bool
    reason: str


def supported() -> list[MethodSupport]:
    """Return every PEFT type that HF `peft` has, by name, with what is known of it.

    >>> [method.allowed for method in supported() if method.name in ("IA3", "LORA", "PREFIX_TUNING")]
    [True, True, False]
    """
    return [
        MethodSupport(
            name=name,
            allowed=name not in REFUSED,
            identity_at_start=name not in REFUSED and name not in CHANGES_OUTPUT,
            reason=REFUSED.get(name) or CHANGES_OUTPUT.get(name, ""),
        )
        for name in sorted(kind.name for kind in PeftType)
    ]


def build_config(
    name: str, options: Mapping[str, Any], *, model: nn.Module, modules: dict[str, nn.Module]
) -> PeftConfig:
    """Return the `PeftConfig` of type `name`, its targets narrowed down to the adapter blocks.

    Args:
        name: A PEFT type ("LORA", "IA3", ...), in any case.
        options: Keywords of its config class.
        model: The model to tune, for HF's default targets of its family.
        modules: The modules inside the adapter blocks.

    Raises:
        PeftError: If the type, a keyword or a target is unknown, or the type is refused.
    """
    name = str(name).upper()
    known = {kind.name: kind for kind in PeftType}
    if name not in known:
        raise PeftError(f"cannot use peft.type={name}", "HF peft has no such type", nearest(name, known))
    if name in REFUSED:
        raise PeftError(f"cannot use peft.type={name}", REFUSED[name], "choose another type, such as LORA or IA3")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[name]]
    fields = {item.name for item in dataclasses.fields(config_class) if item.init} - _SPLIT_DECIDES
    for option in options:
        if option not in fields:
            found = "model.split decides which blocks" if option in _SPLIT_DECIDES else "no such keyword"
            raise PeftError(f"cannot set {option!r} of {config_class.__name__}", found, nearest(option, fields))
    chosen = {"task_type": None, **({"progressbar": False} if "progressbar" in fields else {}), **options}
    if "target_modules" in fields and name != "ADAPTION_PROMPT":
        chosen |= _targets(name, options, fields, model, modules)
    elif name != "ADAPTION_PROMPT":
        chosen["task_type"] = "CAUSAL_LM"
    try:
        return config_class(**chosen)
    except (TypeError, ValueError, ImportError) as error:
        raise PeftError(f"cannot configure {config_class.__name__}", str(error), "change peft.options") from error


def _targets(
    name: str, options: Mapping[str, Any], fields: set[str], model: nn.Module, modules: dict[str, nn.Module]
) -> dict[str, Any]:
    """Return the options that say where the method acts, as full names of modules in the adapter blocks."""
    wanted = options.get("target_modules")
    found = resolve(wanted, modules) if wanted is not None else _default_targets(name, "TARGET", model, modules)
    chosen: dict[str, Any] = {"target_modules": found}
    if "feedforward_modules" in fields:
        inner = options.get("feedforward_modules")
        among = {target: modules[target] for target in found}
        if inner is None:
            chosen["feedforward_modules"] = _default_targets(name, "FEEDFORWARD", model, among)
        else:
            chosen["feedforward_modules"] = resolve(inner, among) if inner else []
    if "fan_in_fan_out" in fields and "fan_in_fan_out" not in options:
        # Conv1D stores its weight transposed; with both kinds HF peft corrects the flag layer by layer.
        chosen["fan_in_fan_out"] = all(isinstance(modules[target], Conv1D) for target in found)
    return chosen


def _default_targets(name: str, what: str, model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return HF's default targets for this family of models, as far as the adapter blocks have them."""
    table = getattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType[name]], "target_module_mapping", None)
    if name == "IA3":
        table = getattr(constants, f"TRANSFORMERS_MODELS_TO_IA3_{what}_MODULES_MAPPING")
    endings = (table or {}).get(getattr(model.config, "model_type", None))
    if not endings:
        return [] if what == "FEEDFORWARD" else resolve(None, modules)
    if isinstance(endings, str):
        return resolve(endings, modules)
    found = [name for name in modules if any(name.endswith(f".{ending}") for ending in endings)]
    return found or resolve(list(endings), modules)
