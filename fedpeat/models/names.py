"""Names of tensors: a shallow model's block positions, and the full model's block indices.

Travelling tensors and bundles are named by the full model's indices (canonical names), whatever a device's depth.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from fedpeat.core import ModelError, shorten


@lru_cache(maxsize=64)
def _block_index(path: str) -> re.Pattern[str]:
    # At a dot or the start, so that "layers" does not match in "my_layers"; the first match is the outermost list.
    return re.compile(rf"(?:^|(?<=\.)){re.escape(path)}\.(\d+)(?=\.|$)")


def block_index(name: str, *, path: str) -> int | None:
    """Return the index of the block that holds the tensor `name`, or None outside the blocks.

    >>> [block_index(name, path="model.layers") for name in ("model.layers.3.mlp.weight", "lm_head.weight")]
    [3, None]
    """
    found = _block_index(path).search(name)
    return int(found[1]) if found else None


def _with_index(name: str, index: int, path: str) -> str:
    return _block_index(path).sub(f"{path}.{index}".replace("\\", r"\\"), name, count=1)


def canonical_name(name: str, *, path: str, sources: Sequence[int]) -> str:
    """Rename a shallow model's tensor by the full model's block index.

    Args:
        name: A tensor's or module's name, wrapper prefixes allowed.
        path: Where the blocks are (`"model.layers"`).
        sources: For each position in the shallow model, its block's index in the full model.

    Raises:
        ModelError: If the position is beyond `sources`.

    >>> canonical_name("base_model.model.model.layers.2.mlp.weight", path="model.layers", sources=(0, 1, 5, 6))
    'base_model.model.model.layers.5.mlp.weight'
    >>> canonical_name("lm_head.weight", path="model.layers", sources=(0, 5))
    'lm_head.weight'
    """
    position = block_index(name, path=path)
    if position is None:
        return name
    if position >= len(sources):
        remedy = "the name belongs to another model"
        raise ModelError(f"cannot name {name!r} canonically", f"the model has {len(sources)} blocks", remedy)
    return _with_index(name, sources[position], path)


def local_name(name: str, *, path: str, sources: Sequence[int]) -> str:
    """Rename a tensor with a canonical name by its block's position in a shallow model.

    Where a block stands at several positions, the first of them is meant.

    Raises:
        ModelError: If the shallow model does not hold that block.

    >>> local_name("model.layers.5.mlp.weight", path="model.layers", sources=(0, 1, 5, 6))
    'model.layers.2.mlp.weight'
    """
    source = block_index(name, path=path)
    if source is None:
        return name
    if source not in sources:
        found = f"this model holds blocks {shorten(sources, 24)}"
        raise ModelError(f"cannot place {name!r}", found, "both ends must use the same split")
    return _with_index(name, list(sources).index(source), path)
