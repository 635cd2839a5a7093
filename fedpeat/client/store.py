"""What a client keeps on its disk between rounds, such that a round can be done again."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from fedpeat.core import Tensors, content_hash, read_tensors, write_tensors

_VERSION = re.compile(r"(.+)\.round-(\d+)\.safetensors")


class Store:
    """Named tensors, a safetensors file for each round that wrote any.

    A client cannot know whether its update counted: it may have come too late, been refused, or the server was killed
    before it wrote its checkpoint. The server says so with the next job, and the client goes on from what it wrote in
    the last round that counted.

    Args:
        folder: Of all clients; None keeps nothing.
        client: Whose.
        server_round: The round that is worked on.
        counted: The rounds in which this client's update counted, as far back as the run may yet be resumed from;
            None for whatever was written last.
    """

    def __init__(
        self, folder: str | Path | None, client: str, server_round: int = 0, counted: Sequence[int] | None = None
    ) -> None:
        self._folder = None if folder is None else Path(folder) / content_hash(client)
        self._round = server_round
        self._counted = counted

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    @property
    def folder(self) -> Path | None:
        """Where, or None."""
        return self._folder

    def read(self, what: str) -> dict[str, torch.Tensor]:
        """Return what was written under this name in the last round that counted; nothing if nothing was.

        Raises:
            StorageError: If the file is damaged.
        """
        versions = self._versions(what)
        wanted = max(versions if self._counted is None else self._counted, default=None)
        return read_tensors(versions[wanted]) if wanted in versions else {}

    def lost(self, what: str) -> bool:
        """Return whether something was written under this name in a round that counted, and is gone."""
        return bool(self._counted) and max(self._counted) not in self._versions(what)

    def write(self, what: str, tensors: Tensors) -> None:
        """Keep `tensors` under this name, and drop what no resumed run could ask for.

        Raises:
            StorageError: If the disk is full.
        """
        if self._folder is None or not tensors:
            return
        write_tensors(self._folder / f"{what}.round-{self._round}.safetensors", tensors)
        for number, path in self._versions(what).items():
            if number != self._round and number not in (self._counted or ()):
                path.unlink(missing_ok=True)

    def _versions(self, what: str) -> dict[int, Path]:
        """Return the files by round."""
        found = () if self._folder is None else self._folder.glob("*.safetensors")
        matches = [(match, path) for path in found if (match := _VERSION.fullmatch(path.name))]
        return {int(match[2]): path for match, path in matches if match[1] == what}
