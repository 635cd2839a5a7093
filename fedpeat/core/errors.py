"""Errors that teach: what was asked, what was found, what to do."""

import difflib
from collections.abc import Iterable


class FedPeatError(Exception):
    """An error a user can cause, told in three parts.

    Args:
        asked: What was wanted, with the value given ("cannot keep 14 middle blocks").
        found: What is there instead ("GPT-2 split 2+2 of 14 has 10").
        remedy: What to do about it ("set emulator.kept_blocks <= 10 or shrink model.split").

    >>> print(FedPeatError("cannot keep 14 blocks", "the middle has 10", "set emulator.kept_blocks <= 10"))
    cannot keep 14 blocks; the middle has 10; set emulator.kept_blocks <= 10
    """

    def __init__(self, asked: str, found: str = "", remedy: str = "") -> None:
        self.asked = asked
        self.found = found
        self.remedy = remedy
        super().__init__("; ".join(part for part in (asked, found, remedy) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Survive a process boundary: Ray re-raises errors from their arguments."""
        return type(self), (self.asked, self.found, self.remedy)


class ConfigError(FedPeatError):
    """A setting is misspelt, out of range, or does not go with another one."""


class ModelError(FedPeatError):
    """A model cannot be loaded, taken apart or put together."""


class PeftError(FedPeatError):
    """A PEFT method cannot be used as asked."""


class DataError(FedPeatError):
    """Data is missing, empty, or lacks a field."""


class StorageError(FedPeatError):
    """A file cannot be read or written: truncated, altered, disk full."""


class EngineError(FedPeatError):
    """Clients cannot be executed: Ray did not start, a worker died, too few replies."""


class UpdateRefused(FedPeatError):
    """A client's update is not fit to be aggregated: wrong names, shapes or dtypes, not finite."""


def shorten(items: Iterable[object], limit: int = 10) -> str:
    """List `items` for a message, cut at `limit`.

    >>> shorten(range(12), limit=3)
    '0, 1, 2 and 9 more'
    """
    words = [str(item) for item in items]
    rest = len(words) - limit
    return ", ".join(words[:limit]) + (f" and {rest} more" if rest > 0 else "")


def nearest(word: str, options: Iterable[str]) -> str:
    """Suggest the option that `word` was probably meant to be, else list what there is.

    >>> nearest("unifrom", ["uniform", "first"])
    "did you mean 'uniform'?"
    >>> nearest("x", ["uniform", "first"])
    'choose from: first, uniform'
    """
    known = sorted(options)
    folded = {option.lower(): option for option in known}
    close = difflib.get_close_matches(word.lower(), list(folded), n=1)
    return f"did you mean {folded[close[0]]!r}?" if close else f"choose from: {shorten(known, 20)}"
