"""What survives a round, written down: one safetensors file, whole or absent."""

import json
from pathlib import Path

from safetensors import safe_open

from fedpeat.core import RunState, StorageError, read_tensors, write_tensors

FORMAT = "1"
_GLOBAL, _SERVER_STEP = "global/", "server_step/"


def write_checkpoint(path: str | Path, state: RunState) -> None:
    """Write `state` to `path`, atomically.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    tensors = {_GLOBAL + name: tensor for name, tensor in state.tensors.items()}
    tensors |= {_SERVER_STEP + name: tensor for name, tensor in state.server_step_state.items()}
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

    def part(prefix: str) -> dict:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return RunState(tensors=part(_GLOBAL), server_step_state=part(_SERVER_STEP), **facts)
