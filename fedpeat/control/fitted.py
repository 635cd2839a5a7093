"""Files with response curves: those of a fit, with what they were fitted to, and the one in the package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedpeat.control.surrogate import Curves
from fedpeat.core import ConfigError, content_hash

PACKAGED = Path(__file__).parent / "curves.json"
"""A fit of the embedded default: what it was fitted to is in it."""


class Fit(NamedTuple):
    """Response curves and where they are from.

    Attributes:
        name: Hash of the parameters, so that a policy can say by which curves it was trained.
        curves: The response.
        facts: What they were fitted to and how well; empty for curves that somebody wrote down.
    """

    name: str
    curves: Curves
    facts: Mapping[str, Any]


def read_fit(path: str | Path | None = None) -> Fit:
    """Return the curves in a file: of `fedpeat control fit`, or their parameters alone.

    Args:
        path: Of the file; None for the fit in the package.

    Raises:
        ConfigError: If it cannot be read.
    """
    path = PACKAGED if path is None else Path(path).expanduser()
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read control.curves={path}", str(error), "give a file of `control fit`") from error
    whole = isinstance(plain, dict) and "curves" in plain
    curves = Curves.from_json(plain["curves"] if whole else plain)
    return Fit(
        content_hash(curves.to_json()), curves, {k: v for k, v in plain.items() if k != "curves"} if whole else {}
    )
