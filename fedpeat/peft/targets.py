"""Which modules inside the adapter blocks does a method act on?"""

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core import PeftError, shorten

ALL_LINEAR = "all-linear"


def modules_in_blocks(model: nn.Module, *, path: str, positions: Iterable[int]) -> dict[str, nn.Module]:
    """Return every module inside the blocks at `positions`, by full name, in the order of the blocks."""
    blocks = model.get_submodule(path)
    return {
        f"{path}.{position}.{name}": module
        for position in sorted(positions)
        for name, module in blocks.get_submodule(str(position)).named_modules()
        if name
    }


def linear_layers(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the linear layers among `modules`: `nn.Linear`, and `Conv1D` as in GPT-2."""
    return [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]


def resolve(wanted: str | Sequence[str] | None, modules: dict[str, nn.Module]) -> list[str]:
    """Return the full names of the modules that `wanted` means.

    Args:
        wanted: None or "all-linear" for all linear layers; a list of names or of their last parts ("q_proj",
            "self_attn.q_proj"), each of which must match; any other text is a regular expression for the full name.
        modules: The modules inside the adapter blocks.

    Raises:
        PeftError: If nothing matches, with what there is.
    """
    if wanted is None or wanted == ALL_LINEAR:
        found, missing = linear_layers(modules), []
    elif isinstance(wanted, str):
        found, missing = [name for name in modules if re.fullmatch(wanted, name)], []
    else:
        found = [name for name in modules if any(_ends_with(name, target) for target in wanted)]
        missing = [target for target in wanted if not any(_ends_with(name, target) for name in modules)]
    if missing or not found:
        asked = shorten(missing) if missing else repr(wanted or ALL_LINEAR)
        raise PeftError(
            f"cannot attach PEFT to {asked}",
            f"the adapter blocks hold no such module; linear layers there: {shorten(_endings(modules))}",
            "name some of these in peft.targets, or leave it out for all linear layers",
        )
    return found


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _endings(modules: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in linear_layers(modules)})
