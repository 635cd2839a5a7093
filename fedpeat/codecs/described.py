"""Codecs as data: both ends of the wire build theirs from the same description."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedpeat.codecs.blocks import int4, int8
from fedpeat.codecs.casts import bf16, fp16, none
from fedpeat.codecs.codec import Codec
from fedpeat.codecs.rotation import drive
from fedpeat.codecs.sparse import top_k, top_k_int8
from fedpeat.core import ConfigError, UpdateRefused, nearest

BUILDERS: Mapping[str, Callable[..., Codec]] = {
    builder.__name__: builder for builder in (none, bf16, fp16, int8, int4, top_k, top_k_int8, drive)
}
"""All codecs by name."""


def describe(codec: Codec) -> dict[str, Any]:
    """Return a codec's description, JSON-like: its name and its builder's keywords."""
    return dict(codec.description)


def from_description(description: Mapping[str, Any]) -> Codec:
    """Return the codec that a description is of; it may come from the wire.

    >>> from_description({"name": "top_k", "share": 0.5}).description
    {'name': 'top_k', 'share': 0.5}

    Raises:
        UpdateRefused: If the codec is unknown, or its keywords are not its builder's, or out of range.
    """
    asked = "a codec's description must hold its name and keywords"
    if not isinstance(description, Mapping) or not isinstance(description.get("name"), str):
        raise UpdateRefused(asked, f"it is {str(description)[:100]}", "use one version of fedpeat on both ends")
    name = description["name"]
    if name not in BUILDERS:
        raise UpdateRefused(asked, f"no codec is named {name[:100]!r}", nearest(name[:100], BUILDERS))
    keywords = {key: value for key, value in description.items() if key != "name"}
    expected = sorted(inspect.signature(BUILDERS[name]).parameters)
    if set(keywords) != set(expected):
        found = f"{name} takes {expected}, not {str(list(keywords))[:100]}"
        raise UpdateRefused(asked, found, "use one version of fedpeat on both ends")
    try:
        return BUILDERS[name](**keywords)
    except ConfigError as error:
        raise UpdateRefused(asked, str(error)[:200], "use one version of fedpeat on both ends") from error
