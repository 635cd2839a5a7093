"""Settings of a simulation to those of a real federation: what goes with it, and what cannot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeat.core import ConfigError

ONLY_SIMULATED = {
    "clients.pool": "clients' rows are never in one place",
    "devices.kind": "what real devices take is measured, and stands in the ledger without a model",
    "attack.kind": "clients are real, and do no harm on request",
    "baselines.local_only": "each client's own model would have to be sent",
    "baselines.whole_model": "clients would have to be sent the full model",
    "baselines.extraction": "clients' rows are not on the server",
}
"""Settings that must be off where clients are on machines of their own, and why."""


def deployed(settings: Mapping[str, Any], names: Sequence[str], *, folder: Path) -> dict[str, Any]:
    """Return the settings of a real federation: data is the server's own, and paths do not depend on where one stands.

    Args:
        settings: As for a simulation; `data.path` (or `data.server_path`) is the server's own text, held out.
        names: Of all clients.
        folder: The deployment's; prepared data and bundles go into it, unless `cache` says where else.

    Raises:
        ConfigError: If something cannot be had in a real federation.
    """
    if (kind := settings["control"].get("kind", "fixed")) != "fixed":
        found = "it decides by modelled devices, and real ones are measured"
        raise ConfigError(f"cannot deploy control={kind}", found, "leave control out, or simulate")
    for key, why in ONLY_SIMULATED.items():
        group, _, name = key.partition(".")
        if settings[group][name]:
            raise ConfigError(f"cannot deploy {key}={settings[group][name]}", why, f"leave {key} out, or simulate")
    if not settings["baselines"]["federated"]:
        raise ConfigError("cannot deploy baselines.federated=false", "nothing would run", "leave it out")
    count = settings["clients"]["count"]
    if count not in {None, len(names)}:
        raise ConfigError(f"clients.count={count}", f"{len(names)} clients are named", "leave clients.count out")
    model = dict(settings["model"])
    model["name"] = _anchored(model["name"])
    cache = settings["cache"] or str(folder / "cache")
    return {**settings, "model": model, "data": _own_data(settings["data"]), "cache": str(Path(cache).absolute())}


def _own_data(data: Mapping[str, Any]) -> dict[str, Any]:
    if data["kind"] == "docstrings":
        found = "data=docstrings is the same text on each machine"
        raise ConfigError("clients of a real federation have data of their own", found, "data=jsonl data.path=FILE")
    if data.get("path") is not None and data.get("server_path") is not None:
        found = "each client names its own file, on its own machine"
        raise ConfigError(
            "data.path and data.server_path are both set", found, "set data.path alone: the server's text"
        )
    own = data.get("server_path") if data.get("path") is None else data["path"]
    if own is None and data.get("server_split") is None:
        raise ConfigError("the server needs text to evaluate on", "data.path is not set", "set data.path=FILE")
    own = [_anchored(path) for path in own] if isinstance(own, list | tuple) else own and _anchored(own)
    return {**data, "path": None, "server_path": own}


def _anchored(name: str) -> str:
    """Return a path that is good from any folder; what is no path here (a hub id) unchanged."""
    path = Path(name).expanduser()
    there = path.exists() or any(character in name for character in "*?[")
    return str(path.absolute()) if there else name
