"""Which settings differ between runs that nobody planned together?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simulations.compare.collect import Run, as_key
from simulations.compare.request import shown
from simulations.settings import NOT_PART_OF_THE_RESULT

NAMING = ("name", "kind", "type", "_target_")
"""Keys by which an option of a group is called, the best first."""

ABSENT = "not set"


def varying(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings whose values differ, and each run's value as shown.

    Where a group's option differs (another builder, or other keys), the group is one key and its value the option's
    name, with whatever else differs among runs of the same option.

    Args:
        runs: Their settings, as resolved.
    """
    ignored = {"seed", "report", *NOT_PART_OF_THE_RESULT}
    plain = [{key: value for key, value in run.settings.items() if key not in ignored} for run in runs]
    found = dict(_walk("", plain))
    if not found:
        # Only how they were executed differs: then that is what is compared.
        plain = [{"engine": run.settings["engine"]} if "engine" in run.settings else {} for run in runs]
        found = dict(_walk("", plain))
    return found


def default_of(key: str, defaults: Mapping[str, Any]) -> str:
    """Return the value of a varying key in other settings, as `varying` would show it; empty where it has none.

    >>> default_of("peft.rank", {"peft": {"rank": 8}}), default_of("peft", {"peft": {"kind": "lora"}})
    ('8', 'lora')
    """
    node: Any = defaults
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return ""
        node = node[part]
    return _name(node) if isinstance(node, Mapping) else shown(node)


def _walk(prefix: str, nodes: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
    if len({as_key(node) for node in nodes}) == 1:
        return
    if not prefix or (all(isinstance(node, Mapping) for node in nodes) and not _is_choice(nodes)):
        keys = list(dict.fromkeys(key for node in nodes for key in node))
        for key in keys:
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from _walk(name, [node.get(key, ABSENT) for node in nodes])
    elif all(isinstance(node, Mapping) for node in nodes):
        yield prefix, _options(nodes)
    else:
        yield prefix, [shown(node) for node in nodes]


def _is_choice(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether nodes are different options of a group, rather than one option with other values."""
    named = any("_target_" in node or "kind" in node for node in nodes)
    names = {as_key([node.get(key) for key in ("_target_", "kind")]) for node in nodes}
    return named and (len(names) > 1 or len({frozenset(node) for node in nodes}) > 1)


def _options(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each node's option, with the keys that differ among those of the same name."""
    names = [_name(node) for node in nodes]
    parts = []
    for node, name in zip(nodes, names, strict=True):
        same = [other for other, its in zip(nodes, names, strict=True) if its == name]
        differ = [
            f"{key} {shown(value)}"
            for key, value in node.items()
            if key not in NAMING and len({as_key(other.get(key)) for other in same}) > 1
        ]
        parts.append(f"{name} ({', '.join(differ)})" if differ else name)
    return parts


def _name(node: Mapping[str, Any]) -> str:
    for key in NAMING:
        if isinstance(node.get(key), str):
            return node[key].rsplit(".", 1)[-1]
    return shown(dict(node))
