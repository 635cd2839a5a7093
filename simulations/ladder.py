"""Several emulators in one federation: what each is, and which device gets which."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeat.core import ConfigError, nearest

Settings = Mapping[str, Any]
MIB = 2**20


def rungs(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the node of each emulator by key: the run's own under `default`, and those of single devices.

    Raises:
        ConfigError: If a named emulator changes a key that the run's own has not, or keeps no number of blocks.
    """
    own, control = dict(settings["emulator"]), settings["control"]
    nodes = {"default": own}
    for kept in sorted({int(kept) for kept in control["kept_blocks"].values()}):
        nodes[f"kept_{kept}"] = keeping(own, kept)
    for kept in (control.get("menu") or {}).get("kept_blocks") or ():
        node = keeping(own, int(kept))
        nodes |= {} if node == own else {f"kept_{int(kept)}": node}
    for name, changes in control["emulators"].items():
        if name in nodes:
            raise ConfigError(f"control.emulators names {name!r}", "that name is taken", "choose another")
        nodes[name] = _varied(own, name, changes or {})
    return nodes


def keeping(emulator: Mapping[str, Any], kept_blocks: int) -> dict[str, Any]:
    """Return the emulator's node with another number of kept blocks, in the stage of a chain that has it.

    Raises:
        ConfigError: If it has no such key.

    >>> keeping({"_target_": "chain", "stages": {"a": {"kept_blocks": 4}, "b": {"share": 0.5}}}, 2)["stages"]["a"]
    {'kept_blocks': 2}
    """
    if "kept_blocks" in emulator:
        return {**emulator, "kept_blocks": kept_blocks}
    for name, stage in emulator.get("stages", {}).items():
        if "kept_blocks" in stage:
            return {**emulator, "stages": {**emulator["stages"], name: keeping(stage, kept_blocks)}}
    raise ConfigError(
        "control.kept_blocks and control.menu.kept_blocks give devices emulators of other depths",
        f"this emulator ({emulator.get('_target_')}) keeps no number of blocks",
        "choose one with kept_blocks, such as emulator=uniform",
    )


def _varied(own: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    if "_target_" in changes:
        return dict(changes)
    node = dict(own)
    for key, value in changes.items():
        if key == "kept_blocks":
            node = keeping(node, value)
        elif key in node and key != "stages":
            node[key] = value
        else:
            found = f"the run's emulator ({own.get('_target_')}) has no such key"
            options = nearest(key, [known for known in own if known not in {"_target_", "stages"}])
            raise ConfigError(f"control.emulators.{name}.{key} cannot be set", found, options)
    return node


def named_emulators(settings: Settings) -> dict[str, str]:
    """Return the emulators that single devices are given by name, or by a number of kept blocks."""
    control = settings["control"]
    by_depth = {client: f"kept_{int(kept)}" for client, kept in control["kept_blocks"].items()}
    return {**by_depth, **control["emulator"]}


def assigned(settings: Settings, clients: Sequence[str], needs: Mapping[str, int]) -> dict[str, str]:
    """Return the emulator of each device that has one of its own, by client.

    Args:
        settings: `control.kept_blocks` and `control.emulator` name it; `control.memory_mib` gives a device the one
            that needs most memory of those that fit.
        clients: Names of all clients.
        needs: Memory that a local step needs with each emulator, bytes, by key.

    Raises:
        ConfigError: If a client or an emulator is unknown, or a device is too small for every emulator.
    """
    chosen = named_emulators(settings)
    for client, name in chosen.items():
        if name not in needs:
            raise ConfigError(f"control.emulator gives {client!r} {name!r}", "no such emulator", nearest(name, needs))
    for client, mib in settings["control"]["memory_mib"].items():
        if client not in clients:
            raise ConfigError(f"control.memory_mib names client {client!r}", "no such client", nearest(client, clients))
        fitting = {key: need for key, need in needs.items() if need <= mib * MIB}
        if not fitting:
            least = min(needs, key=lambda key: needs[key])
            raise ConfigError(
                f"client {client!r} has {mib:g} MiB (control.memory_mib)",
                f"the smallest emulator, {least!r}, needs {needs[least] / MIB:.1f} MiB in training",
                "add a smaller one to control.emulators, lower client.batch_size, or leave the client out",
            )
        chosen[client] = max(fitting, key=lambda key: (fitting[key], key == "default", key))
    return chosen
