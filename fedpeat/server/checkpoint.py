"""What survives a round, written down: one safetensors file a round, whole or absent."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open

from fedpeat.core import (
    GlobalState,
    RunState,
    StorageError,
    digest,
    read_tensors,
    with_prefix,
    without_prefix,
    write_tensors,
)

FORMAT = "4"
_GLOBAL, _FOLDS, _MEMORY, _EMULATOR = "global/", "folds/", "memory/", "emulator/"


def counted_after(
    counted: Mapping[str, tuple[int, ...]], clients: Iterable[str], server_round: int, *, keep: int
) -> dict[str, tuple[int, ...]]:
    """Return the rounds that counted, by client, as far back as a run can be resumed from.

    Args:
        counted: Those before this round.
        clients: Whose updates counted in this round.
        server_round: This round.
        keep: How many checkpoints stay.

    >>> counted_after({"ann": (1, 2)}, ["ann", "bob"], 4, keep=2)
    {'ann': (2, 4), 'bob': (4,)}
    """
    after, oldest = dict(counted), server_round - keep + 1
    for client in clients:
        rounds = (*after.get(client, ()), server_round)
        settled = [number for number in rounds if number <= oldest][-1:]
        after[client] = (*settled, *(number for number in rounds if number > oldest))
    return after


def write_checkpoint(path: str | Path, state: RunState) -> None:
    """Write `state` to `path`, atomically.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    shared = state.shared
    tensors = {
        **with_prefix(_GLOBAL, shared.tensors),
        **with_prefix(_FOLDS, shared.folds),
        **with_prefix(_MEMORY, shared.memory),
        **with_prefix(_EMULATOR, state.emulator),
    }
    facts = {
        "round": state.round,
        "control_state": dict(state.control_state),
        "global_step": state.global_step,
        "seed": state.seed,
        "counted": {client: list(rounds) for client, rounds in state.counted.items()},
        "resumed": list(state.resumed),
        "repeated": state.repeated,
    }
    metadata = {"format": FORMAT, "state": json.dumps(facts, sort_keys=True), "digest": digest(tensors)}
    write_tensors(path, tensors, metadata)


def read_checkpoint(path: str | Path) -> RunState:
    """Return the state written to `path`.

    Raises:
        StorageError: If the file is missing, truncated, altered or not a checkpoint of this format.
    """
    tensors = read_tensors(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise StorageError(
            f"cannot resume from {path}", f"format {metadata.get('format')!r}", f"this version reads format {FORMAT!r}"
        )
    if metadata.get("digest") != digest(tensors):
        raise StorageError(f"cannot resume from {path}", "its tensors were altered", "restore it, or remove it")
    facts = json.loads(metadata["state"])
    facts["counted"] = {client: tuple(rounds) for client, rounds in facts["counted"].items()}
    facts["resumed"] = tuple(facts["resumed"])
    shared = GlobalState(
        tensors=without_prefix(_GLOBAL, tensors),
        folds=without_prefix(_FOLDS, tensors),
        memory=without_prefix(_MEMORY, tensors),
    )
    return RunState(shared=shared, emulator=without_prefix(_EMULATOR, tensors), **facts)


class Checkpoints:
    """The newest checkpoints of a run, a file a round.

    Args:
        folder: Where; made when the first is written.
        keep: How many stay; at least 1.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        self._folder = Path(folder)
        self.keep = max(1, keep)

    def write(self, state: RunState) -> None:
        """Write `state`; only then drop what is too old.

        Raises:
            StorageError: If the disk is full; the checkpoints before it stay.
        """
        write_checkpoint(self._folder / f"round-{state.round:06d}.safetensors", state)
        for path in self.files()[: -self.keep]:
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Return the files, the oldest round first."""
        return [path for _, path in self._numbered()]

    def _numbered(self) -> list[tuple[int, Path]]:
        found = self._folder.glob("round-*.safetensors") if self._folder.is_dir() else ()
        return sorted((int(match[1]), path) for path in found if (match := re.fullmatch(r"round-(\d+)", path.stem)))

    def last_round(self) -> int:
        """Return the round of the newest file, whether or not it can be read; -1 if there is none."""
        return max((number for number, _ in self._numbered()), default=-1)

    def rewind(self, last_round: int) -> None:
        """Drop the files after `last_round`."""
        for number, path in self._numbered():
            if number > last_round:
                path.unlink(missing_ok=True)

    def newest(self, tell: Callable[[str], None] = lambda _: None) -> RunState | None:
        """Return the newest state that can be read; None if nothing was written.

        Args:
            tell: Told of each file that is passed over.

        Raises:
            StorageError: If there are files and none can be read.
        """
        damaged: StorageError | None = None
        for path in reversed(self.files()):
            try:
                return read_checkpoint(path)
            except StorageError as error:
                tell(f"{error.asked}: {error.found}; trying the one before it")
                damaged = error
        if damaged is not None:
            raise damaged
        return None
