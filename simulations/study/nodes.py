"""One value of each axis to the run's `emulator` node, or to why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from fedpeat.core import ConfigError, nearest
from simulations.settings import conf_folder

Node = dict[str, Any]

NONE = "none"
STAGES = {
    "harmonizers": "harmonize",
    "ffn_channels": "shrink",
    "low_rank": "shrink",
    "pruned": "shrink",
    "int8": "store",
    "int4": "store",
}
"""Compressing options of `conf/emulator`, in the order in which they are applied, and their stage in a chain."""

DISTILLED = "distilled"
SET_BY_AXES = ("_target_", "kept_blocks", "steps")
"""Keys of a builder that no override sets: they are its name, or values of an axis."""

FREE_POLICIES = ("local", "discard")
"""Policies that need no place in the full model for what was learnt on the emulator."""


@dataclass(frozen=True)
class Choice:
    """One value of an axis.

    Attributes:
        text: As shown.
        names: The options of `conf/emulator` that it takes its builders from, in the order in which they are applied.
        settings: Keywords of these builders that were given, by option.
    """

    text: str
    names: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@cache
def selections() -> tuple[str, ...]:
    """Return the options of `conf/emulator` that keep a number of blocks, and are one builder."""
    found = sorted((conf_folder() / "emulator").glob("*.yaml"))
    return tuple(path.stem for path in found if "kept_blocks" in (OmegaConf.load(path) or {}))


def builders() -> tuple[str, ...]:
    """Return all options whose keywords can be set as `option.key=value`."""
    return (*selections(), DISTILLED, *STAGES)


@cache
def _option(name: str) -> Mapping[str, Any]:
    node: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "emulator" / f"{name}.yaml"))
    return node["stages"]["train"] if "stages" in node else node


def node_of(name: str, settings: Mapping[str, Any] | None = None, **fixed: Any) -> Node:
    """Return the node of an option's builder; of an option that is a chain, that of the stage it is known for.

    >>> node_of("uniform", kept_blocks=2)
    {'_target_': 'fedpeat.emulators.uniform', 'kept_blocks': 2}
    """
    return {**_option(name), **(settings or {}), **fixed}


def check_key(name: str, key: str) -> None:
    """Check that an option's builder has a key that may be set.

    Raises:
        ConfigError: With the nearest key.
    """
    known = [each for each in _option(name) if each not in SET_BY_AXES]
    if key not in known:
        raise ConfigError(f"{name}.{key}", f"emulator={name} has no such key to set", nearest(key, known))


def emulator_of(selection: Choice, kept: int, compression: Choice, steps: Choice) -> Node:
    """Return the run's `emulator` node: the selection's own, or a chain of select, harmonize, train, shrink and store.

    >>> chosen = Choice("first", ("first",)), 2, Choice("int8", ("int8",)), Choice("5", (DISTILLED,))
    >>> list(emulator_of(*chosen)["stages"])
    ['select', 'train', 'store']
    """
    select = node_of(selection.names[0], selection.settings.get(selection.names[0]), kept_blocks=kept)
    stages: dict[str, Node] = {}
    for name in compression.names:
        stage = STAGES[name]
        stages[f"{stage}_{name}" if stage in stages else stage] = node_of(name, compression.settings.get(name))
    if steps.names:
        stages["train"] = node_of(DISTILLED, steps.settings.get(DISTILLED), steps=steps_of(steps))
    if not stages:
        return select
    order = ("harmonize", "train", "shrink", "store")
    ordered = sorted(stages, key=lambda stage: order.index(stage.partition("_")[0]))
    return {"_target_": "fedpeat.emulators.chain", "stages": {"select": select} | {key: stages[key] for key in ordered}}


def steps_of(choice: Choice) -> int:
    """Return the steps of a distillation.

    >>> steps_of(Choice("200 (learning_rate 0.001)"))
    200
    """
    return int(choice.text.split()[0])


def trained_part(node: Mapping[str, Any]) -> Node | None:
    """Return the part of an emulator's node up to its distillation, which is worked out once; None without one."""
    stages = node.get("stages", {})
    if "train" not in stages:
        return None
    last = list(stages).index("train")
    return dict(list(stages.items())[: last + 1])


def why_not(  # noqa: PLR0911 (a reason each)
    node: Mapping[str, Any], *, kept: int, middle: int, unfreeze: Sequence[str], policy: str
) -> str:
    """Return why an emulator cannot be made, or cannot train so; empty where nothing is known against it.

    Args:
        node: From `emulator_of`.
        kept: How many blocks it keeps.
        middle: How many there are.
        unfreeze: The parts of it that are to train.
        policy: What becomes of what they learn.
    """
    stages = node.get("stages", {"select": node})
    targets = {str(stage["_target_"]).rsplit(".", 1)[-1]: stage for stage in stages.values()}
    if kept == 0 and (len(stages) > 1 or unfreeze):
        return "of no kept blocks there is nothing to compress, distil or unfreeze"
    spread = stages["select"].get("share") is True and kept < middle
    if spread and "harmonizers" in targets:
        return "harmonizers stand in for dropped blocks, and with shared ones none is dropped (cka.share=false)"
    weights = sorted({"attention", "mlp"} & set(unfreeze))
    sparse = targets.get("magnitude_pruning", {}).get("stored") == "sparse"
    stored = [name for name in ("int8", "int4") if name in targets] + (["pruned"] if sparse else [])
    if weights and stored:
        return f"{' and '.join(weights)} cannot train as {stored[0]} stores them"
    if not unfreeze or policy in FREE_POLICIES:
        return ""
    if spread:
        return "a block that stands at several places has no one place to map back to (cka.share=false, or policy=)"
    cut = targets.get("low_rank", {})
    if set(weights) & set(cut.get("sublayers") or weights) and cut:
        return "factors of a low-rank layer have no place in the full model to map back to (policy=)"
    if "mlp" in weights and "harmonizers" in targets:
        return "maps that stand in for dropped blocks train as mlp, and have no place to map back to (policy=)"
    if "mlp" in weights and "ffn_channels" in targets:
        return "an MLP with fewer channels has no place in the full model to map back to (policy=)"
    return ""
