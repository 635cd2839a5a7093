"""A shallower model: keep some blocks, and let every per-block setting follow them."""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedpeat.core import ModelError, shorten
from fedpeat.models.blocks import BlockStack

LINKED_BLOCKS: Mapping[str, str] = {
    "num_kv_shared_layers": "its later blocks reuse keys and values of earlier ones",
    "num_mem_blocks": "its blocks share modules that look up their index",
    "hidden_size_per_layer_input": "its embeddings hold a part for every block",
}
"""What structure cannot tell: config fields that, when set, tie blocks to one another; none may be dropped then."""

_INDEX_NAME = re.compile(r"(layer|block|depth)\w*(idx|id|index|number|num|no)$|^(idx|index|layer|depth|position)$")
_COUNT_NAME = re.compile(r"(^|_)(layers?|blocks?|depth)$|(^|_)(layers?|blocks?)_(count|number|num)$")
_NOT_PER_BLOCK = re.compile(r"^_|^architectures$|token_ids?$|multipliers?$|time_step|^mtp_|labels?$|factor$|section$")


def keep_blocks(model: PreTrainedModel, stack: BlockStack, sources: Sequence[int]) -> None:
    """Cut `model` down to the blocks `sources`, in place and in that order.

    Call it on a model of full depth: each block was then constructed with its own index, so that what follows from the
    index (layer types, sliding windows, scales) goes with the block. Indices that blocks look up at run time (their
    slot in a key-value cache) and per-block lists in the config are renumbered to the new positions.

    Args:
        model: A skeleton (`build_skeleton`); a model with tensors works too.
        stack: From `find_blocks`.
        sources: Indices of the blocks to keep; one standing twice is copied (on the meta device: without memory).

    Raises:
        ModelError: If a block is not there, or blocks of this model depend on one another.
    """
    sources = tuple(sources)
    if sources == tuple(range(stack.count)):
        return
    _check_sources(model, stack, sources)
    blocks = stack.of(model)
    indices = _index_attributes(blocks)
    configs = _configs(model, stack)
    chosen = _choose(list(blocks), sources, memo={id(config): config for config in configs})
    for position, (block, source) in enumerate(zip(chosen, sources, strict=True)):
        for (path, name), (slope, offset, holders) in indices.items():
            if source in holders:
                setattr(block.get_submodule(path), name, slope * position + offset)
    _replace_entries(blocks, chosen)
    for path in stack.beside:
        _keep_beside(model, path, sources)
    for path in _ancestors(stack.path):
        _renumber_ancestor(model.get_submodule(path), stack.count, sources)
    for config in configs:
        _renumber_config(config, stack.count, sources)


def _check_sources(model: PreTrainedModel, stack: BlockStack, sources: tuple[int, ...]) -> None:
    asked = f"cannot keep blocks {shorten(sources, 24)} of a {type(model).__name__}"
    if not sources or not all(0 <= source < stack.count for source in sources):
        raise ModelError(asked, f"it has blocks 0 to {stack.count - 1}", "keep at least one of them")
    config = model.config.get_text_config(decoder=True)
    for field, reason in LINKED_BLOCKS.items():
        if getattr(config, field, None):
            raise ModelError(asked, f"{reason} ({field}={getattr(config, field)})", "keep all blocks of this model")


def _choose(blocks: list[nn.Module], sources: tuple[int, ...], memo: dict[int, Any]) -> list[nn.Module]:
    chosen: list[nn.Module] = []
    for source in sources:
        block = blocks[source]
        # A second copy gets modules of its own (its index differs) but the model's one config.
        chosen.append(copy.deepcopy(block, dict(memo)) if any(block is other for other in chosen) else block)
    return chosen


def _replace_entries(blocks: nn.ModuleList | nn.Sequential, chosen: list[nn.Module]) -> None:
    # In place, so that subclasses of the list, hooks and references to it stay what they were.
    blocks._modules.clear()
    for position, block in enumerate(chosen):
        blocks._modules[str(position)] = block


def _keep_beside(model: nn.Module, path: str, sources: tuple[int, ...]) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    beside = getattr(owner, name)
    if isinstance(beside, nn.ParameterList):
        setattr(owner, name, nn.ParameterList([beside[source] for source in sources]))
    else:
        _replace_entries(beside, _choose(list(beside), sources, memo={}))


def _index_attributes(blocks: nn.Module) -> dict[tuple[str, str], tuple[int, int, frozenset[int]]]:
    """Find the integers that state a block's index: `slope * index + offset` in every block that has them.

    Returns module path within the block and attribute name, to slope, offset and the blocks that hold it. By value, so
    that any name works; a name that says "index" is only needed where few blocks could agree by chance.
    """
    seen: dict[tuple[str, str], dict[int, int]] = {}
    children = list(blocks.children())
    for index, block in enumerate(children):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    seen.setdefault((path, name), {})[index] = value
    found = {}
    for key, values in seen.items():
        line = _line_through(values)
        named = _INDEX_NAME.search(key[1]) is not None
        counted = len(values) == len(children) and (line == (1, 0) or (line == (1, 1) and len(children) >= 3))
        if line is not None and (named or counted):
            found[key] = (*line, frozenset(values))
    return found


