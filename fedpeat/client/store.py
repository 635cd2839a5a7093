"""What a client keeps on its disk between rounds, such that a round can be done again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fedpeat.core import Tensors, content_hash, read_tensors, write_tensors

_VERSION = re.compile(r"(.+?)\.round-(\d+)\.attempt-(\d+)\.safetensors")


class Version(NamedTuple):
    """A file of a store: the round that wrote it, and how often the run had been resumed by then."""

    round: int
    attempt: int
    path: Path

    def counts(self, resumed: Sequence[int]) -> bool:
        """Return whether it belongs to the run: no later resume went back to before it.

        >>> [Version(number, 0, Path()).counts([4]) for number in (4, 5)]
        [True, False]
        """
        return self.attempt <= len(resumed) and all(self.round <= last for last in resumed[self.attempt :])


class Store:
    """Named tensors, a safetensors file for each round that wrote any.

    A run that is killed does its last round again after it was resumed: it must find what there was before that round,
    not what the lost attempt left. So each round writes files of its own, and older ones stay as long as the run may
    yet be resumed from before them.

    Args:
        folder: Of all clients; None keeps nothing.
        client: Whose.
        server_round: The round that is worked on; None for whatever is newest.
        resumed: The rounds after which the run was resumed, oldest first.
        oldest: The earliest round that the run may yet be resumed after.
    """

    def __init__(
        self,
        folder: str | Path | None,
        client: str,
        server_round: int | None = None,
        *,
        resumed: Sequence[int] = (),
        oldest: int = 0,
    ) -> None:
        self._folder = None if folder is None else Path(folder) / content_hash(client)
        self._round = server_round
        self._resumed = tuple(resumed)
        self._oldest = oldest

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    @property
    def folder(self) -> Path | None:
        """Where, or None."""
        return self._folder

    def read(self, what: str) -> dict[str, torch.Tensor]:
        """Return what was last written under this name before the round; nothing if nothing was.

        Raises:
            StorageError: If the file is damaged.
        """
        usable = [
            version
            for version in self._versions(what)
            if version.counts(self._resumed) and (self._round is None or version.round < self._round)
        ]
        return read_tensors(max(usable).path) if usable else {}

    def write(self, what: str, tensors: Tensors) -> None:
        """Keep `tensors` under this name, and drop what no resumed run could ask for.

        Raises:
            StorageError: If the disk is full.
        """
        if self._folder is None or not tensors:
            return
        name = f"{what}.round-{self._round or 0}.attempt-{len(self._resumed)}.safetensors"
        write_tensors(self._folder / name, tensors)
        counting = [version for version in self._versions(what) if version.counts(self._resumed)]
        settled = [version for version in counting if version.round <= self._oldest]
        keep = {version for version in counting if version.round > self._oldest} | set(sorted(settled)[-1:])
        for version in self._versions(what):
            if version not in keep:
                version.path.unlink(missing_ok=True)

    def _versions(self, what: str) -> list[Version]:
        found = [] if self._folder is None else sorted(self._folder.glob(f"{what}.round-*.safetensors"))
        matches = [(match, path) for path in found if (match := _VERSION.fullmatch(path.name))]
        return [Version(int(match[2]), int(match[3]), path) for match, path in matches if match[1] == what]
