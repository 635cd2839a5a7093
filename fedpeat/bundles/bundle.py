"""The bundle: all that a device needs to build its emulated model, and nothing of a dropped block."""

import contextlib
import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fedpeat.bundles.manifest import (
    ADAPTER_FILE,
    EMULATOR_FILE,
    FORMAT,
    MANIFEST,
    TOKENIZER_FOLDER,
    check_files,
    read_manifest,
    version_of,
)
from fedpeat.bundles.tensor_file import sha256_of, write_tensor_file
from fedpeat.core import StorageError, write_json
from fedpeat.emulators import Blocks, Position, emulated_tensors, positions_of
from fedpeat.models import BlockStack, LoadedModel, Split, describe, find_blocks, tied_names


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk.

    Attributes:
        folder: Where it is: `<folder given to write_bundle>/<version>`.
        version: Hash of its content: of every tensor, the config, the tokenizer and the blocks' sources.
        manifest: What `manifest.json` says.
        payload_bytes: Bytes of tensors that a device fetches once.
    """

    folder: Path
    version: str
    manifest: dict[str, Any]
    payload_bytes: int

    @property
    def positions(self) -> tuple[Position, ...]:
        """What stands where in the emulated model."""
        return tuple(Position.of(position) for position in self.manifest["positions"])

    @property
    def sources(self) -> tuple[int, ...]:
        """For each block position of the emulated model, its block's index in the full model."""
        return tuple(position["source"] for position in self.manifest["positions"])

    @property
    def whole(self) -> bool:
        """Whether every block of the full model is there, unchanged and in its own place."""
        own = all(position.source == position.place and not position.changes for position in self.positions)
        return own and len(self.positions) == self.stack.count

    @property
    def adapter_positions(self) -> tuple[int, ...]:
        """Positions that the adapter's blocks have in the emulated model."""
        positions = self.manifest["positions"]
        return tuple(index for index, position in enumerate(positions) if position["role"] == "adapter")

    @property
    def stack(self) -> BlockStack:
        """Where the full model's blocks are."""
        blocks = self.manifest["blocks"]
        return BlockStack(blocks["path"], blocks["count"], tuple(blocks["beside"]))

    @property
    def file_bytes(self) -> int:
        """Size of all files but the manifest, headers and tokenizer included."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def write_bundle(loaded: LoadedModel, *, split: Split, emulator: Blocks, folder: str | Path) -> Bundle:
    """Write what devices need, into `<folder>/<version>/`; equal content gives the same version and is written once.

    Tensors stand under canonical names in two files: the adapter's blocks with everything outside the blocks, which
    bundles with the same split share, and the emulator's blocks. Tied tensors and equal buffers are stored once.

    Args:
        loaded: The full model; only read. It may be on any device.
        split: Which blocks are the adapter.
        emulator: What stands in for the others, from `make_emulator`.
        folder: Where bundles are kept.

    Raises:
        ModelError: If the emulator is not one of this model.
        StorageError: If the disk is full or the folder cannot be written.
    """
    stack = find_blocks(loaded.model)
    files, aliases = _choose_tensors(loaded.model, split, emulator)
    manifest = {
        "format": FORMAT,
        "model": describe(loaded.model),
        "blocks": {"path": stack.path, "beside": list(stack.beside), "count": stack.count},
        "positions": [position.to_json() for position in positions_of(split, emulator)],
        "builder": dict(emulator.description),
        "aliases": aliases,
    }
    with _told(folder):
        return _write(Path(folder), manifest, files, loaded)


def open_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Open a bundle after checking it; nothing is loaded yet.

    Args:
        folder: The bundle's own folder (`Bundle.folder`).
        verify: Hash every file; without it, only the manifest's hash and the files' sizes are checked.

    Raises:
        StorageError: If a file is missing, truncated or altered, or the manifest names files outside the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest, verify=verify)
    return Bundle(folder, manifest["version"], manifest, manifest["payload_bytes"])


def _choose_tensors(
    model: PreTrainedModel, split: Split, emulator: Blocks
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Return the tensors of each file by canonical name, stored once each, and the names that refer to others."""
    outside, inside, buffers = emulated_tensors(model, split, emulator)
    # The adapter's file first: what it holds must not depend on the emulator.
    chosen = {**outside, **inside}
    aliases = tied_names({name: tensor for name, tensor in chosen.items() if name not in buffers})
    aliases |= _equal_names({name: tensor for name, tensor in chosen.items() if name in buffers})
    groups = {ADAPTER_FILE: outside, EMULATOR_FILE: inside}
    stored = {
        file: {name: tensor for name, tensor in group.items() if name not in aliases} for file, group in groups.items()
    }
    return {file: group for file, group in stored.items() if group}, aliases


def _equal_names(buffers: dict[str, torch.Tensor]) -> dict[str, str]:
    first: dict[tuple[Any, ...], str] = {}
    equal = {}
    for name, buffer in buffers.items():
        raw = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content = (buffer.dtype, buffer.shape, hashlib.sha256(raw).digest())
        if first.setdefault(content, name) != name:
            equal[name] = first[content]
    return equal


def _write(
    folder: Path, manifest: dict[str, Any], files: dict[str, dict[str, torch.Tensor]], loaded: LoadedModel
) -> Bundle:
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        entries, payload = {}, 0
        for name, tensors in files.items():
            written = write_tensor_file(partial / name, tensors)
            entries[name] = {"bytes": written.size, "sha256": written.sha256}
            payload += written.payload_bytes
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
            for path in sorted(p for p in (partial / TOKENIZER_FOLDER).rglob("*") if p.is_file()):
                entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                entries[path.relative_to(partial).as_posix()] = entry
        manifest = {**manifest, "files": entries, "payload_bytes": payload}
        manifest["version"] = version_of(manifest)
        write_json(partial / MANIFEST, manifest)
        return _settle(partial, folder / manifest["version"])
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(partial: Path, final: Path) -> Bundle:
    """Move a finished bundle to its place; a sound one that is already there is kept, a damaged one replaced."""
    with contextlib.suppress(StorageError):
        return open_bundle(final)
    shutil.rmtree(final, ignore_errors=True)
    try:
        partial.chmod(0o755)
        partial.rename(final)
    except OSError:
        # Another process may have written the same bundle in the meantime: then that one serves.
        if not final.is_dir():
            raise
    return open_bundle(final)


@contextlib.contextmanager
def _told(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        found = "the disk is full" if full else str(error)
        remedy = "free some space or choose another folder" if full else "check the folder and its permissions"
        raise StorageError(f"cannot write a bundle to {folder}", found, remedy) from error
