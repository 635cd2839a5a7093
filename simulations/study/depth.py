"""How many blocks has the middle? Told by a model's config, without its weights."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from fedpeat.core import ConfigError, ModelError


def middle_of(settings: Mapping[str, Any]) -> int:
    """Return how many blocks of the full model are not the adapter's.

    Raises:
        ConfigError: If the model cannot be split as asked.
        ModelError: If there is no such model.
    """
    from fedpeat.models import make_split

    model = settings["model"]
    split = make_split(_blocks(str(model["name"]), model["revision"]), **model["split"])
    return len(split.middle)


@cache
def _blocks(name: str, revision: str | None) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedpeat.models import find_blocks, locate_model

    place = locate_model(name)
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        found = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the config of model {name!r}", found, "check model.name and the network"
        ) from error
    return find_blocks(model).count


def kept_of(text: str, middle: int) -> int:
    """Return a number of kept blocks; a share (written with a point) is of the middle's, rounded, at least 1.

    Raises:
        ConfigError: If the middle has fewer.

    >>> [kept_of(text, 10) for text in ("4", "0.5", "0.04", "1.0", "0")]
    [4, 5, 1, 10, 0]
    """
    kept = max(1, round(float(text) * middle)) if "." in text else int(text)
    if kept > middle:
        raise ConfigError(
            f"kept={text}", f"the middle has {middle} blocks", f"choose {middle} or fewer, or a share: 0.5"
        )
    return kept