def _line_through(values: dict[int, int]) -> tuple[int, int] | None:
    (first, at_first), *others = values.items()
    slope = 1
    if others:
        slope, rest = divmod(others[0][1] - at_first, others[0][0] - first)
        if rest or slope < 1:
            return None
    elif at_first != first:
        return None
    offset = at_first - slope * first
    return (slope, offset) if all(value == slope * index + offset for index, value in values.items()) else None


def _ancestors(path: str) -> list[str]:
    names = path.split(".")[:-1]
    return [".".join(names[:depth]) for depth in range(len(names) + 1)]


def _renumber_ancestor(module: nn.Module, count: int, sources: tuple[int, ...]) -> None:
    # A model that remembers its depth, or a setting for each block, outside the config.
    for name, value in list(vars(module).items()):
        if _is_per_block(name, value, count):
            setattr(module, name, _chosen(value, sources))
        elif type(value) is int and value == count and _COUNT_NAME.search(name):
            setattr(module, name, len(sources))


def _is_per_block(name: str, value: object, count: int) -> bool:
    plain = (int, float, str, bool, dict, list, tuple, type(None))
    if not isinstance(value, list | tuple) or len(value) != count or _NOT_PER_BLOCK.search(name):
        return False
    return all(isinstance(item, plain) for item in value)


def _chosen(settings: Sequence[Any], sources: tuple[int, ...]) -> list[Any] | tuple[Any, ...]:
    kept = [settings[source] for source in sources]
    return tuple(kept) if isinstance(settings, tuple) else kept


def _configs(model: PreTrainedModel, stack: BlockStack) -> list[PreTrainedConfig]:
    """Collect the distinct config objects by which the model's text part knows its depth."""

    def candidates() -> Iterator[object]:
        for path in _ancestors(stack.path):
            config = getattr(model.get_submodule(path), "config", None)
            yield config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else None
        # Most blocks refer to that same object; some hold a copy of their own.
        for module in stack.of(model).modules():
            yield getattr(module, "config", None)

    found: dict[int, PreTrainedConfig] = {}
    for config in candidates():
        if isinstance(config, PreTrainedConfig) and _depth_fields(config, stack.count):
            found[id(config)] = config
    return list(found.values())


def _depth_fields(config: PreTrainedConfig, count: int) -> list[str]:
    if hasattr(config, "num_hidden_layers"):
        return ["num_hidden_layers"] if config.num_hidden_layers == count else []
    return [name for name, value in vars(config).items() if _COUNT_NAME.search(name) and value == count]


def _renumber_config(config: PreTrainedConfig, count: int, sources: tuple[int, ...]) -> None:
    fields = _depth_fields(config, count)
    derived = _derived_lists(config, count)
    overrides = _per_layer_overrides(config)
    if overrides is not None:
        config.per_layer_config = None
    for name in fields:
        with contextlib.suppress(AttributeError):  # a depth that is derived from a per-block list follows that list
            setattr(config, name, len(sources))
    for name, value in list(vars(config).items()):
        if _is_per_block(name, value, count):
            setattr(config, name, _chosen(value, sources))
    if overrides is not None:
        kept = [(position, overrides[source]) for position, source in enumerate(sources) if source in overrides]
        config.per_layer_config = dict(kept) or None
    _pin(config, {name: [value[source] for source in sources] for name, value in derived.items()})


def _derived_lists(config: PreTrainedConfig, count: int) -> dict[str, list[Any]]:
    """Return per-block lists that the config's class computes from its depth ("every fourth block is attention")."""
    # Those of the model's own config class: transformers' base class computes nothing per block.
    own = [cls for cls in type(config).__mro__ if issubclass(cls, PreTrainedConfig) and cls is not PreTrainedConfig]
    names = {name for cls in own for name, value in vars(cls).items() if isinstance(value, property)}
    found = {}
    for name in sorted(names):
        with contextlib.suppress(AttributeError, RuntimeError):
            value = getattr(config, name)
            if _is_per_block(name, value, count):
                found[name] = list(value)
    return found


def _pin(config: PreTrainedConfig, lists: dict[str, list[Any]]) -> None:
    # The rule would count from the kept blocks; only a class of its own can answer with the lists instead.
    wrong = {name: value for name, value in lists.items() if list(getattr(config, name)) != value}
    if wrong:
        cls = type(config)
        fixed = {name: property(lambda _, value=tuple(value): list(value)) for name, value in wrong.items()}
        config.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **fixed})


def _per_layer_overrides(config: PreTrainedConfig) -> dict[int | str, dict[str, Any]] | None:
    if not config.is_heterogeneous:
        return None
    stated = config.to_dict().get("per_layer_config") or {}
    return {int(index): dict(settings) for index, settings in stated.items()}
