"""A config's node to what its builder makes of it."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from fedpeat.core import ConfigError, FedPeatError


def built(node: Mapping[str, Any], **more: Any) -> Any:
    """Return what the builder named by `node["_target_"]` makes of its flat keywords.

    Raises:
        ConfigError: If a keyword does not fit; errors of ours pass unchanged.
    """
    try:
        return instantiate({**node, **more})
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FedPeatError):
            raise cause from error
        raise ConfigError(
            f"cannot build {node.get('_target_')}", str(error).splitlines()[0], "see docs/configuration.md"
        ) from error
