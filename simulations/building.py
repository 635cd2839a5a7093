"""A config's node to what its builder makes of it."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from fedpeat.core import ConfigError, FedPeatError


def built(node: Mapping[str, Any]) -> Any:
    """Return what the builder named by `node["_target_"]` makes of its keywords.

    Those that are nodes themselves, or mappings of nodes, are built first.

    Raises:
        ConfigError: If a keyword does not fit; errors of ours pass unchanged.
    """
    # By hand: OmegaConf would take a built value that is a dataclass for a part of the config.
    parts = {key: _built_parts(value) for key, value in node.items() if _has_nodes(value)}
    plain = {key: value for key, value in node.items() if key not in parts}
    try:
        return instantiate({**plain, "_partial_": True, "_convert_": "all"})(**parts)
    except FedPeatError:
        raise
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, FedPeatError):
            raise cause from error
        raise ConfigError(
            f"cannot build {node.get('_target_')}", str(error).splitlines()[0], "see docs/configuration.md"
        ) from error


def _has_nodes(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return "_target_" in value or (bool(value) and all(_has_nodes(part) for part in value.values()))


def _built_parts(value: Mapping[str, Any]) -> Any:
    return built(value) if "_target_" in value else {key: _built_parts(part) for key, part in value.items()}
