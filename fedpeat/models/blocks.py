"""Where a model's blocks are, found by structure."""

import itertools
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from fedpeat.core import ModelError


@dataclass(frozen=True)
class BlockStack:
    """The list of a model's transformer blocks.

    Attributes:
        path: The list's name in the model (`"model.layers"`, `"transformer.h"`).
        count: Blocks in it.
        beside: Names of lists next to it that hold one entry a block (per-block gates or norms kept outside the
            blocks): an entry goes where its block goes.
    """

    path: str
    count: int
    beside: tuple[str, ...] = ()

    def of(self, model: nn.Module) -> nn.ModuleList | nn.Sequential:
        """Return the list itself, in `model`."""
        blocks = model.get_submodule(self.path)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise ModelError(f"cannot use the blocks at {self.path!r}", f"that is a {type(blocks).__name__}")
        return blocks

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of all lists indexed by block: the blocks themselves first."""
        return (self.path, *self.beside)


def find_blocks(model: nn.Module) -> BlockStack:
    """Find the list of like blocks that makes up a language model.

    A candidate is a list of at least two modules of one class, each with modules and parameters of its own, that is not
    inside another candidate (the experts of a mixture-of-experts block are). Among several, those with as many entries
    as the config has hidden layers win; of these the nearest to the token embeddings (not a vision tower as deep as the
    text model); then the one with most parameters.

    Args:
        model: Any causal language model.

    Raises:
        ModelError: If it has no such list.

    >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU())
    >>> find_blocks(nn.ModuleDict({"embed": nn.Embedding(8, 4), "stack": nn.ModuleList([block(), block(), block()])}))
    BlockStack(path='stack', count=3, beside=())
    """
    declared = _declared_count(model)
    lists = {path: found for path, module in model.named_modules() if path and (found := _as_blocks(module, declared))}
    outermost = {path: blocks for path, blocks in lists.items() if not any(_inside(path, other) for other in lists)}
    if not outermost:
        found = "no list (nn.ModuleList or nn.Sequential) of two or more like blocks in it"
        remedy = "use a decoder-only transformer of two or more blocks"
        raise ModelError(f"cannot find the blocks of a {type(model).__name__}", found, remedy)
    embeddings = _embeddings_path(model)

    def rank(name: str) -> tuple[bool, int, int]:
        blocks = outermost[name]
        agrees = len(blocks) == declared
        return agrees, _shared_depth(name, embeddings) if agrees else 0, _parameter_count(blocks)

    path = max(outermost, key=rank)
    return BlockStack(path, len(outermost[path]), _lists_beside(model, path))


def _declared_count(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config(decoder=True)
    return getattr(config, "num_hidden_layers", None)


def _embeddings_path(model: nn.Module) -> str:
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return ""
    return next((path for path, module in model.named_modules() if module is embeddings), "")


def _shared_depth(path: str, other: str) -> int:
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _as_blocks(module: nn.Module, declared: int | None) -> nn.ModuleList | nn.Sequential | None:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return None
    # Hybrid models mix block classes (attention, state space): then the config's count must agree.
    alike = len({type(child) for child in module}) == 1 or len(module) == declared
    whole = all(any(True for _ in child.children()) and _parameter_count(child) for child in module)
    return module if alike and whole else None


def _inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lists_beside(model: nn.Module, path: str) -> tuple[str, ...]:
    parent, _, own = path.rpartition(".")
    owner = model.get_submodule(parent)
    count = len(owner.get_submodule(own))  # type: ignore[arg-type]
    lists = (nn.ModuleList, nn.Sequential, nn.ParameterList)
    names = [name for name, child in owner.named_children() if isinstance(child, lists) and name != own]
    same = [name for name in names if len(getattr(owner, name)) == count]
    return tuple(f"{parent}.{name}" if parent else name for name in same)
