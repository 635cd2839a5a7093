"""What survives a round, written down: one safetensors file, whole or absent."""

import json
from pathlib import Path

from safetensors import safe_open

from fedpeat.core import GlobalState, RunState, StorageError, read_tensors, with_prefix, without_prefix, write_tensors

FORMAT = "2"
_GLOBAL, _FOLDS, _MEMORY, _EMULATOR = "global/", "folds/", "memory/", "emulator/"


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
    }
    write_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(facts, sort_keys=True)})


def read_checkpoint(path: str | Path) -> RunState:
    """Return the state written to `path`.

    Raises:
        StorageError: If the file is missing, truncated or not a checkpoint of this format.
    """
    tensors = read_tensors(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise StorageError(
            f"cannot resume from {path}", f"format {metadata.get('format')!r}", f"this version reads format {FORMAT!r}"
        )
    facts = json.loads(metadata["state"])

    shared = GlobalState(
        tensors=without_prefix(_GLOBAL, tensors),
        folds=without_prefix(_FOLDS, tensors),
        memory=without_prefix(_MEMORY, tensors),
    )
    return RunState(shared=shared, emulator=without_prefix(_EMULATOR, tensors), **facts)
